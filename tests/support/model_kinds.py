"""Small random models of many architectures, with everything perturbed that a folder stores."""

from pathlib import Path
from typing import Any

import torch

COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
ROUTED = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "deepseek_v3": EXPERTS | LATENT | ROUTED,
    "gpt_neox": {},
    "gemma": {"head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {},
    "mamba": {"state_size": 4},
    "gpt_oss": EXPERTS | {"head_dim": 8},
    "gemma4_text": {
        "head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def save_kind(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random model of architecture `kind` to `folder`; persistent buffers are not what they
    begin as."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, **(COMMON | KINDS.get(kind, {}) | changes))
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    draw = torch.Generator().manual_seed(1)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                size = 0.03 if name in parameters else 0.3
                tensor.add_(size * torch.randn(tensor.shape, generator=draw).to(tensor.dtype))

    model.save_pretrained(folder)
    return folder
