"""Exported folders: what they hold, what they do not tell, and what loads them."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from fluvial.errors import CheckpointError, ConfigError
from fluvial.models.export import with_equal_ranks
from fluvial.runs.config import parse
from fluvial.runs.export import export_run
from fluvial.runs.model_card import Described, model_card
from fluvial.runs.run import execute
from fluvial.storage.files import digest_of_file
from fluvial.storage.run_files import read_run
from tests.support.runs import run_table, small_table
from tests.support.vllm_rules import broken_rules

TOKENS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100]])
SITES = ("north", "south", "west")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, three_sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run over three sites."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_table(
        small_table(tiny_model, three_sites)
        | {
            "rounds": 2,
            "train": {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4},
            "evaluate": {"sample_prompt": "snow of the north site", "sample_tokens": 2},
            "codec": {"name": "int8"},
            "compare": ["central"],
        },
        folder,
    )
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def texts_of(folder: Path) -> dict[str, str]:
    """The readable files of an export, its card among them."""
    return {
        path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors"
    }


def test_the_adapter_loads_in_peft_by_the_base_s_name(
    finished: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of this name stands for the hub, from which nothing can be loaded here."""
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(tiny_model)
    export_run(finished, tmp_path / "out", base="org/tiny")
    monkeypatch.chdir(tmp_path)
    ours = AutoPeftModelForCausalLM.from_pretrained(str(finished / "adapter"))
    theirs = AutoPeftModelForCausalLM.from_pretrained("out")
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(theirs), logits(theirs.unload()))


def test_nothing_names_this_machine_or_a_site(
    finished: Path, tiny_model: Path, three_sites: Path, tmp_path: Path
) -> None:
    made = export_run(finished, tmp_path / "out", base="org/tiny")
    files = texts_of(tmp_path / "out")
    places = (tmp_path.parent, finished.parent, tiny_model, three_sites)
    for name, text in files.items():
        assert not [place for place in places if str(place) in text], name
        assert "tmp" not in text or name == "tokenizer.json"

    card = files["README.md"]
    assert "contributing sites | 3 |" in card
    assert not [site for site in SITES if site in card]
    assert made.max_lora_rank == 8
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"


def test_a_baseline_is_exported_as_a_run_is(finished: Path, tmp_path: Path) -> None:
    baseline = finished / "compare" / "central"
    made = export_run(baseline, tmp_path / "out", base="org/tiny")
    assert made.form == "peft"
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "out", baseline / "adapter")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    card = (tmp_path / "out" / "README.md").read_text()
    final = json.loads((baseline / "result.json").read_text())["heldout"]["final"]
    assert f"{final['loss']:.4f}" in card
    assert "| codec of the updates | int8 |" not in card


def test_a_folder_of_several_runs_is_refused_with_the_commands_that_work(
    finished: Path, tmp_path: Path
) -> None:
    """The baselines of a run, a comparison, and a contender of it, whose sites have their own."""
    out = tmp_path / "two words"
    for name in ("plain", "coded"):
        (out / name / "seed-0" / "adapter").mkdir(parents=True)
        (out / name / "seed-0" / "result.json").write_text("{}")
    (out / "own" / "seed-0").mkdir(parents=True)
    (out / "own" / "seed-0" / "result.json").write_text("{}")
    (out / "compare.json").write_text("{}")
    for folder, runs in (
        (finished / "compare", ["central"]),
        (out, ["coded/seed-0", "own/seed-0 --site NAME", "plain/seed-0"]),
        (out / "own", ["seed-0 --site NAME"]),
    ):
        with pytest.raises(ConfigError, match="holds several runs") as caught:
            export_run(folder)
        parts = [run.partition(" ") for run in runs]
        commands = [
            f"`fluvial export {shlex.quote(str(folder / run))}{space}{option}`"
            for run, space, option in parts
        ]
        assert str(caught.value).endswith(f"export one of them: {', '.join(commands)}")


def test_the_card_says_what_the_run_found(finished: Path, tmp_path: Path) -> None:
    export_run(finished, tmp_path / "out", base="org/tiny", name_sites=True)
    result = json.loads((finished / "result.json").read_text())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "org/tiny"
    assert card.data.library_name == "peft"
    measured = {each.metric_type: each.metric_value for each in card.data.eval_results}
    final = result["heldout"]["final"]
    assert measured == {"loss": round(final["loss"], 6), "accuracy": round(final["accuracy"], 6)}
    assert f"({result['bytes']['up']:,})" in card.text
    assert "| codec of the updates | int8 |" in card.text
    assert f"contributing sites | 3: {', '.join(SITES)} |" in card.text
    assert "| north | " in card.text

    own = (finished / "adapter" / "README.md").read_text()
    assert f"{final['loss']:.4f}" in own
    assert str(finished.parent) not in own


