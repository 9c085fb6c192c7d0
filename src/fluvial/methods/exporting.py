"""Export of a model: the folder of PEFT or of the model, and samples of its text."""

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fluvial import __version__
from fluvial.data import with_template
from fluvial.data.config import DataConfig
from fluvial.methods.measuring import EvaluateConfig, Texts
from fluvial.models.digests import weights_digest
from fluvial.models.encoding import Prompt
from fluvial.models.loading import weights_folder
from fluvial.models.pool import ModelPool
from fluvial.storage import exported
from fluvial.training.evaluate import has_effect
from fluvial.wire.tensors import Named, factor, norm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reporting:
    """Everything that a server half needs to measure its model and to write it."""

    settings: dict[str, Any]
    """All settings of the run as JSON types."""
    rounds: int
    evaluate: EvaluateConfig
    data: DataConfig
    heldout: bool
    """True where the sites measure models on their held-out text and send the sums."""
    pool: ModelPool
    texts: Texts
    folder: Path
    """Folder in which drafts are written."""
    replace: Callable[[str, Path], None]
    """Puts a finished draft in the place of the folder of this name."""


UNCHANGED = (
    "the tuned model is exactly the base: no change of any round has reached it; look at the "
    "update_norm of each round in metrics.jsonl, at train.learning_rate, the codec and the method"
)


@dataclass(frozen=True)
class Export:
    """Entries of result.json about the model that a run made."""

    adapter_sha256: str | None = None
    """SHA-256 over the weight files of the adapter; None where no adapter was written."""
    model_sha256: str | None = None
    """SHA-256 over the weight files of the model; None where no model was written."""
    samples: list[dict[str, str]] = field(default_factory=list)
    """Continuations of a prompt by the base and by the tuned model, and the right answer."""
    public: dict[str, Any] | None = None
    """Measures on public text; None where there are none."""
    leakage: dict[str, Any] | None = None
    """Success of attacks on what sites send, and a `sentence` on it; None where none were run."""
    parts: str | None = None
    """Tuned weights of each part of a cut model, in words, where the parts differ; else None."""
    noise: dict[str, Any] | None = None
    """Account of noise that is less than a promise of privacy, with a `sentence`; None without."""


def export_weights(reporting: Reporting, state: Named) -> str:
    """Write the folder of PEFT, or of the model; return the SHA-256 over its weight files.

    A model that equals the base is written too, with a warning.
    """
    pool = reporting.pool
    probe = list(reporting.texts.sample().heldout[0].input_ids)
    if (pool.full and norm(state) == 0) or not has_effect(pool, state, probe):
        logger.warning(UNCHANGED)

    save = partial(
        save_weights, pool, state, template=exported.chat_template(reporting.settings["data"])
    )
    return _write("model" if pool.full else "adapter", reporting, save)


def export_adapter(reporting: Reporting, state: Named) -> str:
    """Write the folder of PEFT of an adapter, without the base's weights and its tokenizer.

    Return the SHA-256 over its weight file. An adapter without effect is written with a warning.
    """
    if not any(bool(tensor.any()) for name, tensor in state.items() if factor(name) == "B"):
        logger.warning(UNCHANGED)

    return _write("adapter", reporting, partial(reporting.pool.save_adapter, state))


def save_weights(pool: ModelPool, state: Named, folder: Path, *, template: str | None) -> None:
    """Write a model, with the tokenizer and the chat template where a folder holds them."""
    pool.save(state, folder)
    if template is not None and pool.exports_tokenizer():
        with_template(pool.tokenizer, template).save_pretrained(str(folder))


def _write(name: str, reporting: Reporting, save: Callable[[Path], None]) -> str:
    """Write the folder `name`; return the SHA-256 over its weight files."""
    draft = reporting.folder / f".{name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    save(draft)

    base = weights_digest(weights_folder(reporting.pool.config))
    exported.write(draft, __version__, reporting.settings, base, reporting.data.readings())
    digest = hashlib.sha256()

    for path in sorted(draft.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)

    reporting.replace(name, draft)
    return digest.hexdigest()


PromptFrom = Literal["setting", "site", "public"]
"""Origin of a sample's prompt: `evaluate.sample_prompt`, a held-out record of a site, or text that
belongs to no site."""


def samples(reporting: Reporting, state: Named) -> list[dict[str, str]]:
    """Return continuations of one prompt by the base and by the tuned model.

    Without a configured prompt a site's own text is one, and there is none where sites may not be
    measured or their text is elsewhere. Each sample says where its prompt is from, and has the
    right answer where the prompt is a question.
    """
    settings = reporting.evaluate
    shows_text = reporting.heldout and reporting.texts.sample_from is not None
    if settings.sample_prompt is None and not shows_text:
        return []

    texts = reporting.texts.sample()

    asked: Prompt
    right: dict[str, str] = {}
    origin: PromptFrom = reporting.texts.sample_from or "public"
    if settings.sample_prompt is not None:
        origin = "setting"
        prompt = asked = settings.sample_prompt
    elif texts.questions:
        question = texts.questions[0]
        prompt = asked = question.prompt
        right = {"right": question.answer}
        if question.prompt_ids:
            asked = question.prompt_ids
            prompt = reporting.pool.tokenizer.decode(asked, skip_special_tokens=True)
    else:
        ids = texts.heldout[0].input_ids
        prompt = asked = reporting.pool.tokenizer.decode(
            ids[: max(1, len(ids) // 4)], skip_special_tokens=True
        )

    models = {"the base model": reporting.pool.base_state(), "the tuned model": state}
    length = settings.sample_length(question=bool(right))
    before, after = (
        reporting.pool.generate(weights, [asked], max_new_tokens=length, at_once=1, of=of)[0]
        for of, weights in models.items()
    )
    return [{"prompt": prompt, "prompt_from": origin, "base": before, "final": after} | right]
