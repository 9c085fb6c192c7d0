"""The plan of a site: what it trains and how, and what is predicted of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """Everything about a site's training but the ranks."""

    format: str
    """Format of the frozen base; where `layer_formats` has several, the larger one."""
    batch: int
    length: int
    """Tokens of a sequence at most."""
    checkpointing: bool
    rate: int
    """Bytes of the fp32 update for each byte of its frame."""
    steps: int
    """Local steps, of one batch each."""
    layer_formats: tuple[tuple[int, str], ...] = ()
    """Format of the base in each decoder layer, counted from 0; empty where all have `format`."""


@dataclass(frozen=True)
class Prediction:
    """Predicted figures of a round."""

    memory_bytes: int
    bytes_up: int
    bytes_down: int
    compute_s: float
    link_s: float

    @property
    def seconds(self) -> float:
        """Return the seconds of the round."""
        return self.compute_s + self.link_s


@dataclass(frozen=True)
class SitePlan:
    """The plan of a site."""

    setting: Setting
    ranks: tuple[tuple[str, int], ...]
    """Ranks by module, in order of the names; modules without an adapter are absent."""
    value: int
    """Importance that is covered, in `candidates.VALUE_UNIT`."""
    score: float
    """The objective of the plan, by which plans of a site are compared."""
    under_training: float
    """Share of the site's tokens that a round does not process."""
    prediction: Prediction

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            **asdict(self.setting),
            "layer_formats": [[layer, name] for layer, name in self.setting.layer_formats],
            "ranks": dict(self.ranks),
            "value": self.value,
            "score": self.score,
            "under_training": self.under_training,
            "prediction": asdict(self.prediction),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SitePlan":
        """Return the inverse of `to_json`; the record is the run's own."""
        names = Setting.__dataclass_fields__.keys() - {"layer_formats"}
        layers = tuple((layer, name) for layer, name in values["layer_formats"])
        return cls(
            Setting(**{name: values[name] for name in names}, layer_formats=layers),
            tuple(sorted(values["ranks"].items())),
            values["value"],
            values["score"],
            values["under_training"],
            Prediction(**values["prediction"]),
        )
