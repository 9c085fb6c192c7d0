"""FedSA-LoRA: A is FedAvg's, each B that of its site alone, and measures are of both."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.data import SiteTexts
from fluvial.errors import ConfigError
from fluvial.federation.store import StateStore
from fluvial.models.pool import ModelPool
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import parse
from fluvial.runs.export import export_run
from fluvial.runs.plan import plan
from fluvial.runs.run import Run
from fluvial.storage.run_files import SITES
from fluvial.training.evaluate import heldout
from fluvial.training.folders import kind_of, read_adapter_folder
from fluvial.wire.tensors import Named, only
from tests.support.runs import adapter_of, run_table, run_with_stops

FEDSA = {"method": {"name": "fedsa"}, "evaluate": {}}
LOCAL = {"method": {"name": "local"}, "evaluate": {}}


def own(folder: Path, site: str) -> Named:
    """The weights that a site kept."""
    return StateStore(folder / SITES).read(site, "adapter").tensors


def ran(table: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Named]:
    """The result of a run and the A of its server."""
    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    with RunFolder(folder) as place:
        run = Run(config, place, pool, SiteTexts(config.data, pool.tokenizer, seed=config.seed))
        *_, last = run.events()
        return last.values, getattr(run.server, "shared", {})


def test_after_one_round_a_is_that_of_fedavg_and_each_b_that_of_its_site(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    once = run_config | {"rounds": 1}
    _, shared = ran(once | FEDSA, tmp_path / "fedsa")
    fedavg = run_table(once, tmp_path / "fedavg")
    run_table(once | LOCAL, tmp_path / "local")

    mean = only(adapter_of(fedavg), "A")
    assert shared.keys() == mean.keys()
    assert all(torch.equal(shared[name], mean[name]) for name in mean)
    for site in ("north", "south", "west"):
        kept = own(tmp_path / "fedsa", site)
        alone = only(own(tmp_path / "local", site), "B")
        assert kept.keys() == alone.keys()
        assert all(torch.equal(kept[name], alone[name]) for name in alone)


@pytest.mark.parametrize("method", [FEDSA, LOCAL])
def test_the_model_of_a_site_is_exported_by_its_name(
    run_config: dict[str, Any], tmp_path: Path, method: dict[str, Any]
) -> None:
    """The A of the server with the B that the site kept, where tools read a shared model."""
    table = run_config | {"rounds": 1} | method
    result = run_table(table, tmp_path / "run")
    _, shared = ran(table, tmp_path / "again")
    with pytest.raises(ConfigError, match="fluvial export .*run --site NAME"):
        kind_of(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="name one with --site: north, south, west"):
        export_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="weights of this site; those of north, south, west are"):
        export_run(tmp_path / "run", site="east", base="org/base")

    made = export_run(tmp_path / "run", site="south", base="org/base", form="peft")
    assert made.folder.name == "export-peft-south"
    written = read_adapter_folder(made.folder).tensors
    expected = shared | own(tmp_path / "run", "south")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    loss = result["heldout_by_site"]["south"]["final"]["loss"]
    card = (made.folder / "README.md").read_text()
    assert f"{loss:.4f}" in card
    assert "the model of one site" in card
    assert "south" not in card


def test_the_model_of_a_site_is_exported_from_the_baseline_of_a_run(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Its folder has no configuration of its own; that of the run around it tells it."""
    run_table(run_config | {"rounds": 1, "compare": ["local"]}, tmp_path / "run")
    baseline = tmp_path / "run" / "compare" / "local"
    with pytest.raises(ConfigError, match="name one with --site: north, south, west"):
        export_run(baseline)
    made = export_run(baseline, site="south", base="org/base")
    written = read_adapter_folder(made.folder).tensors
    expected = own(baseline, "south")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert "The local baseline" in (made.folder / "README.md").read_text()


def test_one_site_is_local_training(run_config: dict[str, Any], tmp_path: Path) -> None:
    """With nobody to share with, the site's model is that of the site alone, over two rounds."""
    single = run_config | {"data": run_config["data"] | {"partition": {"by": "iid", "sites": 1}}}
    result, shared = ran(single | FEDSA, tmp_path / "fedsa")
    local = run_table(single | LOCAL, tmp_path / "local")
    (site,) = result["heldout_by_site"]
    both = {**shared, **own(tmp_path / "fedsa", site)}
    alone = own(tmp_path / "local", site)
    assert both.keys() == alone.keys()
    assert all(torch.equal(both[name], alone[name]) for name in alone)
    assert result["heldout"]["final"] == local["heldout"]["final"]


def test_each_site_measures_its_own_model(run_config: dict[str, Any], tmp_path: Path) -> None:
    """The reported loss is that of the shared A with the B in the site's folder."""
    table = run_config | FEDSA
    result, shared = ran(table, tmp_path / "run")
    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    for site, row in result["heldout_by_site"].items():
        with pool.model({**shared, **own(tmp_path / "run", site)}) as model:
            sums = heldout(model, texts.load(site).heldout, pad_token_id=0)
        assert row["final"]["loss"] == sums.loss
    assert result["adapter_sha256"] is None


def test_half_of_the_adapter_goes_both_ways(run_config: dict[str, Any], tmp_path: Path) -> None:
    whole = run_table(run_config, tmp_path / "fedavg")["bytes"]["by_kind"]
    half = run_table(run_config | FEDSA, tmp_path / "fedsa")["bytes"]["by_kind"]
    for way in ("up train", "down train"):
        assert half[way] < 0.6 * whole[way]


def test_resume_is_a_straight_run(run_config: dict[str, Any], tmp_path: Path) -> None:
    """The B of every site lies in its folder, and coding both ways goes on as it was."""
    table = run_config | FEDSA | {"rounds": 3}
    table |= {"codec": {"name": "int4", "error_feedback": True}, "downlink": {"name": "int8"}}
    straight = run_table(table, tmp_path / "straight")
    result = run_with_stops(table, tmp_path / "stopped", (1, 2, 2, 99))
    assert result["heldout"] == straight["heldout"]
    assert result["bytes"] == straight["bytes"]


def test_a_codec_that_learns_is_refused(run_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="which method 'fedsa' does not collect"):
        plan(parse(run_config | FEDSA | {"codec": {"name": "klt"}}, "test"))
