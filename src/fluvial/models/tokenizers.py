"""A base model's tokenizer, and the reasons to refuse it.

transformers is imported where a tokenizer is loaded, so that other commands answer at once.
"""

import logging
from functools import cache
from typing import NoReturn

from fluvial.errors import ConfigError
from fluvial.models.hf import PreTrainedModel, PreTrainedTokenizerBase
from fluvial.models.pretrained import ModelConfig, from_hub, local_folder, num_embeddings

logger = logging.getLogger(__name__)

SAMPLING = ("dropout", "alpha", "nbest_size")
"""Settings of a tokenizer's model with which one text has other tokens each time: of BPE, and of
Unigram."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer, padding on the right; a missing pad token is replaced by EOS.

    A text has the same tokens each time: sampling, such as BPE dropout, is switched off.
    """
    from transformers import AutoTokenizer

    _refuse_without_tokenizer(config)
    tokenizer = from_hub(AutoTokenizer.from_pretrained, config, trust_remote_code=False)
    tokenizer.padding_side = "right"
    _check_values(tokenizer, config)
    _without_sampling(tokenizer, config)
    _drop_absent_tokens(tokenizer)

    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.name_or_path={config.name_or_path!r}: its tokenizer has no end-of-text token, "
            "with which every record ends; name one as eos_token in tokenizer_config.json"
        )

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token

    return tokenizer


def _check_values(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Raise `ConfigError` for a value of tokenizer_config.json with which no text can be read."""
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0:
        _refuse_value(config, "model_max_length", longest, "a number of tokens above 0")

    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str | dict):
        _refuse_value(config, "chat_template", template, "the text of a template")


def _without_sampling(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Switch off the sampling of tokens, with a remark; refuse that of SentencePiece's own code."""
    options = getattr(tokenizer, "sp_model_kwargs", None) or {}
    if not tokenizer.is_fast and options.get("enable_sampling"):
        _refuse_value(config, "sp_model_kwargs.enable_sampling", True, "false")

    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    for key in SAMPLING:
        value = getattr(model, key, None)
        if value:
            setattr(model, key, None)
            _remark_once(config.name_or_path, key, value)


@cache
def _remark_once(name: str, key: str, value: float) -> None:
    logger.warning(
        "model.name_or_path=%r: %s = %s in tokenizer.json draws the tokens of a text anew each "
        "time; it is switched off for training and measuring, and in a tokenizer that is written",
        name,
        key,
        value,
    )


def _refuse_value(config: ModelConfig, key: str, value: object, expected: str) -> NoReturn:
    raise ConfigError(
        f"model.name_or_path={config.name_or_path!r}: {key} in tokenizer_config.json is "
        f"{value!r:.80}, expected {expected}; correct it there, or copy the file again"
    )


def _drop_absent_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give up special tokens whose text is not in the vocabulary, such as an empty one, to which
    transformers gives the id of the unknown token."""
    for name in ("eos_token", "bos_token", "pad_token"):
        text = getattr(tokenizer, name)
        unknown = getattr(tokenizer, f"{name}_id") == tokenizer.unk_token_id
        if text is not None and (text == "" or (unknown and text != tokenizer.unk_token)):
            setattr(tokenizer, name, None)


TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab.*",
    "spiece.*",
    "*.vocab",
    "merges.txt",
    "tekken.json",
)
"""Names of files; every tokenizer has at least one of them."""


def _refuse_without_tokenizer(config: ModelConfig) -> None:
    """Raise `ConfigError` for a local folder that holds no file of a tokenizer."""
    folder = local_folder(config)
    if folder is None or any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        return

    raise ConfigError(
        f"model.name_or_path={config.name_or_path!r}: the folder has no tokenizer (tokenizer.json "
        "and tokenizer_config.json, or tokenizer.model); copy the files from where the model came "
        "from"
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Raise `ConfigError` if the tokenizer knows tokens that `model` (maybe without weights) has no
    row for."""
    rows = num_embeddings(model)
    # Special tokens that a tokenizer's class adds by itself stand in no text, but for those that
    # are put there.
    special = set(tokenizer.all_special_ids)
    plain = ((text, index) for text, index in tokenizer.get_vocab().items() if index not in special)
    last, largest = max(plain, key=lambda item: item[1])

    for what, text, index in (
        ("pad token", tokenizer.pad_token, tokenizer.pad_token_id),
        ("EOS token", tokenizer.eos_token, tokenizer.eos_token_id),
        ("BOS token", tokenizer.bos_token, tokenizer.bos_token_id),
        ("last token", last, largest),
    ):
        if index is not None and index >= rows:
            # A class such as Qwen's brings a pad token of its own where the files name none.
            other = "name a token of the model as pad_token in tokenizer_config.json, "
            first = other if what == "pad token" else ""
            raise ConfigError(
                f"model.name_or_path={name!r}: the tokenizer's {what} {text!r} has id {index}, and "
                f"the model embeds ids up to {rows - 1}; {first}use the tokenizer that belongs to "
                "the model, or resize the model (resize_token_embeddings) and save it anew"
            )
