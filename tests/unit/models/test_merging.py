"""The check of a merged model, in words for people."""

from fluvial.models.merging import MergeCheck


def test_the_bound_of_a_merged_model_is_said_with_its_two_reasons() -> None:
    check = MergeCheck(error=0.0021, effect=0.12, tolerance=0.03)
    assert check.most == 0.03
    assert check.words == (
        "differ from those of base and adapter by 0.21 % of their norm, on random tokens; at most "
        "3 % is accepted, the smaller of 3 % for rounding and half of the 12 % by which the "
        "adapter changes the base's"
    )
    small = MergeCheck(error=0.0021, effect=0.004, tolerance=0.03)
    assert small.most == 0.002
    assert "by 0.21 % of their norm" in small.words
    assert "at most 0.2 % is accepted" in small.words
