"""Step control: the server sets the quantiser's step for all sites by the noise between them."""

import math
from dataclasses import dataclass, field

from fluvial.codecs.base import Codec, SteppedCodec
from fluvial.errors import WireError
from fluvial.exchange.coding import Plain
from fluvial.federation.context import Metrics
from fluvial.wire.tensors import Named, energy

_STEP_OFF = 1 / 64
"""Octaves by which a frame's step may differ from the server's: it is rounded to 1/256 of one."""


class AtStep(Plain):
    """Site half: a codec that quantises by the server's step instead of by its rate."""

    def __init__(self, codec: Codec, step: float) -> None:
        assert isinstance(codec, SteppedCodec), "the server sets a step for codecs that have one"
        super().__init__(codec)
        self.stepped: SteppedCodec = codec
        self.step = step

    def frame(self, update: Named, *, seed: int, round: int) -> bytes:
        """Return the codec's frame for `update` at the server's step."""
        return self.stepped.encode_at(update, self.step, seed=seed, round=round)


@dataclass(frozen=True)
class Noise:
    """The quantiser of one frame."""

    error: float
    """Expected squared error of the update, from the frame."""
    step: float
    """Step of the quantiser, in units of the update."""


@dataclass
class StepControl:
    """Server half: codec noise stays `ratio` times the sampling noise between sites."""

    ratio: float
    step: float | None = None
    """Step of the next round; None until two sites of one round were seen."""
    _seen: list[tuple[Noise, float]] = field(default_factory=list)

    def read(self, codec: SteppedCodec, frame: bytes) -> Noise:
        """Return the noise of a frame; raise `WireError` for a step that was not asked for."""
        noise = Noise(codec.noise_of(frame), codec.step_of(frame))
        if self.step is not None and not abs(math.log2(noise.step / self.step)) <= _STEP_OFF:
            raise WireError(
                f"frame: quantised by a step of {noise.step:.4g}, the server asked for "
                f"{self.step:.4g}"
            )

        return noise

    def fold(self, noise: Noise, update: Named) -> None:
        """Take one update that counts."""
        self._seen.append((noise, energy(update)))

    def close(self, mean: Named) -> Metrics:
        """Set the step for the next round by the updates of this one and their mean; forget them.

        With N sites, energies e_i of decoded updates and codec noises q_i:
        within = (sum e_i - N |mean|^2) / (N - 1) is the variance between sites as decoded; the mean
        carries signal max(0, |mean|^2 - within / N). Noise goes with the square of the step while
        most coefficients are live, so the correction is a square root, damped (ours).
        """
        seen = self._seen
        self._seen = []
        count = len(seen)
        if count < 2:
            return {}

        mean_energy = energy(mean)
        noise = math.fsum(quantiser.error for quantiser, _ in seen) / count
        total = math.fsum(length for _, length in seen)
        within = max((total - count * mean_energy) / (count - 1), 1e-30)
        step = math.exp(math.fsum(math.log(quantiser.step) for quantiser, _ in seen) / count)
        change = math.sqrt(self.ratio * within / max(noise, 1e-30))
        self.step = step * min(max(change, 2**-0.5), 2**0.5)
        signal = max(0.0, mean_energy - within / count)

        return {
            "codec_noise": noise,
            "sampling_noise": within,
            "aggregate_snr_db": 10 * math.log10(max(signal, 1e-30) / max(noise / count, 1e-30)),
            "step": self.step,
        }
