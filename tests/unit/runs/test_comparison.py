"""Contenders of a comparison: what their files mean, and what is refused before any run."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console
from typer.main import get_command

from fluvial.cli import app, console
from fluvial.cli.compare import SeedsCommand, default_name
from fluvial.errors import CheckpointError, ConfigError
from fluvial.report.tables import table
from fluvial.runs.comparison import child
from fluvial.runs.comparison.contenders import Comparison, read_comparison, same_runs
from fluvial.runs.comparison.execute import execute_comparison
from fluvial.runs.comparison.files import run_folder
from fluvial.runs.comparison.gathering import _difference
from fluvial.runs.config import load
from fluvial.runs.run import execute
from tests.support.runs import write_toml

Write = Callable[..., Path]


@pytest.fixture
def write(run_config: dict[str, Any], tmp_path: Path) -> Write:
    """Writes a configuration with changes as NAME.toml."""

    def written(name: str, **changes: Any) -> Path:
        return write_toml(tmp_path / f"{name}.toml", run_config | changes)

    return written


def sweep(write: Write, text: str) -> Path:
    path = write("base").with_name("sweep.toml")
    path.write_text('base = "base.toml"\n' + text)
    return path


def named(comparison: Comparison) -> list[str]:
    return [each.name for each in comparison.contenders]


def test_a_contender_of_a_file_is_the_configuration_of_a_run(write: Write) -> None:
    paths = [write("a"), write("b", codec={"name": "int8"})]
    comparison = read_comparison(paths, ["rounds = 3"], seeds=(4, 0))
    assert named(comparison) == ["a", "b"]
    assert comparison.seeds == (4, 0)
    assert comparison.baseline == "a"
    for path, contender in zip(paths, comparison.contenders, strict=True):
        for seed, config in contender.configs.items():
            assert config == load(path, ["rounds = 3", f"seed = {seed}"])


def test_differing_settings_have_the_value_of_each_contender(write: Write) -> None:
    comparison = read_comparison([write("a"), write("b", rounds=5)])
    assert comparison.differing() == {"rounds": {"a": 2, "b": 5}}


def test_a_site_whose_records_differ_is_one_setting(write: Write, tmp_path: Path) -> None:
    own = {name: {"source": str(tmp_path / f"{name}.jsonl"), "form": "text"} for name in "ab"}
    paths = [write(name, data={"by_site": {'"north.east"': own[name]}}) for name in "ab"]
    with pytest.raises(ConfigError, match=r"differs from 'a' in data\.by_site\.north\.east\n"):
        read_comparison(paths)
    assert read_comparison(paths, allow_different=True).differing() == {
        "data.by_site.north.east": own
    }


def test_a_grid_has_every_combination_that_is_not_excluded(write: Write) -> None:
    path = sweep(
        write,
        """
