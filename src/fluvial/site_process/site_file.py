"""The file of a site's operator: what the site is, where its own things lie, what it takes part
in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from fluvial.data import Numbers, SourceSettings
from fluvial.settings import FilePath, Settings
from fluvial.storage import toml


class Allowed(Settings):
    """Runs that the site takes part in, and bounds on what leaves it.

    Empty lists allow everything, except `run_paths`.
    """

    methods: tuple[str, ...] = ()
    """Values of method.name."""
    models: tuple[str, ...] = ()
    """Values of model.name_or_path."""
    tensors: tuple[str, ...] = ()
    """Patterns, such as "*.lora_*": every tensor that is tuned must match one."""
    max_epsilon: float | None = Field(None, ge=1e-3, le=1e6)
    """Epsilon that all runs of this site may spend together; runs without noise at the site are
    refused. Unset, runs need not promise privacy."""
    max_delta: float = Field(1e-4, ge=1e-15, lt=1)
    """Delta that all these runs may spend together, beside `max_epsilon`."""
    run_paths: tuple[str, ...] = ()
    """Whole paths that a run may name here, such as "/data/shared/*"; without one, a run names
    nothing on this disk. "*" allows everything."""
    max_bytes_up_per_round: int | None = Field(None, ge=1, le=2**63 - 1)
    """An answer that would be more is not sent; the server is told why."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.max_epsilon is None and "max_delta" in self.model_fields_set:
            yield "max_delta: without effect, because max_epsilon is not set; set it, or remove this"


class SiteData(SourceSettings):
    """The site's own records, in place of those that the run names; settings as in the run's
    [data]."""

    source: str
    """A file or folder; a relative one lies beside site.toml."""
    heldout_source: str | None = None
    """Held-out records of the site."""
    heldout: SourceSettings | None = None
    """Settings of `heldout_source`, where they differ."""
    numbers: Numbers | None = None
    """JSON numbers where a text is needed: "refuse" or "text"."""


class SiteFile(Settings):
    """The file of a site's operator."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """As in the run's fleet.sites; letters, digits and _ . -, at most 64."""
    folder: FilePath = Path("fluvial-site")
    """Folder of the site's state and its log."""
    model: str | None = None
    """A local folder of the base model, in place of what the run names; its content must be the
    same."""
    device: str = "auto"
    """As in the run's [model]; this machine's word counts."""
    data: SiteData | None = None
    """The site's own records, which take the place of all that the run names; unset, what
    allow.run_paths covers."""
    allow: Allowed = Allowed()
    server: str = "127.0.0.1:8000"
    """Address of the server's SuperLink."""
    ca: FilePath | None = None
    """The certificate that the server's is checked against."""
    key: FilePath | None = None
    """The site's private key."""


def read_site_file(path: Path) -> SiteFile:
    """Read and check a site file; paths in it are relative to its folder. Raises `ConfigError`."""
    table = toml.load(path, f"there is no site file {str(path)!r}; `fluvial site init` makes one")
    found = toml.read(SiteFile, table, str(path))
    here = path.resolve().parent
    changes: dict[str, Any] = {
        key: here / getattr(found, key)
        for key in ("folder", "ca", "key")
        if getattr(found, key) is not None
    }

    if found.model is not None:
        changes["model"] = _beside(here, found.model)
    if found.data is not None:
        given = found.data.model_dump(include={"source", "heldout_source"}, exclude_none=True)
        changes["data"] = found.data.model_copy(
            update={key: _beside(here, text) for key, text in given.items()}
        )

    return found.model_copy(update=changes)


def _beside(here: Path, text: str) -> str:
    """The whole path of what lies in the site file's folder; else the text, such as the id of a
    hub."""
    return str(here / text) if (here / text).exists() else text
