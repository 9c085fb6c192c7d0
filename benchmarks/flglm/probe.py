"""Memory of one end of a split step in a process of its own; prints one JSON object.

    python -m benchmarks.flglm.probe CONFIG.json

Peaks are those of the process (`ru_maxrss`) above the memory that it holds with its libraries
loaded and one small pass made, so they have the weights, all that the step makes, and what the
allocator keeps.
The other end of the conversation is random hidden states.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluvial.data import Example
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.ends import Ends
from fluvial.methods.flglm.middle import Middle
from fluvial.methods.flglm.places import Places
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.config import RunConfig, parse


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _held_bytes() -> int:
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return resident * resource.getpagesize()


def _warm_up() -> None:
    """Let torch load what a first backward pass and a first optimizer step load."""
    from transformers import LlamaForCausalLM  # noqa: F401

    weight = torch.nn.Parameter(torch.ones(8, 8))
    (weight @ weight).sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW([weight]).step()


def site(config: RunConfig, pool: ModelPool, places: Places, steps: int) -> None:
    """Make steps of a site's layers."""
    train = config.train
    state = initial_state(places.ends, 0)
    start = pool.weights({name: state[name] for name in places.ends.names})
    length = config.data.max_length
    examples = [Example([1] * length, [1] * length)] * train.per_device_train_batch_size
    parts = pool.parts(places.cut, server=False)
    checkpointing = train.gradient_checkpointing

    with parts.part(state, trainable=True, checkpointing=checkpointing) as part:
        tuned = places.ends.names
        front = [name for name in tuned if places.place(name) == "front"]
        ends = Ends(part, tuned, train, front=front, steps=steps, start=start)
        for number in range(steps):
            micro = ends.begin(
                examples, pad_token_id=0, dropout_seed=number, clip=lambda rows: rows
            )
            received = torch.randn(micro.rows.shape, dtype=part.dtype)
            _, gradient = ends.finish(micro, received, len(received), returns=True)
            ends.backward(micro, gradient)
            ends.step(number, 1.0)


def server(
    config: RunConfig, pool: ModelPool, places: Places, steps: int, *, replicas: int, sequences: int
) -> None:
    """Make steps of several replicas of the server's layers, all of which wait at a time."""
    state = initial_state(places.middle, 0)
    names = places.middle.names
    lengths = [config.data.max_length] * sequences
    parts = pool.parts(places.cut, server=True)
    checkpointing = config.train.gradient_checkpointing
    borrowed = [
        parts.part(state, trainable=True, checkpointing=checkpointing) for _ in range(replicas)
    ]
    middles = []
    for lender in borrowed:
        start = pool.weights({name: state[name] for name in names})
        middles.append(Middle(lender.__enter__(), names, config.train, steps=steps, start=start))

    for number in range(steps):
        sent: list[Tensor] = []
        for middle in middles:
            shape = (sum(lengths), middle.part.width)
            received = torch.randn(shape, dtype=middle.part.dtype)
            sent.append(
                middle.forward(received, lengths, micro=0, returns=True, dropout_seed=number)
            )
        for middle, rows in zip(middles, sent, strict=True):
            middle.backward(torch.randn_like(rows), micro=0)
        for middle in middles:
            middle.step(number, 1.0)

    for lender in borrowed:
        lender.__exit__(None, None, None)


def main() -> None:
    """See the module."""
    given: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = parse(given["config"], "probe")
    method = config.method
    assert isinstance(method, FlGlmConfig)
    torch.set_num_threads(1)
    pool = ModelPool(config.model, config.adapter)
    places = Places.of(method, pool.outline.base, pool.layout)
    _warm_up()
    before = _held_bytes()

    if given["end"] == "site":
        site(config, pool, places, given["steps"])
    else:
        server(
            config,
            pool,
            places,
            given["steps"],
            replicas=given["replicas"],
            sequences=given["sequences"],
        )

    print(json.dumps({"peak_bytes": _peak_bytes() - before}))


if __name__ == "__main__":
    main()
