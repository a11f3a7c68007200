"""What a cell of text stands for: chat messages, a list, a label, or the text itself; alike whatever file it came from.

Tables write lists as text in three ways: as JSON, as Python does (`to_csv` of a list) and as NumPy does (`to_csv` of an array).
Only literals are read, nothing is evaluated.
"""

import ast
import json
import re
import warnings
from typing import Any

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}

_LIST = re.compile(r"\s*(?:array\(\s*)?\[")
_MESSAGES = re.compile(_LIST.pattern + r"\s*\{")
# A string (to the end, where it is not closed), or what stands between strings; nothing is looked at twice.
_TOKEN = re.compile(
    r"""(?P<dtype>,\s*dtype=[\w.<>']++\s*\))
    | (?P<call>(?:array|np\.\w++)\()
    | (?P<value>'(?:[^'\\]|\\.)*+(?:'|\\?\Z) | "(?:[^"\\]|\\.)*+(?:"|\\?\Z) | [\])}] | [\w.+-]++)
      (?P<gap>\s++(?=['"\[({\w.+-]))?+""",
    re.VERBOSE | re.DOTALL,
)


def messages_or_text(value: Any) -> Any:
    """The messages that a text lists, each with role and content (or from and value); any other value as it stands.

    >>> messages_or_text('[{"role": "user", "content": "Hi"}]')
    [{'role': 'user', 'content': 'Hi'}]
    >>> messages_or_text("[{'from': 'human', 'value': 'a } {'}\\n {'from': 'gpt', 'value': 'b'}]")  # NumPy: no commas
    [{'from': 'human', 'value': 'a } {'}, {'from': 'gpt', 'value': 'b'}]
    >>> messages_or_text("[{'colour': 'blue'}]")
    "[{'colour': 'blue'}]"
    """
    if not isinstance(value, str) or not _MESSAGES.match(value):
        return value
    if not ("role" in value and "content" in value) and not ("from" in value and "value" in value):
        return value
    found = _list(value)
    return found if found and all(map(_is_message, found)) else value


def list_or_text(value: Any) -> Any:
    """The list that a text writes, such as the tools of a row; any other value as it stands.

    >>> list_or_text('[{"name": "search"}]'), list_or_text("[True, False]"), list_or_text("['a' 'b']")
    ([{'name': 'search'}], [True, False], ['a', 'b'])
    >>> list_or_text("[sic]")
    '[sic]'
    """
    found = _list(value) if isinstance(value, str) and _LIST.match(value) else None
    return value if found is None else found


def label_or_value(value: Any) -> Any:
    """The label that a text writes, None where it is empty; any other value as it stands.

    >>> [label_or_value(value) for value in ("TRUE", "0", "", "good", 1)]
    [True, False, None, 'good', 1]
    """
    return LABELS.get(value.strip().lower(), value or None) if isinstance(value, str) else value


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return ("role" in value and ("content" in value or "tool_calls" in value)) or ("from" in value and "value" in value)


def _list(text: str) -> list[Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = _literal(text)
    return found if isinstance(found, list) else None


def _literal(text: str) -> Any:
    """Of Python's or NumPy's notation; None where it is neither."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in what is somebody's text
            return ast.literal_eval(_TOKEN.sub(_as_python, text.strip()))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _as_python(token: re.Match[str]) -> str:
    if token["dtype"]:
        return ")"
    if token["call"]:
        return "("
    value = "None" if token["value"] == "nan" else token["value"]
    return f"{value}, " if token["gap"] else value


def shown(value: Any) -> str:
    """The beginning of a value, on one line and whatever it is, for messages."""
    if isinstance(value, str):
        return ascii(value[:60]) if not value.isprintable() else repr(value[:60])
    if value is None or isinstance(value, (bool, float)):
        return "null" if value is None else repr(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a very long number"
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else type(value).__name__
