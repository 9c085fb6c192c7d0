"""Paths on the trellis: the frames of the first version to the bit, compiled or in NumPy, on any
number of threads."""

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fluvial.codecs import compiled
from fluvial.codecs.coding_time import loaded
from fluvial.codecs.rotated import paths, paths_numpy, paths_torch
from fluvial.codecs.rotated.trellis import Trellis, TrellisSettings
from fluvial.wire.tensors import Layout
from tests.support import GOLDEN
from tests.support.memory import allocates_less

Doubles = NDArray[np.float64]

FRAMES = json.loads((GOLDEN / "trellis_paths.json").read_text())
"""SHA-256 of paths and frames that the first version of the search made."""
SLOW = {"compiled": 12, "numpy": 12, "exact": 6, "torch": 6}
"""Largest memory of the tests' paths, by the way to search them."""


@pytest.fixture(params=list(SLOW))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Search with numba, with NumPy, with NumPy where BLAS does not fuse, and with torch as on
    another device."""
    name: str = request.param
    if name == "torch":
        on_device = partial(paths.best_path, device=torch.device("cpu"))
        monkeypatch.setattr(
            paths, "best_path", lambda rows, plan, memory, _=None: on_device(rows, plan, memory)
        )
        return name

    if name == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(compiled, "available", lambda: False)
    if name == "exact":
        monkeypatch.setattr(paths_numpy, "_blas_is_fused", lambda *_: False)
    return name


def gaussian(count: int, seed: int) -> Doubles:
    """Sums of twelve numbers of 20 bits, the same on every machine."""
    words = np.random.PCG64(seed).random_raw(12 * count) >> np.uint64(44)
    sums: Doubles = words.astype(np.int64).reshape(12, count).sum(0) / 2.0**20 - 6
    return sums


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_paths_are_those_of_the_first_version(way: str) -> None:
    for row in FRAMES["paths"]:
        if row["memory"] > SLOW[way]:
            continue
        path, decoded = paths.search(gaussian(row["size"], row["size"]), row["bits"], row["memory"])
        assert sha256(np.packbits(path).tobytes()) == row["sha256"], row
        plan = paths.Plan.of(row["size"], row["bits"])
        assert np.array_equal(paths.follow(path, plan, row["memory"]), decoded)


def test_uneven_plans_have_the_paths_of_the_first_version(way: str) -> None:
    """Plans as `klt_trellis` makes them: from 6 bits for a value to 40 values for a bit."""
    shifts = np.array([6, 5, 4, 4, 3, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1], np.int64)
    spans = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 4, 7, 12, 40], np.int64)
    scales = np.linspace(4, 0.25, 18).astype(np.float32)
    length = int(spans.sum())

    for row in FRAMES["uneven"]:
        blocks = row["blocks"]
        rows = gaussian(blocks * length, 9).astype(np.float32).reshape(blocks, length)
        rows *= np.repeat(scales, spans)
        plan = paths.Plan(blocks * length, blocks, length, shifts, spans, scales)
        path = paths.best_path(rows, plan, row["memory"])
        assert sha256(np.packbits(path).tobytes()) == row["sha256"], (way, row)


def test_frames_are_those_of_the_first_version(way: str) -> None:
    shapes = {
        f"layers.{layer}.{module}.lora_{which}.weight": (8, 96) if which == "A" else (96, 8)
        for layer in range(4)
        for module in ("q_proj", "v_proj")
        for which in ("A", "B")
    }
    layout = Layout(tuple(sorted(shapes.items())))
    update = layout.unflatten(torch.from_numpy(1e-3 * gaussian(layout.numel, 1)).float())

    for row in FRAMES["frames"]:
        if row["memory"] > 6 and (
            way in ("exact", "torch") or (way == "numpy" and row["rate"] < 64)
        ):
            continue  # seconds each
        codec = Trellis(TrellisSettings(rate=row["rate"], memory=row["memory"]), layout)
        assert sha256(codec.encode(update, seed=7, round=3)) == row["sha256"], row


def test_both_ways_decode_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    for memory, bits in ((6, 30_000), (8, 7_000), (10, 300), (12, 5_001)):
        plan = paths.Plan.of(5_000, bits)
        path = (np.random.PCG64(memory).random_raw(plan.total) & np.uint64(1)).astype(np.uint8)
        decoded = paths.follow(path, plan, memory)
        with monkeypatch.context() as context:
            context.setattr(compiled, "available", lambda: False)
            assert np.array_equal(paths.follow(path, plan, memory), decoded)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_and_callers_change_no_path(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sites code at once, each on some threads."""
    values = gaussian(20_000, 3)
    expected, _ = paths.search(values, 9_000, 6)
    monkeypatch.setattr(compiled, "_cores", lambda: threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: paths.search(values, 9_000, 6)[0], range(8)))

    assert all(np.array_equal(path, expected) for path in found)


