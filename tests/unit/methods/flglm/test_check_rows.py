"""Rows and remarks of `fluvial check` about a split run."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from fluvial.models.split import Part
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from tests.support.models import with_fitting_model


@pytest.fixture
def table(run_config: dict[str, Any]) -> dict[str, Any]:
    return with_fitting_model(run_config | {"method": {"name": "flglm"}})


def checked(table: dict[str, Any], **method: Any) -> dict[str, Any]:
    """Return what `fluvial check` reports with these settings of the method."""
    return plan(parse(table | {"method": {"name": "flglm", **method}}, "test"))


def rows(table: dict[str, Any], **method: Any) -> dict[str, str]:
    return {row["what"]: row["value"] for row in checked(table, **method)["rows"]}


@pytest.mark.parametrize("ends", ["shared", "own"])
def test_trained_parameters_are_those_of_all_three_parts(table: dict[str, Any], ends: str) -> None:
    adapted = plan(parse({key: table[key] for key in table if key != "method"}, "test"))
    whole = adapted["model"]["trainable"]
    split = checked(table, ends=ends)
    assert split["model"]["trainable"] == whole
    assert rows(table, ends=ends)["trained parameters"].startswith(f"{whole:,} (")

    parts = [
        whole - checked(table, ends=ends, parts={part: "frozen"})["model"]["trainable"]
        for part in ("front", "middle", "back")
    ]
    assert min(parts) > 0
    assert sum(parts) == whole


def test_the_cut_is_in_plain_words(table: dict[str, Any]) -> None:
    assert rows(table)["cut"] == (
        "1 layer and the embedding | 2 layers at the server | 1 layer and the head"
    )


def test_the_lengths_behind_the_bytes_of_a_cut_are_named(table: dict[str, Any]) -> None:
    found = rows(table, front="auto", back="auto")
    assert "data.max_length" in found["why this cut"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            {"parts": {"front": "frozen"}},
            "at most 268,435,456 B (method.memory_bytes) for a site at the",
        ),
        (
            {"recurring": "changes", "hidden": {"name": "int8"}},
            "at most 268,435,456 B (method.memory_bytes) for a site and direction at the server",
        ),
    ],
)
def test_the_room_for_hidden_states_is_that_of_the_setting(
    method: dict[str, Any], words: str, table: dict[str, Any]
) -> None:
    found = checked(table, **method)
    (row,) = [each["value"] for each in found["rows"] if each["what"] == "hidden states by sample"]
    assert words in row
    assert "no room" not in row
    assert not any("memory_bytes" in note for note in found["notes"])


def test_too_little_room_for_an_epoch_is_remarked(table: dict[str, Any]) -> None:
    found = checked(table, parts={"front": "frozen"}, memory_bytes=10_000)
    (row,) = [each["value"] for each in found["rows"] if each["what"] == "hidden states by sample"]
    assert "no room" in row
    (note,) = [note for note in found["notes"] if "method.memory_bytes=10000" in note]
    assert "dropped before they recur" in note


def passes(table: dict[str, Any], end: str, **method: Any) -> int:
    """Return the bytes of activations and gradients at an end."""
    return int(
        rows(table, **method)[f"activations and gradients in memory, {end}"]
        .split()[0]
        .replace(",", "")
    )


@pytest.mark.parametrize("mode", ["sequential", "hierarchical"])
def test_memory_has_a_graph_for_each_micro_batch_in_flight(
    table: dict[str, Any], mode: str
) -> None:
    """Each takes what a pass holds, once for each replica; a site has one more on its way."""
    table = table | {"train": table["train"] | {"gradient_accumulation_steps": 4}}
    server = [passes(table, "server", mode=mode, in_flight=count) for count in (1, 2, 3, 4)]
    more = [after - before for before, after in pairwise(server)]
    assert more[0] > 0
    assert more == [more[0]] * 3

    site = [passes(table, "site", mode=mode, in_flight=count) for count in (1, 2, 3, 4)]
    more = [after - before for before, after in pairwise(site)]
    assert more[1] > 0
    assert more == [2 * more[1], more[1], 0]


def test_a_model_whose_passes_follow_from_values_has_no_predicted_memory(
    table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asks(*_: Any, **__: Any) -> Any:
        return torch.repeat_interleave(torch.ones(2, device="meta", dtype=torch.int64))

    with monkeypatch.context() as patch:
        patch.setattr(Part, "logits", asks)
        assert "not predicted: " in rows(table)["memory in training, site and server"]

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shape '[2, 3]' is invalid for input of size 5")

    monkeypatch.setattr(Part, "logits", fails)
    with pytest.raises(RuntimeError, match="is invalid for input"):
        rows(table)


def test_the_tuned_weights_of_each_part_are_shown(table: dict[str, Any]) -> None:
    """With their counts, and with a head that is the embedding."""
    found = rows(table, ends="own", parts={"front": "frozen", "back": "full"})
    front, middle, back = found["tuned in each part"].split(" | ")
    assert front == "front: frozen"
    assert middle.startswith("middle: a LoRA adapter, ")
    assert back.startswith("back: all weights, ")
    assert found["head"].startswith("the embedding, which belongs to the front")

    values = [
        int(words.split(", ")[1].removesuffix(" values").replace(",", ""))
        for words in (middle, back)
    ]
    assert found["trained parameters"].startswith(f"{sum(values):,} (")
    optimizer = [
        int(found[f"what is tuned and optimizer in memory, {end}"].split()[0].replace(",", ""))
        for end in ("server", "site")
    ]
    # Two moments and the value before in fp32; the value too where it is no weight of the base.
    assert optimizer == [16 * values[0], 12 * values[1]]


def test_an_open_cut_has_parts_too(table: dict[str, Any]) -> None:
    """The cut is chosen, and then what is tuned follows from it."""
    parts = {"front": "frozen", "back": "full"}
    chosen = checked(table, ends="own", front="auto", back="auto", parts=parts)
    number = checked(table, ends="own", front=1, back=1, parts=parts)
    assert chosen["model"] == number["model"]
    assert chosen["bytes"] == number["bytes"]


@pytest.mark.parametrize(("rounds", "remarked"), [(1, True), (2, False)])
def test_changes_of_samples_that_never_recur_are_remarked(
    table: dict[str, Any], rounds: int, remarked: bool
) -> None:
    train = {"num_train_epochs": 1.0}
    notes = checked(
        table | {"rounds": rounds, "train": train}, recurring="changes", hidden={"name": "int8"}
    )["notes"]
    assert any(note.startswith("method.recurring: without effect") for note in notes) is remarked


@pytest.mark.parametrize("frozen", [False, True])
def test_only_gradients_that_are_sent_are_named(table: dict[str, Any], frozen: bool) -> None:
    parts = {"front": "frozen", "middle": "frozen"} if frozen else {}
    noise = {"clip": 1.0, "multiplier": 0.5}
    shown = rows(table, front="auto", parts=parts, noise=noise)
    assert ("from gradients" not in shown["why this cut"]) is frozen
    assert ("gradients, which show labels" not in shown["noise"]) is frozen
