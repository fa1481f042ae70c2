"""Numbers as a reader is told them."""

from __future__ import annotations

from brainfm.reports import wording


def test_numbers_have_three_decimals_and_a_minus_of_their_width() -> None:
    given = (0.5, -0.5, -0.0001, 9.9996, 12.346, 123.46, -1234.6)
    assert [wording.number(v) for v in given] == ["0.500", "−0.500", "0.000", "10.000", "12.35", "123.5", "−1235"]


def test_numbers_are_written_for_people() -> None:
    given = (None, 0.1234, -0.1234, -0.0001, 12.346, 123.46, 1234.6)
    assert [wording.number(v) for v in given] == ["-", "0.123", "−0.123", "0.000", "12.35", "123.5", "1235"]
    assert [wording.signed(v) for v in (0.5, -0.5, 0.0)] == ["+0.500", "−0.500", "0.000"]
    assert [wording.p_value(v) for v in (None, 0.0002, 0.05)] == ["-", "< 0.001", "0.050"]
