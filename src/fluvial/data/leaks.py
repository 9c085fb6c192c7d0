"""Held-out text that is also trained on, which makes a held-out loss too low."""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

from fluvial.data.examples import Example
from fluvial.data.faults import shown

MOST = 5
"""Sites that a remark names."""


class Leaks:
    """Sequences of all sites by a digest of their tokens and labels; 16 bytes for each are kept."""

    def __init__(self) -> None:
        self._trained: set[bytes] = set()
        self._heldout: dict[str, list[bytes]] = {}

    def add(self, site: str, train: Iterable[Example], heldout: Iterable[Example]) -> None:
        """Add the sequences of one site, those that `max_heldout` leaves out apart."""
        self._trained |= {digest(example) for example in train}
        self._heldout[site] = [digest(example) for example in heldout]

    def by_site(self) -> dict[str, int]:
        """Return the held-out sequences of each site, token by token equal to one that any site
        trains on."""
        counts = {
            name: sum(each in self._trained for each in digests)
            for name, digests in self._heldout.items()
        }
        return {name: count for name, count in counts.items() if count}

    def remarks(self, table: str = "data") -> list[str]:
        """Return a remark on what leaks, or none; `table` has the setting of the held-out records,
        and in its name {} stands for a site."""
        leaked = self.by_site()
        if not leaked:
            return []

        total = sum(map(len, self._heldout.values()))
        settings = dict.fromkeys(f"{table.format(name)}.heldout_source" for name in _worst(leaked))
        return [
            f"{sum(leaked.values())} of {total} held-out sequences are also trained on, token by "
            f"token: held-out measures are too good ({_listed(leaked)}); remove the duplicates, or "
            f"name other records in {', '.join(settings)}"
        ]


def digest(example: Example) -> bytes:
    """Return a digest of what is read and what is learned."""
    text = f"{_numbers(example.input_ids)};{_numbers(example.labels)}"
    return blake2b(text.encode(), digest_size=16).digest()


def _numbers(tokens: Sequence[int]) -> str:
    return ",".join(map(str, tokens))


def _worst(counts: Mapping[str, int]) -> list[str]:
    """Return the sites of the largest counts, of at most `MOST`."""
    return sorted(counts, key=lambda name: (-counts[name], name))[:MOST]


def _listed(counts: Mapping[str, int]) -> str:
    """Return the worst sites with their counts."""
    words = [f"{shown(name)}: {counts[name]}" for name in _worst(counts)]
    more = f" and {len(counts) - MOST} more sites" if len(counts) > MOST else ""
    return ", ".join(words) + more
