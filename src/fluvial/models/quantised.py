"""Linear layers with a quantised, frozen weight, in the formats of bitsandbytes.

bitsandbytes makes the codes and dequantises them, on CPUs and GPUs; a base that transformers loads
with its `BitsAndBytesConfig` has the same bits. Its layers are not used: in evaluation, on a CPU
with AVX512-BF16, its 4-bit layer packs the weight anew, for good and in place, and passes no
gradient any more; its 8-bit layer rounds what it multiplies, in evaluation only. Here one product
is computed in training and in evaluation: that with the dequantised weight.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models.layer_lists import layer_lists
from fluvial.models.pretrained import ModelConfig
from fluvial.models.product import product
from fluvial.models.quantisation import BLOCK, NESTED_BLOCK, Format, Quantisation, stored_bytes
from fluvial.models.targets import adaptable_modules, features
from fluvial.wire.tensors import Named

_SPARE = 8
"""Directions of subspace iteration beside those that are wanted."""
_ITERATIONS = 4

_PIECE = 2**20
"""Values that are quantised at a time: the library takes some 20 bytes for each of them."""

EXTRA = "pip install 'fluvial[quantization]'"
"""Command that installs the library."""


@cache
def _functional(setting: str = "model.quantization") -> ModuleType:
    """Return bitsandbytes' functions; raises `ConfigError` that names the `setting` which needs
    them, where it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ConfigError(
            f"{setting}: needs bitsandbytes, which cannot be imported ({error!s:.100}); "
            f"install it with {EXTRA}, or remove the setting"
        ) from error

    module: ModuleType = functional
    return module


def check_library(setting: str = "model.quantization") -> None:
    """Raise `ConfigError` that names `setting` where the library that quantises is not
    installed."""
    _functional(setting)


