"""Checks of a base model on a few tokens, before any measurement."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models.hf import PreTrainedModel
from fluvial.models.stored import first_line

LENGTH = 8


@torch.no_grad()
def check_behaviour(model: nn.Module, name: str) -> None:
    """Raise `ConfigError` for a base that no run could use.

    Such a base cannot read text alone, draws random numbers, attends to later tokens or to padding,
    or has a cache that changes its values. `model` is in evaluation mode and has its weights;
    `name` is `model.name_or_path`.
    """
    where = f"model.name_or_path={name!r}"
    device = next(model.parameters()).device
    tokens = torch.tensor([_tokens(model)], device=device)
    changed = tokens.clone()
    changed[0, -1] = tokens[0, 0]
    state = _random_state(device)

    try:
        logits = [_logits(model, rows) for rows in (tokens, changed)]
        padded = _logits(model, torch.nn.functional.pad(tokens, (0, LENGTH)), LENGTH)
    except Exception as error:
        raise ConfigError(
            f"{where}: the model cannot read a line of text: {first_line(error)}"
        ) from error

    cached = cached_logits(model, tokens)
    if not torch.equal(state, _random_state(device)):
        raise ConfigError(
            f"{where}: {type(model).__name__} draws random numbers in a forward pass, so that no "
            "run could be repeated"
        )

    if not bool(logits[0].isfinite().all()):
        raise ConfigError(
            f"{where}: the model's values are not finite in {next(model.parameters()).dtype}; if "
            "the folder has another type, set model.dtype to it, else copy the folder again, "
            "config.json too, whose numbers may be wrong"
        )

    first, second = (rows[:, :-1].float() for rows in logits)
    if float((first - second).norm()) > _tolerance(model) * float(first.norm()):
        raise ConfigError(
            f"{where}: {type(model).__name__} attends to later tokens, so predicting the next one "
            "is no task for it"
        )

    without = logits[0].float()
    behind = padded[:, : tokens.shape[1]].float()
    if float((without - behind).norm()) > _tolerance(model) * float(without.norm()):
        raise ConfigError(
            f"{where}: {type(model).__name__} gives other values for a text that padding follows, "
            "so that sequences of unequal length cannot be trained or measured together"
        )

    if cached is not None and float((without - cached.float()).norm()) > _tolerance(model) * float(
        without.norm()
    ):
        raise ConfigError(
            f"{where}: {type(model).__name__} gives other values with its cache than without, so "
            "that what is trained and measured would not be what it generates"
        )


def check_positions(base: nn.Module, name: str) -> None:
    """Raise `ConfigError` for a base that is not told where a packed record begins; it may be
    without weights."""
    if "position_ids" not in signature(type(base).forward).parameters:
        raise ConfigError(_unpackable(base, name, "takes no positions"))


@torch.no_grad()
def check_packing(model: nn.Module, name: str) -> None:
    """Raise `ConfigError` unless packed records have the logits that each has alone.

    `model` is as `check_behaviour` needs it, or an adapted one that changes nothing.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    check_positions(base, name)
    device = next(model.parameters()).device
    tokens = torch.tensor(_tokens(model), device=device)
    records = [tokens, tokens.flip(0)[: LENGTH // 2], tokens.roll(1)]
    rows = torch.cat(records).repeat(2, 1)
    positions = torch.cat([torch.arange(len(each), device=device) for each in records])
    found = model(**packed(model, rows, positions.repeat(2, 1))).logits.flatten(0, 1).float()
    alone = torch.cat([_logits(model, each[None])[0] for each in records]).repeat(2, 1).float()

    if float((alone - found).norm()) > _tolerance(model) * float(alone.norm()):
        raise ConfigError(_unpackable(base, name, "lets a packed record read the one before it"))


def packed(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Return the arguments of a forward pass over packed rows (batch, seq), whose positions begin
    again with each record.

    Without a mask transformers takes such positions for the bounds of attention; flash attention
    does so in a batch of one row only, which then holds all rows.
    """
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    if attention.startswith("flash_attention"):
        input_ids, position_ids = (each.flatten()[None] for each in (input_ids, position_ids))
    return {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}


def cached_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor | None:
    """Return the logits of a call with the model's own cache, None where it cannot make one."""
    try:
        logits: Tensor = model(input_ids=tokens).logits
    except Exception:  # a cache that cannot be made is no fault of what is trained
        return None

    return logits


def makes_cache(model: nn.Module) -> bool:
    """Return False for a model whose cache transformers cannot make, such as one whose layers all
    are convolutions: each step then reads the whole text again."""
    token = torch.tensor([_tokens(model)[:1]], device=next(model.parameters()).device)
    return cached_logits(model, token) is not None


def _unpackable(model: nn.Module, name: str, why: str) -> str:
    return (
        f"data.packing: {type(model).__name__} ({name}) {why}, so its records cannot share a "
        "sequence; remove it"
    )


def _logits(model: PreTrainedModel, tokens: Tensor, padding: int = 0) -> Tensor:
    """Return the logits of `tokens`, the last `padding` of which the attention mask leaves out."""
    mask = torch.ones_like(tokens)
    mask[:, tokens.shape[1] - padding :] = 0
    logits: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits


def _tolerance(model: nn.Module) -> float:
    """Return the relative difference that rounding can make where experts get other tokens."""
    return 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05


def _tokens(model: PreTrainedModel) -> list[int]:
    """Return token ids that stand for text: none with a meaning of its own, such as an image's."""
    rows = model.get_input_embeddings().weight.shape[0]
    named = {value for value in model.config.to_dict().values() if isinstance(value, int)}
    plain = [index for index in range(rows) if index not in named]

    return (
        (plain or [0])[-LENGTH:] if len(plain) < LENGTH else plain[:: len(plain) // LENGTH][:LENGTH]
    )


def _random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
