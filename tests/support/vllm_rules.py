"""vLLM's rules for a LoRA adapter on disk, in our own words, because vLLM needs a GPU's packages.

They are those of vllm-project/vllm, releases up to 0.27:
`vllm/lora/peft_helper.py` (`PEFTHelper.validate_legal`): settings and the largest rank;
`vllm/lora/utils.py` (`parse_fine_tuned_lora_name`): names of tensors;
`vllm/lora/lora_model.py` (`LoRAModel.from_local_checkpoint`): every adapted module ends in the name
of a linear module that vLLM's model has;
`vllm/lora/layers` (`set_lora`): factors fit their module, and have at most the rank of the buffers;
`vllm/config/lora.py` (`MaxLoRARanks`): ranks that a server can be started for.
"""

import json
import re
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


def broken_rules(folder: Path, model: nn.Module, max_lora_rank: int) -> list[str]:
    """Return the rules that an adapter breaks on a server with these settings."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    linear = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    leaves = {name.rpartition(".")[2] for name in linear}
    broken = []

    if not {"r", "lora_alpha", "target_modules"} <= config.keys():
        broken.append("r, lora_alpha and target_modules are needed")
    if config["modules_to_save"] is not None or config["use_dora"] or config["bias"] != "none":
        broken.append("modules_to_save, DoRA and biases are not served")
    if config["rank_pattern"] or config["alpha_pattern"]:
        broken.append("patterns of ranks and scales are not read: r and lora_alpha hold for all")
    if max_lora_rank not in MAX_LORA_RANKS or config["r"] > max_lora_rank:
        broken.append(f"rank {config['r']} is beyond {max_lora_rank}")

    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match["module"].rpartition(".")[2] not in leaves:
            broken.append(f"{name} is no factor of a linear module")
            continue

        into, out = linear[match["module"]]
        shape = (config["r"], into) if match["factor"] == "A" else (out, config["r"])
        if tuple(tensor.shape) != shape:
            broken.append(f"{name}: {tuple(tensor.shape)} and not {shape}")

    return broken
