"""Updates that wait, held in temporary files instead of in memory."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fluvial.errors import CheckpointError
from fluvial.wire.tensors import Layout, Named

T = TypeVar("T")


def on_disk(content: T) -> T:
    """Return `content` with equal fp32 tensors that lie in temporary files, which the system reads
    where a value is asked for.

    Named tensors are looked for in tuples and dataclasses. The files have no name and go with the
    tensors. Raises `CheckpointError` where they cannot be written.
    """
    moved: T = _moved(content, {})
    return moved


def _moved(content: Any, done: dict[int, Named]) -> Any:
    """Return `content` on disk; `done` has what was moved by its identity, so that tensors that two
    fields share are written once."""
    if isinstance(content, tuple) and type(content) is tuple:
        return tuple(_moved(item, done) for item in content)
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        values = {
            field.name: _moved(getattr(content, field.name), done)
            for field in dataclasses.fields(content)
            if field.init
        }
        return dataclasses.replace(content, **values)
    if not _is_fp32(content):
        return content

    if id(content) not in done:
        done[id(content)] = _written(content)
    return done[id(content)]


def _is_fp32(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(value, Tensor) for value in content.values())
        and all(value.dtype == torch.float32 and value.numel() for value in content.values())
    )


def _written(tensors: Named) -> Named:
    layout = Layout.of(tensors)
    path = ""
    try:
        with tempfile.NamedTemporaryFile(prefix="fluvial-", delete=False) as file:
            path = file.name
            for name in layout.names:
                file.write(tensors[name].detach().cpu().contiguous().numpy().data)
        vector = torch.from_file(path, shared=True, size=layout.numel, dtype=torch.float32)
    except OSError as error:
        raise CheckpointError(
            f"an update that waits for the others of its round cannot be written to "
            f"{tempfile.gettempdir()}: {error.strerror}; make room there, or set TMPDIR to another "
            "folder"
        ) from error
    finally:
        if path:
            Path(path).unlink()

    return layout.unflatten(vector)
