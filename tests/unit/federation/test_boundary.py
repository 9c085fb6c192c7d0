"""Errors as they leave a site: whose code they name."""

from pathlib import Path

import pytest
import torch

from fluvial.errors import WireError
from fluvial.federation.boundary import outward, place
from fluvial.wire.payload import Payload


def problem_of(source: str, filename: str) -> BaseException:
    """Return the error that code in a file of this name raises."""
    with pytest.raises(Exception) as caught:
        exec(compile(source, filename, "exec"), {"torch": torch, "Payload": Payload})
    caught.value.__traceback__ = caught.tb.tb_next  # without the frame of this test
    return caught.value


def test_an_error_names_the_line_of_the_users_own_code() -> None:
    problem = problem_of("\n\n1 / 0", "/home/someone/method.py")
    assert place(problem) == "method.py:3"
    assert "ZeroDivisionError at method.py:3 (" in outward(problem, None)
    assert "someone" not in outward(problem, None)


def test_an_error_below_the_users_code_names_the_users_line() -> None:
    assert place(problem_of("\ntorch.zeros(2).view(3)", "/home/own.py")) == "own.py:2"
    assert place(problem_of("\nPayload.from_bytes(b'')", "/home/own.py")) == "own.py:2"


def test_an_error_of_our_own_code_names_our_line() -> None:
    with pytest.raises(WireError) as caught:
        Payload.from_bytes(b"")
    caught.value.__traceback__ = caught.tb.tb_next
    assert place(caught.value).startswith(str(Path("fluvial", "wire", "payload.py:")))
