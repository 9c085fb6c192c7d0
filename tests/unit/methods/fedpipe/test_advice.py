"""The choice of a method and a codec from the plans of sites."""

from dataclasses import replace

from fluvial.methods.fedpipe.planner.advice import Uncoded, advised_codec, advised_method
from fluvial.methods.fedpipe.planner.plan import Prediction, Setting, SitePlan
from fluvial.methods.fedpipe.planner.refusal import Alternative, Limit, Refusal

BLOCK = Alternative("fedcybgd", 8, "one block of the model")
ENDS = Alternative("flglm", 6, "the first and last layers of the model")
PLAN = SitePlan(
    Setting("nf4", 4, 64, True, 1, 10),
    (("q_proj", 8),),
    10**9,
    1.0,
    0.0,
    Prediction(10**6, 100, 100, 1.0, 2.0),
)


def refused(site: str, *fitting: Alternative, limit: Limit = "base") -> Refusal:
    return Refusal(site, limit, 2.0, 1.0, "it is too small", fitting)


def test_equal_plans_need_no_fedpipe_and_unequal_ones_do() -> None:
    assert advised_method({"a": PLAN, "b": PLAN}, []).name == "cgfedllm"
    other = replace(PLAN, ranks=(("q_proj", 4),))
    advice = advised_method({"a": PLAN, "b": other}, [])
    assert advice.name == "fedpipe"
    assert "differ in ranks" in advice.why


def test_sites_that_hold_no_base_decide_by_what_fits_all_of_them() -> None:
    plans = {"a": PLAN}
    assert advised_method(plans, [refused("b", BLOCK, ENDS)]).name == "fedcybgd"
    both = [refused("b", BLOCK, ENDS), refused("c", ENDS)]
    advice = advised_method(plans, both)
    assert advice.name == "flglm"
    assert "sites 'b', 'c' cannot hold the base" in advice.why


def test_what_fits_nowhere_or_misses_the_deadline_is_said() -> None:
    none = advised_method({}, [refused("b", BLOCK), refused("c")])
    assert none.name is None
    assert "no method fits site 'c'" in none.why

    late = advised_method({"a": PLAN}, [refused("b", limit="link")])
    assert late.name == "fedpipe"
    assert "the deadline leaves out site 'b'" in late.why


def test_the_codec_is_that_of_the_site_that_a_round_waits_for() -> None:
    rounds = {"a": Uncoded(2.0, 0.9), "b": Uncoded(30.0, 0.4), "c": Uncoded(5.0, 0.1)}
    assert advised_codec({"a": 16, "b": 1, "c": 16}, rounds).name == "identity"
    assert advised_codec({"a": 1, "b": 4, "c": 16}, rounds).name == "int8"
    advice = advised_codec({"a": 1, "b": 16, "c": 1}, rounds)
    assert advice.name == "trellis"
    assert "waits for site 'b', and messages are 40% of its uncoded round" in advice.why
    assert "rate 16" in advice.why
