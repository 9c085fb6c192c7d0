"""Runs on records with a prompt and an answer, whose greedy answers are scored."""

import json
from pathlib import Path
from typing import Any

NEW_TOKENS = 9


def with_questions(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return `table` on records of two sites, unequal in size, with scores of answers."""
    path = folder / "questions.jsonl"
    lines = [
        {"client": "abb"[n % 3], "prompt": f"{n}:", "completion": (" sea", " sea fog")[n % 2]}
        for n in range(36)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {
        "source": str(path),
        "max_length": 32,
        "heldout_share": 0.5,
        "partition": {"by": "column", "column": "client"},
    }

    return table | {"data": data, "evaluate": {"max_new_tokens": NEW_TOKENS, "sample_tokens": 2}}
