"""The form in which lm-evaluation-harness asks a model, and its messages as ours.

This module imports lm-eval, which takes seconds, and is imported when a task is asked for.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import lm_eval.evaluator
import tqdm.std
from jinja2 import TemplateError
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from fluvial.data.template_work import check_template
from fluvial.data.templates import dated
from fluvial.errors import ConfigError
from fluvial.models.hf import PreTrainedTokenizerBase
from fluvial.models.stored import first_line

logger = logging.getLogger(__name__)


class LoadedModel(HFLM):  # type: ignore[misc] # lm-eval has no types
    """A model that is loaded already, as lm-eval's own class for transformers asks it."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        context: int | None,
    ) -> None:
        # lm-eval ties the weights of every model, which these are already, and which fails where an
        # adapter is on the head.
        loaded: Any = model
        loaded.tie_weights = lambda: None
        try:
            super().__init__(
                pretrained=model,
                tokenizer=dated(tokenizer),
                backend="causal",
                batch_size=batch_size,
                max_length=context,
            )
        finally:
            del loaded.tie_weights

        self.cut_prompts = 0
        """Prompts that lost their beginning because the model's context is shorter."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation; raises `ConfigError` for a template that takes too
        much work (see `check_work`) or cannot render it."""
        without = [turn for turn in chat_history if turn["role"] != "system"]  # lm-eval's remedy
        try:
            for turns in (chat_history, without):
                try:
                    check_template(self.tokenizer, turns, add_generation_prompt)
                    break
                except TemplateError:
                    continue
            rendered: str = super().apply_chat_template(chat_history, add_generation_prompt)
        except Exception as error:  # a template is a program: it may raise what a program raises
            raise ConfigError(
                f"--apply-chat-template: the tokenizer's chat template fails: {first_line(error)}; "
                "remove the option, or change the template"
            ) from error

        return rendered

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **options: Any
    ) -> Any:
        longest = self.max_length + 1  # the last token is scored, and not read
        self.cut_prompts += sum(len(before) + len(after) > longest for _, before, after in requests)
        return super()._loglikelihood_tokens(requests, **options)

    def tok_batch_encode(
        self, strings: list[str], *options: Any, left_truncate_len: int | None = None, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Return token ids and mask of prompts that are answered; count those that are cut."""
        if left_truncate_len:
            sizes = [len(self.tok_encode(text)) for text in strings]
            self.cut_prompts += sum(size > left_truncate_len for size in sizes)

        encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(
            strings, *options, left_truncate_len=left_truncate_len, **more
        )
        return encoded


class _Messages:
    """A file in place of standard error, which passes the lines of a progress bar to the log."""

    def write(self, text: str) -> None:
        """Log a line that is not blank."""
        if text.strip():
            logger.info("%s", " ".join(text.split()))

    def flush(self) -> None:
        """Do nothing: a line is logged at once."""


@contextmanager
def quiet() -> Iterator[None]:
    """Pass lm-eval's progress to our log, and leave out its remarks and its look at the machine.

    It calls git in the current folder, whose commit says nothing about the model, and lists every
    package by pip, which takes seconds.
    """
    start = tqdm.std.tqdm.__init__

    def begin(bar: Any, *options: Any, **more: Any) -> None:
        form = "{desc}: {n_fmt} of {total_fmt}"
        start(bar, *options, **more | {"file": _Messages(), "bar_format": form, "mininterval": 1.0})

    with ExitStack() as stack:
        for place, name, value in (
            (tqdm.std.tqdm, "__init__", begin),
            (lm_eval.evaluator, "get_git_commit_hash", lambda: None),
            (lm_eval.evaluator, "add_env_info", _add_versions),
        ):
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)

        remarks = logging.getLogger("lm_eval")
        stack.callback(remarks.setLevel, remarks.level)
        remarks.setLevel(logging.ERROR)
        yield


def _add_versions(results: dict[str, Any]) -> None:
    """Add the versions that lm-eval's own function adds, under its keys."""
    results["transformers_version"] = version("transformers")
    results["lm_eval_version"] = version("lm_eval")
