"""Updates of adapters for the tests of codecs, and damage to their frames."""

import random
from collections.abc import Collection

import torch

from fluvial.codecs import Codec
from fluvial.errors import WireError
from fluvial.wire.frame import seal
from fluvial.wire.tensors import Layout, Named


def attention_layout(
    d: int = 64,
    kv: int = 32,
    *,
    layers: int = 2,
    rank: int = 8,
    modules: Collection[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> Layout:
    """Return the LoRA factors of `modules` in the attention of width `d`, with keys and values of
    width `kv`."""
    widths = {"q_proj": d, "k_proj": kv, "v_proj": kv, "o_proj": d}
    shapes = {}
    for layer in range(layers):
        for module in modules:
            path = f"model.layers.{layer}.self_attn.{module}"
            shapes[f"{path}.lora_A.weight"] = (rank, d)
            shapes[f"{path}.lora_B.weight"] = (widths[module], rank)

    return Layout(tuple(sorted(shapes.items())))


def subspace_updates(layout: Layout, count: int, *, seed: int, decay: float) -> list[Named]:
    """Return updates whose rows lie near one fixed subspace for each feature axis, as those of real
    training do; direction n has a standard deviation proportional to n^-decay."""
    updates = []
    draw = torch.Generator().manual_seed(seed)

    for _ in range(count):
        update = {}
        for name, shape in layout.shapes:
            features = max(shape)
            shared = torch.Generator().manual_seed(features + ("lora_A" in name))
            q = torch.linalg.qr(torch.randn(features, features, generator=shared)).Q
            x = (
                torch.randn(min(shape), features, generator=draw)
                * (1 + torch.arange(features)) ** -decay
                @ q.T
            )
            update[name] = 1e-3 * (x if "lora_A" in name else x.T).contiguous()

        updates.append(update)

    return updates


def count_refused_mutations(codec: Codec, update: Named, count: int) -> int:
    """Return how many of `count` damaged bodies of `update` are refused; every other one must
    decode to finite numbers.

    In each, one to eight bytes are replaced, and a fifth of them are cut short.
    """
    body = codec.body(codec.layout.flatten(update), 0)
    draw = random.Random(0)
    refused = 0

    for _ in range(count):
        mutated = bytearray(body)
        for _ in range(draw.randint(1, 8)):
            mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        if draw.random() < 0.2:
            mutated = mutated[: draw.randrange(len(mutated))] + bytes(draw.randrange(3))

        try:
            decoded = codec.decode(seal(codec.code, codec.fingerprint, bytes(mutated)))
        except WireError:
            refused += 1
            continue

        assert bool(torch.isfinite(codec.layout.flatten(decoded)).all())

    return refused
