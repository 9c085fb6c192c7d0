"""A site's failure, and the texts about it, which come from outside."""

from dataclasses import dataclass

from fluvial.formatting import safe_line


@dataclass(frozen=True)
class Failure:
    """A site that raised, stayed silent or sent what cannot be used."""

    site: str
    round: int
    task: str
    reason: str
    bytes_down: int
    """Bytes of the message that was in vain."""
    bytes_up: int = 0
    """Bytes of the text with which the site reported its error, or of the answer that was
    refused."""
    asked_again: bool = False
    """True where the site was asked again, so that it may have answered after all."""

    def __post_init__(self) -> None:
        """Replace a reason without any words, as a site may send it."""
        if not self.reason.strip():
            object.__setattr__(self, "reason", "it gave no reason")

    def record(self) -> dict[str, str]:
        """Return the failure as a round's record has it, with the last line of its reason."""
        reason = self.reason.strip().splitlines()[-1]
        return {"site": self.site, "task": self.task, "reason": reason}


def unreadable(problem: Exception) -> str:
    """Return one line about an answer that could not be read, without control characters."""
    return reason_of(f"{type(problem).__name__}: {problem}")


def reason_of(text: str) -> str:
    """Return a text from outside in one safe line of at most 1000 characters."""
    return safe_line(" ".join(text.split()))[:1000]
