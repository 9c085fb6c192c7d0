"""Settings of the leakage meter of a run."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fluvial.settings import Settings


class LeakageConfig(Settings):
    """Attacks of a site on its own hidden states and gradients, as a server could run them."""

    sites: Literal["first", "all", "none"] = "first"
    """Sites that run the attacks: the first, all of them, or none, which switches the meter off."""
    every: int = Field(0, ge=0, le=10**6)
    """Rounds from one measure to the next; 0 measures at the end only."""
    texts: int = Field(4, ge=1, le=10**4)
    """Held-out texts of a site that are attacked."""
    tokens: int = Field(16, ge=2, le=10**4)
    """Tokens of each text, from its beginning, or around its first label where the beginning has
    none; each costs a search of the vocabulary."""

    most: float | None = Field(None, gt=0, le=1)
    """Share of the tokens that the server may read. A cut and noise under which more was read where
    it was measured are refused. The run's own meter then measures the base before training, too; a
    run of which it reads more stops there, or at a later measure, and says so at its end."""

    def audits(self, rounds: int) -> int:
        """Return the number of measures in a run of `rounds` rounds."""
        if self.sites == "none":
            return 0
        before = 0 if self.most is None else 1
        return before + 1 + ((rounds - 1) // self.every if self.every else 0)

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.sites == "none":
            for name in sorted(self.model_fields_set - {"sites"}):
                yield f"{name}: without effect, because sites='none'; remove it"
