"""The bed of `benchmarks.leakage`: the embedded model, public text, the sites' held-out text."""

from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from torch import Tensor, nn

from fluvial.data import stdlib
from fluvial.methods.flglm.leakage.attacks import Effort
from fluvial.methods.flglm.leakage.causal import CausalSettings
from fluvial.methods.flglm.leakage.decoder import DecoderSettings
from fluvial.methods.flglm.leakage.meter import Leakage
from fluvial.methods.flglm.leakage.public_model import PublicModel
from fluvial.models.hf import PreTrainedTokenizerBase
from fluvial.models.loading import load_base
from fluvial.models.pretrained import ModelConfig, source_of

MODEL = ModelConfig(dtype="float32", device="cpu")
KEY = b"a key of the benchmark's own, 32"
"""Key of the sites' noise, fixed so that the benchmark repeats."""


@dataclass(frozen=True)
class Size:
    """The work of a run."""

    cuts: tuple[int, ...]
    """Values of p, the layers of the front."""
    multipliers: tuple[float, ...]
    """Standard deviations of the noise, in units of the clip."""
    texts: int
    """Held-out texts that are attacked, in turn from each of the eight sites."""
    tokens: int
    public_texts: int
    decoder_steps: int
    tuning_steps: tuple[int, ...]
    """Steps of LoRA at the site, in the part "tuned"."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Return the smallest and the largest of the cuts."""
        return tuple(sorted({self.cuts[0], self.cuts[-1]}))

    def effort(self) -> Effort:
        """Return the attacker's work."""
        decoders = tuple(self._decoder(context=context) for context in (0, 2))
        searches = (
            CausalSettings(beams=1, shortlist=256),
            CausalSettings(beams=4, prior=0.5, shortlist=128),
            CausalSettings(beams=4, prior=1.0, shortlist=128),
        )
        shifted = self._decoder(shifted=True)
        return Effort(trials=2, decoders=decoders, shifted=shifted, searches=searches)

    def _decoder(self, *, context: int = 2, shifted: bool = False) -> DecoderSettings:
        return DecoderSettings(
            shifted=shifted,
            context=context,
            steps=self.decoder_steps,
            batch=12,
            window=self.tokens,
            learning_rate=5e-3,
        )


@cache
def base() -> nn.Module:
    """Return the embedded model, fp32."""
    return load_base(MODEL)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the embedded model's tokenizer."""
    from transformers import AutoTokenizer

    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source_of(MODEL))
    return loaded


def heldout(size: Size) -> list[Tensor]:
    """Return the texts (tokens,) that are attacked."""
    names = stdlib.site_names()
    documents = {name: stdlib.site_text(name).heldout for name in names}
    turns = [(names[index % len(names)], index // len(names)) for index in range(size.texts)]
    return _encoded([documents[name][number].text for name, number in turns], size.tokens)


def public(size: Size) -> list[Tensor]:
    """Return texts (tokens,) that the attacker has."""
    documents = [text for each in stdlib.public_packages().values() for text in each]
    step = max(1, len(documents) // size.public_texts)
    chosen = documents[::step][: size.public_texts]
    return _encoded([document.text for document in chosen], size.tokens)


def _encoded(texts: list[str], tokens: int) -> list[Tensor]:
    ids = tokenizer()([text[: 8 * tokens] for text in texts])["input_ids"]
    return [torch.tensor(each[:tokens]) for each in ids if len(each) >= tokens]


def median_norm(cut: int, texts: list[Tensor]) -> float:
    """Return the median L2 norm of a token's hidden state behind `cut` layers, to two digits."""
    model = PublicModel(base(), cut)
    norms = [float(row.norm()) for ids in texts for row in model.hidden(ids[None])[0]]
    return float(f"{median(norms):.2g}")


def rows_of(leakage: Leakage) -> list[dict[str, object]]:
    """Return a row for each attack."""
    return [
        {
            "attack": reading.attack,
            "tokens": leakage.tokens,
            "accuracy": reading.accuracy,
            "rouge_1": reading.rouge_1,
            "rouge_2": reading.rouge_2,
            "rouge_l": reading.rouge_l,
        }
        for reading in leakage.readings
    ]
