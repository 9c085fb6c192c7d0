"""A site: who takes part, with its data, what it keeps, and what every method lets it do."""

import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fluvial.codecs import CODECS, CodecSettings, build, must_learn, read_settings
from fluvial.codecs.base import Codec, LearnedCodec, SteppedCodec
from fluvial.codecs.quantise import Identity
from fluvial.data import Example, SiteData
from fluvial.errors import CheckpointError, ConfigError, WireError
from fluvial.evaluate import Heldout, exact_match, heldout
from fluvial.models import Workbench, initial_state
from fluvial.payload import OWN_FILES, Payload, frame_payload, payload_frame
from fluvial.seeds import derive, generator
from fluvial.tensors import Layout, Named, WeightedMean, add, energy, factor, scale, subtract
from fluvial.train import TrainConfig, TrainReport, train

Factors = Literal["A and B", "B"]


class StateStore:
    """What sites keep between rounds: named slots, one version for each round that wrote it.

    A version is written only when the reply that it belongs to was accepted. The version before it stays until the
    next is written, so a run that resumes from the round before finds what the sites held then. `folder=None` keeps
    the bytes in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[Path, bytes] = {}

    def read(self, site: str, slot: str) -> Payload:
        """The newest version, or an empty payload."""
        versions = self._versions(site, slot)
        if not versions:
            return Payload()
        newest = versions[max(versions)]
        return Payload.from_bytes(self._memory[newest] if self.folder is None else newest.read_bytes(), OWN_FILES)

    def file(self, site: str, slot: str) -> Path | None:
        """Where the newest version lies, for a reader that does not want it whole in memory."""
        versions = self._versions(site, slot)
        return versions[max(versions)] if versions and self.folder is not None else None

    def draft(self, site: str, slot: str, payload: Payload) -> Path:
        """Write `payload` to a file that is no version yet; `write` makes it one.

        Every draft has a name of its own: an attempt that is past its deadline may still be writing.
        """
        assert self.folder is not None, "a store in memory has no files"
        path = self._folder(site) / f".{slot}.{secrets.token_hex(8)}.draft"
        write_atomically(path, payload.to_bytes())
        return path

    def write(self, site: str, slot: str, payload: Payload | Path, round: int) -> None:
        """Add a version, a payload or a draft of one, atomically; drop all but the newest of the versions before it."""
        versions = self._versions(site, slot)
        path = self._folder(site) / f"{slot}-{round:06d}.safetensors"
        if isinstance(payload, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            payload.replace(path)
        elif self.folder is None:
            self._memory[path] = payload.to_bytes()
        else:
            write_atomically(path, payload.to_bytes())
        for old in sorted(number for number in versions if number < round)[:-1]:
            self._remove(versions[old])

    def rollback(self, round: int, site: str | None = None) -> None:
        """Forget everything written after `round`, by all sites or by one."""
        paths = list(self._memory) if self.folder is None else list(self.folder.glob("*/*.safetensors"))
        for path in paths:
            mine = site is None or path.parent == self._folder(site)
            if mine and int(path.stem.rsplit("-", 1)[1]) > round:
                self._remove(path)

    def _versions(self, site: str, slot: str) -> dict[int, Path]:
        folder = self._folder(site)
        paths = self._memory if self.folder is None else folder.glob(f"{slot}-*.safetensors")
        pattern = re.compile(rf"{slot}-(\d+)")
        found = ((pattern.fullmatch(path.stem), path) for path in paths if path.parent == folder)
        return {int(match[1]): path for match, path in found if match}

    def _folder(self, site: str) -> Path:
        # A site's name comes from data or from a person; on disk it must not leave the folder nor collide.
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", site).lstrip(".") or "_"
        return (self.folder or Path()) / (plain if plain == site else f"{plain}-{derive(0, site):016x}")

    def _remove(self, path: Path) -> None:
        if self.folder is None:
            del self._memory[path]
        else:
            path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash leaves the old file or the new one; raises `CheckpointError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path} ({len(data)} bytes): {error.strerror}. What was there before is untouched; "
            "free some space and use --resume"
        ) from error


@dataclass
class Site:
    """One site while it answers one message; nothing survives in it but what `keep` puts into the store."""

    name: str
    seed: int
    workbench: Workbench
    load: Callable[[], SiteData]
    train: TrainConfig
    codec: CodecSettings
    method: Any
    """The method's config."""
    downlink: CodecSettings | None
    """How the adapter comes down; None where it comes as it is."""
    store: StateStore
    rounds: int
    """Of the whole run; what a privacy budget is spread over."""
    kept: dict[str, Payload | Path] = field(default_factory=dict)
    """What this answer wants to keep, or the draft of it; stored when the answer is accepted."""

    @property
    def layout(self) -> Layout:
        """Of the whole adapter."""
        return self.workbench.layout

    def recall(self, slot: str) -> Payload:
        """What the site kept under `slot`, or an empty payload."""
        kept = self.kept.get(slot)
        if isinstance(kept, Path):
            return Payload.from_bytes(kept.read_bytes(), OWN_FILES)
        return self.store.read(self.name, slot) if kept is None else kept

    def keep(self, slot: str, payload: Payload, *, draft: bool = False) -> None:
        """Keep `payload` under `slot` once this answer is accepted; a `draft` lies in a file until then."""
        self.kept[slot] = self.store.draft(self.name, slot, payload) if draft and self.store.folder else payload

    def file(self, slot: str) -> Path | None:
        """The file with what the site kept under `slot`, where there is one."""
        kept = self.kept.get(slot)
        return kept if isinstance(kept, Path) else self.store.file(self.name, slot)


