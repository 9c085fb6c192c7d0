"""The models of one process: sites borrow one at a time, and share one frozen base for each
precision and quantisation.

Models are adapted from outside by PEFT; modelling code is never copied.
"""

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluvial.models.adapters import adapt
from fluvial.models.assignment import Assignment, Precision
from fluvial.models.base import Base
from fluvial.models.behaviour import check_behaviour, check_packing
from fluvial.models.encoding import Prompt
from fluvial.models.end_token import end_remarks
from fluvial.models.export import save_adapter, save_whole
from fluvial.models.generation import AT_ONCE, Continuation, continuations
from fluvial.models.hf import PreTrainedTokenizerBase
from fluvial.models.loading import meta_base, weights_folder
from fluvial.models.miniature import check_packing_of_miniature
from fluvial.models.outline import Outline
from fluvial.models.part_tuning import PartTuning, Tuning, adapt_parts, tunes_weights
from fluvial.models.parts import PartPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.quantisation import Quantisation
from fluvial.models.split import Cut
from fluvial.models.states import base_state
from fluvial.models.targets import LoraSettings
from fluvial.models.tokenizers import check_tokenizer, load_tokenizer
from fluvial.models.tuning import (
    Trainable,
    checkpoint_layers,
    name_tuned,
    set_trainable,
    switch_dropout,
    tuned_parameters,
    whole_layers,
    write_weights,
)
from fluvial.models.weight_sources import Source
from fluvial.models.weights import check_weights
from fluvial.wire.payload import Value
from fluvial.wire.tensors import Layout, Named, factor

logger = logging.getLogger(__name__)

MOST_TEMPLATES = 8
"""Templates that are kept: models of different ranks, precisions or formats. Beyond this number,
the least recently used one is dropped, with its base where no other needs it."""


_Ranks = tuple[tuple[str, int], ...]
_Key = tuple[_Ranks, _Ranks, Precision, Quantisation]
"""Ranks, those of the side path, type and formats of the base."""


@dataclass
class _Template:
    """An adapted model to copy, and its idle copies: at most as many as sites worked at a time."""

    model: nn.Module
    free: list[nn.Module] = field(default_factory=list)

    def copy(self) -> nn.Module:
        """Return a copy that shares the frozen parameters."""
        frozen = {id(p): p for name, p in self.model.named_parameters() if factor(name) is None}
        return copy.deepcopy(self.model, dict(frozen))


