"""Remarks on the tokens and questions of sites, for the person who reads `check`."""

from collections.abc import Iterable, Mapping

from fluvial.data.examples import Question
from fluvial.data.faults import listed, shown
from fluvial.data.tokenise import Tokenized
from fluvial.models.encoding import Encoder
from fluvial.models.ends import End, Rendered, answer_text
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


def end_ids(questions: Iterable[Question], eos: int) -> frozenset[int]:
    """Return the tokens that end the answers to `questions` where they are trained: those of their
    chat template, or EOS, which also stands where there is no question."""
    prompts = [question.asked for question in questions]
    ends = [prompt.end.ids if isinstance(prompt, Rendered) else {eos} for prompt in prompts]
    return frozenset().union(*ends or [{eos}])


class Counts:
    """Counts of records or questions, by site."""

    def __init__(self) -> None:
        self._sites: dict[str, tuple[int, int]] = {}

    def add(self, site: str, number: int, of: int) -> None:
        """Count `number` of the `of` of a site."""
        if number:
            self._sites[site] = number, of

    def words(self) -> str:
        """Return the counts of the sites in words; "" where there are none."""
        counts = [
            f"{number:,} of {of:,} at site {shown(name)}"
            for name, (number, of) in self._sites.items()
        ]
        more = ", ..." if len(counts) > MOST_SITES else ""
        return f"{', '.join(counts[:MOST_SITES])}{more}"


class Written:
    """Counts of records with characters that the tokenizer does not know, of expected answers that
    it cannot write, and of those that nothing ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._encoder = Encoder.of(tokenizer)
        self._unknown = Counts()
        self._unwritable = Counts()
        self._endless = Counts()

    def add(self, site: str, train: Tokenized, heldout: Tokenized, asked: list[Question]) -> None:
        """Count the records of a site, and the questions that it is asked."""
        unknown = train.unknown + heldout.unknown
        self._unknown.add(site, unknown, train.records + heldout.records)
        self._unwritable.add(site, sum(map(self._cannot_match, asked)), len(asked))
        self._endless.add(site, sum(map(_is_endless, asked)), len(asked))

    def remarks(self) -> list[str]:
        """Return a remark for each kind that was counted."""
        remarks = []
        if counts := self._unknown.words():
            remarks.append(
                "records with characters that this tokenizer does not know, each of which becomes "
                f"{str(self._tokenizer.unk_token)!r}: {counts}; the model cannot tell these "
                "characters apart"
            )
        if counts := self._unwritable.words():
            remarks.append(
                "expected answers that this tokenizer cannot write as they stand, because it "
                f"changes letters, accents or spaces: {counts}; no model with it matches them "
                "exactly"
            )
        if counts := self._endless.words():
            remarks.append(
                f"expected answers after which the chat template writes no end: {counts}; a model "
                "does not learn to end them, and exact match stays near 0; set data.chat_template "
                'to one that writes an end, such as "chatml"'
            )
        return remarks

    def _cannot_match(self, question: Question) -> bool:
        """Return whether no reference is equal to the text of its own tokens."""
        return not any(
            self._text(reference).strip() == reference.strip()
            for reference in (question.answer, *question.references)
        )

    def _text(self, reference: str) -> str:
        return answer_text(self._tokenizer, self._encoder.plain(reference), End())[0]


def _is_endless(question: Question) -> bool:
    return isinstance(question.asked, Rendered) and question.asked.end == End()
