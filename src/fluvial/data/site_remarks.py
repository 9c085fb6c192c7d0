"""Remarks on the tokens and questions of sites, for the person who reads `check`."""

from collections.abc import Mapping

from fluvial.data.faults import listed, shown
from fluvial.data.tokenise import Tokenized
from fluvial.models.hf import PreTrainedTokenizerBase

MOST_SITES = 8
"""Sites that a remark names with their counts."""


def unasked(questions: Mapping[str, int]) -> list[str]:
    """Return a remark on sites without questions beside others that have some; `questions` has the
    number of each site."""
    without = [name for name, count in questions.items() if not count]
    if not without or len(without) == len(questions):
        return []
    return [
        f"no exact match of the run, since held-out records of {listed(without)} have no question: "
        "plain text, or conversations without a last turn of the assistant after another turn"
    ]


class Unknown:
    """Counts of records with characters that the tokenizer does not know."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._token = str(tokenizer.unk_token)
        self._sites: dict[str, tuple[int, int]] = {}

    def add(self, site: str, *tokenized: Tokenized) -> None:
        """Count the records of a site."""
        unknown = sum(each.unknown for each in tokenized)
        if unknown:
            self._sites[site] = unknown, sum(each.records for each in tokenized)

    def remarks(self) -> list[str]:
        """Return a remark with the counts of the sites, or none."""
        if not self._sites:
            return []
        counts = [
            f"{number:,} of {records:,} at site {shown(name)}"
            for name, (number, records) in self._sites.items()
        ]
        more = ", ..." if len(counts) > MOST_SITES else ""
        return [
            f"records with characters that this tokenizer does not know, each of which becomes "
            f"{self._token!r}: {', '.join(counts[:MOST_SITES])}{more}; the model cannot tell these "
            "characters apart"
        ]
