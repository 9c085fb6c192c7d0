"""Texts from outside on a terminal, where escapes replace controls; numbers for people."""

import pytest

from fluvial.formatting import human_seconds, is_blank, safe_line, safe_text


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202eb\u2028c", r"a\u202eb\u2028c"),
        ("\ud800", r"\ud800"),
        ("می‌خواهم 👩‍🔬 naïve", "می‌خواهم 👩‍🔬 naïve"),
    ],
)
def test_controls_are_escaped_and_scripts_are_not(text: str, safe: str) -> None:
    assert safe_text(text) == safe
    assert safe_line(text) == safe
    assert safe_text(safe) == safe


def test_a_text_keeps_its_lines_and_a_line_has_none() -> None:
    assert safe_text("a\n\n\tb\n\n\n\nc") == "a\n\n\tb [⏎ x 4] c"
    assert safe_line("a\n\tb") == r"a\n\tb"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.0 s"),
        (0.00083, "0.83 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.1 s"),
        (6.0, "6.0 s"),
        (120.0, "2 min"),
        (153.0, "2.5 min"),
        (862.0, "14.4 min"),
        (99.6 * 60, "1 h 40 min"),
    ],
)
def test_short_times_are_told_apart(seconds: float, words: str) -> None:
    assert human_seconds(seconds) == words


@pytest.mark.parametrize(("text", "blank"), [("", True), (" \u200b\n", True), ("\u200ba", False)])
def test_a_text_without_a_visible_character_is_blank(text: str, blank: bool) -> None:
    assert is_blank(text) == blank
