"""The list of cases that the default suite leaves out."""

from pathlib import Path

from tests.slow import LEAVE, STAY, is_slow

TESTS = Path(__file__).parents[1]


def test_the_list_names_tests_that_exist() -> None:
    for each in (*STAY, *LEAVE):
        file, test = each.split("::")
        assert f"def {test}(" in (TESTS / file).read_text("utf-8"), each


def test_a_case_stays_or_is_left() -> None:
    stays = next(test for test, cases in STAY.items() if cases)
    assert not is_slow(stays, STAY[stays][0])
    assert is_slow(stays, "another case")
    left = next(iter(LEAVE))
    assert is_slow(left, LEAVE[left][0])
    assert not is_slow(left, "another case")
    assert is_slow("docs/test_howto.py::test_audit", "")
    assert not is_slow("unit/test_slow.py::test_a_case_stays_or_is_left", "")
