"""What one private site releases, whatever a server asks of it and installs at it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fluvial.codecs import CODECS, build
from fluvial.codecs.base import LearnedCodec
from fluvial.codecs.learned.resnet import ResNet, ResNetSettings
from fluvial.data import SiteTexts
from fluvial.errors import PrivacyError, WireError
from fluvial.exchange.versions import published
from fluvial.federation import noise
from fluvial.federation.releases import count_releases
from fluvial.federation.sites import Site, adapter_message
from fluvial.federation.store import StateStore
from fluvial.federation.talk import only_answer
from fluvial.methods import Context, cgfedllm
from fluvial.methods.cgfedllm import privacy
from fluvial.methods.cgfedllm.config import CgFedLlmConfig
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.config import parse
from fluvial.runs.opening import site_of, tasks_of
from fluvial.seeds import generator
from fluvial.site_process.journal import Header
from fluvial.site_process.process import JOIN, SiteProcess
from fluvial.site_process.site_file import Allowed, SiteFile
from fluvial.training.train import TrainReport
from fluvial.wire.payload import Payload, Value, frame_payload, payload_frame
from fluvial.wire.tensors import Named, scale
from tests.contract.test_what_leaves import (
    BARE,
    CODEC_TABLES,
    KLT,
    PUBLIC,
    cgfedllm_table,
    promised,
)

KEY = bytes(range(32))


class Bed:
    """The sites of a private run, to be asked what a server would not ask."""

    def __init__(self, table: dict[str, Any], folder: Path) -> None:
        self.config = parse(table, "test")
        self.pool = ModelPool(self.config.model, self.config.adapter)
        self.texts = SiteTexts(self.config.data, self.pool.tokenizer, seed=self.config.seed)
        self.store = StateStore(folder)
        self.start = initial_state(self.pool.layout, self.config.seed)

    def site(self, name: str = "north") -> Site:
        return site_of(self.config, name, self.pool, self.texts, self.store)

    def ask(self, name: str = "north", *, round: int = 1, start: Named | None = None) -> bytes:
        """The frame that leaves; it must be all that leaves."""
        message = adapter_message(start or self.start, round=round)
        answer = only_answer(tasks_of(self.config)["train"](self.site(name), message))
        assert set(answer.tensors) == {"f"}
        assert answer.values == {}

        return payload_frame(answer)

    def released(self, frame: bytes) -> Tensor:
        codec = build(self.config.coding, self.pool.layout)
        return self.pool.layout.flatten(codec.decode(frame))


def bed(
    run_config: dict[str, Any], folder: Path, codec: dict[str, Any] | None = None, **changes: Any
) -> Bed:
    method = cgfedllm_table(promised("update") | changes)
    return Bed(run_config | {"method": method, "codec": codec or {"name": "identity"}}, folder)


def test_what_left_minus_the_update_is_gaussian_and_not_the_seeds_noise(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server of before drew `randn` from seed, round and site name, and read the update at any
    epsilon."""
    clipped: list[Tensor] = []
    disturb = noise.disturb

    def spy(steps: Any, std: float, key: bytes) -> Tensor:
        clipped.append(torch.from_numpy(steps * noise.grid_of(std)))
        return disturb(steps, std, key)

    monkeypatch.setattr(noise, "disturb", spy)
    found = bed(run_config, tmp_path, noise_multiplier=4.0)
    std = 4.0 * 0.05
    released = found.released(found.ask()).double()
    drawn = (released - clipped[0]) / std
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-4
    assert float(clipped[0].norm()) <= 0.05

    layout = found.pool.layout
    random = generator(found.config.seed, "privacy", 1, "north")
    shapes = dict(layout.shapes)
    of_seed = {name: torch.randn(shapes[name], generator=random) for name in sorted(shapes)}
    guess = layout.flatten(of_seed).double()
    tolerance = 5 / np.sqrt(len(drawn))
    assert abs(float(torch.nn.functional.cosine_similarity(drawn, guess, dim=0))) < tolerance
    left_over = released - std * guess
    assert (
        abs(float(torch.nn.functional.cosine_similarity(left_over, clipped[0], dim=0)))
        < tolerance + 0.05
    )


