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
        self._position = 0
        """Bytes of the log that were counted."""
        self._bytes: dict[tuple[str | None, int | None], int] = {}
        """Bytes that left the site, by run and round; an answer that is sent again counts once."""
        self._answers: set[tuple[str | None, int | None, str]] = set()
        """Digests of these answers, with run and round."""

    def bytes_of_round(self, header: Header, answer: bytes) -> int:
        """Return the bytes that have left the site in the run and round of `header` once `answer`
        has.

        After a stop or a lost message a server asks again, and the same bytes tell nothing new.
        """
        if self._path.exists():
            with self._path.open("rb") as log:
                log.seek(self._position)
                for line in log:
                    if not line.endswith(b"\n"):
                        break  # cut off by a kill or a full disk: its answer has not left the site

                    self._position += len(line)
                    self._add(line)

        place = header.run, header.round
        new = (*place, _digest(answer)) not in self._answers
        return self._bytes.get(place, 0) + new * len(answer)

    def _add(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            key = entry.get("run"), entry.get("round")
            digest = entry.get("sha256")
            size = entry["bytes"] + 0
            if digest is not None and (*key, digest) in self._answers:
                return
            self._bytes[key] = self._bytes.get(key, 0) + size
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return  # cut off and followed by later lines, or damaged

        if digest is not None:
            self._answers.add((*key, digest))

    def write_answer(
        self, header: Header, answer: Payload, data: bytes, labels: dict[str, Any]
    ) -> None:
        """Log an answer and its bytes `data`, with shapes of tensors and names of values."""
        self._write(
            header,
            {
                **labels,
                "bytes": len(data),
                "sha256": _digest(data),
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


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def labels_of(header: Header | None) -> dict[str, str | int]:
    """Return run, round and task of a message, nothing without a header."""
    if header is None:
        return {}
    return {"run": header.run, "round": header.round, "task": header.task}
