"""Client batches with late sites and sites that begin again: steps of the sites that are there."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.data import SiteTexts
from fluvial.errors import ClientError, DivergenceError
from fluvial.federation.config import FleetConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.mock import Mock
from fluvial.federation.store import StateStore
from fluvial.federation.talk import Talk
from fluvial.methods.flglm.draws import draws_of_round
from fluvial.methods.flglm.server import FlGlmServer
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.models.tuning import tuned_parameters
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import parse
from fluvial.runs.opening import site_of, tasks_of
from fluvial.runs.run import Run
from fluvial.training.train import collate, shifted, shuffled_batches, summed_loss
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named, digest
from tests.support.conversations import relayed
from tests.support.models import with_fitting_model
from tests.support.weights import read_weights

STEPS = 7
LATE = "north"
"""The site that is late, or fails."""
PATIENCE_S = 2.0
"""Deadline of a step; each turn takes one second."""
CLOSE = 5e-6
"""Of a weight, for fp32 sums in another order; seven steps of AdamW move weights by 5e-2."""
Delay = Callable[[str, str, int], float]
"""Seconds of a site's turn, by site, kind and step."""


@pytest.fixture
def table(run_config: dict[str, Any]) -> dict[str, Any]:
    """One round of seven steps of two micro-batches, each of which is clipped."""
    return with_fitting_model(
        run_config
        | {
            "rounds": 1,
            # One micro-batch at a time: the times of these tests count turns.
            "method": {"name": "flglm", "step_deadline_s": PATIENCE_S, "in_flight": 1},
            "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": "attention"},
            "train": {
                "learning_rate": 1e-2,
                "max_steps": STEPS,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "weight_decay": 0.1,
                "max_grad_norm": 0.05,
            },
        }
    )


class Round:
    """One round of `table` on a clock that does not wait, with turns that take some time."""

    def __init__(self, table: dict[str, Any], folder: Path) -> None:
        """Open the run."""
        self.config = parse(table, "test")
        self.pool = ModelPool(self.config.model, self.config.adapter)
        self.texts = SiteTexts(self.config.data, self.pool.tokenizer, seed=self.config.seed)
        self.start = initial_state(self.pool.layout, self.config.seed)
        self._folder = folder

    def play(
        self, delay: Delay, **policy: Any
    ) -> tuple[Named, dict[str, Any], Fleet, dict[tuple[str, int], int]]:
        """Return the adapter, the record, the fleet, and how often each site made each step's
        first turn; `delay` may raise, which is the site's failure."""
        store = StateStore(None)
        task = tasks_of(self.config)["train"]
        delays = dict.fromkeys(self.texts.names, 1.0)
        forwards: dict[tuple[str, int], int] = {}

        def talking(site: str, talk: Talk) -> Talk:
            def said(turn: Payload) -> Payload:
                kind, step = turn.value("of", str), turn.value("step", int)
                delays[site] = delay(site, kind, step)
                if kind == "forward" and turn.value("micro", int) == 0:
                    forwards[site, step] = forwards.get((site, step), 0) + 1
                return turn

            reply = yield from relayed(talk, said)
            delays[site] = delay(site, "reply", 0)
            return reply

        def answer(site: str, _task: str, message: Payload) -> Talk:
            talk = task(site_of(self.config, site, self.pool, self.texts, store), message)
            assert not isinstance(talk, Payload)
            return talking(site, talk)

        mock = Mock(self.texts.names, answer, delays_s=delays)
        fleet = Fleet(mock, FleetConfig.model_validate(policy), clock=mock.clock)
        with RunFolder(self._folder) as opened:
            run = Run(self.config, opened, self.pool, self.texts)
            server = self.config.entry.server(self.config.method, run.context)
            assert isinstance(server, FlGlmServer)
            server.setup(fleet)
            record = server.round(1, fleet)

        return server.model(), record, fleet, forwards

    def simulated(self, present: list[set[str]]) -> Named:
        """Return the adapter after steps of the whole model on the batches of the sites that are
        present in each, by hand."""
        train = self.config.train
        batches = {}
        for name in self.texts.names:
            _, draw = draws_of_round(self.config.seed, 1, name)
            endless = shuffled_batches(self.texts.load(name).train, train.logical_batch, draw)
            batches[name] = list(islice(endless, STEPS))

        with self.pool.model(self.start, trainable="A and B") as model:
            weights = list(tuned_parameters(model).values())
            optimizer = torch.optim.AdamW(weights, weight_decay=train.weight_decay)
            for step, sites in enumerate(present):
                examples = [each for name in sorted(sites) for each in batches[name][step]]
                batch = collate(examples, self.pool.tokenizer.pad_token_id)
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                tokens = sum(each.label_tokens for each in examples)
                loss = summed_loss(*shifted(logits, batch["labels"])) / tokens
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(weights, train.max_grad_norm)
                optimizer.param_groups[0]["lr"] = train.learning_rate * (1 - step / STEPS)
                optimizer.step()
                optimizer.zero_grad()

            return read_weights(model)


