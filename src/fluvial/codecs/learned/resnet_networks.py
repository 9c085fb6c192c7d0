"""The two networks of `resnet`, and the multiply-accumulates that they need."""

from dataclasses import dataclass

from torch import Tensor, nn

_RESBLOCKS = 3


class Residual(nn.Module):
    """x + BN(conv(ReLU(BN(conv(x))))), 3x3 under reflection padding, no bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_reflected(channels, channels), nn.ReLU(), *_reflected(channels, channels)
        )

    def forward(self, values: Tensor) -> Tensor:
        """Return the values and result (batch, channels, height, width)."""
        return values + self.body(values)  # type: ignore[no-any-return]


def build_encoder(stages: int) -> nn.Sequential:
    """Return (batch, 1, rows, cols) to (batch, 2^s, rows / 2^s, cols / 2^s); 246,785 parameters at
    s = 6 stages."""
    layers: list[nn.Module] = [*_reflected(1, 1), nn.ReLU()]
    for stage in range(stages):
        inner = 2**stage
        outer = 2 ** (stage + 1)
        conv = nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outer), nn.ReLU()]

    return nn.Sequential(*layers, *(Residual(2**stages) for _ in range(_RESBLOCKS)))


def build_decoder(stages: int) -> nn.Sequential:
    """Return the mirror of `build_encoder`, ending in a 7x7 convolution and Tanh; 246,698
    parameters at 6 stages."""
    layers: list[nn.Module] = [Residual(2**stages) for _ in range(_RESBLOCKS)]
    for stage in reversed(range(stages)):
        inner = 2 ** (stage + 1)
        outer = 2**stage
        conv = nn.ConvTranspose2d(
            inner, outer, 3, stride=2, padding=1, output_padding=1, bias=False
        )
        layers += [conv, nn.BatchNorm2d(outer), nn.ReLU()]

    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(1, 1, 7), nn.Tanh())


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one canvas."""

    encoder: int
    decoder: int


def multiply_accumulates(rows: int, cols: int, *, stages: int = 6) -> Macs:
    """Return what coding one canvas costs, from the shapes of the convolutions alone.

    A transposed convolution counts its kernel at every output cell, as the paper's 1.80 G for [1,
    4096, 2048] must; without the zeros between the inputs the decoder needs 1.09 G.
    """
    cells = rows * cols
    grid = cells // 4**stages
    residual = _RESBLOCKS * 2 * 9 * 4**stages * grid
    levels = [9 * 2 ** (2 * stage + 1) for stage in range(stages)]  # 9 * channels in * channels out
    down = sum(level * cells // 4 ** (stage + 1) for stage, level in enumerate(levels))
    up = sum(level * cells // 4**stage for stage, level in enumerate(levels))

    return Macs(encoder=9 * cells + down + residual, decoder=residual + up + 49 * cells)


def _reflected(inner: int, outer: int) -> tuple[nn.Module, ...]:
    return nn.ReflectionPad2d(1), nn.Conv2d(inner, outer, 3, bias=False), nn.BatchNorm2d(outer)