def test_all_cores_are_used_on_request_and_change_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread of torch and three cores: one share, then three, then one again."""
    values = gaussian(20_000, 3)
    expected, _ = paths.search(values, 9_000, 6)
    monkeypatch.setattr(compiled, "_cores", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def shares() -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        compiled.over_cores(lambda start, stop: found.append((start, stop)), 9)
        return sorted(found)

    with compiled.all_cores():
        assert shares() == [(0, 3), (3, 6), (6, 9)]
        assert np.array_equal(paths.search(values, 9_000, 6)[0], expected)
    assert shares() == [(0, 9)]


def test_an_error_in_one_share_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def work(start: int, stop: int) -> None:
        if stop == 10:
            raise RuntimeError(f"share {start} to {stop}")

    with pytest.raises(RuntimeError, match="share 5 to 10"):
        compiled.over_cores(work, 10)


def test_products_are_rounded_once() -> None:
    """Fused multiply-adds against fractions, where fp64 alone would round twice."""
    one = np.float32(1)
    tiny = np.float32(2.0**-30)
    # 1 + 2^-24 lies in the middle of two fp32 numbers; a little more must round up, a little less
    # down, and fp64 loses what is beyond 2^-52.
    for sign in (one, -one):
        codes = np.array([[1, 1], [2.0**-12, 2.0**-12]], np.float32)
        values = np.stack([np.full(64, one), np.full(64, 2.0**-12)]).astype(np.float32)
        codes[0] = 1 + sign * 2.0**-23
        values[0] = 1 + sign * 2.0**-23
        out = np.empty((2, 64), np.float32)
        paths_numpy.fused(codes, values, out=out)
        product = np.float32(codes[0, 0] * values[0, 0])
        exact = Fraction(float(product)) + Fraction(float(codes[1, 0])) * Fraction(
            float(values[1, 0])
        )
        assert out[0, 0] == nearest(exact)
        a, b = torch.from_numpy(codes[1, :1]), torch.from_numpy(values[1, :1])
        assert paths_torch._fused(a, b, torch.tensor([float(product)])).item() == nearest(exact)

    before = np.float32(1)
    for code, value in ((1 + 2.0**-23, 2.0**-24), (1 - 2.0**-23, 2.0**-24)):
        codes = np.array([[before], [tiny * np.float32(code)]], np.float32)
        values = np.array([[1.0], [np.float32(value * 2.0**30)]], np.float32)
        out = np.empty((1, 1), np.float32)
        paths_numpy.fused(codes, values, out=out)
        exact = 1 + Fraction(float(codes[1, 0])) * Fraction(float(values[1, 0]))
        assert out[0, 0] == nearest(exact)


def nearest(exact: Fraction) -> np.float32:
    """Return the fp32 number nearest to a fraction that is no middle."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(end)) for end in (-np.inf, np.inf)]
    return min([guess, *around], key=lambda number: abs(Fraction(float(number)) - exact))


def test_numba_is_imported_by_the_first_path_only() -> None:
    lines = (
        "import sys, numpy, fluvial.cli, fluvial.codecs",
        "from fluvial.codecs.rotated import paths",
        "assert 'numba' not in sys.modules",
        "paths.search(numpy.ones(50), 20, 6)",
        "print('numba' in sys.modules)",
    )
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(compiled.available())


def test_without_numba_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.available.cache_clear()
    try:
        assert not compiled.available()
        assert not compiled.available()
    finally:
        compiled.available.cache_clear()

    assert len(caplog.records) == 1
    assert "numba cannot be imported" in caplog.text


def test_a_codec_is_loaded_by_a_small_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tensors that hold 2^16 values, of a layout with twenty times as many."""
    coded: list[int] = []
    body = Trellis.body

    def noted(self: Trellis, vector: torch.Tensor, seed: int) -> bytes:
        coded.append(len(vector))
        return body(self, vector, seed)

    monkeypatch.setattr(Trellis, "body", noted)
    layout = Layout(tuple((f"{number:02d}", (256, 64)) for number in range(80)))
    loaded(TrellisSettings(rate=64), layout)
    assert coded == [2**16]


def test_a_search_holds_one_copy_of_its_values_at_a_time() -> None:
    """Check the memory: 8 bytes a value of what is decoded, and the path."""
    values = np.random.default_rng(0).standard_normal(1 << 18)
    bits = len(values) // 2
    paths.search(values, bits, 6)  # what is made once
    assert allocates_less(lambda: paths.search(values, bits, 6), 9 * len(values) + 2 * bits)
