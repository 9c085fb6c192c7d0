"""The tasks in which a site uses the whole model: to measure it, and to continue a text."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluvial.codecs.activations.rows import lengths_from_mask, pack, unpack
from fluvial.data import Example
from fluvial.errors import WireError
from fluvial.federation.meter import MEASURING, SAMPLING
from fluvial.federation.sites import MOST_NEW_TOKENS, Site, after_round, measures
from fluvial.federation.talk import Talk
from fluvial.methods.flglm.coding import Coding
from fluvial.methods.flglm.release import Release
from fluvial.methods.flglm.state import places_of, state_in_use
from fluvial.methods.flglm.turns import LOOKED_AT, Continue, Look
from fluvial.models.encoding import Encoder, Prompt
from fluvial.models.ends import answer_text, end_of
from fluvial.models.generation import Continuation, count_too_long, room_after
from fluvial.models.split import Part
from fluvial.models.split_generation import SiteGeneration, has_cache
from fluvial.training.answer_scores import AnswerSums
from fluvial.training.evaluate import Heldout
from fluvial.training.train import collate, shifted
from fluvial.wire.payload import Payload, payload_frame

MOST_PROMPT = 10**5
"""Characters of a prompt that a server may send."""


def evaluate(site: Site, message: Payload) -> Talk:
    """Measure the model in a conversation with the server's layers, on held-out text; a task.

    Values in: `which` ("base", or "final": the layers that were sent, or the site's own), `round`,
    `generate`. Values out: as those of `sites.evaluate`.
    """
    new_tokens = message.whole("generate", 0, MOST_NEW_TOKENS)
    data = site.load()

    with whole_model(site, message, Release.in_use(site, message, task=MEASURING)) as model:
        sums = yield from model.heldout(data.heldout)
        if not new_tokens or not data.questions:
            return measures(sums)

        prompts = [question.asked for question in data.questions]
        answers = yield from model.answers(prompts, new_tokens)

    base = message.value("which", str) == "base"
    of = "the base model" if base else after_round(site.round)
    scores = AnswerSums.over(answers, data.questions, of)
    pool = site.pool
    too_long = count_too_long(pool.tokenizer, prompts, new_tokens, pool.outline.context)
    return measures(sums, replace(scores, too_long=too_long))


def sample(site: Site, message: Payload) -> Talk:
    """Continue the `prompt` of the server by `generate` tokens; a task.

    Values in: also `which` and `round`, as in `evaluate`. Value out: `text`.
    """
    new_tokens = message.whole("generate", 1, MOST_NEW_TOKENS)
    prompt = message.value("prompt", str)
    if len(prompt) > MOST_PROMPT:
        raise WireError(f"a prompt of {len(prompt)} characters exceeds the limit of {MOST_PROMPT}")

    with whole_model(site, message, Release.in_use(site, message, task=SAMPLING)) as model:
        (text,) = yield from model.answers([prompt], new_tokens)

    return Payload(values={"text": text})


@dataclass(frozen=True)
class WholeModel:
    """The whole model in a conversation, with the site's part at hand."""

    site: Site
    part: Part
    coding: Coding
    release: Release

    def heldout(self, examples: Sequence[Example]) -> Generator[Payload, Payload, Heldout]:
        """Return loss and hits on `examples`; sequences of like length share a batch."""
        order = sorted(examples, key=lambda example: len(example.input_ids))
        sums = []

        for start in range(0, len(order), LOOKED_AT):
            some = order[start : start + LOOKED_AT]
            batch = collate(some, self.site.pool.tokenizer.pad_token_id, self.part.device)
            logits = yield from self._logits(batch["input_ids"], batch["attention_mask"])
            sums.append(Heldout.of(*shifted(logits, batch["labels"])))

        return Heldout.sum(sums)

    def _logits(self, input_ids: Tensor, mask: Tensor) -> Generator[Payload, Payload, Tensor]:
        lengths = lengths_from_mask(mask, "right")
        rows = self.release(pack(self.part.embed(input_ids, mask), mask))
        rows = yield from self.middle(rows, lengths)
        hidden, _ = unpack(rows, lengths, mask.shape[1], "right")
        return self.part.logits(hidden, mask)

    def middle(self, rows: Tensor, lengths: Tensor) -> Generator[Payload, Payload, Tensor]:
        """Return B's hidden states of A's, both (tokens, width), of sequences of these lengths."""
        look = Look(tuple(lengths.tolist()), self.coding.encode_hidden(rows))
        received = yield look.payload()
        return self.coding.decode_hidden(payload_frame(received), len(rows))

    def answers(
        self, prompts: Sequence[Prompt], new_tokens: int
    ) -> Generator[Payload, Payload, list[Continuation]]:
        """Return greedy continuations of `prompts`, one after another.

        They end where the model's context ends; that of a prompt that fills it is empty.
        """
        tokenizer = self.site.pool.tokenizer
        encoder = Encoder.of(tokenizer)
        context = self.site.pool.outline.context
        cached = has_cache(self.part)
        answers = []

        for prompt in prompts:
            room = room_after(encoder.asked(prompt), new_tokens, context)
            if not room:
                answers.append(Continuation("", cut=False))
                continue

            if cached:
                generation = SiteGeneration(self.part, tokenizer, max_new_tokens=room)
                answer = yield from self._answer(generation.answer(prompt))
            else:
                answer = yield from self._answer_without_cache(prompt, room)
            answers.append(Continuation(answer, cut=answer.cut and room == new_tokens))

        return answers

    def _answer_without_cache(
        self, prompt: Prompt, new_tokens: int
    ) -> Generator[Payload, Payload, Continuation]:
        """Return the continuation of `prompt` by a model whose layers keep other states than keys
        and values: all tokens go through again for each new one."""
        tokenizer = self.site.pool.tokenizer
        end = end_of(tokenizer, self.part.model, prompt)
        tokens = Encoder.of(tokenizer).asked(prompt)
        begin = len(tokens)

        while len(tokens) < begin + new_tokens:
            ids = torch.tensor([tokens], device=self.part.device)
            logits = yield from self._logits(ids, torch.ones_like(ids))
            tokens.append(int(logits[0, -1].argmax()))
            if tokens[-1] in end.ids:
                break

        text, ended = answer_text(tokenizer, tokens[begin:], end)
        return Continuation(text, cut=not ended)

    def _answer(
        self, steps: Generator[Tensor, Tensor, Continuation]
    ) -> Generator[Payload, Payload, Continuation]:
        """Return what `steps` return, whose hidden states are exchanged with the server."""
        begins = True
        try:
            hidden = next(steps)
            while True:
                rows = hidden[0]
                turn = Continue(begins, len(rows), self.coding.encode_hidden(self.release(rows)))
                received = yield turn.payload()
                rows = self.coding.decode_hidden(payload_frame(received), len(rows))
                hidden = steps.send(rows[None])
                begins = False
        except StopIteration as end:
            answer: Continuation = end.value
            return answer
        finally:
            steps.close()


@contextmanager
def whole_model(site: Site, message: Payload, release: Release) -> Iterator[WholeModel]:
    """Borrow the site's part, with the state that the message asks for."""
    places = places_of(site)
    state = state_in_use(site, message, places)
    pool = site.pool.parts(places.cut, server=False)

    with pool.part(state, trainable=False) as part, torch.no_grad():
        yield WholeModel(site, part, Coding.exact(part), release)
