"""A measuring process of its own, and the JSON object that it prints last."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def answer_of(
    module: str,
    *arguments: object,
    environment: Mapping[str, str],
    python: str = sys.executable,
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """Return the JSON object that `python -m module` printed last, with `environment` beside this
    process's own.

    Raises `RuntimeError` with the end of the error output of a process that failed.
    """
    done = subprocess.run(
        [python, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=timeout_s,
        check=False,
    )

    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-400:])

    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
