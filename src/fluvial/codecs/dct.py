"""Top-k of the discrete cosine transform: what neighbours in a tensor have in common needs few
coefficients.

After Peng, Quesnelle, Kingma, "DeMo: Decoupled Momentum Optimization", 2024, arXiv 2411.19870,
which takes the top k of every chunk. Ours takes the largest coefficients of the whole update and
entropy-codes where they are, as `top_k`.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy import fft
from torch import Tensor

from fluvial.codecs.sparse.largest import Largest, LargestSettings, ValueBits
from fluvial.wire.frame import Reader
from fluvial.wire.tensors import Layout

Doubles = NDArray[np.float64]

_LARGEST = float(np.finfo(np.float32).max)


class DctTopKSettings(LargestSettings):
    """The largest coefficients of a chunked cosine transform.

    Bytes per value: 4 / rate. Lost: all but the largest coefficients, and bits of those.
    """

    name: Literal["dct_top_k"] = "dct_top_k"
    """Name of the codec."""
    chunk_size: int = Field(64, ge=1, le=4096)
    """Values, along each of two axes, that are transformed together; the last chunk of an axis may
    be shorter."""
    value_bits: ValueBits = "best"
    """Bits of a kept coefficient; fewer leave room for more of them. "best" tries all."""


class DctTopK(Largest):
    """Every tensor as a matrix (all axes but the last, last) in chunks, orthonormal DCT-II of both
    axes, top-k.

    Body: that of `Largest`, of the coefficients in the place of the values that they are of.
    """

    code: ClassVar[int] = 16
    settings: DctTopKSettings

    def __init__(self, settings: DctTopKSettings, layout: Layout) -> None:
        super().__init__(settings, layout, value_bits=settings.value_bits)
        starts = np.cumsum(layout.sizes) - layout.sizes
        places: dict[tuple[int, int], list[Doubles]] = {}

        for start, size, (_, shape) in zip(starts, layout.sizes, layout.shapes, strict=True):
            if size:
                columns = shape[-1] if shape else 1
                where = start + np.arange(size).reshape(size // columns, columns)
                places.setdefault((size // columns, columns), []).append(where)

        self._places = [torch.from_numpy(np.stack(alike)) for alike in places.values()]

    def body(self, vector: Tensor, seed: int) -> bytes:
        """Code the flattened update (numel,); see `Codec.body`."""
        return super().body(self._transform(vector, fft.dct), seed)

    def parse(self, reader: Reader) -> Tensor:
        """Decode a body into a vector (numel,); see `Codec.parse`."""
        return self._transform(super().parse(reader), fft.idct)

    def _transform(self, vector: Tensor, along: Callable[..., Doubles]) -> Tensor:
        """Return the transform, or its inverse, of all tensors of one shape at a time; fp64 inside,
        kept within fp32."""
        result = torch.empty_like(vector)
        for where in self._places:
            x = vector[where].double().numpy()
            for axis in (1, 2):
                x = np.moveaxis(self._chunked(np.moveaxis(x, axis, -1), along), -1, axis)
            result[where] = torch.from_numpy(np.clip(x, -_LARGEST, _LARGEST)).float()

        return result

    def _chunked(self, x: Doubles, along: Callable[..., Doubles]) -> Doubles:
        """Apply `along` to the last axis in chunks."""
        chunk = min(self.settings.chunk_size, x.shape[-1])
        whole = x.shape[-1] - x.shape[-1] % chunk
        chunks = x[..., :whole].reshape(*x.shape[:-1], -1, chunk)
        parts = [along(chunks, type=2, norm="ortho").reshape(*x.shape[:-1], whole)]

        if whole < x.shape[-1]:
            parts.append(along(x[..., whole:], type=2, norm="ortho"))

        return np.concatenate(parts, axis=-1)
