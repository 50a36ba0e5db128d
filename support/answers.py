"""What a completion says: its text, its chain of thought, whether its answer is right."""

import re
import unicodedata
from fractions import Fraction

import torch

# No number is the 2 of x^2, of x^-2 and of v1.2; no sign is the minus of 5-2.
NUMBER = re.compile(
    r"""(?<![\w^]) (?<!\w\.) (?<!\^[-+])
    (?P<sign>[-+]?) (?:(?<=[-+])[$€£])?
    (?:(?P<whole>\d++)[ ](?=\d++/\d))?+  # of 2 1/2
    (?P<value> \d++(?:,\d{3}(?!\d))*+(?:\.\d++)?+ | (?<!\.)\.\d++ )
    (?: e(?P<e>[-+]?\d++) | \s*+[x×*·]\s*+10(?:\^|\*\*)(?P<ten>[-+]?\d++)
      | (?:\^|\*\*)(?P<power>[-+]?\d++) | /(?P<under>\d++(?:\.\d++)?+) )?+""",
    re.VERBOSE | re.IGNORECASE,
)
LATEX = (
    (r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2"), (r"\^\{([^{}]*)\}", r"^\1"),
    (r"\\(?:times|cdot)", "*"), (r"\\\$", "$"),
)
LONGEST_NUMBER = 4000  # digits, written out: Python reads no more than 4300


def decode(tokenizer, tokens, mask, ends, prefill: str = "") -> list:
    """Texts of tokens [..., T] as nested lists: the prefill, then all but the end token.

    Other special tokens stay: a reward must see that "…</answer><|user|>" goes on after the answer.
    """

    def text(ids, lengths):
        if isinstance(lengths, list):
            return [text(*row) for row in zip(ids, lengths, strict=True)]
        ids = ids[:lengths]
        return prefill + tokenizer.decode(ids[:-1] if ids and ids[-1] in ends else ids)

    return text(tokens.tolist(), mask.sum(-1).tolist())  # lists first: a GPU is waited for twice, not at each row


def cot_mask(tokenizer, tokens, mask):
    """The mask [..., T] up to the first token with which the text holds </reasoning>, or all of it.

    Whether a token is inside depends on it and those before alone, so the sum of log-probabilities
    under this mask is the exact log-probability of having written that chain of thought.
    """
    close, lengths = "</reasoning>", mask.sum(-1)  # [...]
    spans = []
    for ids, length in zip(tokens.flatten(0, -2).tolist(), lengths.flatten().tolist(), strict=True):
        low, high = 0, length  # not within the first `low` tokens; within `high` if anywhere
        while high - low > 1 and close in tokenizer.decode(ids[:length]):
            middle = (low + high) // 2
            low, high = (low, middle) if close in tokenizer.decode(ids[:middle]) else (middle, high)
        spans.append(high)
    spans = torch.tensor(spans, device=mask.device).reshape(lengths.shape)  # [...]
    return torch.arange(mask.shape[-1], device=mask.device) < spans[..., None]  # [..., T]


def answer_is_right(text: str, answer: str) -> bool:
    """Whether a completion ends in `answer`: read in the last <answer>, or in all if there is none.

    Lenient, so that accuracy does not rise merely because the format does. A number is compared by
    value with the last number there: .5, $0.50 and 1/2 are one number, 1,000 and 10^3 another.
    Anything else is compared with the text there, without case and final dot.
    """
    found = text.rpartition("<answer>")[2].partition("</answer>")[0]
    expected = _numbers(answer)
    if len(expected) == 1 and not re.search(r"\w", NUMBER.sub("", _plain_digits(answer))):  # a number and nothing else
        return _numbers(found)[-1:] == expected
    return found.strip().strip(".").casefold() == answer.strip().strip(".").casefold()


def _numbers(text: str) -> list[Fraction]:
    """The numbers of a text, exact, but those too long to write out or divided by 0."""
    numbers = []
    for match in NUMBER.finditer(_plain_digits(text)):
        part = {name: (digits or "").replace(",", "") for name, digits in match.groupdict().items()}
        if max(map(len, part.values())) > LONGEST_NUMBER:
            continue
        exponent = int(part["e"] or part["ten"] or part["power"] or 0)
        if abs(exponent) * (len(part["value"]) if part["power"] else 1) > LONGEST_NUMBER:
            continue
        try:
            value = Fraction(part["value"]) / Fraction(part["under"] or 1)
            value = value**exponent if part["power"] else value * Fraction(10) ** exponent
        except ZeroDivisionError:
            continue
        if value < 1:  # 2 1/2 is one number, 10 6/2 are two
            value += int(part["whole"] or 0)
        numbers.append(-value if part["sign"] == "-" else value)
    return numbers


def _plain_digits(text: str) -> str:
    """Signs, fractions, powers of Unicode and LaTeX in ASCII: − is -, 2½ is 2 1/2, 10³ is 10^3."""
    for latex, plain in LATEX:
        text = re.sub(latex, plain, text)
    text = re.sub(r"(?<=\d)[⁰¹²³⁴-⁹⁻]+", lambda power: "^" + unicodedata.normalize("NFKC", power[0]), text)
    text = re.sub(r"(?<=\d)(?=[¼½¾⅐-⅞])", " ", text)
    text = re.sub("[¼½¾⅐-⅞]", lambda fraction: unicodedata.normalize("NFKC", fraction[0]), text)
    return re.sub("[\u2212\u2010\u2011\u2013\ufe63\uff0d]", "-", text).replace("\u2044", "/")
