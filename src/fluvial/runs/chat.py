"""Conversations with the result of a run, and with its base model beside it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal

from fluvial.data import with_template
from fluvial.data.chat import chat_prompt
from fluvial.data.faults import listed
from fluvial.data.record_kinds import CHAT
from fluvial.data.templates import NAMED
from fluvial.errors import ConfigError
from fluvial.models.encoding import Encoder
from fluvial.models.hf import PreTrainedModel, PreTrainedTokenizerBase
from fluvial.models.pool import ModelPool
from fluvial.models.streaming import Sampling, stream
from fluvial.models.threads import faster_threads, with_threads
from fluvial.runs.evaluation import evaluation_settings, run_settings
from fluvial.storage import exported
from fluvial.storage.files import expanded
from fluvial.training.folders import kind_of, read_adapter_folder, weights_in
from fluvial.training.opened import open_weights
from fluvial.wire.tensors import Named

Template = Literal["auto", "chat", "none"]
"""The form of most records of the run, and without a run the chat template if there is one
("auto"); the chat template; or the bare text."""


class Speaker:
    """One model in a conversation: it answers, and remembers what was said."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        *,
        chats: bool,
    ) -> None:
        self.name = name
        """"base", "tuned", or "model" for a model without a base."""
        self._model = model
        self._tokenizer = tokenizer
        self._context = context
        self._chats = chats
        self._turns: list[Any] = []

    def answer(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Yield the answer in pieces.

        With a chat template, earlier turns go before `text`; without one, `text` alone is
        continued. Raises `ConfigError` where the prompt fills the model's context.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        prompt = (
            chat_prompt(turns, self._tokenizer, "use --template none")
            if self._chats
            else Encoder.of(self._tokenizer).prompt(text)
        )
        if self._context is not None and len(prompt) >= self._context:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens and fills the model's context of "
                f"{self._context}; shorten it, or begin a new conversation with /new"
            )

        pieces = []
        for piece in stream(self._model, self._tokenizer, prompt, sampling, self._context):
            pieces.append(piece)
            yield piece

        if self._chats:
            self._turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]

    def forget(self) -> None:
        """Begin a new conversation."""
        self._turns = []


class Chat:
    """The models of a conversation. Use as a context manager, which frees them."""

    def __init__(
        self,
        name: str,
        *,
        only: Literal["base", "tuned"] | None = None,
        template: Template = "auto",
        site: str | None = None,
        overrides: list[str] | None = None,
    ) -> None:
        """Load the weights that `name` stands for: a run, a folder of an adapter or a model, a hub
        id, or "embedded".

        `site` is the one whose chat template is used, where those of sites differ. `overrides` are
        settings of [model]. Raises `ConfigError` for what is none of these.
        """
        if site is not None and template == "none":
            raise ConfigError(f"--site {site}: without effect beside --template none; remove one")
        self._models = ExitStack()
        name = weights_in(name)
        kind = kind_of(name)

        if kind == "model":
            table, run = run_settings(name, None)
            settings = evaluation_settings(_for_chat(table, run), None, overrides or [])
            if only is not None:
                raise ConfigError(f"--only {only}: without effect, because {name} has no base")
            pool = ModelPool(settings.model, None)
            states: dict[str, Named] = {"model": {}}
        else:
            folder = read_adapter_folder(expanded(name))
            run = folder.run
            settings = evaluation_settings(_for_chat(folder.settings(), run), None, overrides or [])
            pool, tuned = open_weights(folder, settings.model)
            states = {"base": pool.base_state(), "tuned": tuned}

        written, whose = _template(name, run, site, own=pool.tokenizer.chat_template is not None)
        mostly = run.get(exported.MOSTLY)
        tokenizer = with_template(pool.tokenizer, written) if written else pool.tokenizer
        pool.check_behaviour()
        self.max_new_tokens = settings.evaluate.max_new_tokens or Sampling.max_new_tokens
        """Tokens of an answer at most, as the run that made the weights has it."""
        if site is not None:
            mostly = None  # what is asked for goes before what most records were
        self.chats = _chats(tokenizer, template, name, mostly)
        self.way = f"with {whose}" if self.chats else "the bare text is continued"
        """How a prompt is put, and why, in words."""
        if template == "auto" and mostly is not None:
            self.way += f", as most records of the run were: {mostly}"
        models = {
            each: self._models.enter_context(pool.model(state))
            for each, state in states.items()
            if only in (None, each)
        }
        self._models.enter_context(with_threads(faster_threads(next(iter(models.values())))))
        self.speakers = [
            Speaker(each, model, tokenizer, pool.outline.context, chats=self.chats)
            for each, model in models.items()
        ]

    def __enter__(self) -> "Chat":
        """Return the chat."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the models back."""
        self._models.close()