seeds = [3, 5]
baseline = "int8+r=8"
[grid]
"codec.name" = ["identity", "int8"]
"lora.r" = [4, 8]
[[exclude]]
"codec.name" = "identity"
"lora.r" = 8
[[contender]]
name = "slow"
set = ["codec = { name = 'trellis', rate = 64 }", "train.learning_rate = 1e-4"]
""",
    )
    comparison = read_comparison([path])
    assert named(comparison) == ["identity+r=4", "int8+r=4", "int8+r=8", "slow"]
    assert comparison.seeds == (3, 5)
    assert comparison.baseline == "int8+r=8"
    assert [each.config.lora.r for each in comparison.contenders] == [4, 4, 8, 4]
    assert comparison.contenders[-1].config.train.learning_rate == 1e-4
    base = path.with_name("base.toml")
    expected = load(base, ["codec.name = 'int8'", "lora.r = 8", "seed = 5"])
    assert comparison.contenders[2].configs[5] == expected


def test_the_order_of_keys_in_a_grid_means_nothing(write: Write) -> None:
    """Another codec takes the place of the whole table, also where its settings come first."""
    path = sweep(write, '[grid]\n"codec.rate" = [16, 64]\n"codec.name" = ["trellis"]\n')
    codecs = [each.config.coding for each in read_comparison([path]).contenders]
    assert [(codec.name, getattr(codec, "rate", None)) for codec in codecs] == [
        ("trellis", 16),
        ("trellis", 64),
    ]


def test_tables_and_lists_are_values_of_a_grid(write: Write) -> None:
    path = sweep(
        write,
        "[grid]\ncodec = [{ name = 'int8' }, { name = 'trellis', rate = 64 }]\n"
        "'lora.target_modules' = [['q_proj', 'v_proj']]\n",
    )
    assert named(read_comparison([path])) == [
        "int8+target_modules=q_proj,v_proj",
        "trellis,rate=64+target_modules=q_proj,v_proj",
    ]


def test_a_contender_leaves_settings_of_the_base_out(write: Write) -> None:
    path = write("base", codec={"name": "int8"}).with_name("sweep.toml")
    path.write_text(
        'base = "base.toml"\n[[contender]]\nname = "int8"\n'
        '[[contender]]\nname = "blocks"\nunset = ["codec", "lora"]\n'
        "set = [\"method.name = 'fedcybgd'\"]\n"
    )
    assert read_comparison([path]).contenders[1].config.codec is None


def test_files_of_one_name_are_called_by_their_folders_too(write: Write, tmp_path: Path) -> None:
    paths = [write_toml(tmp_path / name / "run.toml", {}) for name in ("x", "y")]
    assert named(read_comparison(paths)) == ["x-run", "y-run"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no contender"),
        ("[grid]\n'lora.r' = []\n", "grid.lora.r: the list is empty"),
        ("[grid]\nseed = [0, 1]\n", "write seeds = [...] above the tables"),
        ("[grid]\n'lora.r' = [4]\n[[exclude]]\n'lora.r' = 5\n", "is no value of the grid"),
        ("[grid]\n'lora.r' = [4]\n[[exclude]]\n'lora.r' = 4\n", "leaves no combination"),
        ("[[contender]]\nname = 'a/b'\n", 'such as "a-b"'),
        ("[[contender]]\nname = 'a'\nset = ['lora.r : 3']\n", "contender 'a'"),
        ("[[contender]]\nname = 'a'\nunset = ['codec']\n", "base.toml does not set codec"),
        ("[[contender]]\nname = 'a'\n[[contender]]\nname = 'A'\n", "is called 'a' too"),
        ("baseline = 'b'\n[[contender]]\nname = 'a'\n", "the contenders are a"),
        ("seeds = [1, 0, 1]\n[[contender]]\nname = 'a'\n", "seeds: 1 is listed twice"),
        ("[[contender]]\nname = 'compare.json'\n", "is a file of the comparison"),
        (f"[[contender]]\nname = '{'a' * 121}'\n", 'such as "aaa'),
        ("seeds = [0]\n[gird]\n'lora.r' = [4]\n", "gird"),
        (f"[grid]\n'train.max_steps' = {list(range(1, 1002))}\n", "at most"),
    ],
)
def test_faults_of_a_sweep_are_refused(write: Write, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_comparison([sweep(write, text)])
    assert words in str(caught.value)


def test_a_seed_counts_once(write: Write) -> None:
    with pytest.raises(ConfigError, match="--seeds: 1 is listed twice; remove one"):
        read_comparison([write("a")], seeds=(1, 1))


def test_a_long_name_of_a_grid_ends_in_a_digest(write: Write) -> None:
    """Each name is that of a folder."""
    targets = [[f"model.layers.{n}.self_attn.q_proj" for n in range(first, 9)] for first in (0, 1)]
    names = named(read_comparison([sweep(write, f"[grid]\n'lora.target_modules' = {targets}\n")]))
    assert len(set(names)) == 2
    assert all(len(name) <= 120 for name in names)


def test_a_run_that_is_killed_while_it_writes_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Write
) -> None:
    code = "import sys; sys.stdin.readline(); print('[\"lo', end='', flush=True); sys.exit(137)"
    program = [sys.executable, "-c", code]
    start = subprocess.Popen
    monkeypatch.setattr(
        "fluvial.runs.comparison.child.subprocess.Popen",
        lambda _, **options: start(program, **options),
    )
    (contender,) = read_comparison([write("a")]).contenders
    with pytest.raises(child.RunFailedError, match="exit code 137"):
        list(child.in_own_process(contender.config, tmp_path / "run", resume=False))


def test_all_faults_of_all_contenders_are_named_at_once(write: Write) -> None:
    path = sweep(
        write, "[grid]\n'lora.r' = [4, 0]\n[[contender]]\nname = 'odd'\nset = ['ruonds = 3']\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_comparison([path])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "contender 'r=0': lora.r = 0" in lines[0]
    assert "contender 'odd': ruonds: unknown key; did you mean" in lines[1]


def test_other_data_or_models_are_refused_with_the_settings(write: Write) -> None:
    paths = [
        write("a"),
        write("b", model={"name_or_path": "embedded"}),
        write("c", evaluate={"every": 1}),
        write("d", train={"max_steps": 9}),
    ]
    with pytest.raises(ConfigError) as caught:
        read_comparison(paths)
    first, second, remedy = str(caught.value).splitlines()
    assert first == "contender 'b' differs from 'a' in model.name_or_path"
    assert second == "contender 'c' differs from 'a' in evaluate.every"
    assert remedy.endswith("or use --allow-different")
    assert named(read_comparison(paths, allow_different=True)) == ["a", "b", "c", "d"]


def test_unequal_seeds_of_files_are_refused(write: Write) -> None:
    paths = [write("a"), write("b", seed=2)]
    with pytest.raises(ConfigError, match="other seeds .*give --seeds"):
        read_comparison(paths)
    assert read_comparison(paths, seeds=(7,)).seeds == (7,)


def test_the_folder_of_a_comparison_follows_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_name([Path("fast.toml")]) == "compare-fast"
    assert default_name([Path("a/run.toml"), Path("b/run.toml")]) == "compare-a-run-b-run"
    assert default_name([tmp_path / "a" / "run.toml"]) == "compare-a-run"
    assert default_name([Path("recipe:clinic")]) == "compare-clinic"
    many = [default_name([Path(f"{'x' * 90}{n}.toml")]) for n in range(2)]
    assert many[0] != many[1]
    assert all(len(name) < 100 for name in many)


def test_a_sweep_stands_alone(write: Write) -> None:
    path = sweep(write, "[grid]\n'lora.r' = [4]\n")
    with pytest.raises(ConfigError, match="give it alone"):
        read_comparison([path, write("a")])


def test_a_changed_configuration_is_refused_before_any_run(write: Write, tmp_path: Path) -> None:
    """Every changed run is named, with its settings."""
    out = tmp_path / "out"
    before = read_comparison([write("a"), write("b", lora={"r": 2})])
    for each in before.contenders:
        next(iter(execute(each.config, run_folder(out, each.name, 1))))

    after = read_comparison([write("a", rounds=3), write("b", lora={"r": 3})])
    with pytest.raises(CheckpointError) as caught:
        next(execute_comparison(after, out))
    first, second = str(caught.value).splitlines()
    assert "a/seed-1 was started with another configuration (differs in rounds)" in first
    assert "b/seed-1 was started with another configuration (differs in lora.r)" in second


def test_a_run_folder_is_no_folder_for_a_comparison(write: Write, tmp_path: Path) -> None:
    comparison = read_comparison([write("a")])
    next(iter(execute(comparison.contenders[0].config, tmp_path / "run")))
    with pytest.raises(CheckpointError, match="holds a run"):
        next(execute_comparison(comparison, tmp_path / "run"))


def test_what_only_data_and_model_show_is_refused_for_all_contenders(
    write: Write, tmp_path: Path
) -> None:
    paths = [write(str(length), lora={"target_modules": [length]}) for length in ("one", "two")]
    with pytest.raises(ConfigError) as caught:
        next(execute_comparison(read_comparison(paths), tmp_path / "out"))
    assert "contender 'one': " in str(caught.value)
    assert "contender 'two': " in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--seeds", "0", "1", "12", "a.toml"],
        ["a.toml", "--seeds", "0,1,12"],
        ["a.toml", "--seeds=0,1", "--seeds", "12"],
    ],
)
def test_seeds_are_several_numbers(words: list[str]) -> None:
    command = get_command(app).commands["compare"]  # type: ignore[attr-defined]
    assert isinstance(command, SeedsCommand)
    context = command.make_context("compare", list(words))
    assert list(context.params["seeds"]) == [0, 1, 12]
    assert list(map(str, context.params["configs"])) == ["a.toml"]


def test_seeds_without_a_number_are_refused() -> None:
    command = get_command(app).commands["compare"]  # type: ignore[attr-defined]
    for words in (["a.toml", "--seeds"], ["a.toml", "--seeds", "x"], ["a.toml", "--seeds=-1"]):
        with pytest.raises(click.UsageError):
            command.make_context("compare", words)


def test_a_contender_is_no_baseline_of_itself(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = sweep(write, '[grid]\n"method.name" = ["fedavg", "cgfedllm"]\n')
    path.with_name("base.toml").write_text(
        write("kept", compare=["local", "fedavg"], codec={"name": "int8"}).read_text()
    )
    comparison = read_comparison([path])
    assert [each.config.compare for each in comparison.contenders] == [
        ("local",),
        ("local", "fedavg"),
    ]
    assert "contender 'fedavg': compare='fedavg' is this method itself, and is left out" in (
        caplog.text
    )


@pytest.mark.parametrize(
    ("tgap", "codec", "same"),
    [
        ({"source": "none"}, {"name": "int8"}, True),
        ({"source": "public"}, {"name": "int8"}, False),
        ({"source": "none"}, {"name": "int4"}, False),
    ],
)
def test_contenders_that_make_the_same_run_are_named(
    write: Write, tgap: dict[str, Any], codec: dict[str, Any], same: bool
) -> None:
    """CG-FedLLM without pre-training is FedAvg with its codec."""
    paths = [
        write("plain", codec={"name": "int8"}, compare=["local"]),
        write("paper", codec=codec, method={"name": "cgfedllm", "tgap": tgap}),
    ]
    found = same_runs(read_comparison(paths))
    assert len(found) == same
    assert not same or found[0].startswith("contenders 'plain' and 'paper' make the same run")
    assert not same or "cgfedllm is fedavg with its codec" in found[0]
    twice = same_runs(
        read_comparison(
            [paths[1], write("again", **load(paths[1]).model_dump(exclude_unset=True, mode="json"))]
        )
    )
    assert "no setting that changes a run differs" in twice[0]


def test_a_shared_heldout_set_is_one_cell_of_each_seed() -> None:
    """Of contenders that are equal too."""

    def measured(loss: float) -> dict[str, Any]:
        sites = {site: {"final": {"loss": loss}} for site in "abc"}
        return {"pooled": False, "overlap": {"one_set": True}, "heldout_by_site": sites}

    base = {0: measured(3.0), 1: measured(3.1)}
    lower = {0: measured(2.9), 1: measured(3.1)}
    for runs, better in ((base, 0), (lower, 1)):
        found = _difference(runs, base, "loss")
        assert found is not None
        assert (found.better, found.cells) == (better, 2)


def test_a_pipe_has_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is wider than 80 columns, whose last column was cut there."""
    text = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=text, width=80))
    row = [f"{'word' * 4}{number}" for number in range(6)]
    console.print_whole(table(row, [row], "", whole=True))
    assert text.getvalue().count("wordwordwordword5") == 2
