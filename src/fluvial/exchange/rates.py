"""Rate control: the server sets the codec's rate for all sites by the errors that they report."""

import math
import statistics
from dataclasses import dataclass, field

from fluvial.codecs import CodecSettings
from fluvial.codecs.auto import AutoSettings
from fluvial.codecs.base import SnrDrivenSettings, lowest_rate
from fluvial.exchange.checks import can_code
from fluvial.federation.context import Metrics
from fluvial.wire.tensors import Layout, Named, energy

FINEST = 4.0
"""Lowest rate that is set, a byte for each value."""
MOST_CHANGE = 2.0
"""Factor between the rates of two rounds, at most."""
_DAMPING = 0.5
"""Exponent on the ratio of bits, below 1 because errors vary between rounds (ours)."""
_LEAST_BITS = 1e-3
"""Bits for each value that count for a codec that loses everything."""


def bits_of(error: float, *, without_bias: bool) -> float:
    """Return the bits for each value that a white Gaussian update needs at a relative squared
    error."""
    least = max(error, 1e-12)
    gain = 1 + 1 / least if without_bias else 1 / least
    return max(math.log2(gain) / 2, _LEAST_BITS)


@dataclass
class RateControl:
    """Server half: bits go with log2 of the signal-to-noise ratio, damped.

    The next round has bits * (bits_of(target) / bits_of(error))^(1/2) bits for each value. The SNR
    in decibels is a concave function of the bits that begins at 0, so each step moves towards the
    target and none beyond it while updates stay the same.
    """

    settings: SnrDrivenSettings
    rate: float
    """Rate of the next round."""
    coarsest: float
    """Highest rate that the codec can code."""
    _seen: list[tuple[float, float]] = field(default_factory=list)
    """Relative squared error of each update that counts, and its energy as decoded."""

    @classmethod
    def of(cls, settings: CodecSettings, layout: Layout) -> "RateControl | None":
        """Return the control that the settings ask for; None where their rate is fixed."""
        if isinstance(settings, AutoSettings):  # the chosen codec follows its noise
            return None
        if not isinstance(settings, SnrDrivenSettings) or not settings.snr_driven:
            return None
        return cls(settings, settings.model_dump()["rate"], _coarsest(settings, layout))

    def fold(self, error: float, update: Named) -> None:
        """Take one update that counts, and the error that its site reports."""
        self._seen.append((error, energy(update)))

    def close(self, mean: Named) -> Metrics:
        """Set the rate of the next round by the updates of this one and their mean; forget them.

        Medians are taken, so that one site does not change the rate of all. With N sites and
        energies e_i of decoded updates, within = (sum e_i - N |mean|^2) / (N - 1) is the variance
        between sites as decoded; the mean carries signal max(0, |mean|^2 - within / N).
        """
        seen = self._seen
        self._seen = []
        metrics: Metrics = {"rate": self.rate}
        if not seen:
            return metrics

        error = statistics.median_low(error for error, _ in seen)
        sent = statistics.median_low(self._sent(error, decoded) for error, decoded in seen)
        count = len(seen)
        within = None

        if count > 1:
            mean_energy = energy(mean)
            total = math.fsum(decoded for _, decoded in seen)
            within = max((total - count * mean_energy) / (count - 1), 1e-30)
            noise = max(error * sent, 1e-30)
            signal = max(0.0, mean_energy - within / count)
            metrics |= {
                "codec_noise": noise,
                "sampling_noise": within,
                "aggregate_snr_db": 10 * math.log10(max(signal, 1e-30) / (noise / count)),
            }

        target = self._target(sent, within)
        if target is not None:
            self.rate = self._next(error, target)
        return metrics

    def _target(self, sent: float, within: float | None) -> float | None:
        """Return the relative squared error to aim at; None where nothing is known of it."""
        if self.settings.snr_db is not None:
            return float(10 ** (-self.settings.snr_db / 10))

        ratio = self.settings.noise_ratio
        if within is None or ratio is None:
            return None
        if self.settings.without_bias:  # the variance as decoded has the codec's noise in it
            ratio /= 1 + ratio
        return ratio * within / max(sent, 1e-30)

    def _sent(self, error: float, decoded: float) -> float:
        """Return the energy of an update, from its energy as decoded: noise adds to it where there
        is no bias, and is missing from it elsewhere."""
        if self.settings.without_bias:
            return decoded / (1 + error)
        return decoded / max(1 - error, 1 / 64)

    def _next(self, error: float, target: float) -> float:
        """Return the rate that comes nearer to the `target`, as a number of four digits."""
        without_bias = self.settings.without_bias
        wanted = bits_of(target, without_bias=without_bias)
        change = (bits_of(error, without_bias=without_bias) / wanted) ** _DAMPING
        rate = self.rate * min(max(change, 1 / MOST_CHANGE), MOST_CHANGE)
        finest = max(FINEST, lowest_rate(self.settings))
        return float(f"{min(max(rate, finest), self.coarsest):.4g}")


def _coarsest(settings: SnrDrivenSettings, layout: Layout) -> float:
    """Return the highest rate at which the codec can code `layout`, within a hundredth."""
    low = float(settings.model_dump()["rate"])
    high = low
    while _codes_at(settings, high, layout):
        low, high = high, 2 * high

    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _codes_at(settings, middle, layout) else (low, middle)

    return float(f"{low * (1 - 1e-4):.4g}") if low > settings.model_dump()["rate"] else low


def _codes_at(settings: SnrDrivenSettings, rate: float, layout: Layout) -> bool:
    """Return whether the codec can code `layout` at a rate."""
    try:
        changed = type(settings).model_validate({**settings.model_dump(), "rate": rate})
    except ValueError:  # beyond the limits of the setting
        return False
    return can_code(changed, layout)
