"""The remark on held-out records that do not ask for what only other sites know."""

from collections import Counter

import pytest

from fluvial.data.config import DataConfig
from fluvial.data.examples import Example, Question
from fluvial.data.overlap import Asked, own_only
from fluvial.data.texts import SiteData


def asked(name: str, trained: str, questions: str) -> Asked:
    """Return a site whose answers are words, and whose held-out records no other site has."""
    heldout = [Example([ord(letter) for letter in name], [1] * len(name))]
    held = [Question(f"{name} {number}?", word) for number, word in enumerate(questions.split())]
    data = SiteData([], heldout, held, 0, 0, 0)
    return Asked.of(data, [Question("What?", word) for word in trained.split()])


def config(*names: str, heldout: bool = True) -> DataConfig:
    """Return tables of sites, each with held-out records of its own or a share of its records."""
    own = {"heldout_source": "held.csv"} if heldout else {}
    return DataConfig.model_validate(
        {"by_site": {name: {"source": "a.csv"} | own for name in names}}
    )


def test_sites_that_are_asked_for_the_answers_of_others_have_no_remark() -> None:
    """Different files with all kinds of answers, in another case and spacing."""
    sites = {
        "a": asked("a", "red red blue", "Red blue GREEN black"),
        "b": asked("b", "green black", "red blue green black"),
    }
    assert not own_only(config("a", "b", heldout=False), sites)


def test_sites_that_are_asked_for_their_own_answers_only_are_named() -> None:
    sites = {
        "a": asked("a", "red red blue", "red blue red"),
        "b": asked("b", "green black", "green black red"),
    }
    (remark,) = own_only(config("a", "b"), sites)
    assert remark.startswith("held-out records: those of 'a' do not ask for the answers that only")

    sites["b"] = asked("b", "green black", "green black")
    (remark,) = own_only(config("a", "b"), sites)
    assert "those of 'a', 'b' do not ask" in remark


def test_sites_that_train_on_the_same_answers_have_no_remark() -> None:
    """Nothing is known elsewhere only: yes and no at both, and a word that one site has once."""
    sites = {
        "a": asked("a", "yes no " * 10, "yes no yes"),
        "b": asked("b", "yes no " * 10 + "maybe", "yes no no"),
    }
    assert not own_only(config("a", "b", heldout=False), sites)


@pytest.mark.parametrize("words", ["", "one two three red"])
def test_answers_that_do_not_recur_decide_nothing(words: str) -> None:
    """A remark says so for a share of a site's own records; files of the user are meant as such."""
    sites = {"a": asked("a", "red blue", words), "b": asked("b", "green black", words)}
    (remark,) = own_only(config("a", "b", heldout=False), sites)
    assert "may or may not ask" in remark
    assert not own_only(config("a", "b"), sites)


def test_common_records_and_one_site_have_no_remark() -> None:
    one = asked("a", "red blue", "red")
    other = Asked(one.measured, Counter(), one.questions)
    assert not own_only(config("a"), {"a": one})
    assert not own_only(config("a", "b", heldout=False), {"a": one, "b": other})
