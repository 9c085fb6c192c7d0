"""Seconds of the parts of a round: those that sites report of their work, and the server's own.

The time from a message to its answer is `download + training + coding + other + transfer`. A site
reports the first three and all of its work, and the rest follows. `transfer` is what the server
waits beside that work: the upload, and polls at both ends. A conversation's `transfer` also has
what the server does on its turns.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from fluvial.errors import WireError
from fluvial.federation.meter import APART

Part = Literal["work", "training", "coding", "decoding", "waiting", "download"]
REPORTED: tuple[Part, ...] = ("work", "training", "coding", "download")
"""Parts that a site reports, in the order in which a reply has them. `work` is all of its work."""
MOST_S = 1e8
"""Seconds that a site may report, at most."""
Seconds = dict[str, float]


@dataclass
class Stopwatch:
    """Seconds by part."""

    seconds: Seconds = field(default_factory=dict)

    @contextmanager
    def time(self, part: Part) -> Iterator[None]:
        """Add the seconds that pass meanwhile to `part`."""
        since_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - since_s)

    def add(self, part: Part, seconds: float) -> None:
        """Add seconds to `part`."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds


def to_list(seconds: Mapping[str, float]) -> list[float]:
    """Return the seconds of `REPORTED`, as a reply has them."""
    return [float(seconds.get(part, 0.0)) for part in REPORTED]


def read_list(value: object) -> Seconds:
    """Return the seconds of a reply by part, none where it has none; raise `WireError`."""
    if value is None:
        return {}
    if not isinstance(value, list) or len(value) != len(REPORTED):
        raise WireError(f"header: times={value!r:.40}, expected {len(REPORTED)} numbers")
    for seconds in value:
        if type(seconds) is not float or not 0 <= seconds <= MOST_S:
            raise WireError(f"header: times={value!r:.40}, expected seconds up to {MOST_S:g}")

    return dict(zip(REPORTED, value, strict=True))


@dataclass
class RoundTimes:
    """Seconds of the current round, of each site and of the server."""

    server: Stopwatch = field(default_factory=Stopwatch)
    by_site: dict[str, Seconds] = field(default_factory=dict)

    def answered(self, site: str, task: str, seconds: float, reported: Mapping[str, float]) -> None:
        """Take note of an answer that came `seconds` after its message.

        Measuring is one part; so is the whole of a site that reports nothing.
        """
        if task in APART:
            parts = {"measuring": seconds}
        elif reported:
            own = {part: reported.get(part, 0.0) for part in ("download", "training", "coding")}
            other = reported.get("work", 0.0) - own["training"] - own["coding"]
            own["other"] = max(other, 0.0)
            parts = own | {"transfer": max(seconds - math.fsum(own.values()), 0.0)}
        else:
            parts = {"unreported": seconds}

        row = self.by_site.setdefault(site, {})
        for part, each in parts.items():
            row[part] = row.get(part, 0.0) + each

    def close_round(self) -> dict[str, dict[str, Any]]:
        """Return the seconds since the last call: `server`, and `sites` by name."""
        closed: dict[str, dict[str, Any]] = {
            "server": _rounded(self.server.seconds),
            "sites": {site: _rounded(parts) for site, parts in self.by_site.items()},
        }
        self.server = Stopwatch()
        self.by_site = {}
        return closed


def _rounded(seconds: Mapping[str, float]) -> Seconds:
    return {part: round(each, 4) for part, each in seconds.items()}
