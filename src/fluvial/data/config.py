"""The settings of the data: sources, form of the records, reading, partition."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from fluvial.data.examples import Overlong
from fluvial.data.files import UTF8, known_encoding
from fluvial.data.forms import ANSWERS, FIELDS, Form
from fluvial.data.partition import Iid, Partition
from fluvial.data.read_as import ReadAs
from fluvial.data.records import Numbers
from fluvial.settings import Settings
from fluvial.storage.kinds import kind_of, taken_over
from fluvial.storage.paths import BUNDLED

STDLIB = "stdlib"
READING = ("form", "columns", "encoding", "delimiter")
"""Settings that each source may have of its own."""


class SourceSettings(Settings):
    """Settings of one source, where they differ from those of [data]."""

    form: Literal["auto", Form] | None = None
    """Form of the source's records."""
    columns: dict[str, str] | None = None
    """Columns of the source, our field = its column; {} where none is renamed."""
    encoding: str | None = None
    """Encoding of the source's files; unset, that of [data] for files of the same kind, else
    UTF-8."""
    delimiter: str | None = None
    """Character between the columns of the source's CSV files; unset, as `encoding`."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from unreadable(self.columns, self.encoding, self.delimiter)


class SiteDataSettings(SourceSettings):
    """Records of one site; what is not set is as in the run's [data]."""

    source: str
    """File or folder of the site's records; a relative path is relative to the file that names
    it."""
    heldout_source: str | None = None
    """File or folder of the site's held-out records."""
    heldout: SourceSettings | None = None
    """Settings of `heldout_source`, where they differ."""
    numbers: Numbers | None = None
    """Treatment of JSON numbers where a text is needed: "refuse" or "text"."""
    read_as: ReadAs | None = None
    """Form that the site's records are read as, in place of that of [data]."""
    chat_template: str | None = None
    """Chat template of the site's conversations, in place of that of [data]."""


