"""A run with a budget, small enough for a test."""

import json
from pathlib import Path
from typing import Any

BUDGET = {
    "up_bytes": 3000,
    "trial_rounds": 2,
    "trial_sites": 2,
    "target_modules": ["attention", "all-linear"],
    "r": [1, 2],
}


def budget_table(run_config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return `run_config` with public text in `folder`, and everything but the steps open."""
    public = folder / "public.jsonl"
    texts = [f"The stream number {n} carries {n * n} stones." for n in range(24)]
    public.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    kept = {key: value for key, value in run_config.items() if key != "codec"}
    lora = {
        key: value
        for key, value in run_config["lora"].items()
        if key not in ("r", "target_modules")
    }
    data = {**run_config["data"], "public_source": str(public)}
    return kept | {"lora": lora, "data": data, "budget": BUDGET, "rounds": 3}
