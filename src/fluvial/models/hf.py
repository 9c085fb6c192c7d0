"""Types of transformers for annotations; at run time they are `Any`, as importing takes seconds."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
else:
    PretrainedConfig = PreTrainedModel = PreTrainedTokenizerBase = Any

__all__ = ["PreTrainedModel", "PreTrainedTokenizerBase", "PretrainedConfig"]
