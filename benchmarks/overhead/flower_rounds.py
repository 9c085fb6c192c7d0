"""The rounds of `benchmarks.overhead.probe` in Flower's Ray simulation; prints one JSON object.

    python -m benchmarks.overhead.flower_rounds SITES ROUNDS VALUES

Kept favourable to Flower: the update is one packed array, not one for each tensor; one CPU for each
actor, so that every core has one; the server polls every 5 ms, where Flower's own
`send_and_receive` sleeps 100 ms. Needs `pip install 'flwr[simulation]'`, which fluvial itself does
not.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

POLL_S = 0.005


def resident() -> int:
    """Memory of this process and all its descendants, bytes; shared pages count once (PSS)."""
    return sum(_pss(process) for process in _family(os.getpid()))


def _family(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue

            children.setdefault(parent, []).append(int(folder.name))

    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def _pss(process: int) -> int:
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass

    return 0


def measure(sites: int, number: int, values: int) -> dict[str, Any]:
    """Seconds of each round, the first of which starts the actors, and the memory of all processes
    after each."""
    began = time.perf_counter()
    found: dict[str, Any] = {"round_s": [], "peak_pss_bytes": 0}
    client = ClientApp()
    server = ServerApp()

    @client.train()  # type: ignore[untyped-decorator, unused-ignore]
    def answer(message: Message, context: Context) -> Message:
        received = message.content.array_records["adapter"]["packed"].numpy()
        update = received + np.float32(context.node_id % 65536)
        records = {
            "update": ArrayRecord({"packed": Array(update)}),
            "values": MetricRecord({"n": 1, "loss": 1.0}),
        }

        return Message(RecordDict(records), reply_to=message)

    @server.main()  # type: ignore[untyped-decorator, unused-ignore]
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower calls it so
        while len(nodes := list(grid.get_node_ids())) < sites:
            time.sleep(POLL_S)
        found["start_s"] = time.perf_counter() - began
        adapter = np.zeros(values, np.float32)
        for _ in range(number):
            since = time.perf_counter()
            down = ArrayRecord({"packed": Array(adapter)})
            waiting = set(
                grid.push_messages(
                    [
                        Message(
                            RecordDict({"adapter": down}), dst_node_id=node, message_type="train"
                        )
                        for node in nodes
                    ]
                )
            )
            total = np.zeros(values, np.float64)
            weight = 0

            while waiting:
                replies = list(grid.pull_messages(waiting))
                for reply in replies:
                    waiting.discard(reply.metadata.reply_to_message_id)
                    counts: Any = reply.content.metric_records["values"]
                    samples = int(counts["n"])
                    total += samples * reply.content.array_records["update"]["packed"].numpy()
                    weight += samples

                if not replies:
                    time.sleep(POLL_S)

            adapter = adapter + (total / weight).astype(np.float32)
            found["round_s"].append(time.perf_counter() - since)
            found["peak_pss_bytes"] = max(
                found["peak_pss_bytes"], resident()
            )  # apart from the time, as it takes some

        assert np.isfinite(adapter).all()

    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server, client, sites, backend_config={"client_resources": resources})
    return found


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(measure(*map(int, sys.argv[1:]))) + "\n")
