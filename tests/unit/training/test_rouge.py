"""ROUGE of texts and of token ids, by cases computed by hand."""

import pytest

from fluvial.training.rouge import rouge, rouge_of_ids


def test_rouge_by_hand() -> None:
    """Read: the cat the cat sat; sent: the cat sat on the mat."""
    found = rouge("The cat, the cat sat!", ["the cat sat on the mat"])

    # the (2 of 2), cat (1 of 2), sat (1): 4 common of 5 and 6.
    assert found.rouge_1 == pytest.approx(2 * 4 / 11)
    # "the cat" once, "cat sat" once: 2 common of 4 and 5.
    assert found.rouge_2 == pytest.approx(2 * 2 / 9)
    # the cat sat: 3 of 5 and 6.
    assert found.rouge_l == pytest.approx(2 * 3 / 11)


@pytest.mark.parametrize("text", ["", "one", "one two three"])
def test_rouge_of_equal_and_of_disjoint_texts(text: str) -> None:
    size = len(text.split())
    assert rouge(text, [text]) == (float(size >= 1), float(size >= 2), float(size >= 1))
    assert rouge(text, ["four five"]) == (0, 0, 0)


def test_each_score_takes_its_best_reference() -> None:
    found = rouge("red hat", ["hat red", "red blue green hat"])
    assert found == pytest.approx((1.0, 0.0, 2 * 2 / 6))


def test_the_longest_common_subsequence_need_not_be_a_run() -> None:
    """Also of token ids, which are tokens as they are."""
    assert rouge_of_ids([*b"abcbdab"], [*b"bdcaba"]).rouge_l == pytest.approx(2 * 4 / 13)
    assert rouge_of_ids([*b"xaxbxc"], [*b"abc"]).rouge_l == pytest.approx(2 * 3 / 9)
