"""Weights of an encoder and a decoder as another process published them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fluvial.errors import WireError
from fluvial.wire.payload import Payload


def load_networks(
    codec: str,
    encoder: nn.Module,
    decoder: nn.Module,
    payload: Payload,
    fault: Callable[[str, Tensor], str | None],
) -> bool:
    """Fill the networks from tensors named encoder.* and decoder.*; return True if those of the
    decoder are there.

    `fault` says of a name and its tensor what is wrong with the values. Raises `WireError`, which
    names the codec, for a tensor that is missing, left over, of another type or shape, or at fault.
    """
    left = dict(payload.tensors)
    has_decoder = any(name.startswith("decoder.") for name in left)
    networks = {"encoder": encoder, "decoder": decoder} if has_decoder else {"encoder": encoder}

    with torch.no_grad():
        for network_name, network in networks.items():
            for leaf, tensor in network.state_dict().items():
                if not tensor.is_floating_point():
                    continue  # BatchNorm's count of batches, unused when coding

                name = f"{network_name}.{leaf}"
                received = _matching(left.pop(name, None), tensor, f"{codec}: {name}")
                wrong = fault(name, received)
                if wrong is not None:
                    raise WireError(f"{codec}: {name}: {wrong}")

                tensor.copy_(received)

    if left:
        raise WireError(
            f"{codec}: unexpected tensor {min(left)[:64]!r}; both ends need the same codec settings"
        )

    return has_decoder


def _matching(received: Tensor | None, expected: Tensor, place: str) -> Tensor:
    """Return `received` if it has the shape of `expected` in fp32; raises `WireError`."""
    if received is None:
        shown = "nothing"
    elif received.shape != expected.shape or received.dtype != torch.float32:
        shown = f"{received.dtype} {tuple(received.shape)}"
    else:
        return received

    raise WireError(f"{place}: expected float32 {tuple(expected.shape)}, found {shown}")
