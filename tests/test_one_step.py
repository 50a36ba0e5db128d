"""docs/one-step.md: what needs no training is computed again, and the page has to agree."""

import re

import pytest

from experiments import one_step
from experiments.one_step_numbers import Program

PAGE = one_step.PAGE.read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.])−?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@pytest.fixture(scope="module")
def again():
    """The sections that need no trained model, made anew."""
    program = Program()
    return one_step.untrained_parts(program, program.moment())


def section_of(page: str, heading: str) -> str:
    return page[page.index(heading):].partition("\n\n## ")[0].partition("\n\n### After")[0].rstrip()


@pytest.mark.parametrize("which", range(4), ids=["batch", "scores", "gradients", "weights"])
def test_the_page_has_the_numbers_that_the_program_computes(again, which):
    made = again[which]
    shown = section_of(PAGE, made.splitlines()[0])
    hint = "run python experiments/one_step.py, which writes the page"
    # Without their numbers, and wrapped anew: a number that is a digit longer may move the end of a line.
    assert NUMBER.sub("#", shown).split() == NUMBER.sub("#", made).split(), hint
    for old, new in zip(NUMBER.findall(shown), NUMBER.findall(made), strict=True):
        digits = len(old.partition(".")[2])
        ours, theirs = (float(text.replace("−", "-").replace(",", "")) for text in (old, new))
        # Another processor adds in another order: the last digit may differ by one. Integers are counts.
        assert abs(ours - theirs) < 1.5 * 10**-digits * (digits > 0) + 1e-12, f"{old} is {new} now; {hint}"


def test_the_terms_of_the_abstract_are_seen_with_a_number():
    abstract = ("GRPO with CoT-format-only rewards", "SAMI-style symmetric InfoNCE", "Sufficiency Index",
                "MI lower bound under matched negatives", "entropic Sinkhorn OT on hidden-state distributions")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| \d \|$", PAGE, re.MULTILINE))
    for term in abstract:
        assert NUMBER.search(rows[term]), f"{term} has no number"
        words = re.sub(r"[*()]|\s+", " ", PAGE.lower())
        assert words.count(term.lower()) >= 2 or "CoT-format-only" in term, f"{term} is in the first table alone"


def test_a_page_whose_sentences_are_not_true_is_not_written():
    with pytest.raises(SystemExit, match="the sky is green"):
        one_step.check(False, "the sky is green")


def test_a_paragraph_is_wrapped_and_nothing_else():
    long = "word " * 40
    made = one_step.wrapped(f"# {long}\n\n{long}\n\n| {long} |\n\n```\n{long}\n\n{long}\n```\n\n{long}")
    lengths = [len(line) > 120 for line in made.splitlines() if line]
    assert lengths == [True, False, False, True, False, True, True, False, False, False]