def test_a_retry_and_another_process_release_the_same_bytes(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    first = bed(run_config, tmp_path).ask()
    assert bed(run_config, tmp_path).ask() == first
    assert count_releases(StateStore(tmp_path).private("north")) == 1
    assert bed(run_config, tmp_path / "elsewhere").ask() != first


def test_a_server_that_asks_again_with_other_models_gets_no_more_than_the_rounds(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The run has two rounds: a third release is refused, and so is a round beyond the run."""
    found = bed(run_config, tmp_path)
    frames = {found.ask(), found.ask(start=scale(found.start, 1.001))}
    assert len(frames) == 2

    for round in (1, 2):
        with pytest.raises(PrivacyError, match="epsilon counts 2"):
            found.ask(round=round, start=scale(found.start, 1.002))

    with pytest.raises(WireError, match="'round': 99 is not from 1 to 2"):
        found.ask(round=99, start=scale(found.start, 1.002))
    assert found.ask() in frames


def test_a_second_request_gets_noise_of_its_own_even_for_the_same_update(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else equal bytes would tell that two updates are equal."""
    found = bed(run_config, tmp_path)
    update = constant(found)
    monkeypatch.setattr(cgfedllm, "train_locally", lambda *_, **__: (update, None))
    one, two = (
        found.released(found.ask(start=start)) for start in (found.start, scale(found.start, 1.001))
    )
    assert float(torch.nn.functional.cosine_similarity(one, two, dim=0)) < 0.5


def constant(found: Bed, size: float = 1.0) -> Named:
    random = torch.Generator().manual_seed(3)
    return {
        name: size * torch.randn(shape, generator=random)
        for name, shape in found.pool.layout.shapes
    }


def installed(found: Bed, *sites: str) -> None:
    """Give these sites the codec of the run, fitted if it learns."""
    settings = found.config.coding
    layout = found.pool.layout
    kind = CODECS[settings.name]

    if issubclass(kind, LearnedCodec):
        codec = kind.fit(settings, layout, [constant(found), constant(found, 0.5)], seed=0)
        for site in sites:
            found.store.write(site, "codec", published(codec, 1, decoder=False), 0)


PRIVATE = [("update", name, settings, 4.0) for name, settings in CODEC_TABLES.items()] + [
    ("latent", "klt", CODEC_TABLES["klt"], 4.0),
    (
        "latent",
        "resnet",
        CODEC_TABLES["resnet"] | BARE,
        1.0,
    ),  # not linear: only the same update has the same latent
]


@pytest.mark.parametrize(
    ("placement", "codec", "settings", "size"),
    PRIVATE,
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_leaves_is_a_function_of_the_disturbed_vector_alone(
    placement: str,
    codec: str,
    settings: dict[str, Any],
    size: float,
    run_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other records, another loss, another count, an update of another length before it is clipped:
    equal bytes."""
    monkeypatch.setattr(privacy, "claim", lambda *_: KEY)
    monkeypatch.setattr(
        cgfedllm, "derive", lambda *_: 7
    )  # codecs draw by the site's name, which is public
    found = bed(
        run_config, tmp_path, {"name": codec, **settings}, placement=placement, clip_norm=0.01
    )
    installed(found, "north", "west")
    frames = set()

    for site, length, loss in (
        ("north", 1.0, 0.5),
        ("west", size, 9.0),
    ):  # powers of two scale without rounding
        update = constant(found, length)
        report = TrainReport(
            steps=3, label_tokens=int(loss), loss=loss, grad_norm=loss, weights=update
        )
        monkeypatch.setattr(
            cgfedllm, "train_locally", lambda *_, told=report, **__: (told.weights, told)
        )
        frames.add(found.ask(site))

    assert len(frames) == 1


def test_an_installed_codec_with_error_feedback_gets_no_residual(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """What a server installs is its own choice; nothing of the undisturbed update is kept or sent
    for it."""
    method = cgfedllm_table(promised("update"), tgap=PUBLIC)
    found = Bed(run_config | {"method": method, "codec": KLT}, tmp_path)
    settings: Value = {"name": "int8", "error_feedback": True}
    found.store.write(
        "north", "codec", Payload(values={"settings": settings, "version": 1, "learned": {}}), 0
    )
    site = found.site()
    tasks_of(found.config)["train"](site, adapter_message(found.start, round=1))
    assert "residual" not in site.kept


def test_an_installed_codec_that_tells_of_the_update_is_refused(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Under placement latent a server installs one whose frame has scales of the undisturbed
    update."""
    method = cgfedllm_table(promised("latent"), tgap=PUBLIC)
    found = Bed(run_config | {"method": method, "codec": KLT}, tmp_path)
    layout = found.pool.layout
    settings = ResNetSettings(**CODEC_TABLES["resnet"])
    codec = ResNet.fit(settings, layout, [constant(found)], seed=0)
    found.store.write("north", "codec", published(codec, 1, decoder=False), 0)

    with pytest.raises(WireError, match="tells of the update beside its latent"):
        found.ask()
    assert count_releases(found.store.private("north")) == 0


# -- a site's own file ---------------------------------------------------------------------------


def join(
    run_config: dict[str, Any], folder: Path, *, run: str, most: float = 8.0, **changes: Any
) -> None:
    """A run greets a site whose file allows epsilon `most` in all."""
    process = SiteProcess(
        SiteFile(
            name="north",
            folder=folder,
            device="cpu",
            allow=Allowed(max_epsilon=most, run_paths=("*",)),
        )
    )
    table = run_config | {"method": cgfedllm_table(), "codec": {"name": "identity"}} | changes
    message = Payload(values={"config": table})
    header = Header(run=run, task=JOIN, round=0, session="one", seq=1, ack=0, base=-1)
    process.answer(header, message.to_bytes())


def at(epsilon: float, placement: str = "update", **others: Any) -> dict[str, Any]:
    return cgfedllm_table({"placement": placement, "clip_norm": 0.05, "epsilon": epsilon, **others})


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ({"name": "fedavg"}, "takes part only in runs that add noise at the site"),
        (cgfedllm_table(), "takes part only in runs that add noise at the site"),
        (at(1.0, "aggregate"), "takes part only in runs that add noise at the site"),
        (at(1.0, heldout="exact"), "sends no measures that epsilon does not count"),
        (at(8.1), "more than this site has left"),
        (at(1.0, delta=0.9), r"spend delta 0.9 \(method.privacy.delta\), which is more"),
    ],
)
def test_a_site_that_bounds_epsilon_refuses_runs_beyond_it(
    method: dict[str, Any], text: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError, match=text):
        join(run_config, tmp_path, run="one", method=method)


def test_the_runs_of_a_site_share_its_epsilon(run_config: dict[str, Any], tmp_path: Path) -> None:
    """A server that begins one run after another, or greets one again with more, gets no more in
    all."""
    join(run_config, tmp_path, run="one", method=at(5.0))
    join(run_config, tmp_path, run="one", method=at(5.0))

    with pytest.raises(PrivacyError, match="more than this site has left"):
        join(run_config, tmp_path, run="two", method=at(4.0))
    join(run_config, tmp_path, run="two", method=at(2.5))
    with pytest.raises(PrivacyError, match="more than this site has left"):
        join(run_config, tmp_path, run="one", method=at(6.0))


def test_a_run_cannot_hide_what_it_spent_behind_a_smaller_promise(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """A server greets a run that released with a smaller epsilon, to make room for another run."""
    join(run_config, tmp_path / "site", run="one", method=at(8.0))
    start = bed(run_config, tmp_path / "bed").start
    process = SiteProcess(
        SiteFile(
            name="north",
            folder=tmp_path / "site",
            device="cpu",
            allow=Allowed(max_epsilon=8.0, run_paths=("*",)),
        )
    )
    header = Header(run="one", task="train", round=1, session="one", seq=2, ack=0, base=-1)
    join(run_config, tmp_path / "site", run="one", method=at(7.0))  # nothing left the site yet
    answer = process.answer(header, adapter_message(start, round=1).to_bytes())
    assert answer.times is None, "seconds are no part of what epsilon counts"
    assert '"seconds"' not in (tmp_path / "site" / "outgoing.jsonl").read_text()

    with pytest.raises(
        PrivacyError, match="this run made releases under epsilon 7 .*; begin a new"
    ):
        join(run_config, tmp_path / "site", run="one", method=at(0.1))

    with pytest.raises(PrivacyError, match="more than this site has left"):
        join(run_config, tmp_path / "site", run="two", method=at(2.0))
    join(run_config, tmp_path / "site", run="one", method=at(7.0))


def test_the_server_reads_no_value_beside_a_private_frame(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """A site that says more than its frame has failed, so that no one comes to rely on it."""
    found = bed(run_config, tmp_path)
    context = Context(
        seed=found.config.seed,
        rounds=2,
        layout=found.pool.layout,
        codec=found.config.coding,
        downlink=None,
        train=found.config.train,
        open_pool=lambda: found.pool,
        secret=lambda: KEY,
        public=dict,
    )
    assert isinstance(found.config.method, CgFedLlmConfig)
    server = cgfedllm.CgFedLlmServer(found.config.method, context)
    frame = found.ask()
    server.shared.exchange.link.uplink.begin(found.start, 1)
    readable = server.shared.exchange.read(1, "a", frame_payload(frame))
    _, update = readable.content
    assert (readable.weight, update.loss) == (1, None)

    with pytest.raises(
        WireError, match=r"values \['loss', 'n'\] came, which epsilon does not count"
    ):
        server.shared.exchange.read(1, "a", frame_payload(frame, n=3, loss=1.0))


def test_a_site_of_its_own_counts_through_new_sessions(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """A server that begins again makes a site forget what it kept, but never what it released."""
    table = run_config | {"method": at(8.0), "codec": {"name": "identity"}}
    start = bed(run_config, tmp_path / "bed").start

    def ask(task: str, message: Payload, session: str) -> bytes:
        process = SiteProcess(
            SiteFile(
                name="north",
                folder=tmp_path / "north",
                device="cpu",
                allow=Allowed(run_paths=("*",)),
            )
        )
        header = Header(run="one", task=task, round=1, session=session, seq=1, ack=0, base=-1)
        return process.answer(header, message.to_bytes()).data

    frames = set()
    for session in ("first", "second", "third"):
        ask(JOIN, Payload(values={"config": table}), session)
        frames.add(ask("train", adapter_message(start, round=1), session))

    assert len(frames) == 1
    ask("train", adapter_message(scale(start, 1.001), round=1), "fourth")
    with pytest.raises(PrivacyError, match="epsilon counts 2"):
        ask("train", adapter_message(scale(start, 1.002), round=1), "fifth")

    longer = table | {"rounds": 1000}
    ask(JOIN, Payload(values={"config": longer}), "sixth")
    with pytest.raises(PrivacyError, match="epsilon cannot count both"):
        ask("train", adapter_message(scale(start, 1.002), round=1), "sixth")
    with pytest.raises(WireError, match="unknown task 'snapshot'"):
        ask("snapshot", adapter_message(start, round=1), "sixth")