def encode(weight: Tensor, kind: Format) -> Named:
    """Return the stored tensors of a matrix (rows, columns): codes `weight`, and its scales."""
    library = _functional()
    if kind == "int8":
        rows = torch.split(weight, max(1, _PIECE // weight.shape[1]))
        pieces = [library.int8_vectorwise_quant(piece.to(torch.float16)) for piece in rows]
        return {
            "weight": torch.cat([codes for codes, _, _ in pieces]),
            "scale": torch.cat([scale for _, scale, _ in pieces]),
        }

    pieces = [
        library.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
        for piece in torch.split(weight.contiguous().flatten(), _PIECE)
    ]
    codes = torch.cat([codes for codes, _ in pieces])
    absmax = torch.cat([state.absmax for _, state in pieces])
    if kind == "nf4":
        return {"weight": codes, "absmax": absmax}

    offset = absmax.mean()
    nested, state = library.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return {
        "weight": codes,
        "absmax": nested,
        "nested_absmax": state.absmax,
        "offset": offset,
    }


def decode(
    stored: Mapping[str, Tensor], kind: Format, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return the matrix of `shape` that the tensors of `encode` stand for, in `dtype`."""
    library = _functional()
    if kind == "int8":
        # As bitsandbytes does in its own product for training.
        scale = stored["scale"].unsqueeze(1).mul(1 / 127)
        return stored["weight"].to(dtype).mul_(scale)

    # As one row: blocks run on over the ends of rows, and the library's kernel for CPUs would begin
    # a block in each row.
    state = library.QuantState(
        absmax=stored["absmax"],
        shape=(1, shape[0] * shape[1]),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    if kind == "nf4-double":
        state.offset = stored["offset"]
        state.state2 = library.QuantState(
            absmax=stored["nested_absmax"],
            code=_dynamic_code(stored["absmax"].device),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        state.nested = True

    weight: Tensor = library.dequantize_4bit(stored["weight"], state)
    return weight.view(shape)


@cache
def _dynamic_code(device: torch.device) -> Tensor:
    """Return the 256 levels (fp32) of the scales' own quantisation."""
    code: Tensor = _functional().create_dynamic_map()
    return code.to(device)


class QuantisedLinear(nn.Linear):
    """A linear layer with a frozen weight of codes: (..., in) to (..., out).

    Its parameters are the codes, the scales and the bias, so that copies of a model share them.
    """

    weight: nn.Parameter
    """Codes: two values a byte (values / 2, 1) in NF4, (out, in) in int8."""

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, kind: Format, *, correction_rank: int = 0
    ) -> None:
        """Quantise `weight` (out, in), on its device; `bias` is taken as it is."""
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.kind: Format = kind
        self.dtype = weight.dtype
        self.register_parameter("bias", bias)
        stored = encode(weight, kind)
        self._names = tuple(stored)

        for name, tensor in stored.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

        self.correction_rank = correction_rank
        if correction_rank:
            out, into = low_rank(weight.float() - self.dense().float(), correction_rank)
            self.correction_B = nn.Parameter(out.to(weight.dtype), requires_grad=False)
            self.correction_A = nn.Parameter(into.to(weight.dtype), requires_grad=False)

    def dense(self) -> Tensor:
        """Return the dequantised weight (out, in) without its correction."""
        stored = {name: self._parameters[name] for name in self._names}
        shape = (self.out_features, self.in_features)
        return decode(stored, self.kind, shape, self.dtype)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b; the backward pass dequantises again, and saves no weight."""
        value = product(x, self.bias, self.dense)
        if not self.correction_rank:
            return value

        inner = nn.functional.linear(x, self.correction_A)
        return value + nn.functional.linear(inner, self.correction_B)

    def extra_repr(self) -> str:
        """Return the sizes and the format."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


def layers_of_coded(base: nn.Module) -> dict[str, int]:
    """Return the decoder layer, counted from 0, of each linear module of `base` that can be
    quantised, by name.

    These are the modules of decoder layers that "all-linear" would adapt; a weight that two modules
    share stays as it is. `base` may be on the meta device; without a list of decoder layers there
    are none.
    """
    lists = layer_lists(base)
    users = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    found: dict[str, int] = {}
    for name, module in adaptable_modules(base).items():
        layer = next(
            (
                int(name.removeprefix(f"{path}.").partition(".")[0])
                for path, _ in lists
                if name.startswith(f"{path}.")
            ),
            None,
        )
        if layer is not None and users[id(module.weight)] == 1:
            found[name] = layer

    return found


def formats(base: nn.Module, quantisation: Quantisation) -> dict[str, Format]:
    """Return the format of each linear module of `base` that is quantised, by name.

    `base` may be on the meta device. Raises `ConfigError` for a layer that the model does not have,
    and where nothing is quantised.
    """
    lists = layer_lists(base)
    if not lists:
        raise ConfigError(
            f"model.quantization: {type(base).__name__} has no list of decoder layers, so that "
            "none can be quantised; remove it"
        )

    count = len(lists[0][1])
    beyond = [layer for layer, _ in quantisation.layers if layer >= count]
    if beyond:
        raise ConfigError(
            f"model.layer_quantization: layer {beyond[0]}: the model has {count} layers, counted "
            "from 0"
        )

    kinds = {name: quantisation.format(layer) for name, layer in layers_of_coded(base).items()}
    found = {name: kind for name, kind in kinds.items() if kind is not None}
    if quantisation and not found:
        raise ConfigError(
            f"model.quantization: without effect, because no linear layer of {type(base).__name__} "
            "has a format; remove it, or name fewer layers in model.layer_quantization"
        )
    return found


def weight_bytes(
    base: nn.Module, quantisation: Quantisation, correction_rank: int = 0
) -> dict[str, int]:
    """Return the bytes of each of the base's parameters, by name, with these formats and with
    corrections; `base` may be on the meta device, in its own float types."""
    sizes = {name: parameter.nbytes for name, parameter in base.named_parameters()}
    kinds = formats(base, quantisation) if quantisation else {}

    for name, kind in kinds.items():
        layer: Any = base.get_submodule(name)
        rows, columns = features(layer)
        rank = min(correction_rank, rows, columns)
        correction = rank * (rows + columns) * layer.weight.itemsize
        sizes[f"{name}.weight"] = stored_bytes(kind, rows, columns) + correction

    return sizes


def quantised_bytes(base: nn.Module, quantisation: Quantisation, correction_rank: int = 0) -> int:
    """Return the bytes of all of the base's parameters; see `weight_bytes`."""
    return sum(weight_bytes(base, quantisation, correction_rank).values())


def lost(weight: Tensor, kind: Format, correction_rank: int = 0) -> float:
    """Return ||W - Q(W)||^2 of a matrix (rows, columns) in a format, with its correction."""
    linear = QuantisedLinear(weight, None, kind, correction_rank=correction_rank)
    missing = weight.float() - linear.dense().float()
    if linear.correction_rank:
        missing -= linear.correction_B.float() @ linear.correction_A.float()
    return float(missing.double().square().sum())


def largest_decoded(base: nn.Module, quantisation: Quantisation) -> int:
    """Return the bytes of the largest weight that a product dequantises; 0 without any."""
    names = formats(base, quantisation) if quantisation else ()
    weights = dict(base.named_parameters())
    return max((weights[f"{name}.weight"].nbytes for name in names), default=0)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors (rows, rank) and (rank, columns) of the best approximation of a matrix,
    nearly: by subspace iteration from a fixed start, so that it is the same at every site."""
    rank = min(rank, *matrix.shape)
    start = torch.randn(
        matrix.shape[1],
        min(rank + _SPARE, *matrix.shape),
        generator=torch.Generator().manual_seed(0),
    )
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q

    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return (basis @ left[:, :rank]) * root, root.unsqueeze(1) * right[:rank]


def quantised_words(config: ModelConfig) -> str:
    """Return a paragraph for the card of an adapter: how plain transformers loads the same base;
    empty for a float base."""
    quantisation = config.quantisation
    if not quantisation:
        return ""

    layers = "; ".join(
        f"{kind} in layers {', '.join(map(str, numbers))}"
        for kind, numbers in quantisation.by_format().items()
    )
    named = f"{quantisation.usual or config.dtype}{f'; {layers}' if layers else ''}"
    words = f"\n\nThe base was quantised ({named}), and the adapter is not merged into it. "

    if layers or config.quantization_correction:
        what = "a correction" if config.quantization_correction else "several formats"
        return f"{words}transformers has no base with {what}; `fluvial evaluate` makes it."

    if quantisation.usual == "int8":
        options = "load_in_8bit=True"
    else:
        options = (
            'load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_use_double_quant={quantisation.usual == 'nf4-double'}"
        )
    return f"{words}transformers loads the same base with `BitsAndBytesConfig({options})`."
