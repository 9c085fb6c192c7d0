"""A trial within a budget is a run on the same text, and a choice of nothing changes nothing."""

from pathlib import Path
from typing import Any

import pytest

from fluvial.data import SiteTexts
from fluvial.federation.in_process import local_fleet
from fluvial.models.pool import ModelPool
from fluvial.runs.budget.trials import PublicSites, Trial
from fluvial.runs.config import parse
from fluvial.runs.opening import site_of, tasks_of
from fluvial.runs.run import execute
from tests.support.budget import budget_table
from tests.support.runs import run_table


@pytest.mark.parametrize("name", ["fedavg", "cgfedllm"])
def test_a_trial_is_the_run_on_that_text(
    run_config: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """The run gives every site the public text of a simulated one, over three rounds."""
    method = {"name": name, "tgap": {"source": "none"}} if name == "cgfedllm" else {"name": name}
    table = budget_table(run_config, tmp_path)
    settings = {key: value for key, value in table.items() if key != "budget"}
    config = parse(
        settings
        | {
            "method": method,
            "codec": {"name": "trellis", "rate": 16.0, "error_feedback": True},
            "rounds": 3,
        },
        "test",
    )
    pool = ModelPool(config.model, config.adapter)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    sites = PublicSites.of(texts, 3)
    trial = Trial(config, pool, sites)
    trial.run_until(2)
    trial.loss()  # measuring does not change what follows
    trial.run_until(3)

    def assemble(config: Any, folder: Any, pool: Any, texts: Any) -> Any:
        def open_site(site: str) -> Any:
            return site_of(config, site, pool, texts, folder.store)

        return local_fleet(texts.names, open_site, tasks_of(config), config.fleet)

    *_, last = execute(config, tmp_path / "run", assemble=assemble, texts=lambda *_: sites)
    assert trial.loss() == last.values["heldout"]["final"]["loss"]
    assert trial.bytes["up"] == last.values["bytes"]["up"]
    assert trial.bytes["down"] == last.values["bytes"]["down"]


def test_a_budget_with_nothing_open_changes_no_weight(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    fixed = run_config | {
        "lora": run_config["lora"] | {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "codec": {"name": "trellis", "rate": 8.0, "error_feedback": True},
    }
    assert "max_steps" in fixed["train"] or "num_train_epochs" in fixed["train"]
    free = run_table(fixed, tmp_path / "a")
    bound = run_table(fixed | {"budget": {"up_bytes": 10**6}}, tmp_path / "b")
    assert bound["adapter_sha256"] == free["adapter_sha256"]
    assert bound["bytes"] == free["bytes"]
    assert bound["setup"]["budget"]["chosen"] == {}