@pytest.fixture
def opened(table: dict[str, Any], tmp_path: Path) -> Round:
    return Round(table, tmp_path / "run")


def without(round: Round, steps: range, site: str = LATE) -> list[set[str]]:
    """Return the sites of each step, all but `site` in `steps`."""
    everybody = set(round.texts.names)
    return [everybody - {site} if step in steps else everybody for step in range(STEPS)]


def assert_close(one: Named, other: Named, start: Named) -> None:
    """Assert that both are the same training."""
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    assert moved > 200 * CLOSE
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < CLOSE


def slow(kind: str, step: int, seconds: float) -> Delay:
    """Let one turn of the late site take longer, once; all others take a second."""
    due = [(LATE, kind, step)]

    def delay(*turn: Any) -> float:
        if turn in due:
            due.clear()
            return seconds
        return 1.0

    return delay


def test_nobody_is_late(opened: Round) -> None:
    """Every step is that of all sites, once."""
    adapter, record, _, forwards = opened.play(lambda *_: 1.0)
    assert_close(adapter, opened.simulated(without(opened, range(0))), opened.start)
    assert set(forwards.values()) == {1}
    assert "missed_steps" not in record


@pytest.mark.parametrize("kind", ["forward", "backward", "clip"])
def test_a_late_site_misses_the_steps_that_are_made_without_it(opened: Round, kind: str) -> None:
    """Late in steps 2 to 4, in any turn; the others are held up once, and its turn of an old
    version is not used."""
    adapter, record, fleet, forwards = opened.play(slow(kind, 2, 14.0))
    assert record["missed_steps"] == 3
    assert record["sites"] == 3
    assert fleet.failures == []
    assert_close(adapter, opened.simulated(without(opened, range(2, 5))), opened.start)
    again = 1 if kind == "forward" else 2  # a step that has begun with it is made again
    others = [name for name in opened.texts.names if name != LATE]
    assert [forwards[others[0], step] for step in range(STEPS)] == [1, 1, again, 1, 1, 1, 1]


