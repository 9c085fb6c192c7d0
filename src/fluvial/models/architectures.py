"""The reasons to refuse an architecture, by its configuration."""

from fluvial.errors import ConfigError
from fluvial.models.hf import PretrainedConfig

_READS_BOTH_WAYS = ("xlnet", "xlm", "flaubert", "cpmant")
"""Model types whose language models attend to later tokens, whatever their settings."""

_SEEDS_ITSELF = ("reformer",)
"""Model types whose backward pass draws from the process-wide random generator."""

_ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Model types that are causal only where their configuration says `is_decoder`."""


def refuse_architecture(base_config: PretrainedConfig, where: str) -> None:
    """Raise `ConfigError`, which names the base as `where`, unless it is a causal language model
    with float weights that transformers has and that trains the same way twice."""
    from transformers import AutoModelForCausalLM

    kind = base_config.model_type

    if getattr(base_config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{where}: {kind!r} is an encoder-decoder; only causal (decoder-only) language models "
            "are tuned"
        )

    if type(base_config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"{where}: transformers has no causal language model of the type {kind!r}"
        )

    if kind in _SEEDS_ITSELF:
        raise ConfigError(
            f"{where}: {kind!r} sets the process-wide random generator by itself while it trains, "
            "so that no run could be repeated"
        )

    if kind in _READS_BOTH_WAYS:
        raise ConfigError(
            f"{where}: {kind!r} attends to later tokens, so predicting the next one is no task for "
            "it"
        )

    if kind in _ENCODERS and not base_config.is_decoder:
        raise ConfigError(
            f"{where}: {kind!r} attends to later tokens, because config.json has is_decoder = "
            "false; set it to true for a causal language model"
        )

    quantised = getattr(base_config, "quantization_config", None)
    if quantised is not None:
        method = (
            quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        )
        raise ConfigError(
            f"{where}: its weights are quantised ({getattr(method, 'value', method)}, by "
            "quantization_config in config.json), and only float weights are tuned and measured; "
            "name the model it was made from, which model.quantization quantises when it is "
            "loaded, or dequantise it and save it anew"
        )
