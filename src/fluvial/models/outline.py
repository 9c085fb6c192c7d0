"""A base model's names, shapes and types, known without its weights."""

import copy
from functools import cached_property
from typing import cast

import torch
from torch import nn

from fluvial.models.adapters import adapt
from fluvial.models.assignment import Assignment, Precision
from fluvial.models.loading import meta_base, skeleton
from fluvial.models.part_tuning import PartKind, PartTuning, Tuning
from fluvial.models.pretrained import ModelConfig, context_length, dtype_of, num_embeddings
from fluvial.models.tuning import tuned_parameters
from fluvial.wire.tensors import Layout, factor


class Outline:
    """The base on the meta device, and what a run tunes in it.

    Every attribute raises `ConfigError` for a base that cannot be tuned, or an adapter that does
    not fit it.
    """

    def __init__(self, config: ModelConfig, tuning: Tuning) -> None:
        """Load nothing."""
        self._config = config
        self.tuning = tuning

    @cached_property
    def base(self) -> nn.Module:
        """The base without weights and without an adapter."""
        return meta_base(self._config)

    def blank(self, kind: PartKind) -> nn.Module:
        """Return a new base on the meta device, in the types of a loaded one, as a part of this
        kind has it: with or without the adapter.

        PEFT puts its modules into the base itself, which is returned without PEFT's wrapper.
        """
        base = skeleton(self._config).to("meta")
        lora = self.tuning.lora if isinstance(self.tuning, PartTuning) else self.tuning
        if kind == "lora":
            assert lora is not None, "where all weights are tuned, there is no adapter"
            adapt(base, lora)
        return base

    @cached_property
    def _tuned(self) -> nn.Module:
        assert not isinstance(self.tuning, PartTuning), "parts have models of their own"
        if self.tuning is None:
            return skeleton(self._config)  # which has the types of a loaded model
        return adapt(copy.deepcopy(self.base), self.tuning)

    @cached_property
    def precision(self) -> Precision:
        """The float type of the base in this run."""
        return cast(Precision, str(dtype_of(self._config)).removeprefix("torch."))

    @cached_property
    def assignment(self) -> Assignment:
        """The assignment of this run, with one sequence in a forward pass."""
        if not isinstance(self.tuning, PartTuning):
            return Assignment.of(
                self._tuned,
                batch=1,
                precision=self.precision,
                quantisation=self._config.quantisation,
            )

        shapes: list[tuple[str, tuple[int, ...]]] = []
        ranks: tuple[tuple[str, int], ...] = ()
        if self.tuning.tunes("lora"):
            adapter = Outline(self._config, self.tuning.lora).assignment
            shapes += adapter.layout.shapes
            ranks = adapter.ranks
        if self.tuning.tunes("full"):
            shapes += Outline(self._config, None).assignment.layout.shapes

        layout = self.tuning.within(Layout(tuple(sorted(shapes))), self.base)
        adapted = {name.partition(".lora_")[0] for name in layout.names if factor(name)}
        ranks = tuple((module, rank) for module, rank in ranks if module in adapted)
        return Assignment(layout, ranks, 1, self.precision, quantisation=self._config.quantisation)

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The types of the tuned parameters in a model, by name."""
        parameters = tuned_parameters(self._tuned)
        return {name: parameter.dtype for name, parameter in parameters.items()}

    @cached_property
    def context(self) -> int | None:
        """Tokens that the base reads at most; None without a limit."""
        return context_length(self.base)

    @property
    def num_embeddings(self) -> int:
        """Rows of the base's input embedding."""
        return num_embeddings(self.base)
