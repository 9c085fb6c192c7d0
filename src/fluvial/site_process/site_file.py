"""The settings of a site's operator in site.toml: name, paths, own data, and what is allowed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from fluvial.data.config import SiteDataSettings
from fluvial.data.site_names import plain_fault_of
from fluvial.settings import FilePath, Settings
from fluvial.storage import toml


class Allowed(Settings):
    """Runs that the site takes part in, and bounds on what it sends.

    Empty lists allow everything, except `run_paths`.
    """

    methods: tuple[str, ...] = ()
    """Allowed values of method.name, and the baselines of `compare`, which are methods too."""
    models: tuple[str, ...] = ()
    """Allowed values of model.name_or_path."""
    tensors: tuple[str, ...] = ()
    """Patterns of tensors, such as "*.lora_*"; every tuned tensor must match one."""
    max_epsilon: float | None = Field(None, ge=1e-3, le=1e6)
    """Upper bound on the sum of epsilon over all runs of this site; with it, runs that add no noise
    at the site are refused. Unset, runs need not promise privacy."""
    max_delta: float = Field(1e-4, ge=1e-15, lt=1)
    """Upper bound on the sum of delta over all these runs, beside `max_epsilon`."""
    run_paths: tuple[str, ...] = ()
    """Patterns of absolute paths that a run may name, such as "/data/shared/*"; "*" allows all, an
    empty list none."""
    max_bytes_up_per_round: int | None = Field(None, ge=1, le=2**63 - 1)
    """Upper bound on the bytes that the site sends in a round. An answer beyond it is not sent, and
    the server receives the reason. An answer that is sent again, as after a stop, counts once."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.max_epsilon is None and "max_delta" in self.model_fields_set:
            yield (
                "max_delta: without effect, because max_epsilon is not set; set it, or remove this"
            )


class SiteFile(Settings):
    """The settings in site.toml."""

    name: str
    """Name of the site, as in the run's fleet.sites: letters of any language, digits and _ . -, at
    most 64, composed (NFC)."""
    folder: FilePath = Path("fluvial-site")
    """Folder of the site's state and logs."""
    model: str | None = None
    """Local folder of the base model, which replaces the run's; its content must be the same."""
    device: str = "auto"
    """Device of this site, as in the run's [model]; it replaces the run's."""
    memory_mb: float | None = Field(None, gt=0, le=1e9)
    """Most memory of this site's training, in 10^6 bytes, for a method that plans it; unset, what
    the machine has. The run's own limit holds where it is lower."""
    data: SiteDataSettings | None = None
    """Records of the site, which replace the run's sources; unset, the site reads those of the run
    that allow.run_paths covers."""
    allow: Allowed = Allowed()
    """Runs that the site takes part in, and bounds on what it sends."""
    server: str = "127.0.0.1:8000"
    """Address of the server's SuperLink."""
    stream: str | None = Field(None, pattern=r"^.+:[0-9]{1,5}$")
    """Address HOST:PORT of the run's live stream, for a site that reaches it by another address
    than the host of `server` with the port that the run names."""
    ca: FilePath | None = None
    """Certificate of the authority that signed the server's certificate."""
    key: FilePath | None = None
    """Private key of the site."""
    server_fingerprint: str | None = Field(None, pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")
    """Fingerprint of the server's channel.pub, as ssh-keygen prints it. A secure channel is opened
    to the process that has this key, and to no other."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        fault = plain_fault_of(self.name)
        if fault is not None:
            yield f"name: {fault}"
        if self.server_fingerprint is not None and self.key is None:
            yield (
                "server_fingerprint: without effect, because key is not set; set it, or remove this"
            )


def read_site_file(path: Path) -> SiteFile:
    """Read and check site.toml, whose paths are relative to its folder; raise `ConfigError`."""
    table = toml.load(path, f"there is no site file {str(path)!r}; `fluvial site init` makes one")
    site = toml.read(SiteFile, table, str(path))
    here = path.resolve().parent
    changes: dict[str, Any] = {
        key: here / path
        for key, path in (("folder", site.folder), ("ca", site.ca), ("key", site.key))
        if path is not None
    }

    if site.model is not None:
        changes["model"] = _beside(here, site.model)
    if site.data is not None:
        given = site.data.model_dump(include={"source", "heldout_source"}, exclude_none=True)
        changes["data"] = site.data.model_copy(
            update={key: _beside(here, text) for key, text in given.items()}
        )

    return site.model_copy(update=changes)


def _beside(here: Path, text: str) -> str:
    """Return the path of `text` in the folder `here` if it exists, else `text`, as for a hub id."""
    return str(here / text) if (here / text).exists() else text