MOMENTS = {
    "hidden states up": ("forward", 2),
    "hidden states down or gradient up": ("backward", 2),
    "gradient down": ("clip", 2),
}
"""The turn that does not come when a site is killed with this tensor on its way; with the first
micro-batch, of a step that has two."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_site_rejoins_late(opened: Round, moment: str) -> None:
    """It begins again, which takes until step 4 is over, and goes on from the server's weights and
    moments: the run is that of the sites that were there."""
    died: list[str] = []

    def delay(site: str, kind: str, step: int) -> float:
        if (site, kind, step) == (LATE, *MOMENTS[moment]) and not died:
            died.append(site)
            raise DivergenceError("the test kills this site")
        return 13.0 if (site, kind, step) == (LATE, "forward", 0) and died else 1.0

    adapter, record, fleet, _ = opened.play(delay, on_failure="retry")
    assert [failure.site for failure in fleet.failures] == [LATE]
    assert record["sites"] == 3
    missing = range(2, 2 + record["missed_steps"])
    assert 2 <= len(missing) <= 3
    assert_close(adapter, opened.simulated(without(opened, missing)), opened.start)


def test_a_site_cannot_keep_a_step_from_its_end(opened: Round) -> None:
    """Late in the middle of every step, and back at once: each step begins again once."""

    def delay(site: str, kind: str, step: int) -> float:
        return PATIENCE_S + 0.5 if (site, kind) == (LATE, "backward") else 1.0

    adapter, record, _, forwards = opened.play(delay, on_failure="skip")
    assert record["missed_steps"] == STEPS
    assert record["sites"] == 2
    others = [name for name in opened.texts.names if name != LATE]
    assert {forwards[name, step] for name in others for step in range(STEPS)} == {2}
    without_it, *_ = opened.play(slow("forward", 0, 10_000.0), on_failure="skip")
    assert digest(adapter) == digest(without_it)


def test_a_site_that_stays_away_is_left_out_at_the_end(opened: Round) -> None:
    """The others hold the quorum; under on_failure="stop" the round waits for it."""
    away = slow("forward", 2, 10_000.0)
    adapter, record, fleet, _ = opened.play(away, on_failure="skip")
    assert record["sites"] == 2
    assert [failure.reason for failure in fleet.failures] == [
        "it was late when the others had made the round's steps"
    ]
    assert_close(adapter, opened.simulated(without(opened, range(2, STEPS))), opened.start)

    _, record, fleet, _ = opened.play(slow("forward", 2, 10_000.0))
    assert (record["sites"], fleet.clock() > 10_000) == (3, True)


def test_a_site_that_took_part_in_no_step_has_failed(opened: Round) -> None:
    """It comes when the others have made all steps."""
    never = slow("forward", 0, 40.0)
    _, record, fleet, _ = opened.play(never, on_failure="skip", deadline_s=1000.0)
    assert record["sites"] == 2
    assert [failure.site for failure in fleet.failures] == [LATE]

    with pytest.raises(ClientError, match="took part in one"):
        opened.play(slow("forward", 0, 1000.0))


def test_a_step_waits_for_the_quorum(opened: Round) -> None:
    """With one site of three late, a quorum of all waits for it, whatever the step's deadline."""
    adapter, record, _, _ = opened.play(slow("forward", 2, 14.0), on_failure="skip", quorum=1.0)
    assert "missed_steps" not in record
    assert_close(adapter, opened.simulated(without(opened, range(0))), opened.start)


def test_a_step_below_the_quorum_ends_the_round(opened: Round) -> None:
    """Two sites that are gone for good leave one of three: the error names the step."""

    def delay(site: str, kind: str, step: int) -> float:
        if site != LATE and (kind, step) == ("backward", 3):
            raise DivergenceError("the test kills this site")
        return 1.0

    with pytest.raises(ClientError, match=r"train, step 4: 1 of 3 sites answered, fleet\.quorum"):
        opened.play(delay, on_failure="skip")


def test_own_ends_go_on_from_the_sites_own_values(table: dict[str, Any], tmp_path: Path) -> None:
    """Nothing of the ends is sent; a late site makes the steps in which it takes part."""
    own = Round(table | {"method": table["method"] | {"ends": "own"}}, tmp_path / "run")
    _, record, fleet, _ = own.play(slow("backward", 2, 14.0))
    assert (record["missed_steps"], record["sites"], fleet.failures) == (3, 3, [])


def test_both_ends_hold_the_same_hidden_states(table: dict[str, Any], tmp_path: Path) -> None:
    """A step that begins again, and turns that are not used, count in what both ends remember."""
    late = slow("backward", 2, 14.0)
    epochs = {"train": table["train"] | {"per_device_train_batch_size": 8}}
    models = []
    for number, memory in enumerate(({}, {"memory_bytes": 0})):
        method = table["method"] | {"parts": {"front": "frozen"}, **memory}
        frozen = Round(table | epochs | {"method": method}, tmp_path / str(number))
        model, record, fleet, _ = frozen.play(slow("backward", 2, 14.0))
        assert (record["missed_steps"], record["sites"], fleet.failures) == (3, 3, [])
        models.append(digest(model))

    assert models[0] == models[1]
    method = table["method"] | {"hidden": {"name": "int8"}, "recurring": "changes"}
    changes = Round(table | epochs | {"method": method}, tmp_path / "changes")
    _, record, fleet, _ = changes.play(late)
    assert (record["missed_steps"], record["sites"], fleet.failures) == (3, 3, [])
