"""Log of everything that a site sends: one JSON object a line in outgoing.jsonl."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from fluvial.site_process.journal import Header
from fluvial.storage.files import append
from fluvial.wire.payload import Payload

NAME = "outgoing.jsonl"
"""Name of the log in the site's folder."""


class OutgoingLog:
    """Log of the answers and errors that leave a site, written before they leave."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def bytes_of_round(self, header: Header) -> int:
        """Return the bytes that left the site so far in the run and round of `header`."""
        total = 0
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off by a kill or a full disk: its answer has not left the site

            if entry.get("run") == header.run and entry["round"] == header.round:
                total += entry["bytes"]

        return total

    def write_answer(
        self, header: Header, answer: Payload, data: bytes, labels: dict[str, str]
    ) -> None:
        """Log an answer and its bytes `data`, with shapes of tensors and names of values."""
        self._write(
            header,
            {
                **labels,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "tensors": {name: list(tensor.shape) for name, tensor in answer.tensors.items()},
                "values": sorted(answer.values),
            },
        )

    def write_error(self, header: Header | None, text: str) -> None:
        """Log the text of an error; `header` is None where that of the message was not read."""
        self._write(header, {"bytes": len(text.encode()), "error": text})

    def _write(self, header: Header | None, entry: dict[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        append(self._path, json.dumps({"time": now, **labels_of(header), **entry}) + "\n")


def labels_of(header: Header | None) -> dict[str, str | int]:
    """Return run, round and task of a message, nothing without a header."""
    if header is None:
        return {}
    return {"run": header.run, "round": header.round, "task": header.task}
