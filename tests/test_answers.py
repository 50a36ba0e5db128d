"""answers.py: what counts as a right answer, however the number is written."""

import pytest

from support.answers import _numbers, answer_is_right


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("<reasoning>1 + 1 = 2.</reasoning><answer>2</answer>", "2", True),
        ("<reasoning>1 + 1 = 2.</reasoning><answer>3</answer>", "2", False),
        ("<reasoning>So 2</reasoning><answer></answer>", "2", False),
        ("1 + 1 = 2. Answer: 2", "2", True),
        ("<reasoning>2</reasoning> 3", "2", False),
        ("<answer>1</answer><answer>2</answer>", "2", True),
        ("<answer>it is 2 apples.</answer>", "2", True),
        ("<answer>2 of 12</answer>", "2", False),
        ("<answer>12</answer>", "2", False),
        ("<answer>1,234.0</answer>", "1234", True),
        ("<answer>-2</answer>", "2", False),
        ("<answer>5-2</answer>", "2", True),
        ("<answer>Paris.</answer>", "paris", True),
        ("<answer>London</answer>", "Paris", False),
        ("<answer>(B)</answer>", "(B)", True),
        ("", "2", False),
    ],
)
def test_what_counts_as_right(text, answer, right):
    assert answer_is_right(text, answer) == right


@pytest.mark.parametrize(
    "said, answer, right",
    [
        ("0.5", ".5", True), ("5", ".5", False), (".5", "0.50", True), ("$.50", "0.5", True), ("-$5", "-5", True),
        ("\u22125", "-5", True), ("5", "\u22125", False), ("-5", "\u22125", True), ("3\u20135", "5", True),
        ("1/2", "2", False), ("1/2", "0.5", True), ("\u00bd", "1/2", True), ("2\u00bd", "2.5", True), ("2 1/2", "5/2", True),
        (r"\frac{1}{2}", "2", False), (r"\dfrac{3}{4}", ".75", True), ("10 6/2", "3", True), ("1/3", "0.333", False),
        ("10^3", "3", False), ("10^3", "1000", True), ("1e3", "1,000", True), ("10\u00b3", "1000", True), ("2**10", "1024", True),
        (r"5 \times 10^{-2}", "0.05", True), ("5 m\u00b2", "5", True), ("4 = x^2", "2", False), ("**12**", "12", True),
        ("so...5", "5", True), ("version 1.2.5", "5", False), ("50%", "50", True), ("007", "7", True),
        ("9007199254740993", "9007199254740992", False), ("10^99999", "99999", False), ("1/0", "0", False),
        ("10^99999", "10^99999", True), ("9" * 5000, "9" * 5000, True), ("2024/05/01", "2024/05/01", True),
        ("Room 5", "Room 5", True), ("5", "Room 5", False),
    ],
)
def test_numbers_are_compared_by_value_however_written(said, answer, right):
    assert answer_is_right(f"<answer>{said}</answer>", answer) == right, (
        f"{_numbers(said)} said, {_numbers(answer)} expected")
