"""Run attacks on held-out text, and say in one sentence how much the server could read.

A token counts as read where an attack names it at its position. Tokens with which all texts of a
site begin, such as BOS or those of a template, are known beforehand and do not count. ROUGE is
that of the decoded text, mean over texts, beside token accuracy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean

from torch import Tensor

from fluvial.training.rouge import Rouge, rouge, rouge_of_ids

GRADIENTS = "gradient matching"
"""Name of the attack on gradients."""


@dataclass(frozen=True)
class Observation:
    """All that the server saw of one text, and the text."""

    ids: Tensor
    """Token ids (tokens,), for the comparison only."""
    hidden: Tensor
    """The site's hidden states h_A as received, (tokens, width)."""
    middle: Tensor | None = None
    """The server's own hidden states h_B, (tokens, width); None where no gradient was sent."""
    gradient: Tensor | None = None
    """dL/dh_B as received, (tokens, width)."""


Attack = Callable[[Observation], Tensor]
"""Token ids (tokens,) read from an observation, -1 where nothing was read."""


@dataclass(frozen=True)
class Reading:
    """Success of one attack, each figure from 0 to 1."""

    attack: str
    accuracy: float
    """Tokens read, of all that count."""
    rouge_1: float
    rouge_2: float
    rouge_l: float


@dataclass(frozen=True)
class Leakage:
    """Success of all attacks on the same texts."""

    texts: int
    tokens: int
    """Tokens that count."""
    uncounted: int
    """Tokens that do not, because all texts of a site begin with them."""
    readings: tuple[Reading, ...]

    @property
    def worst(self) -> Reading:
        """Return the reading of the attack that named most tokens."""
        return max(self.readings, key=lambda reading: reading.accuracy)

    @property
    def sentence(self) -> str:
        """Return the verdict for a summary: the worst attack's figure, on hidden states and on
        gradients apart where both were attacked, and how many tokens do not count."""
        if not self.uncounted:
            return self._verdict
        return (
            f"{self._verdict}; {self.uncounted} of {self.uncounted + self.tokens} are not counted, "
            "because all texts of a site begin with them"
        )

    @property
    def _verdict(self) -> str:
        on_gradients = [each for each in self.readings if each.attack == GRADIENTS]
        on_hidden = [each for each in self.readings if each.attack != GRADIENTS]
        if not on_gradients or not on_hidden:
            worst = self.worst
            return f"the server could read {_share(worst)} of the tokens ({worst.attack})"

        hidden = max(on_hidden, key=lambda reading: reading.accuracy)
        return (
            f"the server could read {_share(hidden)} of the tokens from hidden states "
            f"({hidden.attack}), {_share(on_gradients[0])} from gradients"
        )

    def to_values(self, most: float | None = None) -> dict[str, object]:
        """Return plain values for result.json, beside a bound where the run has one."""
        values = self._to_values()
        if most is None:
            return values

        within = self.worst.accuracy <= most
        words = "within" if within else "BEYOND"
        sentence = f"{self.sentence}; {words} method.leakage.most={most:g}"
        return values | {"most": most, "within": within, "sentence": sentence}

    def _to_values(self) -> dict[str, object]:
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "uncounted": self.uncounted,
            "worst": self.worst.attack,
            "accuracy": self.worst.accuracy,
            "sentence": self.sentence,
            "attacks": [asdict(reading) for reading in self.readings],
        }


def beyond_bound(leakage: Leakage, most: float | None) -> str | None:
    """Return why a run stops, where a server could read more than the share `most`; else None."""
    if most is None or leakage.worst.accuracy <= most:
        return None
    return (
        f"{leakage.sentence}, and method.leakage.most={most:g} allows less; the run stops here. "
        "Raise the noise or the bound, or use another method"
    )


def _share(reading: Reading) -> str:
    """Return the share of tokens that an attack read."""
    share = f"{100 * reading.accuracy:.0f} %"
    if reading.accuracy < 1 and share == "100 %":
        share = "more than 99 %"

    return share


def measure(
    observations: Sequence[Observation],
    attacks: Mapping[str, Attack],
    decode: Callable[[list[int]], str] | None = None,
) -> Leakage:
    """Return the success of `attacks` on `observations`, at least one of each.

    `decode` turns ids into text for ROUGE; without it, ROUGE is that of token ids.
    """
    known = common_beginning([observation.ids for observation in observations])
    readings = []
    tokens = sum(len(observation.ids) - known for observation in observations)

    for name, attack in attacks.items():
        right = 0
        overlaps = []

        for observation in observations:
            read = attack(observation)[known:]
            sent = observation.ids[known:]
            right += int((read == sent).sum())
            overlaps.append(_overlap(read, sent, decode))

        rouge = [mean(values) for values in zip(*overlaps, strict=True)]
        readings.append(Reading(name, right / tokens, *rouge))

    return Leakage(len(observations), tokens, known * len(observations), tuple(readings))


def common_beginning(texts: Sequence[Tensor]) -> int:
    """Return how many leading tokens all texts share; 0 for a single text.

    One token of the shortest text always counts.
    """
    if len(texts) < 2:
        return 0

    length = min(map(len, texts))
    for index in range(length - 1):
        if len({int(ids[index]) for ids in texts}) > 1:
            return index

    return length - 1


def _overlap(read: Tensor, sent: Tensor, decode: Callable[[list[int]], str] | None) -> Rouge:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L of two texts of token ids."""
    ours: list[int] = read[read >= 0].tolist()
    theirs: list[int] = sent.tolist()
    if decode is None:
        return rouge_of_ids(ours, theirs)

    return rouge(decode(ours), [decode(theirs)])
