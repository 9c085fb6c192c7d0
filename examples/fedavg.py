"""FedAvg over LoRA adapters as a plain loop: no fleet, no messages, the same weights.

    python -m examples.fedavg [CONFIG]

McMahan et al., AISTATS 2017, Algorithm 1, over the adapters of FedIT (Zhang et al., ICASSP 2024).
`fluvial run` computes the same weights, bit for bit; tests/docs/test_examples.py compares them.
"""

import sys
from pathlib import Path

from fluvial import RunConfig, WeightedMean, load_config
from fluvial.codecs import build
from fluvial.data import SiteTexts
from fluvial.federation.cohort import sample
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.seeds import generator
from fluvial.training.train import train
from fluvial.wire.tensors import Named, digest, moved, subtract

CONFIG = Path(__file__).parents[1] / "configs" / "stdlib.toml"


def fedavg(config: RunConfig) -> Named:
    """Return the global adapter after all rounds."""
    models = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, models.tokenizer, seed=config.seed)
    adapter = initial_state(models.layout, config.seed)
    codec = build(config.coding, models.layout)

    for number in range(1, config.rounds + 1):
        mean = WeightedMean()

        for site in sample(texts.names, 1.0, seed=config.seed, round=number):
            examples = texts.load(site).train
            start = models.weights(adapter)

            with models.model(adapter, trainable="A and B") as model:
                report = train(
                    model,
                    examples,
                    config.train,
                    pad_token_id=models.tokenizer.pad_token_id,
                    generator=generator(config.seed, "train", number, site),
                    start=start,
                )

            frame = codec.encode(subtract(report.weights, start), round=number)
            mean.add(codec.decode(frame, round=number), len(examples))

        adapter = moved(adapter, mean.mean())

    return adapter


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else CONFIG
    settings = load_config(
        given, ['method.name = "fedavg"', 'codec.name = "identity"', "compare = []", "rounds = 2"]
    )
    print(digest(fedavg(settings)))
