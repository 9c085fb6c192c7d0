"""One measurement of `benchmarks.overhead` in a process of its own; prints one JSON object.

python -m benchmarks.overhead.probe start T0        seconds from T0 (since the epoch) to round 1
python -m benchmarks.overhead.probe imports         seconds of each heavy import
python -m benchmarks.overhead.probe rounds SITES ROUNDS VALUES      rounds without training
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast


def start(began: float) -> dict[str, float]:
    """Seconds from the start of this process to the moment at which the first site is asked to
    train, and after it."""
    from fluvial.runs.config import parse
    from fluvial.runs.run import execute

    imported = time.time() - began
    table = {
        "rounds": 1,
        "data": {"max_length": 128, "max_heldout": 1},
        "lora": {
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "target_modules": "attention",
        },
        "train": {"learning_rate": 5e-3, "per_device_train_batch_size": 4, "max_steps": 1},
    }
    found = {"imported_s": imported}

    with tempfile.TemporaryDirectory() as folder:
        for event in execute(parse(table, "benchmark"), Path(folder) / "run"):
            if event.kind != "result":
                found[
                    {"setup": "first_round_begins_s", "round": "first_round_done_s"}[event.kind]
                ] = time.time() - began
                if event.kind == "round":
                    break

    return found


def imports() -> dict[str, float]:
    """Seconds of each import, each after those before it."""
    found: dict[str, float] = {}
    for name in (
        "numpy",
        "torch",
        "pydantic",
        "fluvial.runs.config",
        "fluvial.runs.run",
        "transformers",
        "peft",
        "datasets",
    ):
        since = time.perf_counter()
        __import__(name)
        found[name] = time.perf_counter() - since

    since = time.perf_counter()
    # transformers imports these when they are asked for
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    found["transformers: AutoModel, AutoTokenizer"] = time.perf_counter() - since

    return found


def rounds(sites: int, number: int, values: int) -> dict[str, Any]:
    """Measure rounds of FedAvg's server half over sites whose only work is to read the adapter and
    send an update."""
    import torch

    from fluvial.codecs.quantise import Identity, IdentitySettings
    from fluvial.exchange.start import adapter_or_start
    from fluvial.federation.in_process import local_fleet
    from fluvial.federation.sites import Site
    from fluvial.federation.store import StateStore
    from fluvial.methods.fedavg import FedAvgConfig, FedAvgServer
    from fluvial.methods.interface import Context
    from fluvial.models.pool import ModelPool
    from fluvial.runs.checkpoint import RunFolder
    from fluvial.runs.result import peak_rss_bytes
    from fluvial.training.config import TrainConfig
    from fluvial.wire.payload import Payload, frame_payload
    from fluvial.wire.tensors import Layout

    layout = embedded_layout(values)
    pool = cast(ModelPool, SimpleNamespace(layout=layout))
    store = StateStore(None)
    identity = IdentitySettings()

    def answer(site: Site, message: Payload) -> Payload:
        """Return an update of fixed size: other values at every site, none that the server refuses
        as larger than training reaches."""
        received = adapter_or_start(site, message, site.layout)
        assert isinstance(received, dict), "both ends make the same start"
        value = 1e-4 * (1 + int(site.name))
        update = {name: torch.full_like(tensor, value) for name, tensor in received.items()}
        frame = Identity.of(site.layout).encode(update, round=message.value("round", int))
        return frame_payload(frame, n=1, loss=1.0)

    def load() -> Any:
        raise AssertionError("nothing is trained here")

    def open_site(name: str) -> Site:
        return Site(
            name=name,
            seed=0,
            pool=pool,
            load=load,
            train=TrainConfig(),
            codec=identity,
            downlink=None,
            method=FedAvgConfig(),
            store=store,
            rounds=number,
        )

    context = Context(
        seed=0,
        rounds=number,
        layout=layout,
        codec=identity,
        downlink=None,
        train=TrainConfig(),
        open_pool=lambda: pool,
        secret=lambda: bytes(32),
        public=dict,
    )
    server = FedAvgServer(FedAvgConfig(), context)
    fleet = local_fleet([f"{name}" for name in range(sites)], open_site, {"train": answer})
    before = peak_rss_bytes()
    seconds = []
    saving = []

    with tempfile.TemporaryDirectory() as path, RunFolder(Path(path) / "run") as folder:
        for each in range(1, number + 1):
            since = time.perf_counter()
            server.round(each, fleet)
            seconds.append(time.perf_counter() - since)
            by_site = fleet.meter.close_round()
            since = time.perf_counter()
            folder.append_metrics({"round": each, "sites": len(by_site)})
            folder.save(each, server.state())
            saving.append(time.perf_counter() - since)

    assert torch.isfinite(next(iter(server.model().values()))).all()
    assert Layout.of(server.model()) == layout
    return {
        "round_s": seconds,
        "checkpoint_s": saving,
        "bytes_up": fleet.meter.totals["up", "train"] // (sites * number),
        "bytes_down": fleet.meter.totals["down", "train"] // (sites * number),
        "rss_before_bytes": before,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def embedded_layout(values: int) -> Any:
    """Factors of rank 8 on q, k, v and o of hidden size 128, as many layers as make up `values`;
    32,768 have 4."""
    from fluvial.wire.tensors import Layout

    each = 2 * 8 * 128
    names = [
        (f"model.layers.{layer}.self_attn.{target}.lora_{kind}.weight", shape)
        for layer in range(values // (4 * each))
        for target in ("k_proj", "o_proj", "q_proj", "v_proj")
        for kind, shape in (("A", (8, 128)), ("B", (128, 8)))
    ]
    layout = Layout(tuple(sorted(names)))
    assert layout.numel == values, f"{values} is no whole number of layers"

    return layout


def main(arguments: list[str]) -> None:
    """See the module."""
    what, *numbers = arguments
    found: dict[str, Any]

    if what == "start":
        found = start(float(numbers[0]))
    elif what == "imports":
        found = imports()
    else:
        found = rounds(*map(int, numbers))

    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
