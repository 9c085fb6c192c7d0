"""What leaves a site is what docs/deploy.md lists: every method, codecs of every family, every
privacy setting."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fluvial.codecs import CODECS
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import InProcess
from fluvial.federation.sites import Site
from fluvial.federation.talk import Talk
from fluvial.methods import METHODS
from fluvial.methods.fedpipe.tasks import Upload
from fluvial.models.pool import ModelPool
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import execute, in_process
from fluvial.wire.payload import Payload
from tests.support import ROOT
from tests.support.conversations import relayed
from tests.support.models import with_fitting_model
from tests.support.questions import with_questions

PAGE = ROOT / "docs" / "deploy.md"
PUBLIC = {"source": "public", "rounds": 3, "simulated_sites": 2}
BARE = {"normalise": "none"}
"""No scales of the undisturbed update beside a latent."""

# One or more of every family; the learned ones with as little training as they take.
CODEC_TABLES: dict[str, dict[str, Any]] = {
    "identity": {},
    "bf16": {},
    "int8": {},
    "int4": {},
    "nf4": {},
    "top_k": {"rate": 8},
    "random_k": {"rate": 8},
    "sign": {},
    "half_sign": {},
    "ternary": {"rate": 8},
    "hadamard": {"rate": 8},
    "eden": {"rate": 8},
    "trellis": {"rate": 8},
    "dct_top_k": {"rate": 8},
    "powersgd": {"rate": 4},
    "resnet": {"canvas": "grouped", "stages": 2, "iterations": 10},
    "cnn": {"rate": 8, "iterations": 10},
    "vq": {"rate": 16},
    "klt": {"rate": 8},
    "klt_trellis": {"rate": 16},
    "klt_sum": {"rate": 8},
}


# -- the page ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One answer that the page lists."""

    methods: tuple[str, ...]
    when: str
    tasks: tuple[str, ...]
    tensors: frozenset[str]
    values: frozenset[str]


def names(cell: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in cell.split(",") if each.strip())


def rows() -> list[Row]:
    """The table of the page."""
    text = PAGE.read_text(encoding="utf-8")
    match = re.search(r"<!-- leaves:.*?-->(.*?)<!-- /leaves -->", text, flags=re.S)
    assert match, "the page has no table of what leaves"
    lines = [line for line in match[1].splitlines() if line.startswith("|")][2:]
    found = []

    for line in lines:
        methods, when, tasks, tensors, values, _ = (
            each.strip() for each in line.strip("|").split("|")
        )
        known = tuple(METHODS) if methods == "all" else names(methods)
        found.append(
            Row(known, when, names(tasks), frozenset(names(tensors)), frozenset(names(values)))
        )

    return found


def listed(method: str, task: str, labels: frozenset[str]) -> Row:
    """The one row of the page for a task of a method under what is true of a run."""
    fitting = [
        row for row in rows() if method in row.methods and row.when in labels and task in row.tasks
    ]
    assert len(fitting) == 1, (
        f"{method}, {task}, {sorted(labels)}: {len(fitting)} rows of docs/deploy.md"
    )

    return fitting[0]


# -- the recorder --------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Sees every answer of every site as the bytes that leave it."""

    seen: list[tuple[str, str, str, bytes]] = field(default_factory=list)
    """Method, site, task, answer; a turn of a conversation as "task turn"."""

    def assemble(self, config: RunConfig, folder: Any, pool: ModelPool, texts: Any) -> Fleet:
        fleet = in_process(config, folder, pool, texts)
        transport = fleet.transport
        assert isinstance(transport, InProcess)

        def recorded(name: str, task: Any) -> Any:
            def note(site: Site, task_or_turn: str, left: Payload) -> Payload:
                self.seen.append((config.method.name, site.name, task_or_turn, left.to_bytes()))
                return left

            def conversation(site: Site, talk: Talk) -> Talk:
                def turn(left: Payload) -> Payload:
                    return note(site, f"{name} {left.values['of']}", left)

                return note(site, name, (yield from relayed(talk, turn)))

            def answer(site: Site, message: Payload) -> Payload | Talk:
                answered: Payload | Talk = task(site, message)
                if isinstance(answered, Payload):
                    return note(site, name, answered)
                return conversation(site, answered)

            return answer

        transport.tasks = {name: recorded(name, task) for name, task in transport.tasks.items()}
        return fleet


def record(table: dict[str, Any], folder: Path) -> list[tuple[str, str, str, bytes]]:
    recorder = Recorder()
    config = parse(with_fitting_model(table), "test")
    *_, last = execute(config, folder, assemble=recorder.assemble)
    assert last.kind == "result"
    assert recorder.seen
    return recorder.seen


@dataclass(frozen=True)
class Case:
    """A run, and the rows of the page that it fills."""

    name: str
    method: dict[str, Any]
    labels: frozenset[str]
    codec: dict[str, Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)


def case(
    name: str,
    method: dict[str, Any],
    *labels: str,
    codec: dict[str, Any] | None = None,
    **more: Any,
) -> Case:
    return Case(name, method, frozenset(labels), codec, more)


