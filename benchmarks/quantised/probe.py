"""Memory and time of one base in a process of its own; prints one JSON object.

    python -m benchmarks.quantised.probe FOLDER FORMAT LENGTH STEPS

Peaks are those of the process (VmHWM of Linux) above the memory that it holds with its libraries
loaded, so they have the base, the adapter and all that a step makes. Times are those of the
processor, on one thread, so that other processes count less.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.models.tuning import tuned_parameters


def _peak_bytes() -> int:
    """Return the peak of this process alone; `ru_maxrss` begins at that of the process that started
    it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _held_bytes() -> int:
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE")


def _pool(folder: str, kind: str) -> ModelPool:
    quantised = {} if kind == "bfloat16" else {"quantization": kind}
    config = ModelConfig.model_validate(
        {"name_or_path": folder, "dtype": "bfloat16", "device": "cpu", **quantised}
    )
    return ModelPool(config, LoraSettings(r=8, lora_dropout=0.0, target_modules="attention"))


def main() -> None:
    """Load the base, make some steps of an adapter, and print what they took."""
    torch.set_num_threads(1)
    folder, kind, length, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    import peft  # noqa: F401
    from transformers import Qwen2ForCausalLM  # noqa: F401

    weight = torch.nn.Parameter(torch.ones(8, 8))
    (weight @ weight).sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW([weight]).step()
    before = _held_bytes()

    pool = _pool(folder, kind)
    state = initial_state(pool.layout, 0)
    started = time.process_time()

    with pool.model(state, trainable="A and B") as model:
        load_s = time.process_time() - started
        load_peak = _peak_bytes() - before
        held = _held_bytes() - before
        stored = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" not in name)
        optimizer = torch.optim.AdamW(tuned_parameters(model).values(), lr=1e-4)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, pool.outline.num_embeddings, (1, length), generator=draw)
        times = []

        for _ in range(steps):
            begin = time.process_time()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.process_time() - begin)

    print(
        json.dumps(
            {
                "stored_bytes": stored,
                "load_s": load_s,
                "load_peak_bytes": load_peak,
                "held_bytes": held,
                "step_peak_bytes": _peak_bytes() - before,
                "step_s": min(times[1:] or times),  # the first one allocates
                "loss": float(loss.detach()),
            }
        )
    )


if __name__ == "__main__":
    main()
