"""Where the text of the sites comes from: the standard library, files, a saved data set or a hub id."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fluvial.data import stdlib
from fluvial.data.partition import Files, Iid, Natural, Partition, split
from fluvial.data.records import Example, Form, Question, Tokenized, detect_form, tokenize
from fluvial.errors import ConfigError
from fluvial.seeds import derive, numpy_generator
from fluvial.settings import Settings

STDLIB = "stdlib"
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
CACHED_SITES = 32


class DataConfig(Settings):
    """Which text, in which form, split how."""

    source: str = STDLIB
    """"stdlib", a file (jsonl, json, csv, parquet, txt) or a folder of them, a `save_to_disk` folder, a hub id."""
    split: str = "train"
    """Split of a hub id or of a saved `DatasetDict`."""
    heldout_source: str | None = None
    """Held-out records, in the same form and split over the sites by the same column."""
    heldout_split: str | None = None
    """Split of a hub id or saved data set with the held-out records."""
    heldout_share: float = Field(0.1, gt=0, lt=1)
    """Share of each site's records that is never trained on, when no held-out source is named."""
    public_source: str | None = None
    """Text that belongs to no site and that the server may read: what a codec is pre-trained on."""
    form: Literal["auto", Form] = "auto"
    """What a record looks like; "auto" tells by its fields."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field = your column, such as {completion = "answer"}."""
    partition: Partition = Iid()
    """How one data set becomes many sites; a deployed site has its own."""
    max_length: int = Field(128, ge=8)
    """Tokens of one sequence."""
    packing: bool = False
    """Join sequences before cutting them to `max_length`; attention crosses the EOS between them."""
    loss_on: Literal["answer", "all"] = "answer"
    """Which tokens of a conversation are learned; of plain text always all."""
    max_heldout: int | None = Field(None, ge=1)
    """At most this many held-out sequences for each site, the first ones."""

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> "DataConfig":
        default = type(self).model_fields
        touched = {
            name for name in default if getattr(self, name) != default[name].get_default(call_default_factory=True)
        }
        if self.source == STDLIB:
            idle = touched & {
                "split",
                "heldout_source",
                "heldout_split",
                "heldout_share",
                "form",
                "columns",
                "partition",
            }
            if idle:
                raise ValueError(
                    f"{', '.join(sorted(idle))}: without effect, because source='stdlib' brings its own split"
                )
        if self.heldout_split == self.split and self.heldout_source in (None, self.source):
            raise ValueError(f"heldout_split={self.heldout_split!r}: these are the records to train on; name others")
        if "heldout_share" in touched and (self.heldout_source or self.heldout_split):
            raise ValueError("heldout_share: without effect beside heldout_source or heldout_split; remove one")
        return self


@dataclass(frozen=True)
class SiteData:
    """What one site trains on and is measured on; never empty."""

    train: list[Example]
    heldout: list[Example]
    questions: list[Question]
    """Held-out prompts with their answers, for exact match."""
    records: int
    truncated_records: int
    truncated_tokens: int


