"""The checks that have a name: each says whether an answer is right, from the answer and the row that it is for.

All but `regex` compare with the row's column `answer`.
"""

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from bnf_train.errors import UsageError

CheckFunction = Callable[[str, str, Mapping[str, Any]], Any]  # (prompt, answer, row) -> bool, or a share of right

COLUMN = "answer"
MARK = "####"  # what GSM8K writes before a result

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"""
    (?<![\w.])                                           # not within a word or a number
    (?P<sign>(?<![\w)\]}}.])[-\u2212+](?=[$€£\d.])|)   # a sign, no hyphen and no minus between two numbers
    [$€£]?\s?(?P<more>[-\u2212]?)
    (?:(?P<whole>\d+)\s+(?=\d+/))?                       # of a mixed number, as in 1 1/2
    (?P<number>{_DIGITS})
    (?P<over>(?:\s?/\s?\d+)*)                            # a fraction, or a date
    (?P<power>[eE][-+]?\d{{1,3}}(?!\w))?
    """,
    re.VERBOSE,
)
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*([-\u2212]?\d+)\s*\}\s*\{\s*(\d+)\s*\}")


def exact(prompt: str, answer: str, row: Mapping[str, Any]) -> bool:
    """The answer is the row's, white space at both ends left out.

    >>> exact("", " 18\\n", {"answer": "18"}), exact("", "18.", {"answer": 18})
    (True, False)
    """
    return answer.strip() == _expected(row).strip()


def contains(prompt: str, answer: str, row: Mapping[str, Any]) -> bool:
    """The row's answer stands in it, upper and lower case told apart.

    >>> contains("", "It is Paris.", {"answer": "Paris"}), contains("", "paris", {"answer": "Paris"})
    (True, False)
    """
    return _expected(row).strip() in answer


def number(prompt: str, answer: str, row: Mapping[str, Any]) -> bool:
    """The last number of the answer is the last number of the row's answer, however both are written.

    >>> number("", "So she pays $1,234.50.", {"answer": "1000 + 234.5 = 1234.5\\n#### 1234.5"})
    True
    """
    found = last_number(answer)
    return found is not None and found == last_number(_expected(row))


def last_number(text: str) -> Fraction | None:
    """The last number of a text, or the first one behind its last `####`; None where there is none.

    Thousands have commas, money its sign, and fractions are numbers: 3/4, 1 1/2, \\frac{3}{4}.

    >>> [str(last_number(text)) for text in ("#### 18 (2 steps)", "A: $1,234.50", "from 3-5", "x = -3/4.", "none")]
    ['18', '2469/2', '5', '-3/4', 'None']
    """
    _, mark, behind = text.rpartition(MARK)
    text = _FRAC.sub(r"\1/\2", text if not mark else behind).replace("{,}", ",").replace("\\$", "$")
    values = [_value(match) for match in _NUMBER.finditer(text)]
    return None if not values else values[0] if mark else values[-1]


def _value(match: re.Match[str]) -> Fraction:
    over = [int(part) for part in re.findall(r"\d+", match["over"])]
    if len(over) > 1 or over == [0]:  # no fraction: the last of several numbers
        return Fraction(over[-1])
    value = Fraction(match["number"].replace(",", "")) / (over[0] if over else 1) * _power(match["power"])
    value += int(match["whole"] or 0)
    negative = (match["sign"].strip() in ("-", "\u2212")) != bool(match["more"])
    return -value if negative else value


def _power(text: str | None) -> Fraction:
    return Fraction(10) ** int(text[1:]) if text else Fraction(1)


def regex(pattern: str, flag: str) -> CheckFunction:
    """The pattern is found in the answer.

    Raises:
      UsageError: it is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{flag}: expected a regular expression behind regex=, got one with an error ({error}).") from error
    return lambda prompt, answer, row: compiled.search(answer) is not None


def math_verify(flag: str) -> CheckFunction:
    """The answer is the row's as mathematics, LaTeX or not, by the package math-verify.

    Raises:
      UsageError: it is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UsageError(
            f"{flag}: needs the package math-verify, which is not installed (pip install 'math-verify[antlr4_13_2]'); "
            "--check number needs none."
        ) from error

    def check(prompt: str, answer: str, row: Mapping[str, Any]) -> bool:
        expected = _expected(row)
        return bool(verify(parse(expected) or parse(f"${expected}$"), parse(answer)))  # LaTeX without its marks, too

    return check


def _expected(row: Mapping[str, Any]) -> str:
    return str(row[COLUMN])
