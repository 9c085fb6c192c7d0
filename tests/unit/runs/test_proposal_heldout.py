"""Held-out records that `fluvial init` is given: of one source, of several, and of some sites."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from fluvial.errors import ConfigError
from fluvial.runs.config import RunConfig, load
from fluvial.runs.plan import plan, preview
from fluvial.runs.proposal.heldout import ALL, fitted
from fluvial.runs.proposal.models import look_at_model
from fluvial.runs.proposal.records import facts_about, read_records
from fluvial.runs.proposal.same_form import in_one_form
from fluvial.runs.proposal.settings import Answers, chat_template
from tests.unit.runs.test_proposal import answers, proposed, run_init, written


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_source_with_held_out_records(tiny_model: Path) -> None:
    asked = written(answers(3, prompt="Who had case {}?"), "asked.jsonl")
    config = proposed(
        *("--model", str(tiny_model), "--data", written(answers()), "--heldout", asked)
    )
    assert config.data.heldout_source is not None
    assert Path(config.data.heldout_source).name == "asked.jsonl"
    assert "heldout_share" not in Path("q.toml").read_text()
    north = written([row for row in answers(3) if row["hospital"] == "north"], "north.jsonl")
    with pytest.raises(ConfigError, match="heldout_source has no records of site 'south'"):
        proposed("--force", "--model", "embedded", "--data", "records.jsonl", "--heldout", north)
    Path("plain.txt").write_text("A line.\nAnother line.\n")
    plain = ("--data", "records.jsonl", "--heldout", "plain.txt")
    with pytest.raises(ConfigError, match=r"--heldout 'plain.txt': is plain text and the records"):
        run_init("--force", "--yes", "--model", str(tiny_model), *plain)


def test_held_out_records_are_of_the_same_task_by_the_same_columns(tiny_model: Path) -> None:
    """A column 'text' that is a question: alone, it would be plain text."""
    rows = [
        {"who": row["hospital"], "text": row["question"], "label": row["answer"]}
        for row in answers()
    ]
    data, asked = written(rows), written(rows, "asked.jsonl")
    columns = ("--column", "prompt=text", "--column", "completion=label", "--site-column", "who")
    config = proposed("--model", str(tiny_model), "--data", data, "--heldout", asked, *columns)
    assert config.data.columns == {"prompt": "text", "completion": "label"}


def test_held_out_records_whose_columns_or_bytes_differ(tiny_model: Path) -> None:
    """Columns, encoding and delimiter are set where those of the source do not hold."""
    lines = "".join(f"{r['hospital']};Fall für {r['question']};{r['answer']}\n" for r in answers())
    Path("a.csv").write_text(f"hospital;Frage;Antwort\n{lines}", encoding="cp1252")
    rows = [
        {"hospital": r["hospital"], "prompt": r["question"], "completion": r["answer"]}
        for r in answers(3)
    ]
    options = ("--force", "--model", str(tiny_model), "--data", "a.csv", "--heldout")
    other = proposed(*options, written(rows, "asked.jsonl")).data.heldout
    assert other is not None
    assert other.model_dump(exclude_unset=True) == {"columns": {}}
    why = "held-out file differs: its columns have the names of our fields, so none is renamed"
    assert why in " ".join(Path("q.toml").read_text().replace("\n#", "").split())

    text = "".join(f"{r['hospital']},É {r['prompt']},{r['completion']}\n" for r in rows)
    Path("asked.csv").write_text(f"hospital,Frage,Antwort\n{text}", encoding="utf-8")
    same = proposed(*options, "asked.csv").data.heldout
    assert same is not None
    why = "# the held-out file differs: encoding and delimiter as the file was found"
    assert why in Path("q.toml").read_text()
    assert same.model_dump(exclude_unset=True) == {"encoding": "utf-8", "delimiter": ","}

    plain = text.replace("É", "E").replace(",", ";")  # ASCII reads the same in both encodings
    Path("asked.csv").write_text(f"hospital;Frage;Antwort\n{plain}")
    assert proposed(*options, "asked.csv").data.heldout is None

    strange = written([{"x": row["prompt"], "y": row["completion"]} for row in rows], "x.jsonl")
    with pytest.raises(ConfigError, match=r"--heldout 'x.jsonl': its columns x, y fit no form.*"):
        proposed(*options, strange)


@pytest.mark.parametrize(
    ("template", "turns", "form"),
    [(None, 1, "prompt_completion"), ("plain", 1, "messages"), (None, 2, "messages")],
)
def test_held_out_prompts_beside_conversations_are_read_in_one_form(
    tiny_model: Path, template: str | None, turns: int, form: str
) -> None:
    """A site was trained in a chat template and measured without one."""
    model = look_at_model(str(tiny_model))
    model.tokenizer.chat_template = template
    rows = answers(4)
    turn = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It"}]
    chats = written([{"messages": turn * turns} for _ in rows], "chats.jsonl")
    asked = written([{"prompt": "Who?", "completion": "It"}], "asked.jsonl")
    records = facts_about(read_records(chats), {})
    heldout = fitted({ALL: read_records(asked)}, records)

    has = template is not None
    same, apart = in_one_form(records, heldout, has_template=has)
    assert same.read_as == apart[ALL].facts.read_as == form
    assert same.is_conversation == (form == "messages")
    known = cast(Answers, SimpleNamespace(model=model, template=None, heldout=apart))
    assert bool(chat_template(known, same)) == (form == "messages" and not has)
    assert in_one_form(records, {}, has_template=has) == (records, {})


def test_one_site_of_several_with_conversations_is_read_as_the_others(tiny_model: Path) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It"}]
    written([{"messages": turns}] * 6, "bern.jsonl")
    pairs = [{"prompt": f"Who {n}?", "completion": "It"} for n in range(6)]
    written(pairs, "rome.jsonl")
    config = proposed(
        *("--model", str(tiny_model), "--data", "bern.jsonl", "--data", "rome.jsonl"),
        *("--heldout", written(pairs, "asked.jsonl")),
    )
    assert config.data.by_site["bern"].read_as == "prompt_completion"
    assert config.data.by_site["bern"].chat_template is None
    assert config.data.by_site["rome"].read_as is None


def test_the_length_holds_held_out_records_too(tiny_model: Path) -> None:
    """A length of the shorter records to train on cut all held-out answers off, and was refused."""
    rows = answers(6, prompt="Who?")
    long = [{**row, "question": "Who had " + "a very long case " * 5} for row in rows[:2]]
    data, asked = written(rows), written([*long, rows[6], rows[12]], "asked.jsonl")
    options = ("--site-column", "hospital", "--heldout", asked)
    heldout = [row["hospital"] for row in [*long, rows[6], rows[12]]]
    assert set(heldout) == {row["hospital"] for row in rows}
    config = proposed("--model", str(tiny_model), "--data", data, *options)
    longest = preview(config, heldout[0], 1)["heldout"][0]["length"]
    assert 16 < longest <= config.data.max_length
    text = Path("q.toml").read_text()
    assert f"of 22 looked at (held out: 4) has {longest} tokens" in text


def _three_sites() -> tuple[str, ...]:
    lines = "".join(f"Fall {n}: für wen?;Haus {n}\n" for n in range(12))
    Path("lisbon.csv").write_text(f"Frage;Antwort\n{lines}", encoding="cp1252")
    written([{"instruction": f"Case {n}", "output": f"Room {n}"} for n in range(14)], "oslo.jsonl")
    Path("rome").mkdir()
    written(answers(4), "rome/a.jsonl")
    return ("--data", "lisbon.csv", "--data", "oslo.jsonl", "--data", "rome")


def _notes(config: RunConfig) -> str:
    return "\n".join(plan(config)["notes"])


def test_one_held_out_file_for_several_sources(tiny_model: Path) -> None:
    """Each table names the file; all sites are measured on the same records."""
    asked = written(
        [{"prompt": f"Who had {n}?", "completion": f"House {n}"} for n in range(6)], "asked.jsonl"
    )
    data = proposed("--model", str(tiny_model), *_three_sites(), "--heldout", asked).data
    assert {own.heldout_source for own in data.by_site.values()} == {str(Path(asked).resolve())}
    differing = {name: own.heldout for name, own in data.by_site.items()}
    assert differing["oslo"] is None or differing["oslo"].columns == {}
    assert differing["lisbon"] is not None
    assert differing["lisbon"].columns == {}
    assert "that sites share" in Path("q.toml").read_text()

    planned = plan(load(Path("q.toml")))
    assert [site["heldout"] for site in planned["sites"]] == [6, 6, 6]
    assert [site["train"] for site in planned["sites"]] == [12, 14, 12]
    assert "on its own only" not in "\n".join(planned["notes"])


def test_a_held_out_file_for_some_of_several_sources(tiny_model: Path) -> None:
    """The others hold out a share of their records; one file for all stands in for the rest."""
    sources = _three_sites()
    asked = written([{"instruction": f"Say {n}", "output": "It"} for n in range(5)], "asked.jsonl")
    options = ("--model", str(tiny_model), *sources, "--heldout", f"oslo={asked}")
    data = proposed(*options).data
    assert [name for name, own in data.by_site.items() if own.heldout_source] == ["oslo"]
    counts = {site["name"]: site["heldout"] for site in plan(load(Path("q.toml")))["sites"]}
    assert counts == {"lisbon": 1, "oslo": 5, "rome": 1}

    other = written([{"question": "Say?", "answer": "It"}] * 3, "other.jsonl")
    data = proposed("--force", *options, "--heldout", other).data
    names = {name: Path(own.heldout_source or "").name for name, own in data.by_site.items()}
    assert names == {"lisbon": other, "oslo": asked, "rome": other}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["bern=asked.jsonl"], "'bern=asked.jsonl': no --data makes a site 'bern'; they make lis"),
        (["oslo=asked.jsonl"] * 2, "names the records of site 'oslo' again; keep one"),
        (["asked.jsonl"] * 2, "names the records of all sites again"),
        (
            ["lisbon=asked.jsonl", "oslo=asked.jsonl", "rome=asked.jsonl", "asked.jsonl"],
            "'asked.jsonl': without effect, because each site has one of its own",
        ),
        (["oslo=no.jsonl"], "there is no file or folder"),
        (["plain.txt"], "'plain.txt': is plain text and the records have answers"),
    ],
)
def test_wrong_held_out_options_are_named(options: list[str], words: str, tiny_model: Path) -> None:
    written([{"prompt": "Say?", "completion": "It"}] * 3, "asked.jsonl")
    Path("plain.txt").write_text("A line.\nAnother line.\n")
    given = [word for option in options for word in ("--heldout", option)]
    with pytest.raises(ConfigError, match=words):
        run_init("--yes", "--model", str(tiny_model), *_three_sites(), *given)


def test_sites_without_common_held_out_records_are_remarked(tiny_model: Path) -> None:
    """A share of each site's own records cannot show what the others add; init and check say it."""
    own = "each site is measured on its own only"
    result = run_init("--yes", "--model", str(tiny_model), *_three_sites())
    assert own in " ".join(result.output.split())
    assert "as heldout_source of each table data.by_site.NAME" in _notes(load(Path("q.toml")))

    column = proposed("--force", "--model", str(tiny_model), "--data", written(answers()))
    assert "name a data.heldout_source that has the same records" in _notes(column)
    shares = ("--data", "records.jsonl", "--sites", "3")  # of one source: all are alike
    assert own not in _notes(proposed("--force", "--model", str(tiny_model), *shares))
    asked = written(answers(3, prompt="Who had case {}?"), "asked.jsonl")
    meant = ("--data", "records.jsonl", "--heldout", asked)
    assert own not in _notes(proposed("--force", "--model", str(tiny_model), *meant))