def _for_chat(table: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of an evaluation with the answers as long as those of the run, if known."""
    return {**table, "evaluate": run.get("evaluate", {})}


def _template(
    name: str, run: dict[str, Any], site: str | None, *, own: bool
) -> tuple[str | None, str]:
    """Return the chat template of a run, None for the tokenizer's, and whose it is in words.

    Where the templates of sites differ, it is that of `site` (see `_numbered_template` for a folder
    without its run); unset, that of the first site with
    the template that the run's result has, or with any. `own` says that the tokenizer has one.
    """
    folder = expanded(name)
    config = exported.config_around(folder) if folder.is_dir() else None
    if config is None:
        return _numbered_template(name, run, site, own=own)

    by_site = exported.templates_by_site(config.get("data", {}))
    written = run.get("data", {}).get("chat_template")
    if len(set(by_site.values())) < 2:
        if site is not None:
            why = "all sites of the run have one chat template"
            raise ConfigError(f"--site {site}: without effect, because {why}; remove it")
        return written, "its chat template"

    sites = [each for each, template in by_site.items() if template or own]
    if site is None:
        site = _first(by_site, written)
    if site not in sites:
        raise ConfigError(
            f"--site {site}: no site of the run with a chat template; name one of {listed(sites)}"
        )
    others = [each for each in sites if by_site[each] != by_site[site]]
    more = f" (--site NAME for that of {listed(others)})" if others else ""
    return by_site[site], f"the chat template of site {site!r}{more}"


def _numbered_template(
    name: str, run: dict[str, Any], site: str | None, *, own: bool
) -> tuple[str | None, str]:
    """Return the same where no run lies around the folder, which names no sites: `site` is the
    number of a template among those of the run's sites."""
    written = run.get("data", {}).get("chat_template")
    readings = run.get(exported.READINGS, [])
    found = dict.fromkeys(each.get("chat_template") for each in readings)
    templates = [each for each in found if each or own]
    if len(templates) < 2:
        if site is not None:
            raise ConfigError(
                f"--site {site}: without effect, because {name} has one chat template, and no "
                "names of sites; remove it"
            )
        return written, "its chat template"

    known = {str(number): each for number, each in enumerate(templates, 1)}
    if site is None:
        site = _first(known, written)
    if site not in known:
        shown = ", ".join(f"{number} ({_words(each)})" for number, each in known.items())
        raise ConfigError(
            f"--site {site}: {name} has the chat templates of the run's sites without their names; "
            f"choose one by its number: {shown}"
        )
    which = f"chat template {site} of {len(known)} ({_words(known[site])})"
    return known[site], f"{which} of the run's sites (--site NUMBER for another)"


def _first(templates: Mapping[str, str | None], written: str | None) -> str:
    """Return the key of the first template that is `written`, else of the first that is one."""
    keys = [key for key, template in templates.items() if template]
    return next((key for key in keys if templates[key] == written), keys[0])


def _words(template: str | None) -> str:
    """Return a chat template in few words."""
    if template is None:
        return "the tokenizer's"
    return template if template in NAMED else f"a text of {len(template):,} characters"


def _chats(
    tokenizer: PreTrainedTokenizerBase, template: Template, name: str, mostly: str | None
) -> bool:
    has = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has:
        raise ConfigError(
            f"--template chat: the tokenizer of {name} has no chat template; use --template none"
        )
    if template == "auto" and mostly not in (None, CHAT):
        return False
    return has and template != "none"
