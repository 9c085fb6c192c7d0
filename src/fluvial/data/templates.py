"""Chat templates for tokenizers that bring none, and the choice of `data.chat_template`.

The named ones are written here after the published formats; each ends an assistant's turn with the
tokenizer's EOS token, so that a model learns to stop where its generation stops.
"""

import copy
import json
import re
from datetime import datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError

from fluvial.data.config import DataConfig
from fluvial.data.faults import shown
from fluvial.errors import ConfigError
from fluvial.models.hf import PreTrainedTokenizerBase
from fluvial.storage.files import expanded, refuse_endless

_EOS = "{% if m.role == 'assistant' and not '@'.endswith(eos_token) %}{{ eos_token }}{% endif %}"
"""EOS after an assistant's turn whose own mark `@` is not EOS."""
_STRICT = (
    "{% for m in messages %}{% if m.role not in @ %}"
    "{{ raise_exception('this template knows the roles ' ~ @ | join(', ')) }}{% endif %}{% endfor "
    "%}"
)
_NEWLINE = "{{ '\\n' }}"
"""A line break behind a tag, where Jinja drops one that is written as such."""


def _each_turn(head: str, mark: str, end: str, start: str, before: str = "") -> str:
    """Return a template that writes `head`, content, `mark`, `end` for each turn, and `start` for
    generation."""
    end = end.replace("\n", _NEWLINE)
    turn = f"{head}{{{{ m.content | trim }}}}{mark}{_EOS.replace('@', mark)}{end}"
    return (
        f"{before}{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt "
        f"%}}{start}{{% endif %}}"
    )


_BOS = "{{ bos_token }}"
_GEMMA_ROLE = "{{ 'model' if m.role == 'assistant' else m.role }}"
_WORDS = "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[m.role] }}"
_ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate between user and assistant, the user first') }}{% "
    "endif %}{% endfor %}"
)
_ALL = _STRICT.replace("@", "['system', 'user', 'assistant']")
_TWO = _STRICT.replace("@", "['user', 'assistant']") + _ALTERNATING

NAMED: dict[str, tuple[str, str]] = {
    "chatml": (
        "ChatML of OpenAI, as Qwen and others use it",
        _each_turn("<|im_start|>{{ m.role }}\n", "<|im_end|>", "\n", "<|im_start|>assistant\n"),
    ),
    "llama3": (
        "Llama 3 of Meta, https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3",
        _each_turn(
            "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n",
            "<|eot_id|>",
            "",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            _BOS,
        ),
    ),
    "zephyr": (
        "Zephyr of Hugging Face, https://arxiv.org/abs/2310.16944",
        _ALL
        + "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}"
        + "{{ eos_token }}\n{% endfor %}"
        + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    ),
    "gemma": (
        "Gemma of Google, https://ai.google.dev/gemma/docs/core/prompt-structure",
        _each_turn(
            f"<start_of_turn>{_GEMMA_ROLE}\n",
            "<end_of_turn>",
            "\n",
            "<start_of_turn>model\n",
            _TWO + _BOS,
        ),
    ),
    "mistral": (
        "Mistral 7B Instruct of Mistral AI, https://arxiv.org/abs/2310.06825",
        _TWO
        + _BOS
        + "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
        + "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
    ),
    "plain": (
        "ours: roles as words, for a base model that knows no chat",
        _ALL
        + _BOS
        + f"{{% for m in messages %}}{_WORDS}: {{{{ m.content | trim }}}}"
        + "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        + _NEWLINE
        + "{% endfor %}"
        + "{% if add_generation_prompt %}Assistant:{% endif %}",
    ),
}
"""Source and Jinja text of each named template."""
_JINJA = Environment(extensions=["jinja2.ext.loopcontrols"])
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
TODAY = datetime(2024, 7, 26)
"""Date in every chat template, so that tokens do not depend on the day of the run."""


def template_of(chosen: str) -> str:
    """Return the Jinja text that `data.chat_template` chooses: a named one, or the text itself.

    Raise `ConfigError` for anything else. A file is read by `inlined_template` only, where the
    configuration is loaded.
    """
    if chosen in NAMED:
        return NAMED[chosen][1]
    if "{" in chosen:
        _check_syntax(chosen)
        return chosen

    raise ConfigError(
        f"data.chat_template = {shown(chosen)}: neither a file that the configuration can read nor "
        f"a known template; choose one of {', '.join(NAMED)}, or name a file with a Jinja template"
    )


def _check_syntax(text: str) -> None:
    """Raise `ConfigError` for a text that is no Jinja template."""
    try:
        # transformers adds a tag of its own, around what the assistant says.
        _JINJA.parse(_GENERATION.sub("", text))
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"data.chat_template: line {error.lineno} of the template is no Jinja: {error.message}"
        ) from error


def inlined_template(chosen: str, folder: Path) -> str:
    """Return `data.chat_template` with the text of a file in place of its name.

    Other values stay as they are. A configuration carries the text, so that a site needs no file of
    the server's. Raise `ConfigError` if the file cannot be read.
    """
    if chosen in NAMED or "{" in chosen:
        return chosen

    path = folder / expanded(chosen)
    refuse_endless(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return template_of(chosen)  # raises
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template: {str(path)!r} cannot be read: {error}") from error

    if "{" not in text:
        raise ConfigError(f"data.chat_template: {str(path)!r} holds no Jinja template")

    return text


def inlined_templates(config: DataConfig) -> DataConfig:
    """Return the settings with the text of each chat template's file in place of its name, see
    `inlined_template`; paths are relative to the working directory."""
    chosen = config.chat_template
    changes: dict[str, object] = {}
    if chosen is not None:
        changes["chat_template"] = inlined_template(chosen, Path())
    own = {
        name: table.model_copy(update={"chat_template": inlined_template(template, Path())})
        for name, table in config.by_site.items()
        if (template := table.chat_template) is not None
    }
    if own:
        changes["by_site"] = {**config.by_site, **own}
    return config.model_copy(update=changes) if changes else config


def with_template(
    tokenizer: PreTrainedTokenizerBase, chosen: str | None
) -> PreTrainedTokenizerBase:
    """Return `tokenizer`, or a copy of it that has the chosen chat template."""
    if chosen is None:
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = template_of(chosen)
    return changed


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a chat template of the tokenizer asks for today's date."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def dated(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return `tokenizer`, or a copy of it whose chat templates write `TODAY`, not today's date.

    transformers gives a template no function but its own. So ours is written in Jinja before the
    template, and hides that one, however it is called.
    """
    if not writes_date(tokenizer):
        return tokenizer

    changed = copy.copy(tokenizer)
    template: str | dict[str, str] = tokenizer.chat_template
    changed.chat_template = (
        {name: _strftime(text) + text for name, text in template.items()}
        if isinstance(template, dict)
        else _strftime(template) + template
    )
    return changed


@cache
def _strftime(template: str) -> str:
    """Return a macro of Jinja that writes `TODAY` in a format of `strftime`.

    It knows the directives that stand in `template`, except %s, which depends on the machine's time
    zone; any other stays as it is written. The line break after it belongs to it, so that the
    template's own text stays as it is.
    """
    directives = set(re.findall("%-?[a-zA-Z]", template)) - {"%s", "%-s"}
    written = [(code, TODAY.strftime(code)) for code in sorted(directives)]
    pairs = [("%%", "\0"), *written, ("\0", "%")]
    steps = "".join(f"|replace({json.dumps(old)}, {json.dumps(new)})" for old, new in pairs)
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n"
