"""What can go wrong, as one small tree.

    FluvialError
    ├── ConfigError       a setting, path, model or data file of the user is wrong
    │   ├── MissingWeightsError   a base model's folder has a configuration and no weights
    │   ├── RefusalError   the same, in words that may leave a site
    │   └── DataError      faults of data files, told together (`data.faults`)
    ├── WireError         bytes from outside break the format or a limit
    ├── ClientError       a site raised or stayed silent, or too few sites answered
    ├── CheckpointError   a run folder cannot be written, locked or resumed
    ├── GateError         a codec did not carry held-out updates and is refused
    ├── PrivacyError      a site would release what its privacy budget does not count
    └── DivergenceError   training left the finite numbers or exploded

A message says what was found, where, and what would be right. Broken invariants are `assert`, not
these.
"""

from typing import Any


class FluvialError(Exception):
    """Base of every error that Fluvial raises on purpose."""


class ConfigError(FluvialError):
    """A setting, path, model or data record of the user is wrong."""


class MissingWeightsError(ConfigError):
    """A base model's folder has a configuration and no weights, which sizes can be told without."""


class RefusalError(ConfigError):
    """A site does not do what it was asked; its text leaves the site.

    The text is made of constants, names of settings and numbers: nothing of records, files or
    paths.
    """


class WireError(FluvialError):
    """Bytes from outside break the format, a limit or the agreed layout."""


class ClientError(FluvialError):
    """A site raised or stayed silent, or fewer sites than the quorum answered."""


class CheckpointError(FluvialError):
    """A run folder cannot be written, locked or resumed."""


class GateError(FluvialError):
    """A codec did not carry held-out updates; the message lists the failed criteria, `report` all
    that was measured."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class PrivacyError(FluvialError):
    """A site would release something that epsilon does not count."""


class DivergenceError(FluvialError):
    """Training produced NaN or Inf, or the adapter grew beyond the guard; its text leaves the
    site."""
