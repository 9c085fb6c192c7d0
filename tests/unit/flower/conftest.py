"""Fixtures of the tests of the live stream."""

from collections.abc import Iterator

import pytest

pytest.importorskip("grpc", reason="needs the extra 'flower'")

from fluvial.flower.stream.listener import StreamListener
from tests.support.stream import LIMITS, Desk


@pytest.fixture
def listener() -> Iterator[StreamListener]:
    with StreamListener(limits=LIMITS) as opened:
        yield opened


@pytest.fixture
def desk(listener: StreamListener) -> Desk:
    return Desk(listener)
