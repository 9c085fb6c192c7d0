"""The refusal of a site that no plan fits: the limit that binds, with numbers and a remedy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fluvial.formatting import human_bytes, human_seconds
from fluvial.methods.fedpipe.planner.decision import Models, Planner, Room

Limit = Literal["base", "activations", "link", "deadline"]


@dataclass(frozen=True)
class Alternative:
    """Another method, and the memory that a site needs for it."""

    method: str
    bytes: int
    why: str
    """The weights that are at the site, such as "one block of the model"."""


@dataclass(frozen=True)
class Refusal:
    """The reason why no plan fits a site."""

    site: str
    limit: Limit
    needed: float
    """Bytes or seconds, of the setting that needs least."""
    available: float
    words: str
    """The limit, its figures, and the remedy."""
    fitting: tuple[Alternative, ...] = ()
    """Other methods that fit the site's memory, the preferred ones first."""

    def __str__(self) -> str:
        """Return the refusal as one line."""
        if not self.fitting:
            return f"site {self.site!r}: {self.words}"
        other = self.fitting[0]
        return (
            f"site {self.site!r}: {self.words}; or use method {other.method!r}, which has "
            f"{other.why} at the site and needs {human_bytes(other.bytes)}"
        )


def refusal(
    planner: Planner,
    site: str,
    models: Models,
    deadline_s: float | None,
    alternatives: Sequence[Alternative] = (),
) -> Refusal:
    """Return why no plan fits a site; `alternatives` are other methods, the preferred ones first.

    The limits are taken one after another: the base in its smallest format, then activations of the
    smallest pass and the smallest adapter, then the messages of the fastest setting that memory
    allows, then its whole round.
    """
    least = planner.least
    memory = models.profile.memory_bytes
    fitting = tuple(other for other in alternatives if other.bytes <= memory)
    smallest = min(planner.formats, key=lambda format: (models.memory.base(format), format.name))
    base = models.memory.base(smallest) + models.memory.reserve

    if base > memory:
        remedy = "raise method.budgets.memory_mb, or add a smaller format to method.planner.formats"
        words = (
            f"the base in format {smallest.name} needs {human_bytes(base)} with the reserve of "
            f"{human_bytes(models.memory.reserve)}, more than its {human_bytes(memory)}; {remedy}"
        )
        return Refusal(site, "base", base, memory, words, fitting)

    if models.profile.unmeasured:
        adapted = base + models.memory.lora_bytes * models.time.lora_measured
        words = (
            f"base and smallest adapter of all weights need {human_bytes(adapted)} before a pass, "
            f"more than its {human_bytes(memory)}, so that no speed was measured; raise "
            "method.budgets.memory_mb, or set method.budgets.tokens_s"
        )
        return Refusal(site, "activations", adapted, memory, words, fitting)

    rooms = list(planner.rooms(models, deadline_s))
    if all(room.memory < least for room in rooms):
        room, needed = min(
            ((room, planner.memory_bytes(models, room.setting, least)) for room in rooms),
            key=lambda pair: pair[1],
        )
        setting = room.setting
        remedies = ["shorten data.max_length"]
        if setting.batch > 1:
            remedies.append("allow smaller method.planner.batches")
        if planner.settings.checkpointing == "never":
            remedies.append("allow method.planner.checkpointing")
        words = (
            f"a pass of {setting.batch} x {setting.length} tokens over the base in format "
            f"{setting.format} needs {human_bytes(needed)} with activations, more than its "
            f"{human_bytes(memory)}; {', '.join(remedies)}, or raise method.budgets.memory_mb"
        )
        return Refusal(site, "activations", needed, memory, words, fitting)

    assert deadline_s is not None, "a plan fits"
    allowed_s = deadline_s / planner.settings.safety
    room = min(
        (room for room in rooms if room.memory >= least), key=lambda room: room.most_seconds(least)
    )
    total_s = room.most_seconds(least)
    link_s = _link_s(models, room, least)

    if link_s > allowed_s:
        words = (
            f"the messages of the smallest adapter take {human_seconds(link_s)} at rate "
            f"{room.setting.rate}, more than the {human_seconds(allowed_s)} that the deadline "
            "allows; choose a codec of a higher rate, or raise method.deadline_s"
        )
        return Refusal(site, "link", link_s, allowed_s, words)

    steps = room.setting.steps
    batch = room.setting.batch
    remedy = "lower train.max_steps or train.num_train_epochs"
    if min(planner.settings.eighths) > 1:
        remedy = f"allow fewer method.planner.eighths, {remedy}"
    if steps == 1:
        remedy = "shorten data.max_length"
    words = (
        f"{steps} step{'s' if steps > 1 else ''} of {batch} sequence{'s' if batch > 1 else ''} "
        f"take{'' if steps > 1 else 's'} {human_seconds(total_s)}, more than the "
        f"{human_seconds(allowed_s)} that the deadline allows; {remedy}, or raise "
        "method.deadline_s"
    )
    return Refusal(site, "deadline", total_s, allowed_s, words)


def _link_s(models: Models, room: Room, lora: int) -> float:
    """Return the seconds of the messages of an adapter of one module."""
    return models.time.seconds(
        models.profile,
        room.format,
        room.wire,
        batch=room.setting.batch,
        tokens=0,
        checkpointing=room.setting.checkpointing,
        lora=lora,
        modules=1,
    ).link_s