Task = Callable[[Site, Payload], Payload]


def adapter_message(adapter: Named, **values: Any) -> Payload:
    """An exact adapter on the wire: one packed frame, because every named tensor would cost a header."""
    return frame_payload(Identity.of(Layout.of(adapter)).encode(adapter), **values)


def read_adapter_message(message: Payload, layout: Layout) -> Named:
    """Inverse of `adapter_message`; raises `WireError` for another layout."""
    return Identity.of(layout).decode(payload_frame(message))


def part(layout: Layout, factors: Factors) -> Layout:
    """The layout of what is trained and sent."""
    return layout if factors == "A and B" else Layout(tuple(s for s in layout.shapes if factor(s[0]) == "B"))


def train_locally(
    site: Site,
    received: Named,
    round: int,
    *,
    examples: Sequence[Example],
    factors: Factors = "A and B",
    purpose: str = "train",
) -> tuple[Named, TrainReport]:
    """Tune from the state `received` on `examples`; returns the update (trained - received) of `factors`."""
    bench = site.workbench
    start = bench.weights(received)
    with bench.model(received, trainable=factors, checkpointing=site.train.gradient_checkpointing) as model:
        report = train(
            model,
            examples,
            site.train,
            pad_token_id=bench.tokenizer.pad_token_id,
            generator=generator(site.seed, purpose, round, site.name),
            start=start,
        )
    return subtract(report.weights, start), report


def site_codec(site: Site, layout: Layout) -> Codec:
    """The codec of this run: built from its settings, or as it was installed."""
    if not must_learn(site.codec):
        return build(site.codec, layout)
    installed = site.recall("codec")
    if not installed.values:
        raise WireError(f"site {site.name!r} was asked to train before its codec was installed")
    settings = read_settings(installed.value("settings", dict))
    kind = CODECS[settings.name]
    if not issubclass(kind, LearnedCodec):
        return build(settings, layout)
    return kind.from_published(settings, layout, Payload(installed.tensors, installed.value("learned", dict)))


def install_codec(site: Site, message: Payload) -> Payload:
    """Task: keep the codec that the server learned or chose."""
    site.keep("codec", message)
    return Payload()


