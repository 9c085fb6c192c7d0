"""Base class of server halves with one model for all sites: how it is measured and written."""

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from fluvial.errors import ConfigError, wrong_return
from fluvial.federation.context import Context
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import state_message
from fluvial.methods.exporting import Export, Reporting, export_weights, samples
from fluvial.methods.measuring import Measures, ask_heldout, measure_public
from fluvial.models.assignment import Assignment
from fluvial.models.states import changed
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import Layout, Named, moved, scale


class SharedModelServer(ABC):
    """Server half that has the model of all sites."""

    context: Context

    @property
    def assigned(self) -> Assignment | None:
        """The assignment that fits `model`; None for the run's own."""
        return None

    @abstractmethod
    def model(self) -> Named:
        """Return the global adapter, or the change of all weights."""

    def _checked_model(self) -> Named:
        """Return `model`; raises `ConfigError` for what has not its layout."""
        model: object = self.model()
        if not isinstance(model, dict) or not all(isinstance(t, Tensor) for t in model.values()):
            raise ConfigError(wrong_return("the server half's model", model, "tensors by name"))

        layout = self.context.layout if self.assigned is None else self.assigned.layout
        other = Layout.of(model)
        if other != layout:
            differing = sorted(set(other.shapes) ^ set(layout.shapes))[:2]
            raise ConfigError(
                f"the server half's model: tensors of another layout, first differences {differing}"
            )

        return model

    def measure(
        self, fleet: Fleet, reporting: Reporting, *, round: int, which: Literal["base", "final"]
    ) -> Measures:
        """Send every site the model, and return its measures on the sites' held-out text."""
        if not reporting.heldout:
            return Measures()

        new_tokens = reporting.evaluate.max_new_tokens
        if which == "base":
            message = Payload(values={"which": "base", "generate": new_tokens})
        else:
            model = self._checked_model()
            assigned: dict[str, Value] = {}
            if self.assigned is not None:
                run = reporting.pool.assignment(self.assigned.batch)
                assigned = self.assigned.to_values(run)
            message = state_message(
                changed(model), Layout.of(model), which="sent", generate=new_tokens, **assigned
            )

        return ask_heldout(fleet, message, round=round)

    def export(self, fleet: Fleet, reporting: Reporting, final: Measures) -> Export:  # noqa: ARG002
        """Write the model and its card; return what result.json says about it."""
        state = changed(self._checked_model())
        texts = samples(reporting, state)
        sha256 = export_weights(reporting, state)
        public = (
            None
            if reporting.heldout
            else measure_public(reporting.pool, state, reporting.data, reporting.texts)
        )

        if reporting.pool.full:
            return Export(model_sha256=sha256, samples=texts, public=public)
        return Export(adapter_sha256=sha256, samples=texts, public=public)


def move(adapter: Named, mean: Named, learning_rate: float) -> Named:
    """Return the adapter moved by `learning_rate` times the `mean` update.

    Factors that the update does not have stay as they are.
    """
    return moved(adapter, mean if learning_rate == 1 else scale(mean, learning_rate))
