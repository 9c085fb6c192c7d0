"""Random candidates, profiles and models for tests of FedPipe's planner."""

import random
from fractions import Fraction
from typing import Any

from fluvial.methods.fedpipe.planner.candidates import Candidate
from fluvial.methods.fedpipe.planner.decision import Models
from fluvial.methods.fedpipe.planner.memory import Activations, MemoryModel
from fluvial.methods.fedpipe.planner.profile import Profile, Speed, Tokens
from fluvial.methods.fedpipe.planner.sizes import Sizes
from fluvial.methods.fedpipe.planner.time import TimeModel

MB = 10**6
SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
MLP = {"gate_proj": (172, 64), "up_proj": (172, 64), "down_proj": (64, 172)}


def candidates(seed: int, layers: int = 4, *, mlp: bool = False) -> list[Candidate]:
    """Weights of a small Llama with random scores and spectra."""
    draw = random.Random(seed)
    return [
        Candidate(
            f"model.layers.{layer}.{'self_attn' if name in SHAPES else 'mlp'}.{name}",
            *shape,
            layer,
            "attention" if name in SHAPES else "mlp",
            draw.random() ** 3,
            tuple(sorted((draw.random() ** 4 for _ in range(32)), reverse=True)),
        )
        for layer in range(layers)
        for name, shape in (SHAPES | (MLP if mlp else {})).items()
    ]


def sizes(layers: int = 4) -> Sizes:
    """A base of 40 M parameters, most of them in linear layers."""
    return Sizes(
        weights=(((1000, 1000),) * (36 // layers),) * layers,
        other=4_000_000,
        hidden=64,
        heads=4,
        vocabulary=1000,
        width=2,
    )


def models(seed: int = 0, **changes: Any) -> Models:
    """A site whose budgets are drawn, or given as fields of its profile."""
    draw = random.Random(seed)
    speed = draw.uniform(500, 20_000)
    facts: dict[str, Any] = {
        "memory_bytes": draw.randrange(20 * MB, 120 * MB),
        "speeds": {"bfloat16": (Speed(1, speed), Speed(4, 2 * speed), Speed(16, 2.5 * speed))},
        "up_bytes_s": draw.uniform(1e3, 1e6),
        "down_bytes_s": draw.uniform(1e4, 1e7),
        "latency_s": draw.uniform(0, 3),
        "samples": draw.randrange(20, 2000),
    }
    facts |= changes
    samples = facts["samples"]
    facts.setdefault("tokens", (Tokens(32, samples * 20), Tokens(64, samples * 30)))
    base = sizes()
    memory = MemoryModel(
        base,
        Activations.of(base, checkpointing=False, scores=True),
        Activations.of(base, checkpointing=True, scores=True),
        5 * MB,
        Fraction(112),
    )
    return Models(Profile(**facts), memory, TimeModel(base.parameters, 8 * 448))
