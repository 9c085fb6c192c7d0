"""The encoder and the decoder of `cnn`: a linear path plus a residual path of convolutions."""

from torch import Tensor, nn

STRIDE = 4
"""Features of one latent position."""


class _Sum(nn.Module):
    """The sum of two paths with the same input; the second starts at zero."""

    def __init__(self, linear: nn.Module, residual: nn.Sequential) -> None:
        super().__init__()
        self.linear = linear
        self.residual = residual
        last = residual[-1]

        for weight in last.parameters():
            nn.init.zeros_(weight)

    def forward(self, values: Tensor) -> Tensor:
        """Return the values (batch, channels, length)."""
        return self.linear(values) + self.residual(values)  # type: ignore[no-any-return]


def build_encoder(rank: int, channels: int, hidden: int) -> nn.Module:
    """Return (batch, rank, features) to (batch, channels, features / 4)."""
    residual = nn.Sequential(
        nn.Conv1d(rank, hidden, 4, 2, 1),
        nn.ReLU(),
        nn.Conv1d(hidden, hidden, 4, 2, 1),
        nn.ReLU(),
        nn.Conv1d(hidden, channels, 3, padding=1),
    )
    return _Sum(nn.Conv1d(rank, channels, 2 * STRIDE, STRIDE, STRIDE // 2, bias=False), residual)


def build_decoder(rank: int, channels: int, hidden: int) -> nn.Module:
    """Return the mirror of `build_encoder`."""
    residual = nn.Sequential(
        nn.Conv1d(channels, hidden, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose1d(hidden, hidden, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose1d(hidden, rank, 4, 2, 1),
    )
    return _Sum(
        nn.ConvTranspose1d(channels, rank, 2 * STRIDE, STRIDE, STRIDE // 2, bias=False), residual
    )
