"""Bounds on the effect of hostile sites on a round, whatever their number below one half and the
order in which replies come."""

import json
import random
import tempfile
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.errors import CheckpointError, WireError
from fluvial.federation.bounds import BoundedReplies, check_update
from fluvial.federation.config import FleetConfig
from fluvial.federation.in_process import local_fleet
from fluvial.federation.waiting import on_disk
from fluvial.training.config import TrainConfig
from fluvial.wire.tensors import Named


def counted_in(
    order: Sequence[str], lengths: dict[str, float], weights: dict[str, int]
) -> tuple[dict[str, int], list[dict[str, Any]], list[str]]:
    """Return the weights that count, the clipped sites and the failed ones, for an order of
    arrival; asserts that each update that counts has its own values."""
    fleet = local_fleet(tuple(lengths), lambda _: None, {}, FleetConfig(on_failure="skip"))  # type: ignore[arg-type, return-value]
    cohort: BoundedReplies[Named] = BoundedReplies(fleet, "train", 1, asked=len(lengths))
    folded: dict[str, int] = {}

    for site in order:
        tensors = {"w": torch.full((3,), lengths[site])}
        for reply in cohort.add(site, lengths[site], weights[site], tensors):
            folded[reply.site] = reply.weight
            assert torch.equal(reply.content["w"], torch.full((3,), lengths[reply.site]))

    for reply in cohort.close():
        folded[reply.site] = reply.weight
        assert torch.equal(reply.content["w"], torch.full((3,), lengths[reply.site]))

    return folded, cohort.clipped, sorted(failure.site for failure in fleet.failures)


def test_the_order_of_arrival_changes_nothing_of_the_bounds() -> None:
    """The heaviest, and all that may be too long, wait for the others, whoever comes first."""
    lengths = {"a": 1.0, "b": 2.0, "c": 1.5, "d": 90.0, "e": 1.0}
    weights = {"a": 5, "b": 7, "c": 10**6, "d": 3, "e": 7}
    seen = {
        json.dumps(counted_in(order, lengths, weights), sort_keys=True)
        for order in permutations(lengths)
    }
    assert len(seen) == 1
    folded, _, failed = json.loads(seen.pop())
    assert folded == {"a": 5, "b": 7, "e": 7, "c": 9 * 19}
    assert failed == ["d"]


@pytest.mark.parametrize("liars", [2, 3])
def test_all_of_a_minority_that_is_too_long_fail(liars: int) -> None:
    """Of seven or eight, two or three send updates that are a million times too long, of one length
    or of many, in any place."""
    for factor in (1.0, 3.0):
        lengths = {f"liar-{index}": 1e6 * factor**index for index in range(liars)}
        lengths |= {f"honest-{index}": 1.0 + index / 10 for index in range(5)}
        weights = dict.fromkeys(lengths, 10)
        honest = sorted(site for site in lengths if site.startswith("honest"))

        for seed in range(60):
            order = random.Random(seed).sample(sorted(lengths), len(lengths))
            folded, clipped, failed = counted_in(order, lengths, weights)
            assert sorted(folded) == honest
            assert failed == sorted(lengths.keys() - honest)
            assert clipped == []


def test_updates_wait_in_files_and_no_longer_than_they_must(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Of a cohort of 40, two are in memory; when half have answered, all but the heaviest count."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fleet = local_fleet(("a",), lambda _: None, {}, FleetConfig(on_failure="skip"))  # type: ignore[arg-type, return-value]
    cohort: BoundedReplies[tuple[Named, Named]] = BoundedReplies(fleet, "train", 1, asked=40)
    ready = []

    for index in range(40):
        update = {"w": torch.full((5, 2), float(index))}
        ready.append(cohort.add(f"{index:02}", 1.0, 100 - index, (update, update)))

    assert [len(counted) for counted in ready] == [0] * 20 + [20] + [1] * 19
    for index, counted in enumerate(ready[20], start=1):
        first, second = counted.content
        assert first is second
        assert torch.equal(first["w"], torch.full((5, 2), float(index)))
        assert first["w"].untyped_storage().is_shared() == (2 <= index < 20)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="waits for the others.*set TMPDIR"):
        on_disk({"w": torch.ones(1)})


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_what_training_reaches_is_bounded_for_every_adam(optim: Any) -> None:
    train = TrainConfig(optim=optim, max_steps=3, learning_rate=0.005)
    check_update({"w": torch.full((4,), 5.9)}, 10, train)
    with pytest.raises(WireError, match="training with these"):
        check_update({"w": torch.full((4,), 6.1)}, 10, train)

    other = train.model_copy(update={"adam_beta1": 0.0, "adam_beta2": 1 - 1e-6})
    check_update({"w": torch.full((4,), 1400.0)}, 10, other)
