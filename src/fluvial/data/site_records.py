"""The records of every site: read from their sources, partitioned, and a share held out."""

from collections.abc import Collection, Sequence

from fluvial.data.config import DataConfig, SiteDataSettings
from fluvial.data.faults import Faults, shown
from fluvial.data.forms import CONVERSATIONS, Form
from fluvial.data.partition import Drawn, Files, Natural, alike, split
from fluvial.data.read_as import SETTING, kinds_apart
from fluvial.data.records import Record
from fluvial.data.site_names import chosen
from fluvial.data.sources import (
    Found,
    Source,
    classes_of,
    has_splits,
    read_each,
    read_source,
)
from fluvial.errors import ConfigError
from fluvial.seeds import derive, numpy_generator

SOURCES = ("source", "heldout_source")
"""Settings of the records to train on and of those held out."""
Parts = dict[str, tuple[Sequence[Record], Sequence[Record]]]
"""Records to train on and held-out records of each site."""


class SiteRecords:
    """Reader of a configuration's records; `notes` and `forms` grow with each source."""

    def __init__(self, config: DataConfig, seed: int, owner: str | None) -> None:
        self.config = config
        self.seed = seed
        self.owner = owner
        self.notes: list[str] = []
        """Remarks on the files for their owner."""
        self.forms: set[str] = set()
        """Forms of the records."""
        self.public_forms: set[str] = set()
        """Forms of the public records, once they were read."""
        self.conversing: set[str] = set()
        """Sites with a table of their own that have conversations."""
        self.changed: set[str] = set()
        """Owners of the records whose form `data.read_as` changes; "" for those of all sites."""
        self._forms_at: dict[str, list[Form]] = {}
        """Forms of the records of each source, by its setting."""

    def read(self, faults: Faults) -> Parts:
        """Return the records of each site; faults of the files go to `faults`."""
        config = self.config
        if self.owner is None:
            self._refuse_idle_split()
        if self.owner is None and config.by_site:
            return self._by_site(faults)
        train = self._source("data.source", config.source, config.split)
        heldout = self._heldout_source()

        if self.owner is not None:
            alone = self._whole(train, heldout, faults, self.owner)
            self._compare_forms()
            return alone
        if isinstance(config.partition, Files):
            parts = self._by_file(train, faults)
            apart = self._by_file(heldout, faults) if heldout else None
        else:
            parts = self._by_partition(train, config.partition, faults)
            same = config.partition
            whole = same.model_copy(update={"largest": None}) if isinstance(same, Natural) else same
            apart = self._by_partition(heldout, whole, faults) if heldout else None

        if faults.count:
            return {}
        self._compare_forms()

        if config.sites is not None:
            names = chosen(sorted(parts), config.sites)
            parts = {name: parts[name] for name in names}
            if apart is not None:
                apart = {name: apart[name] for name in names if name in apart}

        self.notes += alike({name: len(records) for name, records in parts.items()})
        if apart is None:
            return self._shared(parts, faults)

        return self._matched(parts, apart, faults)

    def _compare_forms(self) -> None:
        """Note held-out records of another kind than those to train on."""
        trained, heldout = (self._forms_at.get(f"data.{name}", []) for name in SOURCES)
        self.notes += kinds_apart(trained, heldout)

    def idle(self, names: Collection[str]) -> dict[str, str]:
        """Return the settings about conversations that change no record of the sites `names`, by
        their place, and why."""
        idle = {}
        if self.config.read_as and not self.changed:
            idle[SETTING] = "no record has another form"
        for name, own in self.config.by_site.items():
            if name in names and own.chat_template and name not in self.conversing:
                idle[f"data.by_site.{name}.chat_template"] = "no record of it is a conversation"
            if name in names and own.read_as and name not in self.changed:
                idle[f"data.by_site.{name}.read_as"] = "no record of it has another form"
        return idle

    def public(self) -> list[Record]:
        """Return the public records; raise `DataError` for what cannot be read."""
        assert self.config.public_source is not None, "there is a public source"
        source = self._source("data.public_source", self.config.public_source, self.config.split)
        faults = Faults()
        records = read_source(source, faults)
        faults.raise_any()
        self.notes += records.notes
        self.public_forms |= set(records.forms)
        self.changed |= {""} if records.changed else set()

        return [entry.record for entry in records.entries]

    def _source(self, where: str, name: str, wanted: str) -> Source:
        own = {
            "data.heldout_source": self.config.heldout,
            "data.public_source": self.config.public,
        }.get(where)
        return Source(
            where,
            name,
            wanted,
            self.config.reading(own, None if where == "data.source" else name),
            strict=where == "data.source" and self.owner is None,
        )

    def _noted(self, source: Source, faults: Faults) -> Found | None:
        """Return the records of a source and add its notes; return None, and add a fault, if it
        cannot be read."""
        try:
            found = read_source(source, faults)
        except ConfigError as error:
            faults.include(error)
            return None

        self._add(source, found)
        return found

    def _add(self, source: Source, found: Found) -> None:
        """Add what is known about the records of a source."""
        self.notes += found.notes
        self.forms |= set(found.forms)
        self.changed |= {self.owner or ""} if found.changed else set()
        self._forms_at.setdefault(source.where, []).extend(found.forms)

    def _heldout_source(self) -> Source | None:
        config = self.config
        if not (config.heldout_source or config.heldout_split):
            return None

        name = config.heldout_source or config.source
        if config.heldout_split and not has_splits(name):
            raise ConfigError(
                f"data.heldout_split={config.heldout_split!r}: {name!r} has no splits; name the "
                "file or folder with the held-out records in data.heldout_source"
            )

        return self._source("data.heldout_source", name, config.heldout_split or config.split)

    def _refuse_idle_split(self) -> None:
        """Raise `ConfigError` for `data.split` where no source has splits."""
        config = self.config
        sites = config.by_site.values() or (config,)
        names = [config.public_source, *(own.source for own in sites)]
        if config.heldout_split is None:
            names += [own.heldout_source for own in sites]

        given = [name for name in names if name is not None]
        if config.differs("split") and not any(map(has_splits, given)):
            raise ConfigError(
                f"data.split={config.split!r}: without effect, because {given[-1]!r} has no "
                "splits; remove it, or name the file with these records as the source"
            )

    def _whole(self, train: Source, heldout: Source | None, faults: Faults, owner: str) -> Parts:
        """Return the records of a site that has its files to itself."""
        own = self._noted(train, faults)
        apart = self._noted(heldout, faults) if heldout else None

        if faults.count or own is None:
            return {}

        records = [entry.record for entry in own.entries]
        if apart is not None:
            return {owner: (records, [entry.record for entry in apart.entries])}

        return self._shared({owner: records}, faults)

    def _by_site(self, faults: Faults) -> Parts:
        """Return the records of each site, read as if the site had its files alone."""
        names = tuple(sorted(self.config.by_site))
        parts: Parts = {}
        noted: dict[str, list[str]] = {}
        for name in chosen(names, self.config.sites or names):
            own = Faults()
            records = SiteRecords(self.config.of_site(name), self.seed, name)
            parts |= records.read(own)
            setting = SETTING.replace("data.", f"data.by_site.{name}.")
            for note in records.notes:
                noted.setdefault(note.replace(SETTING, setting), []).append(shown(name))
            self.forms |= records.forms
            self.conversing |= {name} if records.forms & CONVERSATIONS else set()
            self.changed |= records.changed
            faults.include_all(own.of_site(name, SiteDataSettings.model_fields))

        for note, sites in noted.items():
            self.notes.append(f"site{'s' * (len(sites) > 1)} {', '.join(sites)}: {note}")
        self.notes += alike({name: len(train) for name, (train, _) in parts.items()})
        return {} if faults.count else parts

    def _by_file(self, source: Source, faults: Faults) -> dict[str, list[Record]]:
        try:
            found = read_each(source, faults)
        except ConfigError as error:
            faults.include(error)
            return {}

        for each in found.values():
            self._add(source, each)
        return {name: [entry.record for entry in each.entries] for name, each in found.items()}

    def _by_partition(
        self, source: Source, partition: Drawn, faults: Faults
    ) -> dict[str, list[Record]]:
        found = self._noted(source, faults)
        if found is None or not found.entries:
            return {}

        entries = found.entries
        before = faults.count
        try:
            classes = classes_of(entries, partition, f"{source.name!r}", faults)
            if before or faults.count:
                return {}
            draw = derive(self.seed, "partition") % 2**32
            parts = split(classes, len(entries), partition, draw)
        except ConfigError as error:
            where = "" if source.where == "data.source" else f"{source.where}: "
            faults.include(ConfigError(f"{where}{error}"))
            return {}

        return {name: [entries[number].record for number in part] for name, part in parts.items()}

    def _matched(
        self, parts: dict[str, list[Record]], apart: dict[str, list[Record]], faults: Faults
    ) -> Parts:
        missing = sorted(set(parts) - set(apart))
        if missing:
            faults.add(
                f"data.heldout_source has no records of site {shown(missing[0])} ({len(missing)} "
                "sites lack some); add some, or remove data.heldout_source, so that a share of "
                "each site's records is held out"
            )

        strange = sorted(set(apart) - set(parts))
        if strange:
            count = sum(len(apart[name]) for name in strange)
            self.notes.append(
                f"data.heldout_source: {count} records are of sites without records to train on, "
                f"such as {shown(strange[0])}, and are left out"
            )

        return {name: (records, apart.get(name, [])) for name, records in parts.items()}

    def _shared(self, parts: dict[str, list[Record]], faults: Faults) -> Parts:
        """Return the records of each site, less a drawn share of them that is held out."""
        shared: Parts = {}
        for name, records in parts.items():
            order = numpy_generator(self.seed, "heldout", name).permutation(len(records))
            cut = round(self.config.heldout_share * len(records))
            if not 0 < cut < len(records):
                fault = _too_few(name, len(records), cut, self.config.heldout_share)
                faults.add(fault, f"data: site {shown(name)}")
                continue

            train = sorted(order[cut:])
            heldout = sorted(order[:cut])
            shared[name] = (
                [records[number] for number in train],
                [records[number] for number in heldout],
            )

        return shared


def _too_few(name: str, count: int, heldout: int, share: float) -> str:
    """Return the fault of a site with `count` records, `heldout` of which would be held out."""
    if count < 2:
        return (
            f"data: site {shown(name)} has {count} record, and one to train on and one held out "
            "are needed; give the site more records, or name the others in data.sites"
        )

    return (
        f"data: site {shown(name)} has {count} records; data.heldout_share={share} leaves "
        f"{count - heldout} to train on and {heldout} held out, and both need at least one; give "
        "the site more records, change data.heldout_share, or name the others in data.sites"
    )
