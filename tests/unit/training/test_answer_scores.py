"""Scores of answers, by cases computed by hand."""

import pytest

from fluvial.training.answer_scores import (
    AnswerSums,
    equal_in_squad,
    exact_match,
    squad_words,
    token_f1,
)


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        (" Paris\n", "Paris", True),
        ("paris", "Paris", False),
        ("Pa ris", "Paris", False),
        ("", " ", True),
    ],
)
def test_exact_match_ignores_white_space_at_both_ends_only(
    answer: str, reference: str, equal: bool
) -> None:
    assert exact_match(answer, reference) is equal


def test_case_punctuation_and_articles_do_not_count() -> None:
    assert squad_words("The cat's  hat, an Apple.") == ["cats", "hat", "apple"]
    assert token_f1("the Cat!", "a cat") == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("red hat", "red big hat", 4 / 5),
        ("hat hat hat", "hat", 1 / 2),
        ("blue", "red", 0.0),
        ("", "red", 0.0),
        ("the", "", 1.0),
    ],
)
def test_token_f1_is_the_overlap_of_words(answer: str, reference: str, score: float) -> None:
    assert token_f1(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("", "A", False),
        ("B", "A", False),
        (" a.", "A", True),
        ("the A", "A", False),
        ("", "+", False),
        ("-", "+", False),
        ("+", "+", True),
        ("a cat", "cat", True),
        ("", " ", True),
    ],
)
def test_a_reference_that_is_an_article_or_punctuation_is_compared_as_it_is(
    answer: str, reference: str, equal: bool
) -> None:
    """SQuAD's script would find nothing in the choice "A", as in an empty answer."""
    assert equal_in_squad(answer, reference) is equal
    assert (token_f1(answer, reference) == 1.0) is equal


def test_each_score_takes_its_best_reference() -> None:
    sums = AnswerSums.of("the red hat", ["hat", "red the hat"])

    # F1 without articles: [red, hat] in both. Runs of two: none in common. Longest common
    # subsequence with the second reference: two of three words.
    assert sums == AnswerSums(
        questions=1, right=0, f1=10**6, rouge_1=10**6, rouge_2=0, rouge_l=666_667
    )
    assert AnswerSums.of(" hat\n", ["cap", "hat"]).right == 1


def test_sums_are_equal_in_any_order_and_questions_without_answer_count_nothing() -> None:
    first = AnswerSums.of("red hat", ["red big hat"])
    second = AnswerSums.of("a b c", ["c"])
    third = AnswerSums.of("x", ["x"])

    assert (first + second) + third == third + (second + first)
    assert (third + AnswerSums()).means(4) == {
        "exact_match": 0.25,
        "f1": 0.25,
        "rouge_1": 0.25,
        "rouge_2": 0.0,
        "rouge_l": 0.25,
    }
