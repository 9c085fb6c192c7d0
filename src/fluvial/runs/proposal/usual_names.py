"""Usual names of columns for the fields of a record."""

import re
from collections.abc import Mapping, Sequence

from fluvial.data.multiple_choice import LETTERS

LIKE: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "dialog", "dialogue", "chat", "turns"),
    "conversations": ("conversations", "conversation"),
    "instruction": ("instruction", "task"),
    "output": ("output", "response", "answer", "completion"),
    "input": ("input", "context"),
    "prompt": (
        *("prompt", "question", "query", "request", "source", "document", "article", "input"),
        *("problem", "frage", "eingabe", "pregunta", "domanda"),
        *("sourcetext", "inputtext", "questiontext"),
    ),
    "completion": (
        *("completion", "answer", "response", "reply", "target", "output", "summary", "label"),
        *("solution", "antwort", "ausgabe", "respuesta", "reponse", "risposta"),
        *("answertext", "answervalue", "targettext", "outputtext"),
    ),
    "text": ("text", "content", "note", "report", "body", "sentence", "story"),
    "question": ("question", "questionstem", "stem", "prompt", "query", "problem", "frage"),
    "context": ("context", "article", "passage", "paragraph", "support", "document", "story"),
    "choices": ("choices", "options", "candidates", "answerchoices", "answeroptions"),
    "answer": (
        *("answer", "answerkey", "answeridx", "correctanswer", "correctoption", "correct", "cop"),
        *("label", "target", "gold", "key", "solution", "antwort"),
    ),
    **{
        letter: tuple(
            f"{name}{end}"
            for name in ("", "op", "opt", "option", "choice")
            for end in ((letter.casefold(), str(number)) if name else (letter.casefold(),))
        )
        for number, letter in enumerate(LETTERS, start=1)
    },
}
"""Usual names of columns for a field, the best first."""


def plain_names(columns: Sequence[str]) -> dict[str, str]:
    """Return the columns by their names without case and marks, the first of equal ones."""
    return {re.sub(r"[\W_]+", "", name.casefold()): name for name in reversed(columns)}


def usual_name(plain: Mapping[str, str], field: str) -> str | None:
    """Return the column with the best usual name for a field, None without one."""
    return next((plain[name] for name in LIKE[field] if name in plain), None)