class SiteTexts:
    """The data of all sites of a configuration; records are read once, tokens are made when a site is asked for."""

    def __init__(self, config: DataConfig, tokenizer: Any, *, seed: int, owner: str | None = None) -> None:
        """With an `owner` all records are of the one site of that name, whatever the configuration's partition."""
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        if owner is not None:
            self._parts: dict[str, tuple[Any, Any]] | None = {owner: _whole(config, seed, owner)}
        else:
            self._parts = None if config.source == STDLIB else _partitioned(config, seed)
        self.names = stdlib.site_names() if self._parts is None else tuple(sorted(self._parts))
        self.load = lru_cache(CACHED_SITES)(self._load)
        self.public = cache(self._public)

    def sample(self) -> SiteData:
        """The data of the first site, to show the model on."""
        return self.load(self.names[0])

    def _load(self, name: str) -> SiteData:
        """Tokens of one site, or of all together under the name `POOLED`.

        Raises `ConfigError` when a site has nothing to train on, or nothing held out.
        """
        if name == POOLED and name not in self.names:
            return _union([self._load(own) for own in self.names])
        if self._parts is None:
            text = stdlib.site_text(name)
            train, heldout = (self._stdlib(documents) for documents in (text.train, text.heldout))
        else:
            train, heldout = (self._records(name, part) for part in self._parts[name])
        for what, found in (("to train on", train), ("held out", heldout)):
            if not found.examples:
                raise ConfigError(f"data: site {name!r} has no records {what}; give it some, or leave the site out")
        return SiteData(
            train.examples,
            heldout.examples[: self.config.max_heldout],
            heldout.questions,
            train.records + heldout.records,
            train.truncated_records + heldout.truncated_records,
            train.truncated_tokens + heldout.truncated_tokens,
        )

    def _public(self) -> dict[str, list[Example]]:
        """Examples of text that is nobody's, in parts that can stand for sites.

        Raises `ConfigError` when the configuration names no public text.
        """
        if self.config.source == STDLIB and self.config.public_source is None:
            packages = {name: self._stdlib(documents).examples for name, documents in stdlib.public_packages().items()}
            return _even_parts(packages)
        if self.config.public_source is None:
            raise ConfigError(
                "data.public_source: a codec that learns from public text needs some, in the language and form of the "
                "sites' data; name a file, or set method.tgap.source='sites' (each site then sends raw updates once)"
            )
        dataset = _open(self.config.public_source, self.config.split, "data.public_source")
        parts = split(dataset, Iid(sites=min(8, len(dataset))), derive(self.seed, "public") % 2**32)
        return {name: self._records(name, part).examples for name, part in parts.items()}

    def _stdlib(self, documents: list[stdlib.Document]) -> Tokenized:
        records = ((document.name, {"text": document.text}) for document in documents)
        return tokenize(records, "text", self.tokenizer, max_length=self.config.max_length, packing=self.config.packing)

    def _records(self, site: str, dataset: Any) -> Tokenized:
        ours = {theirs: field for field, theirs in self.config.columns.items()}
        form = _form(self.config, dataset.column_names)

        def records() -> Any:
            for number, row in enumerate(dataset):
                fields: Mapping[str, Any] = {ours.get(column, column): value for column, value in row.items()}
                yield f"site {site!r}, record {fields.get('id', number)!r}", fields

        return tokenize(
            records(),
            form,
            self.tokenizer,
            max_length=self.config.max_length,
            packing=self.config.packing,
            loss_on=self.config.loss_on,
        )


POOLED = "pooled"
"""Name of the one site that holds everybody's data, for the centralised baseline."""


def _union(sites: list[SiteData]) -> SiteData:
    return SiteData(
        [example for site in sites for example in site.train],
        [example for site in sites for example in site.heldout],
        [question for site in sites for question in site.questions],
        sum(site.records for site in sites),
        sum(site.truncated_records for site in sites),
        sum(site.truncated_tokens for site in sites),
    )


def _even_parts(packages: dict[str, list[Example]], parts: int = 8) -> dict[str, list[Example]]:
    """Join packages into `parts` groups of like size, each new package going to the smallest group so far."""
    groups: list[tuple[list[str], list[Example]]] = [([], []) for _ in range(parts)]
    for name in sorted(packages, key=lambda name: (-len(packages[name]), name)):
        names, examples = min(groups, key=lambda group: len(group[1]))
        names.append(name)
        examples += packages[name]
    return {names[0]: examples for names, examples in groups if examples}


def _whole(config: DataConfig, seed: int, owner: str) -> tuple[Any, Any]:
    """Train and held-out `datasets.Dataset` of a site that has its records to itself."""
    train = _open(config.source, config.split, "data.source")
    _form(config, train.column_names)
    if not (config.heldout_source or config.heldout_split):
        return _hold_out(owner, train, config, seed)
    source = config.heldout_source or config.source
    return train, _open(source, config.heldout_split or config.split, "data.heldout_source")


def _partitioned(config: DataConfig, seed: int) -> dict[str, tuple[Any, Any]]:
    """Train and held-out `datasets.Dataset` of each site."""
    draw = derive(seed, "partition") % 2**32
    if isinstance(config.partition, Files):
        train = _open_each(config.source, config.split, "data.source")
    else:
        dataset = _open(config.source, config.split, "data.source")
        _form(config, dataset.column_names)
        train = split(dataset, config.partition, draw)
    heldout: dict[str, Any] = {}
    if config.heldout_source or config.heldout_split:
        source = config.heldout_source or config.source
        if (
            config.heldout_split
            and _is_local(source)
            and not (Path(source).expanduser() / "dataset_dict.json").exists()
        ):
            raise ConfigError(
                f"data.heldout_split={config.heldout_split!r}: {source!r} has no splits; name the file or folder with "
                "the held-out records in data.heldout_source"
            )
        if isinstance(config.partition, Files):
            heldout = _open_each(source, config.split, "data.heldout_source")
        else:
            apart = _open(source, config.heldout_split or config.split, "data.heldout_source")
            same = config.partition
            heldout = split(
                apart, same.model_copy(update={"largest": None}) if isinstance(same, Natural) else same, draw
            )
        missing = sorted(set(train) - set(heldout))
        if missing:
            raise ConfigError(
                f"data.heldout_source has no records of site {missing[0]!r} ({len(missing)} sites lack some)"
            )
    else:
        for name, part in train.items():
            train[name], heldout[name] = _hold_out(name, part, config, seed)
    return {name: (train[name], heldout[name]) for name in train}