@pytest.mark.parametrize("score", [0.0, 0.3])
def test_the_card_has_no_rouge_2_where_no_answer_has_two_words(
    finished: Path, score: float
) -> None:
    run = read_run(finished)
    run["result"]["heldout"]["final"] |= {"rouge_1": 0.5, "rouge_2": score}
    card = model_card(Described(run["config"], run["result"], "", "adapter"))
    assert "| ROUGE-1 | " in card
    assert ("| ROUGE-2 | " in card) == ("ROUGE-2" in card) == (score > 0)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_merged_model_is_base_and_adapter(
    finished: Path, tiny_model: Path, tmp_path: Path, dtype: Any
) -> None:
    """PEFT's own merge of the run's adapter, made without Fluvial, has the same weights."""
    made = export_run(finished, tmp_path / "out", form="merged", dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected: Any = PeftModel.from_pretrained(base, str(finished / "adapter")).merge_and_unload()
    kind = torch.float32 if dtype == "auto" else torch.bfloat16
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == kind
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor.to(kind), merged.state_dict()[name]), name

    assert made.check is not None
    assert 0 < made.check.error < made.check.tolerance or dtype == "auto"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    generate = pipeline("text-generation", model=merged, tokenizer=tokenizer)
    assert generate("snow", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    told = json.loads((tmp_path / "out" / "fluvial.json").read_text())
    assert told["model"] == {}  # its base has no name
    assert str(tiny_model) not in "".join(texts_of(tmp_path / "out").values())


def test_a_merge_that_rounding_would_eat_is_refused(finished: Path, tmp_path: Path) -> None:
    """The same run with a far smaller adapter, whose change bfloat16 cannot hold."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    small = {name: tensor * 1e-3 for name, tensor in load_file(weights).items()}
    save_file(small, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="damaged"):
        export_run(copy, tmp_path / "out", form="merged")

    (copy / "digests.json").write_text(
        json.dumps({name: digest_of_file(copy / name) for name in ("result.json", "metrics.jsonl")})
    )
    with pytest.raises(ConfigError, match=r"in bfloat16 is not base and adapter.*--dtype float32"):
        export_run(copy, tmp_path / "out", form="merged", dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    assert export_run(copy, tmp_path / "out", form="merged").check is not None


def test_a_quantised_base_is_merged_as_it_computes(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The merged model has the dequantised weights, and so the run's own held-out loss."""
    config = run_config["model"] | {"quantization": "nf4", "quantization_correction": 2}
    result = run_table(run_config | {"rounds": 1, "model": config}, tmp_path / "run")
    made = export_run(tmp_path / "run", tmp_path / "out", form="merged")
    assert made.check is not None
    assert made.check.error < 1e-5 < made.check.effect
    float_base = AutoModelForCausalLM.from_pretrained(config["name_or_path"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"  # which has no adapter
    assert not torch.equal(merged.get_parameter(name), float_base.get_parameter(name))

    table = run_config | {"rounds": 1, "model": {"name_or_path": str(tmp_path / "out")}}
    again = run_table(table, tmp_path / "again")
    final = result["heldout"]["final"]["loss"]
    assert again["heldout"]["base"]["loss"] == pytest.approx(final, rel=1e-5)  # other sums


def test_what_cannot_be_exported_is_refused(finished: Path, tmp_path: Path) -> None:
    for given, text in (
        ({}, r"nobody else has; name its id on the hub with --base-name"),
        ({"base": "/some/folder"}, "must be the id of a model on the hub"),
        ({"form": "gguf"}, "convert_hf_to_gguf.py"),
        ({"base": "org/tiny", "dtype": "float16"}, "without effect, because nothing is merged"),
    ):
        with pytest.raises(ConfigError, match=text):
            export_run(finished, tmp_path / "out", **given)  # type: ignore[arg-type]

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        export_run(finished, tmp_path / "full", base="org/tiny")
    with pytest.raises(CheckpointError, match="holds no run"):
        export_run(tmp_path / "full", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_is_not_exported(run_config: dict[str, Any], tmp_path: Path) -> None:
    next(execute(parse(run_config, "test"), tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"has not finished.*--resume"):
        export_run(tmp_path / "run", tmp_path / "out", base="org/tiny")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_equal_ranks_keep_the_product(tiny_model: Path, tmp_path: Path, use_rslora: bool) -> None:
    """PEFT reads ranks of 2 and 6 with one scale, and the padded factors, to the same logits."""
    from fluvial.models.adapters import adapt
    from fluvial.models.export import save_adapter
    from fluvial.models.targets import LoraSettings
    from fluvial.models.tuning import tuned_parameters

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    names = [name for name, _ in base.named_modules() if name.endswith(("q_proj", "v_proj"))]
    ranks = {name: 6 if "layers.0" in name else 2 for name in names}
    settings = LoraSettings(r=4, lora_alpha=16, use_rslora=use_rslora)
    adapted: Any = adapt(base, settings, ranks | {names[-1]: 2, names[-2]: 2})
    for parameter in tuned_parameters(adapted).values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(adapted, tmp_path / "unequal")

    config = json.loads((tmp_path / "unequal" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    factors = load_file(tmp_path / "unequal" / "adapter_model.safetensors")
    config, factors = with_equal_ranks(config, factors)
    (tmp_path / "equal").mkdir()
    (tmp_path / "equal" / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, tmp_path / "equal" / "adapter_model.safetensors", {"format": "pt"})

    loaded = [
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / name)
        )
        for name in ("unequal", "equal")
    ]
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert broken_rules(tmp_path / "equal", plain, 8) == []
    assert broken_rules(tmp_path / "unequal", plain, 8)
    torch.testing.assert_close(*map(logits, loaded), rtol=1e-5, atol=1e-6)  # sums of other lengths
    assert not torch.equal(logits(loaded[0]), logits(plain))


def test_only_the_owner_s_folder_is_replaced(finished: Path, tmp_path: Path) -> None:
    """What an export left unfinished goes with the next one."""
    draft = tmp_path / ".out.partial"
    draft.mkdir()
    (draft / "old").touch()
    export_run(finished / "adapter", tmp_path / "out", base="org/tiny")
    assert not (tmp_path / "out" / "old").exists()
    assert not draft.exists()
