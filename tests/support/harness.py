"""Tasks of lm-eval in local files, as a user writes them."""

import json
from pathlib import Path
from typing import Any

WORDS = ["river", "water", "stone", "bird", "tree", "house"]
QUESTIONS: list[dict[str, Any]] = [
    {
        "question": f"Which word follows {first}?",
        "choices": [second, first, second[::-1], "none"],
        "answer": number % 4,
        "subject": "small_streams",
    }
    for number, (first, second) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
]
HEADER = "The following are multiple choice questions (with answers) about small streams.\n\n"
LISTED = (
    "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\n"
    "Answer:"
)


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_tasks(folder: Path) -> Path:
    """Write a folder of three tasks: texts as choices, letters as choices, and short answers."""
    folder.mkdir()
    asked = str(lines(folder / "asked.jsonl", QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": asked}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks: list[dict[str, Any]] = [
        {
            "task": "texts",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        {
            "task": "letters",
            "output_type": "multiple_choice",
            "description": HEADER,
            "doc_to_text": LISTED,
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", **mean}],
        },
        {
            "task": "written",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}\n",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    ]
    for task in tasks:  # JSON is YAML
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return folder
