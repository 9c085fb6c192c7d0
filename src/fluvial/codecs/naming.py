"""Names of settings in the errors of codecs."""

from collections.abc import Iterator
from contextlib import contextmanager

from fluvial.errors import ConfigError


@contextmanager
def configured_in(table: str) -> Iterator[None]:
    """Let errors name the settings of `table`; by themselves codecs name those of [codec]."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("codec.", f"{table}.")) from None