def code(
    site: Site, codec: Codec, update: Named, round: int, *, step: float | None = None, slot: str = "residual"
) -> bytes:
    """The frame for `update`. With error feedback the residual is added first, and what the codec lost is kept.

    u = update + decay^missed * residual; sent Q(u); residual = u - Q(u), after Seide et al. (2014) and Karimireddy
    et al. (2019). `missed` counts the rounds since the residual was made in which the site did not take part. With
    `step`, the codec quantises by that instead of by its rate. The residual is kept under `slot`.
    """
    encode: Callable[..., bytes] = codec.encode
    if step is not None:
        assert isinstance(codec, SteppedCodec), "the server sets a step for codecs that have one"
        encode = partial(codec.encode_at, step=step)
    encode = partial(encode, seed=derive(site.seed, "codec", round, site.name), round=round)
    if not codec.settings.error_feedback:
        return encode(update)
    kept = site.recall(slot)
    if kept.tensors:
        codec.layout.check(kept.tensors, "residual")
        missed = max(0, round - kept.value("round", int) - 1)
        update = add(update, scale(kept.tensors, codec.settings.feedback_decay**missed))
    frame = encode(update)
    residual = subtract(update, codec.decode(frame))
    error = energy(residual) / max(energy(update), 1e-30)
    site.keep(slot, Payload(residual, {"round": round, "error": error}))
    return frame


def evaluate(site: Site, message: Payload) -> Payload:
    """Task: held-out sums of the adapter that was sent, of the site's own, or of the base.

    Values in: `which` is "sent", "own" or "base"; `generate` is the number of tokens for exact match, or 0.
    Values out: `loss_sum`, `hits`, `tokens`, and with `generate` on data with answers `right` and `questions`.
    """
    which = message.value("which", str)
    bench, data = site.workbench, site.load()
    if which == "sent":
        adapter = read_adapter_message(message, site.layout)
    elif which == "own":
        adapter = site.recall("adapter").tensors or initial_state(site.layout, site.seed)
    elif which == "base":
        adapter = bench.base_state()
    else:
        raise WireError(f"evaluate: which={which!r:.40}, expected 'sent', 'own' or 'base'")
    with bench.model(adapter) as model:
        sums = heldout(model, data.heldout, pad_token_id=bench.tokenizer.pad_token_id)
    values: dict[str, Any] = {"loss_sum": sums.loss_sum, "hits": sums.hits, "tokens": sums.label_tokens}
    new_tokens = message.value("generate", int)
    if new_tokens and data.questions:
        prompts = [question.prompt for question in data.questions]
        answers = bench.generate(adapter, prompts, max_new_tokens=new_tokens)
        values["right"] = exact_match(answers, [question.answer for question in data.questions])
        values["questions"] = len(answers)
    return Payload(values=values)


def heldout_of(reply: Payload) -> Heldout:
    """The sums in a reply of `evaluate`."""
    sums = Heldout(reply.value("loss_sum", float), reply.value("hits", int), reply.value("tokens", int))
    if sums.label_tokens < 1:
        raise WireError("evaluate: a site measured nothing")
    return sums


def weight_of(reply: Payload) -> int:
    """The sample count in a reply, a whole number from 1 to 2^31."""
    samples: int = reply.value("n", int)
    if not 1 <= samples <= 2**31:
        raise WireError(f"sample count n={samples} is out of range")
    return samples


def read_update(reply: Payload, codec: Codec, round: int) -> tuple[Named, int]:
    """The decoded update of `round` in a reply and its weight, checked for the mean; raises `WireError`."""
    update, weight = codec.decode(payload_frame(reply), round=round), weight_of(reply)
    WeightedMean.check(update, weight)
    return update, weight


def refuse_learned(settings: CodecSettings, method: str) -> None:
    """Raise `ConfigError` if the codec needs a fit that `method` does not do."""
    name: str = settings.name
    if must_learn(settings):
        raise ConfigError(
            f"codec.name={name!r} learns from updates, which method {method!r} does not collect; use 'fedavg' or "
            "'cgfedllm'"
        )


COMMON_TASKS: dict[str, Task] = {"evaluate": evaluate, "install": install_codec}