UNBIASED = ("eden", "random_k")
"""Codecs that the gate never refuses, so that its setting would have no effect."""


def cgfedllm_table(
    promised: dict[str, Any] | None = None, codec: str = "", **changes: Any
) -> dict[str, Any]:
    table: dict[str, Any] = {
        "name": "cgfedllm",
        "max_growth": 1e9,
        "tgap": {"source": "none"},
    }
    if "tgap" in changes and codec not in UNBIASED:
        table["gate"] = "report"
    return table | changes | ({} if promised is None else {"privacy": promised})


def promised(placement: str, heldout: str = "none") -> dict[str, Any]:
    return {"placement": placement, "clip_norm": 0.05, "noise_multiplier": 1.0, "heldout": heldout}


MEASURES = "held-out measures"
LEARNS = "a codec that learns"
AT = {
    "update": "noise at the site",
    "latent": "noise at the site",
    "aggregate": "noise at the server",
}
INT8 = {"name": "int8"}
KLT = {"name": "klt", "rate": 8}
LEFT_AT_END = ('ends = "shared", no client batch',)
NOTHING_AT_END = ('ends = "own", or a client batch',)
WHOLE = "the whole update"
NOT_HELD = "no hidden states held by sample"
HELD = "hidden states held by sample"
COVARIANCE = 'tgap.source = "sites-covariance"'

EVERYDAY = [
    case("fedavg", {"name": "fedavg"}, "plain", MEASURES, codec=INT8),
    case(
        "fedavg feedback",
        {"name": "fedavg"},
        "error feedback",
        MEASURES,
        codec=INT8 | {"error_feedback": True},
        rounds=2,
    ),
    case("fedcybgd", {"name": "fedcybgd"}, "plain", MEASURES, tune="lora"),
    case("fedsa", {"name": "fedsa"}, "plain", MEASURES, evaluate={}),
    case("fedsb", {"name": "fedsb"}, "plain", MEASURES),
    case("flasc", {"name": "flasc"}, "plain", MEASURES),
    case("ecolora", {"name": "ecolora"}, "plain", MEASURES),
    case("fedpipe", {"name": "fedpipe", "probe_steps": 2}, "plain", WHOLE, MEASURES),
    case(
        "fedpipe feedback",
        {"name": "fedpipe", "planner": {"selection": "all"}},
        *("plain", "error feedback", MEASURES),
        codec=INT8 | {"error_feedback": True},
        rounds=2,
    ),
    *(
        case(
            f"flglm {mode} {ends}",
            {"name": "flglm", "mode": mode, "ends": ends}
            | ({"sync_steps": 1} if mode == "hierarchical" else {}),
            "plain",
            NOT_HELD,
            MEASURES,
            f'ends = "{ends}"',
            *(LEFT_AT_END if ends == "shared" and mode != "client-batch" else NOTHING_AT_END),
        )
        for mode in ("sequential", "client-batch", "hierarchical")
        for ends in ("shared", "own")
    ),
    case(
        "flglm by parts, own",
        {"name": "flglm", "ends": "own", "parts": {"back": "full"}},
        *("plain", NOT_HELD, MEASURES, 'ends = "own"', *NOTHING_AT_END),
    ),
    case(
        "flglm by parts, shared",
        {"name": "flglm", "mode": "sequential", "parts": {"back": "full"}},
        *("plain", NOT_HELD, MEASURES, 'ends = "shared"', *LEFT_AT_END),
    ),
    case(
        "flglm memory",
        {"name": "flglm", "parts": {"front": "frozen"}},
        *("plain", HELD, MEASURES, 'ends = "shared"', *NOTHING_AT_END),
    ),
    case(
        "baselines",
        {"name": "local"},
        "plain",
        MEASURES,
        compare=["fedavg", "central"],
        evaluate={},
    ),
    case("central_cyclic", {"name": "central_cyclic"}, "plain", MEASURES, tune="lora"),
    case(
        "tgap at sites",
        cgfedllm_table(tgap={"source": "sites", "rounds": 2}),
        *("plain", LEARNS, 'tgap.source = "sites"', MEASURES),
        codec=KLT,
    ),
    case(
        "moments",
        cgfedllm_table(tgap={"source": "sites-covariance", "reading": "local", "rounds": 2}),
        *("plain", LEARNS, COVARIANCE, MEASURES),
        codec=KLT,
    ),
    case("private update", cgfedllm_table(promised("update")), AT["update"], codec=INT8),
    case(
        "private latent",
        cgfedllm_table(promised("latent"), tgap=PUBLIC),
        AT["latent"],
        LEARNS,
        codec=KLT,
    ),
    case("private mean", cgfedllm_table(promised("aggregate")), AT["aggregate"], codec=INT8),
    case(
        "measured", cgfedllm_table(promised("update", "exact")), AT["update"], MEASURES, codec=INT8
    ),
]


NO_FEEDBACK = ("identity", "eden", "resnet")
"""Refused with error feedback: they lose nothing, or what they lose would grow without bound."""


