"""Write a tuned model: an adapter as a folder of PEFT, all weights as a folder of transformers."""

import shutil
from pathlib import Path

from fluvial.models.hf import PreTrainedModel

_GENERATION = "generation_config.json"


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter of `model`: adapter_config.json and adapter_model.safetensors."""
    # PEFT would add the whole matrix of a head or embedding that is adapted.
    model.save_pretrained(str(folder), save_embedding_layers=False)


def save_whole(model: PreTrainedModel, folder: Path, base: Path) -> None:
    """Write all weights of `model`, with the generation settings of the `base` folder, if any."""
    model.save_pretrained(str(folder))
    (folder / _GENERATION).unlink(missing_ok=True)

    if (base / _GENERATION).is_file():
        shutil.copyfile(base / _GENERATION, folder / _GENERATION)
