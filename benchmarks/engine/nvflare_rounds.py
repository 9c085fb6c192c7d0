"""Rounds of NVFlare's simulator whose clients only answer; prints one JSON object.

    python -m benchmarks.engine.nvflare_rounds server SITES ROUNDS PAYLOAD_BYTES FOLDER
    python nvflare_rounds.py client FOLDER      (as NVFlare starts it, once for each site)

Run by a Python that has `nvflare` 2.9 (it pins another protobuf than Flower, so in an environment
of its own); fluvial is not imported. The client is NVFlare's persistent loop: one process for each
site and all rounds. It answers with as many bytes as it got, other ones at every site and in every
round. A round is timed from the moment at which the first site has its model to that of the next
round, so one round more is run than is timed.
"""

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

_STAMPS = "stamps.jsonl"


def client(folder: Path) -> None:
    """Answer as a site until the run ends."""
    import nvflare.client as flare  # type: ignore[import-not-found]

    flare.init()
    site = str(flare.get_site_name())
    salt = np.float32(1 + sum(site.encode()))

    while flare.is_running():
        model = flare.receive()
        if model is None:
            break

        received = time.time()
        values = np.asarray(model.params["numpy_key"], dtype=np.float32)
        update = values + salt * np.float32(1e-3)
        flare.send(flare.FLModel(params={"numpy_key": update}, metrics={"accuracy": 0.0}))
        entry = {
            "site": site,
            "round": model.current_round,
            "received": received,
            "sent": time.time(),
        }

        with (folder / _STAMPS).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def simulate(sites: int, rounds: int, payload: int, folder: Path) -> dict[str, object]:
    """Seconds of each round, and from the start to the end of the first one."""
    began = float(os.environ.get("ENGINE_BEGAN", time.time()))
    from nvflare.app_common.np.recipes import fedavg  # type: ignore[import-not-found]
    from nvflare.recipe.sim_env import SimEnv  # type: ignore[import-not-found]

    start = folder / "start.npy"
    np.save(start, np.random.default_rng(0).standard_normal(payload // 4, dtype=np.float32))
    recipe = fedavg.NumpyFedAvgRecipe(
        name="engine",
        initial_ckpt=str(
            start.resolve()
        ),  # a large model given as `model=` does not get through in minutes
        min_clients=sites,
        num_rounds=rounds + 1,
        train_script=str(Path(__file__).resolve()),
        train_args=f"client {folder.resolve()}",
    )
    recipe.execute(SimEnv(num_clients=sites, workspace_root=str(folder / "simulation")))
    stamps = [json.loads(line) for line in (folder / _STAMPS).read_text().splitlines()]
    numbers = sorted({entry["round"] for entry in stamps})
    begins = [
        min(entry["received"] for entry in stamps if entry["round"] == number) for number in numbers
    ]

    return {
        "start_s": begins[1] - began,
        "round_s": [end - begin for begin, end in pairwise(begins)],
        "answers": len(stamps),
    }


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "client":
        client(Path(given[0]))
    else:
        found = simulate(int(given[0]), int(given[1]), int(given[2]), Path(given[3]))
        sys.stdout.write("\n" + json.dumps(found) + "\n")
