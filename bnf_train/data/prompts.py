"""Prompts to be answered, of rows that may have responses or none: token ids as at inference, and the row's own columns."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from bnf_train.data.conversations import RESPONSES, to_conversation
from bnf_train.data.files import RawRow
from bnf_train.data.read import has_splits, read_rows
from bnf_train.data.rows import Counts, RowRefused, Rules
from bnf_train.data.template import SENTINEL, Options
from bnf_train.data.tokens import tokenize
from bnf_train.data.values import list_or_text
from bnf_train.errors import UsageError

NO_LIMIT = 2**31


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered.

    Attributes:
      ids: token ids up to where the answer begins; none where `unrendered`.
      text: of the last message of the user.
      key: the whole conversation, as `Row.prompt`.
      columns: of the row, as they stand in the data.
      number: of the row in its source, from 1.
    """

    ids: list[int]
    text: str
    key: str
    columns: Mapping[str, Any]
    number: int
    source: str

    @property
    def conversation(self) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """Its messages, and the tools that there are."""
        messages, tools = json.loads(self.key)
        return messages, tools

    @property
    def where(self) -> str:
        """The row's name in messages."""
        return f"{self.source}, row {self.number}"


def prompts(
    rows: Sequence[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    rules: Rules | None = None,
    options: Options | None = None,
    *,
    numbers: Sequence[int] | None = None,
) -> tuple[list[Prompt], Counts]:
    """The distinct prompts of rows in any shape of training data, or with a prompt alone (a column `prompt` or `question`).

    Args:
      numbers: of the rows in their source; None: 1, 2, 3, ...

    Raises:
      UsageError: a row has no prompt, or is not as `rules` ask.
    """
    numbers = range(1, len(rows) + 1) if numbers is None else numbers
    asked = [_with_one_response(row, f"{source}, row {number}") for row, number in zip(rows, numbers, strict=True)]
    alike = Rules(**(rules or Rules()) | {"duplicates": "keep", "several_turns": "drop", "empty": "drop"})
    tokenized, counts = tokenize(asked, tokenizer, NO_LIMIT, source, alike, options, numbers=numbers, checked=True)
    columns = dict(zip(numbers, rows, strict=True))
    found: dict[str, Prompt] = {}
    for row in tokenized:
        response = row.responses[0]
        ids = response.input_ids[: response.prompt_length]
        prompt = Prompt(ids, _last_words(row.prompt), row.prompt, columns[row.number], row.number, source)
        found.setdefault(row.prompt, prompt)
    return list(found.values()), counts


def unrendered(rows: Sequence[RawRow], source: str) -> list[Prompt]:
    """As `prompts`, for a server that has the tokenizer: messages alone.

    Raises:
      UsageError: a row has no prompt, or one that cannot be read.

    Example:
      >>> [prompt.text for prompt in unrendered([{"question": "2 + 2?"}, {"prompt": "2 + 2?"}], "rows.jsonl")]
      ['2 + 2?']
    """
    found: dict[str, Prompt] = {}
    for number, row in enumerate(rows, 1):
        where = f"{source}, row {number}"
        try:
            read = to_conversation(_with_one_response(row, where), where)
        except RowRefused as refused:
            raise UsageError(str(refused)) from refused
        key = json.dumps([read.prompt, read.tools], sort_keys=True, default=str)
        found.setdefault(key, Prompt([], _last_words(key), key, row, number, source))
    return list(found.values())


def read_prompts(source: str) -> list[RawRow]:
    """Rows of a file, folder or hub dataset: its test split where it has one, else its training split."""
    return (read_rows(source, "test") if has_splits(source) else []) or read_rows(source)


def _with_one_response(row: RawRow, where: str) -> RawRow:
    """The conversation with its first response, or one that is not looked at, so that it is rendered as in training."""
    told = {name: row[name] for name in ("prompt", "conversations", "system", "tools") if row.get(name) not in (None, "")}
    first = next((row[name] for name in RESPONSES if row.get(name) not in (None, "")), None)
    several = list_or_text(first) if row.get("completions") is first else None
    if isinstance(several, list) and several:
        first = several[0]
    if "prompt" not in told and "conversations" not in told and first is None:
        if row.get("question") in (None, ""):
            if empty := next((name for name in ("prompt", "question") if name in row), None):
                raise UsageError(f"{where}: {empty} is empty; fill it in, or take the row out.")
            raise UsageError(f"{where}: expected a column prompt (or question) to answer, got {', '.join(row) or 'none'}.")
        told["prompt"] = row["question"]
    return told | {"completion": SENTINEL if first is None else first, "label": True}


def _last_words(key: str) -> str:
    messages, _ = json.loads(key)
    return next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), str(messages[-1]["content"]))