def product() -> Iterator[Case]:
    """Every codec, under both methods that take one, and under every privacy setting that takes the
    codec."""
    for codec, settings in CODEC_TABLES.items():
        table = {"name": codec, **settings}
        learned = (LEARNS,) if CODECS[codec].learned else ()
        for feedback in (False,) if codec in NO_FEEDBACK else (False, True):
            label = "error feedback" if feedback else "plain"
            with_feedback = table | {"error_feedback": feedback}
            for method in ({"name": "fedavg"}, cgfedllm_table(codec=codec, tgap=PUBLIC)):
                if method["name"] == "fedavg" and codec == "resnet":
                    # The codec carries nothing of so small a model, and fedavg's gate refuses it.
                    continue
                if method["name"] == "fedavg" and learned:
                    method = method | {"tgap": PUBLIC}

                yield case(
                    f"{method['name']} {codec} {label}",
                    method,
                    label,
                    *learned,
                    MEASURES,
                    codec=with_feedback,
                    rounds=2 if feedback else 1,
                )

        for placement, heldout in ((each, also) for each in AT for also in ("none", "exact")):
            bare = BARE if placement == "latent" and codec == "resnet" else {}
            if placement == "latent" and codec not in ("klt", "resnet"):
                continue
            labels = (AT[placement], *learned, *((MEASURES,) if heldout == "exact" else ()))
            method = cgfedllm_table(promised(placement, heldout), codec, tgap=PUBLIC)
            yield case(f"{placement} {heldout} {codec}", method, *labels, codec=table | bare)

    for placement in ("update", "aggregate"):
        auto = {"name": "auto", "rate": 8, "error_feedback": False}
        method = cgfedllm_table(promised(placement), tgap=PUBLIC)
        yield case(f"{placement} auto", method, AT[placement], LEARNS, codec=auto)


PRODUCT = list(product())


def tiny(run_config: dict[str, Any], each: Case) -> dict[str, Any]:
    """One round of one step, where nothing else is asked for."""
    train = run_config["train"] | {"max_steps": 1}
    table = run_config | {"rounds": 1, "train": train, "method": each.method} | each.more
    return table if each.codec is None else table | {"codec": each.codec}


def check_what_leaves(each: Case, run_config: dict[str, Any], folder: Path) -> set[Row]:
    filled = set()
    for method, site, task, wire in record(tiny(run_config, each), folder):
        answer = Payload.from_bytes(wire)
        row = listed(method, task, each.labels)
        assert set(answer.tensors) == row.tensors, (method, site, task)
        assert set(answer.values) == row.values, (method, site, task)
        filled.add(row)

    return filled


@pytest.mark.parametrize("each", EVERYDAY, ids=lambda each: each.name)
def test_what_leaves_a_site_is_what_the_page_lists(
    each: Case, run_config: dict[str, Any], tmp_path: Path
) -> None:
    assert check_what_leaves(each, run_config, tmp_path / "run")


def test_of_a_late_site_its_largest_components_leave_and_their_numbers(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Upload, "share", lambda *_: 0.4)
    budgets = [{"site": site, "up_mbit_s": 0.1} for site in ("north", "south", "west")]
    method = {
        "name": "fedpipe",
        "planner": {"selection": "all"},
        "deadline_s": 1e6,
        "budgets": budgets,
    }
    each = case("late", method, "plain", "its largest components", MEASURES)
    filled = check_what_leaves(each, run_config, tmp_path / "run")
    assert any("k" in row.values for row in filled)


@pytest.mark.parametrize("method", ["fedavg", "flglm"])
def test_of_answers_only_sums_of_scores_leave(
    method: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    more = with_questions({}, tmp_path)
    labels = (
        "plain",
        NOT_HELD,
        "held-out measures with answers",
        'ends = "shared"',
        *NOTHING_AT_END,
    )
    each = case("answers", {"name": method}, *labels, **more)
    filled = check_what_leaves(each, run_config, tmp_path / "run")
    assert any("questions" in row.values for row in filled)


@pytest.mark.slow
@pytest.mark.parametrize("each", PRODUCT, ids=lambda each: each.name)
def test_what_leaves_is_listed_for_every_codec_and_privacy_setting(
    each: Case, run_config: dict[str, Any], tmp_path: Path
) -> None:
    assert check_what_leaves(each, run_config, tmp_path / "run")


def test_the_page_lists_every_task_of_every_method_and_no_other() -> None:
    common = {"evaluate", "join", "any"}
    for name, method in METHODS.items():
        tasks = {task.split()[0] for row in rows() if name in row.methods for task in row.tasks}
        wanted = set(method.tasks) | ({"install"} if "snapshot" in method.tasks else set())
        assert wanted <= tasks, name
        assert tasks - common - {"visit", "train"} <= wanted, name


def test_every_codec_is_among_those_recorded() -> None:
    assert set(CODEC_TABLES) == set(CODECS)


def test_a_value_that_the_page_does_not_list_fails(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The recorder's own test: a label that is not true of the run leaves a name over."""
    wrong = case("wrong", {"name": "fedavg"}, "error feedback", MEASURES, codec=INT8)
    with pytest.raises(AssertionError):
        check_what_leaves(wrong, run_config, tmp_path / "run")