def _hold_out(name: str, part: Any, config: DataConfig, seed: int) -> tuple[Any, Any]:
    """The records of a site to train on, and a drawn share of them that is held out."""
    order = numpy_generator(seed, "heldout", name).permutation(len(part))
    cut = round(config.heldout_share * len(part))
    if not 0 < cut < len(part):
        raise ConfigError(
            f"data: site {name!r} has {len(part)} records; data.heldout_share={config.heldout_share} leaves "
            f"{len(part) - cut} to train on and {cut} held out, and both need at least one"
        )
    return part.select(sorted(order[cut:])), part.select(sorted(order[:cut]))


def _form(config: DataConfig, found: list[str]) -> Form:
    """The form of records with the columns `found`; raises `ConfigError` if they are not those of the settings."""
    for field, column in config.columns.items():
        if column not in found:
            raise ConfigError(f"data.columns: {field} = {column!r}, but the data has the columns {', '.join(found)}")
    ours = {theirs: field for field, theirs in config.columns.items()}
    return detect_form((ours.get(column, column) for column in found), "data") if config.form == "auto" else config.form


def _files(source: str, where: str) -> list[Path]:
    path = Path(source).expanduser()
    if not path.exists():
        raise ConfigError(f"{where}: there is no file or folder {source!r}")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in LOADERS)
    if not files:
        raise ConfigError(f"{where}: folder {source!r} holds no {', '.join(LOADERS)} file")
    return files


def _open_each(source: str, wanted: str, where: str) -> dict[str, Any]:
    """One `datasets.Dataset` for each file of a folder, by the file's name."""
    opened: dict[str, Any] = {}
    for path in _files(source, where):
        if path.stem in opened:
            raise ConfigError(f"{where}: {source!r} holds two files for site {path.stem!r}; rename one or join them")
        opened[path.stem] = _open(str(path), wanted, where)
    return opened


def _is_local(source: str) -> bool:
    path = Path(source).expanduser()
    return path.exists() or source.startswith((".", "/", "~")) or path.suffix in LOADERS


def _broken_line(path: Path) -> str:
    """The first line of a jsonl file that is no JSON, or nothing: the readers of `datasets` do not tell."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            try:
                json.loads(line)
            except ValueError as error:
                if line.strip():
                    return f"line {number} is not JSON ({error})"
    return ""


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[:300]}"


def _open(source: str, wanted: str, where: str) -> Any:
    """One `datasets.Dataset`; raises `ConfigError` naming the setting."""
    import datasets

    datasets.disable_progress_bars()  # the command line shows its own
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is in the error below
    path = Path(source).expanduser()
    try:
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                if wanted not in saved:
                    raise ConfigError(f"{where}: {source!r} has the splits {', '.join(saved)}, not {wanted!r}")
                saved = saved[wanted]
            return saved
        if _is_local(source):
            files = _files(source, where)
            kinds = {LOADERS.get(file.suffix) for file in files}
            if len(kinds) != 1 or None in kinds:
                raise ConfigError(f"{where}: {source!r} must hold files of one kind among {', '.join(LOADERS)}")
            if not any(file.stat().st_size for file in files):
                raise ConfigError(f"{where}: {source!r} is empty")
            loaded = datasets.load_dataset(str(kinds.pop()), data_files=[str(file) for file in files], split="train")
        else:
            loaded = datasets.load_dataset(source, split=wanted)
    except ConfigError:
        raise
    except Exception as error:  # datasets raises whatever its readers raise
        raise ConfigError(f"{where}: {source!r} cannot be read: {_broken_line(path) or _cause(error)}") from error
    if len(loaded) == 0:
        raise ConfigError(f"{where}: {source!r} is empty")
    return loaded
