"""What every table of settings is: read-only, without unknown keys, and described by the docstrings of its fields."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A table of a configuration or of a site's or server's file; docs/settings.md is written from these."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