class DataConfig(Settings):
    """The text of a run, its form, and its partition over the sites."""

    source: str = STDLIB
    """Source of the records: "stdlib" or "stdlib-keywords" (docs/data.md), a file (jsonl,
    json, csv, tsv, parquet, txt) or a folder of files, a `save_to_disk` folder, or a hub id."""
    split: str = "train"
    """Split of a hub id or of a saved `DatasetDict`."""
    heldout_source: str | None = None
    """Source of held-out records, partitioned by the same column."""
    heldout_split: str | None = None
    """Split of a hub id or saved data set with the held-out records."""
    heldout_share: float = Field(0.1, gt=0, lt=1)
    """Share of each site's records that is never trained on, when no held-out source is named."""
    public_source: str | None = None
    """Source of public text, which the server may read to pre-train a codec."""
    form: Literal["auto", Form] = "auto"
    """Form of a record; "auto" finds it by the fields. A txt file always has the form "text"."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of columns: our field = your column, such as {completion = "answer"}; "dialog.answer"
    is the field `answer` of the object `dialog`."""
    encoding: str = UTF8
    """Encoding of text files by Python's names: "utf-8" (with or without a byte order mark),
    "cp1252", "utf-16"."""
    delimiter: str | None = None
    """Character between the columns of CSV files; by default the comma, in tsv files the tab."""
    numbers: Numbers = "refuse"
    """JSON numbers and booleans in place of a text: refused, or read as the file writes them
    ("text")."""
    read_as: ReadAs | None = None
    """Form that records with answers are read as, training and held-out records alike:
    "prompt_completion" (conversations of one question with its answer are read without a template)
    or "messages" (prompts are read as conversations, in the chat template); unset, their own."""
    heldout: SourceSettings | None = None
    """Settings of `heldout_source` that differ from those of [data]."""
    public: SourceSettings | None = None
    """Settings of `public_source` that differ from those of [data]."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: "chatml", "llama3", "zephyr", "gemma",
    "mistral", "plain", a file with a Jinja template, or the template itself."""
    by_site: dict[str, SiteDataSettings] = Field(default_factory=dict)
    """Records of each site by its name, as tables `[data.by_site.NAME]` in place of `source` and
    `partition`: files of any kind, with columns of their own."""
    partition: Partition = Iid()
    """Partition of one data set into sites; a deployed site has a data set of its own."""
    sites: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the sites that take part, of those that the partition gives; unset, all."""
    max_length: int = Field(128, ge=8, le=10**7)
    """Tokens of one sequence."""
    overlong: Overlong = "cut"
    """Treatment of records of more than `max_length` tokens: cut at the end (refused where no token
    of the answer would stay), "shorten_prompt" (the beginning of the prompt is cut, and the end
    only if that is not enough), "drop", or "refuse". Plain text is cut into windows instead."""
    packing: bool = False
    """Sharing of sequences by short records in training: up to `max_length` tokens, best fit first.
    No record reads another, and none is cut; records to measure are not packed."""
    loss_on: Literal["answer", "all"] = "answer"
    """Tokens of a conversation with loss; plain text always has loss on all."""
    max_heldout: int | None = Field(None, ge=1, le=10**9)
    """Most held-out sequences of a site that are measured, from the first on."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from unreadable(self.columns, self.encoding, self.delimiter)

        touched = self._touched()
        yield from self._idle_beside_sites(touched)

        if self.bundled:
            idle = touched & {
                "split",
                "heldout_source",
                "heldout_split",
                "heldout_share",
                "heldout",
                "partition",
                "read_as",
                "chat_template",
                "overlong",
                "form",
                "columns",
            }
            if self.public_source is None:
                idle |= touched & {"encoding", "delimiter", "numbers"}
            if idle:
                yield (
                    f"{', '.join(sorted(idle))}: without effect, because source={self.source!r} "
                    "brings its own split"
                )

        if self.heldout_split == self.split and self.heldout_source in (None, self.source):
            yield (
                f"heldout_split={self.heldout_split!r}: these are the records to train on; name "
                "others"
            )
        if "heldout_share" in touched and (self.heldout_source or self.heldout_split):
            yield "heldout_share: without effect beside heldout_source or heldout_split; remove one"
        if self.heldout is not None and not (self.heldout_source or self.heldout_split):
            yield "heldout: without effect, because no heldout_source is named; remove it"
        if self.public is not None and self.public_source is None:
            yield "public: without effect, because no public_source is named; remove it"

    @property
    def bundled(self) -> bool:
        """True where the records come with Python."""
        return self.source in BUNDLED and not self.by_site

    def of_site(self, name: str) -> "DataConfig":
        """Return the settings of a site that `by_site` names, as if it had its records alone."""
        table = self.model_dump(exclude_unset=True, exclude={"by_site", "sites"})
        own = self.by_site[name].model_dump(exclude_unset=True, exclude_none=True)
        table = taken_over(table, "", kind_of(self.by_site[name].source))
        if "heldout_source" in own:
            table.pop("heldout_share", None)
        return DataConfig.model_validate({**table, **own})

    def readings(self) -> list[dict[str, Any]]:
        """Return the ways in which the run's sources are read, each once, without their names: as
        tables of settings of [data], and `suffix`, the kind of the source's files."""
        tables = [self.of_site(name) for name in sorted(self.by_site)] or [self]
        sources = [
            (data, name, own)
            for data in tables
            for name, own in ((data.source, None), (data.heldout_source, data.heldout))
        ]
        found: list[dict[str, Any]] = []
        for data, name, own in (*sources, (self, self.public_source, self.public)):
            if name is None or name in BUNDLED:
                continue
            reading = data.reading(own, None if name == data.source else name)
            table = reading.model_dump(exclude={"own"}, exclude_none=True)
            table["suffix"] = kind_of(name)
            if any(own.chat_template for own in self.by_site.values()):
                table["chat_template"] = data.chat_template
            if table not in found:
                found.append(table)
        return found

    def _idle_beside_sites(self, touched: set[str]) -> Iterator[str]:
        """Yield a line for what has no effect beside `by_site`, or is wrong in it."""
        if not self.by_site:
            return
        idle = touched & {"source", "heldout_source", "heldout_split", "heldout", "partition"}
        if idle:
            yield (
                f"{', '.join(sorted(idle))}: without effect beside data.by_site, whose tables name "
                "the records of each site; remove it, or remove these tables"
            )
        for name, own in self.by_site.items():
            if own.source in BUNDLED:
                yield (
                    f"by_site.{name}.source={own.source!r}: brings sites of its own; name a file, "
                    "or set data.source"
                )
            if own.heldout is not None and own.heldout_source is None:
                yield (
                    f"by_site.{name}.heldout: without effect, because it names no heldout_source; "
                    "remove it"
                )
        if "heldout_share" in touched and all(own.heldout_source for own in self.by_site.values()):
            yield "heldout_share: without effect, because each site names a heldout_source"

    def _touched(self) -> set[str]:
        default = dict(type(self).model_construct())
        return {name for name, value in self if value != default[name]}

    def reading(
        self, own: SourceSettings | None = None, name: str | None = None
    ) -> "ReadingSettings":
        """Return how a source is read: by its own settings, where those are unset by these.

        `name` is that of a held-out or public source; None for `source` itself.
        """
        given = {} if own is None else own.model_dump(exclude_none=True)
        table = self.model_dump(include=set(READING))
        if name is not None:
            table = taken_over(table, "" if self.bundled else kind_of(self.source), kind_of(name))
        return ReadingSettings(
            **({"encoding": UTF8, "delimiter": None} | table | given),
            numbers=self.numbers,
            read_as=self.read_as,
            own=frozenset(given),
        )


class ReadingSettings(Settings):
    """Settings of one source, with nothing unset."""

    form: Literal["auto", Form]
    columns: dict[str, str]
    encoding: str
    delimiter: str | None
    numbers: Numbers
    read_as: ReadAs | None
    own: frozenset[str]
    """Settings that were given for this source alone."""


def unreadable(
    columns: Mapping[str, str] | None, encoding: str | None, delimiter: str | None
) -> Iterator[str]:
    """Yield a line for each renamed field, an encoding or a delimiter that cannot be."""
    for field, column in (columns or {}).items():
        if field in FIELDS:
            continue
        hint = f"fields are {', '.join(FIELDS)}"
        if column in FIELDS:
            hint = f"our field comes first: {{{column} = {field!r}}}"
        yield f"columns: {field!r:.40} is no field of a record; {hint}"

    fields = dict[str, str]()
    for field, column in (columns or {}).items():
        first = fields.setdefault(column, field)
        listed = {first, field} - {"references"} <= {*ANSWERS.values()}
        if first != field and not ("references" in (first, field) and listed):
            yield (
                f"columns: {first} and {field} name one column, {column!r:.40}; name a column of "
                "its own for each"
            )

    if encoding is not None and not known_encoding(encoding):
        yield (
            f"encoding={encoding!r:.40}: no known encoding of text; write one such as 'utf-8', "
            "'cp1252' or 'utf-16'"
        )

    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n\0'):
        yield (
            f"delimiter={delimiter!r:.40}: must be one character, such as ';' or, for a tab, "
            '"\\t"'
        )