class ModelPool:
    """Models to borrow, by assignment; base, tokenizer and models are loaded when first used.

    With an adapter every borrowed model is a copy whose frozen parameters are the base's own, so a
    further one costs an adapter. Where weights of the base are tuned it stays on disk; every
    borrowed model is made from there, costs a base, and goes when it is given back. If they are
    tuned in some parts only, it is whole, with the adapters of the other parts merged.
    """

    def __init__(self, model: ModelConfig, tuning: Tuning) -> None:
        """Load nothing."""
        self.config = model
        self.tuning = tuning
        self.full = tunes_weights(tuning)
        self.outline = Outline(model, tuning)
        self._lock = threading.RLock()
        self._bases: dict[tuple[Precision, Quantisation], Base] = {}
        self._templates: OrderedDict[_Key, _Template] = OrderedDict()
        self._parts: dict[tuple[Cut, bool], PartPool] = {}
        self.measures_of_base: dict[bytes, tuple[dict[str, Value], str | None]] = {}
        """Held-out measures of the base and its `right_answers`, by a digest of the records."""
        self.right_answers: dict[str, str | None] = {}
        """Right and wrong held-out answers of the last measure of each site of this process, see
        `answer_scores.right_answers`; they are sent to nobody."""

    def beside(self, tuning: Tuning) -> "ModelPool":
        """Return a pool of another adapter, which shares the bases that are loaded or will be."""
        assert not self.full, "where weights of the base are tuned, it is not shared"
        other = ModelPool(self.config, tuning)
        other._bases = self._bases
        return other

    @property
    def layout(self) -> Layout:
        """The layout of the run's own assignment, from shapes alone."""
        return self.outline.assignment.layout

    def assignment(self, batch: int) -> Assignment:
        """Return the run's own assignment, with `batch` sequences of a forward pass."""
        return replace(self.outline.assignment, batch=batch)

    # -- loaded when used --------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer; raises `ConfigError` where it does not belong to the base."""
        tokenizer = load_tokenizer(self.config)
        check_tokenizer(tokenizer, self.outline.base, self.config.name_or_path)
        return tokenizer

    @property
    def device(self) -> torch.device:
        """The device of borrowed models."""
        return self._base().device

    @property
    def base(self) -> Source:
        """The base's weights on disk, in the run's own precision."""
        return self._base().source

    def blank(self) -> nn.Module:
        """Return a skeleton of the base, for a site that receives its weights (see `fill`)."""
        base = self._base()
        return base.blank() if self.full else copy.deepcopy(base.skeleton)

    def parts(self, cut: Cut, *, server: bool) -> PartPool:
        """Return the pool of the server's parts, or of a site's, of the model under `cut`."""
        with self._lock:
            if (cut, server) not in self._parts:
                self._parts[cut, server] = PartPool(self.config, self.tuning, cut, server=server)
            return self._parts[cut, server]

    def load(self, assignment: Assignment | None = None) -> None:
        """Load tokenizer and base now, for another assignment than the run's own where one is
        given; raises `ConfigError` where one of them cannot be used."""
        if self.full:
            check_weights(self.config, self.outline.base)
            self.blank()
            _ = self.base
        elif isinstance(self.tuning, PartTuning):
            self._base().share()  # whose cut may be open
        else:
            self._template(assignment or self.outline.assignment)

        _ = self.tokenizer

    def check_behaviour(self, ends: Collection[int] | None = None) -> None:
        """Load the base, and raise `ConfigError` if no run could use it (see `probe`); an end token
        that no adapter can learn is logged (see `end_remarks`)."""
        self.load()
        for remark in self.end_remarks(ends=ends):
            logger.warning("%s", remark)
        if self.full:  # beside an adapter the base is checked where it is loaded
            with self.model({}) as model:
                check_behaviour(model, self.config.name_or_path)

    def end_remarks(
        self, assignment: Assignment | None = None, ends: Collection[int] | None = None
    ) -> list[str]:
        """Return remarks on the tokens `ends` that end answers, by default EOS, of a base that a
        new adapter tunes, see `end_token`."""
        if not isinstance(self.tuning, LoraSettings):
            return []
        tokenizer = self.tokenizer
        ids = [tokenizer.eos_token_id] if ends is None else sorted(ends)
        layout = self.layout if assignment is None else assignment.layout
        with self.model(base_state(layout), assignment=assignment) as model:
            named = zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
            return [remark for each in named for remark in end_remarks(model, *each)]

    def check_packing(self, assignment: Assignment | None = None) -> None:
        """Load the base, and raise `ConfigError` if packed records would read each other.

        A miniature of its architecture is tried first, as `fluvial check` does: weights may be so
        small that what a record reads of another one is below the tolerance.
        """
        check_packing_of_miniature(self.config)
        with self.model(self.base_state(), assignment=assignment) as model:
            check_packing(model, self.config.name_or_path)

    def _base(self, assignment: Assignment | None = None) -> Base:
        assignment = assignment or self.outline.assignment
        key = (assignment.precision, assignment.quantisation)
        with self._lock:
            if key not in self._bases:
                config = self.config.model_copy(update={"dtype": assignment.precision})
                self._bases[key] = Base(config, quantisation=assignment.quantisation)
            return self._bases[key]

    def _template(self, assignment: Assignment) -> _Template:
        """Return the template of an assignment, made when it is first asked for."""
        key = (assignment.ranks, assignment.side, assignment.precision, assignment.quantisation)
        with self._lock:
            template = self._templates.get(key)
            if template is None:
                own = self.outline.assignment.ranks == assignment.ranks
                base = self._base(assignment).share()
                ranks = None if own else dict(assignment.ranks)
                model = self._adapt(base, ranks, dict(assignment.side)).eval()
                template = self._templates[key] = _Template(model)

            self._templates.move_to_end(key)
            if len(self._templates) > MOST_TEMPLATES:
                self._templates.popitem(last=False)
                self._drop_bases()

            return template

    def _drop_bases(self) -> None:
        """Drop the bases of no template, but for the run's own."""
        own = self.outline.assignment
        used = {(precision, formats) for _, _, precision, formats in self._templates}
        used.add((own.precision, own.quantisation))
        self._bases = {key: base for key, base in self._bases.items() if key in used}

    def _adapt(
        self,
        base: nn.Module,
        ranks: Mapping[str, int] | None = None,
        side: Mapping[str, int] | None = None,
    ) -> nn.Module:
        """Return `base` with the adapter of this pool, in place."""
        if isinstance(self.tuning, PartTuning):
            assert ranks is None, "the sites of a cut model have the same ranks"
            return adapt_parts(base, self.tuning)

        assert self.tuning is not None, "where all weights are tuned, there is no adapter"
        return adapt(base, self.tuning, ranks, side)

    # -- borrowing ---------------------------------------------------------------------------------

    @contextmanager
    def model(
        self,
        state: Named,
        *,
        trainable: Trainable = "none",
        checkpointing: bool = False,
        assignment: Assignment | None = None,
    ) -> Iterator[nn.Module]:
        """Borrow a model that holds `state`, whose `trainable` parameters require gradients.

        Where no assignment is given, it is the run's own, in the ranks of `state`.
        """
        assignment = assignment or self.outline.assignment.fitting(state)
        with self._take(state, trainable, assignment) as model:
            set_trainable(model, trainable)
            switch_dropout(model, active=False)
            if model.training:
                model.eval()
            if checkpointing:
                checkpoint_layers(model)

            try:
                yield model
            finally:
                for parameter in tuned_parameters(model).values():
                    parameter.grad = None
                if checkpointing:
                    whole_layers(model)

    @contextmanager
    def _take(
        self, state: Named, trainable: Trainable, assignment: Assignment
    ) -> Iterator[nn.Module]:
        if self.full:
            yield self._whole(state, trainable, assignment)
            return

        with self._lock:
            template = self._template(assignment)
            free = template.free.pop() if template.free else None

        model = template.copy() if free is None else free
        write_weights(model, state)
        try:
            yield model
        finally:
            with self._lock:
                template.free.append(model)

    def _whole(self, state: Named, trainable: Trainable, assignment: Assignment) -> nn.Module:
        """Return a model with the changes of weights in `state`, and with its factors merged unless
        they are trained."""
        base = self._base(assignment)
        factors = {name: tensor for name, tensor in state.items() if factor(name)}
        changes = {name: tensor for name, tensor in state.items() if name not in factors}
        model = base.make(changes, own=bool(factors) or trainable != "none")
        adapted: Any = model
        if factors:
            adapted = self._adapt(model)
            write_weights(adapted, factors)

        if trainable != "none" and isinstance(self.tuning, PartTuning):
            model.requires_grad_(False)
            name_tuned(model, state)
            return model

        merged: nn.Module = adapted.merge_and_unload() if factors else model
        return merged

    def weights(self, state: Named, assignment: Assignment | None = None) -> Named:
        """Return the values, fp32, that the parameters named in `state` have in a model with it."""
        if not self.full:
            return state

        base = self._base(assignment).source
        return {
            name: tensor if factor(name) else base.get(name).float() + tensor
            for name, tensor in state.items()
        }

    def base_state(self) -> Named:
        """Return the state that changes nothing in the run's own layout (see `base_state`)."""
        return base_state(self.layout)

    # -- results -----------------------------------------------------------------------------------

    def save(self, state: Named, folder: Path) -> None:
        """Write an adapter as a folder of PEFT, a model whose weights are tuned as a folder of
        transformers.

        Its weights are in the base's type, with the generation settings of the base's folder. The
        tokenizer is written too, unless `exports_tokenizer` is false.
        """
        with self.model(state) as model:
            if self.full:
                save_whole(model, folder, weights_folder(self.config))
            else:
                save_adapter(model, folder)

        if self.exports_tokenizer():
            self.tokenizer.save_pretrained(str(folder))

    def save_adapter(self, state: Named, folder: Path) -> None:
        """Write an adapter as a folder of PEFT, from the base's shapes: no weight is loaded, and no
        tokenizer."""
        model = self._adapt(meta_base(self.config))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        factors = {
            names[id(parameter)]: state[name] for name, parameter in tuned_parameters(model).items()
        }
        model.load_state_dict(factors, strict=False, assign=True)
        save_adapter(model, folder)

    def exports_tokenizer(self) -> bool:
        """Return whether a written folder holds the tokenizer.

        AutoPeftModelForCausalLM adds a row to the model for each token of the adapter's folder that
        the model has no row for, which changes all probabilities. A class such as Qwen's adds
        tokens by itself, so the tokenizer of such a base stays in the base's folder.
        """
        return self.full or len(self.tokenizer) <= self.outline.num_embeddings

    def generate(
        self,
        state: Named,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        assignment: Assignment | None = None,
        at_once: int = AT_ONCE,
        of: str = "the model",
    ) -> list[Continuation]:
        """Return greedy continuations of `prompts`, without the prompts and special tokens.

        Lines about progress name the model as `of`.
        """
        with self.model(state, assignment=assignment) as model:
            return continuations(
                model,
                self.tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                context=self.outline.context,
                at_once=at_once,
                of=of,
            )
