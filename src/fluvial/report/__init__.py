"""Tables, lines and pages about runs, for people."""

from typing import Any

JsonObject = dict[str, Any]
"""JSON object in a file of a run; `damage_reported` is the check of its keys and types."""
