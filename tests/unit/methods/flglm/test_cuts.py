"""The choice of a cut on profiles in numbers: small memory, a thin line, a deep model, leakage."""

from dataclasses import replace

import pytest

from fluvial.errors import ConfigError
from fluvial.methods.flglm.cuts import Bounds, Cost, Open, Profile, candidates, choose
from fluvial.methods.flglm.footprint import Footprint, Passes

MB = 10**6
ONE = Passes(10 * MB, 20 * MB, 1 * MB)
TWO = Passes(14 * MB, 24 * MB, 2 * MB)


def profile(layers: int = 8, mbit_s: float | None = None, shared: bool = True) -> Profile:
    """Layers of 40 MB, embedding and head of 100 MB; each layer of a site sends 1 MB a round."""

    def cost(front: int, back: int) -> Cost:
        size = 5 * MB + (front + back) * MB * shared
        return Cost(size, None if mbit_s is None else 8e-6 * size / mbit_s)

    return Profile(
        100 * MB,
        0,
        (40 * MB,) * layers,
        {"lora": (4 * MB,) * layers},
        Footprint((ONE, TWO), (ONE, TWO), (ONE, TWO)),
        {"front": "lora", "middle": "lora", "back": "lora"},
        1,
        cost,
        lambda front: 1.0 if front < 3 else 0.9,
    )


def cut(
    given: Profile, bounds: Bounds, front: Open = "auto", back: Open = "auto"
) -> tuple[int, int]:
    chosen = choose(candidates(given, front, back), bounds)
    return chosen.front, chosen.back


def test_without_bounds_the_fewest_layers_are_at_the_site() -> None:
    assert cut(profile(), Bounds()) == (1, 1)
    assert cut(profile(mbit_s=0.01), Bounds()) == (1, 1)


def test_a_small_server_sends_layers_to_the_front_first() -> None:
    """Six layers in the middle need 240 MB, 24 MB beside tuned ones and 40 MB in passes."""
    assert cut(profile(), Bounds(server=304 * MB)) == (1, 1)
    assert cut(profile(), Bounds(server=303 * MB)) == (2, 1)
    assert cut(profile(), Bounds(server=200 * MB)) == (4, 1)


def test_a_small_site_is_refused_with_the_least_that_is_needed() -> None:
    """Two layers need 180 MB with the ends, 8 MB beside tuned ones and 30 MB in passes."""
    assert cut(profile(), Bounds(site=218 * MB)) == (1, 1)
    with pytest.raises(ConfigError, match=r"site_memory_mb: it needs 218 MB.*more than 217 MB"):
        cut(profile(), Bounds(site=217 * MB))


def test_bounds_that_leave_nothing_name_the_cut_that_comes_nearest() -> None:
    """One cut with all that it needs, and not the least of each end, which no cut has together."""
    match = (
        r"front=4 and method.back=1: method.site_memory_mb: it needs 362 MB there, .*"
        r"server_memory_mb: it needs 160 MB there, .*; none of the 21 cuts keeps all bounds, and "
        r"this one comes nearest; shorten"
    )
    with pytest.raises(ConfigError, match=match):
        cut(profile(), Bounds(site=250 * MB, server=100 * MB))


def test_layers_that_send_nothing_cost_no_time_on_a_thin_line() -> None:
    """Layers in front send nothing here: the server keeps 20, and all others are in front."""

    def cost(_front: int, back: int) -> Cost:
        return Cost(back * MB, 8.0 * back)

    deep = replace(profile(layers=48), cost=cost)
    assert cut(deep, Bounds(server=1000 * MB)) == (27, 1)
    assert cut(deep, Bounds(server=1000 * MB), front=1) == (1, 27)


def test_numbers_stay_and_are_held_to_the_bounds() -> None:
    assert cut(profile(), Bounds(), front=3) == (3, 1)
    assert cut(profile(), Bounds(), front=2, back=3) == (2, 3)
    with pytest.raises(ConfigError, match="method.front=2 and method.back=3: method.site_memory"):
        cut(profile(), Bounds(site=200 * MB), front=2, back=3)


def test_a_bound_on_leakage_acts_through_what_was_measured() -> None:
    assert cut(profile(), Bounds(read=0.95)) == (3, 1)
    with pytest.raises(
        ConfigError, match=r"front=3 .*leakage.most: a server read 90%.*no cut alone"
    ):
        cut(profile(), Bounds(read=0.5))


@pytest.mark.parametrize("shared", [True, False])
def test_more_memory_never_makes_the_choice_worse(shared: bool) -> None:
    given = profile(layers=6, mbit_s=1.0, shared=shared)
    cuts = candidates(given, "auto", "auto")
    steps = [None, *(size * MB for size in range(100, 500, 20))]

    def key(site: int | None, server: int | None) -> tuple[float, ...]:
        try:
            return choose(cuts, Bounds(site, server)).key
        except ConfigError:
            return (float("inf"),)

    for server in steps:
        keys = [key(site, server) for site in steps[1:]] + [key(None, server)]
        assert keys == sorted(keys, reverse=True)
    for site in steps:
        keys = [key(site, server) for server in steps[1:]] + [key(site, None)]
        assert keys == sorted(keys, reverse=True)
