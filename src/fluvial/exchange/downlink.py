"""The downlink: the exact adapter, or a coded difference to the adapter that a site holds.

With a codec, the server keeps the adapter that the sites hold, codes its difference to the global
adapter, and adds the decoded difference to it. The loss of one round is part of the next round's
difference, so errors do not accumulate (error feedback at the server; EF21-P of Gruntkowska et al.,
ICML 2023, whose server keeps all its state). A site that was absent receives the frames that it
missed, or the exact adapter if that is shorter. A factor A that is frozen does not change, and no
frame has it.

With and without a codec, the adapter of round 1 is the start, which is not sent (see `start`).
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from fluvial.codecs import CodecSettings, build
from fluvial.codecs.naming import configured_in
from fluvial.errors import ConfigError, WireError
from fluvial.exchange.coding import Plain
from fluvial.exchange.difference import REFERENCE, Difference
from fluvial.exchange.gathering import STALE, START
from fluvial.exchange.start import adapter_or_start, checked_start, start_message
from fluvial.federation.sites import (
    Sent,
    Site,
    adapter_message,
    factor_layout,
    read_adapter_message,
)
from fluvial.models.adapters import is_side
from fluvial.models.states import digest, initial_state
from fluvial.seeds import derive
from fluvial.wire.payload import Payload, Value, frame_payload, join, payload_frame, split
from fluvial.wire.tensors import Layout, Named, factor

_SLOT = "received"
"""Slot of a site for the adapter that it received last."""


def coded_layout(layout: Layout, factors: Sent) -> Layout:
    """Return the layout of what a frame has, for sites that receive `layout`: not the frozen A of
    `factors` "B". A side path is frozen at the sites, but changes from round to round."""
    if factors != "B":
        return layout
    return Layout(tuple(s for s in layout.shapes if is_side(s[0]) or factor(s[0]) != "A"))


def received_layout(layout: Layout, factors: Sent) -> Layout:
    """Return the layout of what sites receive, for an adapter of `layout`: not what each of them
    keeps, which is its own B beside "A", and the fixed factors around "R"."""
    return factor_layout(layout, factors) if factors in ("A", "R") else layout


class Downlink:
    """Server half: one reference for all sites, and the frames that lead to it from older
    versions."""

    def __init__(
        self,
        settings: CodecSettings | None,
        seed: int,
        adapter: Named,
        factors: Sent = "A and B",
    ) -> None:
        """Begin with `adapter`, version 0, which every site makes from the seed.

        `factors` are those that sites send.
        """
        self.seed = seed
        self.layout = Layout.of(adapter)
        with configured_in("downlink"):
            coded = coded_layout(self.layout, factors)
            codec = None if settings is None else build(settings, coded)
        self.coder = None if codec is None else Difference(Plain(codec))
        self.start = digest(adapter)
        """Digest of version 0."""
        self.starting = False
        """True in a round in which sites receive version 0, without a codec."""
        self.reference = adapter
        self.version = 0
        self.frames: dict[int, bytes] = {}
        self.oldest = 0
        """Oldest version from which the frames lead to the reference."""
        self.holds: dict[str, int] = {}
        """Version that each site has acknowledged; 0 for a site not listed."""
        self._messages: dict[int, Payload] = {}

    def advance(self, adapter: Named, round: int) -> None:
        """Make `adapter`, or its coded image, what sites of `round` receive.

        Raises `ConfigError` for an adapter in which a frozen factor has changed.
        """
        self._messages = {}
        if self.coder is None:
            self.reference = adapter
            self.starting = round == 1 and digest(adapter) == self.start
            return

        if round <= self.version or round == 1:  # asked again, or version 0 is the adapter
            return

        seed = derive(self.seed, "downlink", round)
        names = self.coder.layout.names
        frozen = self.reference.keys() - set(names)
        for name in sorted(frozen):
            if not torch.equal(adapter[name], self.reference[name]):
                raise ConfigError(
                    f"[downlink]: {name!r} has changed, which the method's factors='B' freeze"
                )

        state = {REFERENCE: Payload(_chosen(self.reference, names))}
        frame, after = self.coder.encode(_chosen(adapter, names), state, seed=seed, round=round)
        self.reference = self.reference | after[REFERENCE].tensors
        self.version = round
        self.frames[round] = frame

        while sum(map(len, self.frames.values())) > self.layout.raw_bytes:
            self.oldest = min(self.frames)
            del self.frames[self.oldest]

    def message(self, site: str, values: Mapping[str, Value]) -> Payload:
        """Return what `site` needs to hold the reference.

        Sites that hold the same version share one message.
        """
        base = self.holds.get(site, 0)
        if self.coder is None:
            if self.starting and base == 0:
                return self._shared(0, lambda: start_message(self.start, values))
            return self._shared(-1, lambda: adapter_message(self.reference, **values))

        if base < self.oldest:
            return self._shared(
                -1, lambda: adapter_message(self.reference, version=self.version, **values)
            )

        frames = [frame for version, frame in sorted(self.frames.items()) if version > base]
        marks: dict[str, Value] = {
            "base": base,
            "version": self.version,
            "sizes": [len(frame) for frame in frames],
        }
        if base == 0:
            marks[START] = self.start
        return self._shared(base, lambda: _frames_payload(frames, {**values, **marks}))

    def _shared(self, key: int, make: Callable[[], Payload]) -> Payload:
        if key not in self._messages:
            self._messages[key] = make()
        return self._messages[key]

    def acknowledge(self, site: str) -> None:
        """Note that `site` has answered the last message."""
        if self.coder is not None:
            self.holds[site] = self.version

    def forget(self, sites: Iterable[str]) -> None:
        """Note that these sites hold nothing; the next message brings them the exact adapter."""
        self._messages = {}
        for site in sites:
            self.holds[site] = -1

    def state(self) -> Payload:
        """Return the reference, the frames, and the version that each site holds.

        Without a codec it is empty, because the adapter is the reference.
        """
        if self.coder is None:
            return Payload()

        frames = {
            str(version): torch.frombuffer(bytearray(frame), dtype=torch.uint8)
            for version, frame in self.frames.items()
        }
        values: dict[str, Value] = {
            "version": self.version,
            "oldest": self.oldest,
            "holds": dict(self.holds),
        }
        return join({"reference": Payload(self.reference), "frames": Payload(frames, values)})

    def restore(self, state: Payload) -> None:
        """Become the downlink whose `state` this was."""
        if self.coder is None:
            return

        halves = split(state, ("reference", "frames"))
        self.layout.check(halves["reference"].tensors, "checkpoint")
        self.reference = halves["reference"].tensors

        frames = halves["frames"]
        self.frames = {
            int(version): tensor.numpy().tobytes() for version, tensor in frames.tensors.items()
        }
        self.version = frames.value("version", int)
        self.oldest = frames.value("oldest", int)
        self.holds = frames.value("holds", dict)


def _chosen(adapter: Named, names: Iterable[str]) -> Named:
    return {name: adapter[name] for name in names}


def receive(site: Site, message: Payload, factors: Sent = "A and B") -> Named | Payload:
    """Return, at a site that sends `factors`, the adapter that `message` brings, and keep it.

    Return the site's answer, `STALE` or `OTHER_START`, if it builds on what the site lacks.
    """
    layout = received_layout(site.layout, factors)
    if site.downlink is None:
        if START in message.values and message.value("round", int) != 1:
            raise WireError("only round 1 begins with a start")
        return adapter_or_start(site, message, layout)

    version = message.whole("version", 0, site.rounds)
    if "base" not in message.values:
        received = read_adapter_message(message, layout)
    else:
        held = _held(site, layout, message)
        if isinstance(held, Payload):
            return held

        received = held
        coder = Difference(Plain(build(site.downlink, coded_layout(layout, factors))))
        for frame in _split_frames(message):
            before = _chosen(received, coder.layout.names)
            received = received | coder.decode(frame, {REFERENCE: Payload(before)})

    site.keep(_SLOT, Payload(received, {"version": version}))
    return received


def _held(site: Site, layout: Layout, message: Payload) -> Named | Payload:
    """Return the adapter that the frames of `message` build on, or the site's answer where it holds
    another or none."""
    version = message.whole("base", 0, site.rounds)
    stored = site.recall(_SLOT)
    kept = bool(stored.tensors) and stored.value("version", int) == version
    if version == 0:  # what is kept may be the start of an earlier plan
        kept = kept and Layout.of(stored.tensors) == layout
        start = stored.tensors if kept else initial_state(layout, site.seed)
        return checked_start(site, message, start)

    if not kept:
        return STALE
    layout.check(stored.tensors, "the adapter that the site keeps")
    return stored.tensors


def _frames_payload(frames: list[bytes], values: dict[str, Value]) -> Payload:
    return frame_payload(b"".join(frames), **values) if frames else Payload(values=values)


def _split_frames(message: Payload) -> list[bytes]:
    sizes = message.value("sizes", list)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise WireError(f"adapter: sizes of frames {sizes!r:.60} are not whole numbers above 0")
    if not sizes:
        return []

    joined = payload_frame(message)
    if sum(sizes) != len(joined):
        raise WireError(f"adapter: frames of {sum(sizes)} bytes were announced, {len(joined)} came")

    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [joined[end - size : end] for end, size in zip(ends, sizes, strict=True)]
