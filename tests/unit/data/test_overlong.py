"""Remedies for records that do not fit: no setting raises the context of the model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from fluvial.data import DataConfig, DataError, SiteTexts, read_whole
from fluvial.errors import ConfigError
from fluvial.models.pool import ModelPool
from fluvial.runs.evaluation import with_remedies
from fluvial.training.record_result import read_texts
from tests.support.tokenizer_kinds import characters

RAISE = "Raise data.max_length (the longest record has 74 tokens), or set"
RAISE_TO = "Raise data.max_length to 70 at most (the model reads at most 70 tokens and the"
CANNOT = "Raising data.max_length cannot help (the model reads at most 64 tokens and the"
LONGER_CONTEXT = "shorten the records, choose a model with a longer context, or set"


def config_of(folder: Path) -> DataConfig:
    """Return settings of a source whose records have 74 tokens by `characters`."""
    source = folder / "long.jsonl"
    rows = [{"prompt": "x" * 70, "completion": "yes"}] * 4
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partition = {"by": "iid", "sites": 1}
    table = {"source": str(source), "max_length": 64, "heldout_share": 0.5, "partition": partition}
    return DataConfig.model_validate(table)


@pytest.mark.parametrize(
    ("context", "remedies"),
    [
        (None, [RAISE]),
        (4096, [RAISE]),
        (70, [RAISE_TO, LONGER_CONTEXT]),
        (64, [CANNOT, LONGER_CONTEXT]),
    ],
)
def test_the_remedy_is_one_that_the_model_allows(
    context: int | None, remedies: list[str], tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    texts = SiteTexts(config, characters(), seed=0, context=context)
    with pytest.raises(DataError) as at_check:
        texts.check()
    with pytest.raises(DataError) as at_a_site:
        texts.load("site-0")
    with pytest.raises(DataError) as measured:
        read_whole(config, characters(), "--data", context=context)

    for told in map(str, (at_check.value, at_a_site.value, measured.value)):
        assert all(remedy in told for remedy in remedies)
        assert '"shorten_prompt"' in told


def test_evaluate_names_the_setting_that_helps(tmp_path: Path) -> None:
    pool = cast(
        ModelPool, SimpleNamespace(outline=SimpleNamespace(context=64), tokenizer=characters())
    )
    with pytest.raises(ConfigError) as caught, with_remedies({}):
        read_texts(config_of(tmp_path), pool, None)
    told = str(caught.value)
    assert CANNOT in told
    assert told.endswith("""With this command, add --set 'data.overlong="shorten_prompt"'""")
