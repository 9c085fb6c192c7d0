"""The tree of errors that Fluvial raises on purpose.

    FluvialError
    ├── ConfigError              a setting, path, model or data file of the user is wrong
    │   ├── MissingWeightsError  a model folder has a configuration but no weights
    │   ├── RefusalError         a site refuses a request, in a text that may leave the site
    │   └── DataError            faults of data files, listed together (`data.faults`)
    ├── WireError                bytes from outside break the format or a limit
    │   └── ChannelError         bytes of a secure channel are not authentic, in order or in time
    ├── ClientError              a site raised or stayed silent, or the quorum was missed
    │   └── UnfitSiteError       a site and a run do not fit together, until one of them is changed
    ├── CheckpointError          a run folder cannot be written, locked or resumed
    ├── GateError                a codec did not carry held-out updates and is refused
    ├── PrivacyError             a release is outside the privacy budget of a site
    └── DivergenceError          training produced values that are not finite, or exploded

A message says what was found, where, and what would be right. Broken invariants are `assert`, not
errors of this tree.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal


class FluvialError(Exception):
    """Base of every error that Fluvial raises on purpose."""


class ConfigError(FluvialError):
    """A setting, path, model or data record of the user is wrong."""


class MissingWeightsError(ConfigError):
    """A base model's folder has a configuration, which gives its sizes, but no weights."""


class RefusalError(ConfigError):
    """A site refuses a request, in a text that leaves the site.

    The text consists of constants, names of settings and numbers. It names no records, files or
    paths.
    """


class WireError(FluvialError):
    """Bytes from outside break the format, a limit or the agreed layout."""


class ChannelError(WireError):
    """Bytes of a secure channel are not authentic, not in order, not complete or not in time."""


class ClientError(FluvialError):
    """A site raised or stayed silent, or fewer sites than the quorum answered."""


class UnfitSiteError(ClientError):
    """A site does not take part in a run, and would not if it were asked again unchanged."""


class CheckpointError(FluvialError):
    """A run folder cannot be written, locked or resumed."""


def type_name(value: object) -> str | None:
    """Return the name of a value's type, None for one that may hold more than a name."""
    name = type(value).__name__
    return name if name.isidentifier() and name.isascii() and len(name) <= 60 else None


def wrong_return(
    function: str,
    value: object,
    expected: str,
    *,
    verb: Literal["returned", "yielded", "is"] = "returned",
) -> str:
    """Return the text of an error about a function of a method that returned another type.

    The value itself is not in it, because the text may leave a site.
    """
    return f"{function} {verb} {type_name(value) or 'another type'}; expected {expected}"


def check_call(
    function: str, value: Callable[..., object], *arguments: str, **keywords: str
) -> None:
    """Raise `ConfigError` unless a function of the user's own can be called with these arguments.

    The error names the function as `function`, and its file and line. `keywords` are arguments that
    are given by name.
    """
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # of some functions in C none is known
        return

    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        called = ", ".join([*arguments, *(f"{name}=" for name in keywords)])
        raise ConfigError(
            f"{function}{_definition(value)} is called with ({called}), and takes {signature}: "
            f"{error}"
        ) from None


def _definition(value: Callable[..., object]) -> str:
    """Return file and line of a function or of a class's constructor, where it is known."""
    own = vars(value).get("__init__", value) if isinstance(value, type) else value
    function = inspect.unwrap(own)
    code = getattr(function, "__code__", None)  # a callable object has none
    return f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else ""


class GateError(FluvialError):
    """A codec did not carry held-out updates; the message lists the failed criteria."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report
        """All measures of the gate, as JSON values."""


class PrivacyError(FluvialError):
    """A site would release a value that its epsilon does not count, or a server reads more than the
    run allows."""


class DivergenceError(FluvialError):
    """Training produced NaN or Inf, or the adapter grew beyond the guard.

    The text leaves the site.
    """
