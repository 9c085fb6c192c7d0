"""Models that several threads build at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from fluvial.models.loading import load_base, meta_base, skeleton
from fluvial.models.pretrained import ModelConfig


def test_threads_that_build_models_leave_the_libraries_as_they_were(tiny_model: Path) -> None:
    from transformers import PreTrainedModel

    config = ModelConfig(name_or_path=str(tiny_model), device="cpu", dtype="bfloat16")
    load_base(config)  # what is imported late is imported
    before = (PreTrainedModel.tie_weights, nn.Module.register_parameter, torch.get_default_dtype())
    together = threading.Barrier(4)

    def build(make: int) -> list[nn.Module]:
        together.wait()
        kinds = (load_base, skeleton, meta_base)
        return [kinds[(make + i) % 3](config) for i in range(9)]

    with ThreadPoolExecutor(4) as threads:
        built = [model for each in threads.map(build, range(4)) for model in each]

    after = (PreTrainedModel.tie_weights, nn.Module.register_parameter, torch.get_default_dtype())
    assert after == before

    for model in built:
        assert isinstance(model, PreTrainedModel)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert embedding.weight is head.weight, "untied"
