"""Shares of tokens that a server read where it was measured, by the layers in front and the noise.

The figures are those of `benchmarks/results/leakage.json`, and a test compares them: the best
attack on 8 texts of the embedded model, with a clip at the median norm. They are no bound for other
models and texts. So a run's own meter measures again what was expected here.
"""

from fluvial.methods.flglm.leakage.noise import NoiseConfig

HIDDEN: dict[int, dict[float, float]] = {
    1: {0.0: 1.0, 0.1: 1.0, 0.2: 0.75, 0.3: 0.364, 0.5: 0.071},
    2: {0.0: 1.0, 0.1: 1.0, 0.2: 0.788, 0.3: 0.321, 0.5: 0.092},
    3: {0.0: 1.0, 0.1: 0.978, 0.2: 0.826, 0.3: 0.413, 0.5: 0.109},
}
"""Share read from hidden states by layers in front, and by noise in units of the clip."""
GRADIENTS = 0.940
"""Least share read from gradients, at any cut and noise: where gradients are sent, no cut and no
noise meet a bound below."""


def expected(front: int, noise: NoiseConfig | None, *, gradients: bool) -> float:
    """Return the share that a server reads of hidden states or of gradients, whichever is more.

    `gradients` says that steps send them, which they do unless front and middle are frozen.

    Noise between two measured values counts as the smaller one, and a deeper front as the deepest
    that was measured. Rows of the public embedding, without a layer in front, count as read.
    """
    if not front:
        return 1.0

    multiplier = 0.0 if noise is None else noise.multiplier
    shares = HIDDEN[min(front, max(HIDDEN))]
    nearest = max(each for each in shares if each <= multiplier)
    return max(shares[nearest], GRADIENTS) if gradients else shares[nearest]
