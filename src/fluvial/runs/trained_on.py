"""Records that a run trained on, which are known again where its model is measured on them."""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from fluvial.data import DataConfig
from fluvial.data.faults import Faults
from fluvial.data.records import Record
from fluvial.data.site_records import SiteRecords
from fluvial.data.sources import Source, read_source
from fluvial.errors import ConfigError
from fluvial.storage import exported, toml
from fluvial.storage.inputs import changed, digests
from fluvial.storage.run_files import DESCRIPTION, INPUTS


def trained_on(folder: Path, measured: DataConfig) -> int | None:
    """Return the number of records of `measured.source` that the run around `folder` trained on.

    None where it is not known: no run lies around the folder, its sites are elsewhere, or their
    files have changed since.
    """
    trained = _training_records(folder)
    if trained is None:
        return None
    faults = Faults()
    source = Source("--data", measured.source, measured.split, measured.reading(), strict=False)
    entries = read_source(source, faults).entries
    return sum(each in trained for each in _digests(entry.record for entry in entries))


def trained_words(count: int | None, records: int) -> str:
    """Return a line about measured records that were trained on; empty where none is known."""
    if not count:
        return ""
    if count == records:
        return f"The run trained on all {records} records, so the scores are no held-out scores"
    return (
        f"The run trained on {count} of these {records} records, for which the scores are no "
        "held-out scores"
    )


def _training_records(folder: Path) -> set[bytes] | None:
    """Return digests of the records that all sites of a run trained on, None where these are not
    known."""
    config = exported.config_around(folder) if folder.is_dir() else None
    if config is None:
        return None
    before = (config.get(DESCRIPTION) or {}).get(INPUTS) or {}
    named = {name: digest for name, digest in before.items() if name.startswith("data.")}
    if not named or changed(named, digests({"data": config["data"]})):
        return None

    data = toml.read(DataConfig, config["data"], str(folder))
    if data.bundled:
        return None
    faults = Faults()
    try:
        parts = SiteRecords(data, config["seed"], None).read(faults)
    except ConfigError:
        return None
    return {each for train, _ in parts.values() for each in _digests(train)}


def _digests(records: Iterable[Record]) -> Iterable[bytes]:
    """Yield a digest of what each record says, whatever file it is in."""
    for record in records:
        text = repr(record.content)
        yield blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
