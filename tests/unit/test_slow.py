"""The list of cases that the default suite leaves out."""

from pathlib import Path

from tests.slow import LEAVE, STAY, is_slow

TESTS = Path(__file__).parents[1]


def test_the_list_names_tests_that_exist() -> None:
    for file, tests in (STAY | LEAVE).items():
        text = (TESTS / file).read_text()
        assert [test for test in tests if f"def {test}(" not in text] == []


def test_a_case_stays_or_is_left() -> None:
    file, (test, stay) = "oracle/test_flglm.py", next(iter(STAY["oracle/test_flglm.py"].items()))
    assert not is_slow(file, test, stay[0])
    assert is_slow(file, test, "another case")
    assert is_slow("docs/test_howto.py", "test_audit", "")
    assert not is_slow(file, "test_a_test_that_is_not_listed", "")
