"""Tiny files of our own in the form of SuperGLUE's."""

import json
from pathlib import Path
from typing import Any

STORY = "The old town had a mill. Mara ran the mill of Ostrel.\n@highlight\nOstrel is a town"
RECORDS: dict[str, list[dict[str, Any]]] = {
    "BoolQ": [
        {"question": "is ice cold", "passage": "Ice is cold.", "idx": 0, "label": True},
        {"question": "is ice hot", "passage": "Ice is cold.", "idx": 1, "label": False},
    ],
    "CB": [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment", "idx": 0},
        {"premise": "It rains.", "hypothesis": "It is dry", "label": "contradiction", "idx": 1},
        {"premise": "It rains.", "hypothesis": "It is late", "label": "neutral", "idx": 2},
    ],
    "COPA": [
        {
            "premise": "The cup fell.",
            "choice1": "It broke.",
            "choice2": "It flew.",
            "question": "effect",
            "label": 0,
            "idx": 0,
        },
        {
            "premise": "The cup fell.",
            "choice1": "It flew.",
            "choice2": "I pushed it.",
            "question": "cause",
            "label": 1,
            "idx": 1,
        },
    ],
    "MultiRC": [
        {
            "idx": 0,
            "version": 1.1,
            "passage": {
                "text": "Mara has a cat and a dog.",
                "questions": [
                    {
                        "question": "What has Mara?",
                        "idx": 0,
                        "answers": [
                            {"text": "A cat", "idx": 0, "label": 1},
                            {"text": "A cow.", "idx": 1, "label": 0},
                        ],
                    },
                    {
                        "question": "Who has a dog?",
                        "idx": 1,
                        "answers": [{"text": "Mara", "idx": 2, "label": 1}],
                    },
                ],
            },
        }
    ],
    "ReCoRD": [
        {
            "source": "ours",
            "idx": 0,
            "passage": {
                "text": STORY,
                "entities": [
                    {"start": STORY.index(name), "end": STORY.index(name) + len(name) - 1}
                    for name in ("Mara", "Ostrel", "old town")
                ],
            },
            "qas": [
                {
                    "query": "The mill of @placeholder, a town, was old",
                    "idx": 0,
                    "answers": [{"start": 0, "end": 0, "text": "Ostrel"}],
                }
            ],
        }
    ],
    "RTE": [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment", "idx": 0},
        {"premise": "It rains.", "hypothesis": "It snows.", "label": "not_entailment", "idx": 1},
    ],
    "WiC": [
        {
            "word": "bank",
            "sentence1": "The bank of the river.",
            "sentence2": "The bank has money.",
            "idx": 0,
            "label": False,
            "start1": 4,
            "start2": 4,
            "end1": 8,
            "end2": 8,
            "version": 1.1,
        }
    ],
    "WSC": [
        {"text": text, "target": target | {"span1_text": noun}, "idx": idx, "label": label}
        for idx, (text, target, noun, label) in enumerate(
            [
                *(
                    (
                        "Mara called Nils because she was late.",
                        {"span1_index": index, "span2_index": 4, "span2_text": "she"},
                        noun,
                        label,
                    )
                    for index, noun, label in ((0, "Mara", True), (2, "Nils", False))
                ),
                (
                    "The mill stood where it was.",
                    {"span1_index": 0, "span2_index": 4, "span2_text": "it"},
                    "The mill",
                    True,
                ),
            ]
        )
    ],
}


def write_superglue(folder: Path, records: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """Write the validation file of each task, and return the folder."""
    for task, rows in (RECORDS if records is None else records).items():
        (folder / task).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / task / "val.jsonl").write_text(text, encoding="utf-8")

    return folder
