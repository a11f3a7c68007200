"""Which messages of a row are prompt and which are response, whatever its shape."""

from typing import Any

from bnf_train.data.read import SHAPES, RawRow, shown
from bnf_train.errors import UsageError

Message = dict[str, Any]
Sides = list[tuple[Message, bool]]  # each response and whether it is preferred


class RowRefused(UsageError):
    """A row that a rule may leave out."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


def to_conversations(row: RawRow, where: str) -> tuple[list[Message], Sides]:
    """Prompt messages, and each response message with its label (a pair's preferred one first).

    Raises:
      RowRefused: a response is empty, or where the prompt ends is not certain.
      UsageError: the row has neither shape.
    """
    labels = _labels(row, where)
    turns = {name: _messages(row[name], "assistant", f"{where}: {name}") for name in labels}
    prompt = [] if row.get("prompt") is None else _messages(row["prompt"], "user", f"{where}: prompt")
    if not any(message["content"].strip() for message in prompt):
        prompt = []
    if all(len(messages) > 1 for messages in turns.values()):  # whole conversations: what they share is the prompt
        shared = _shared(list(turns.values()))
        texts = {message["content"].strip() for message in shared}
        if any(message["content"].strip() not in texts for message in prompt):
            raise RowRefused("no_boundary", f"{where}: prompt: expected a part of the conversations beside it, got other text.")
        prompt = shared
        turns = {name: messages[len(shared) :] for name, messages in turns.items()}
        if any(len(messages) > 1 for messages in turns.values()):
            differ = " and ".join(str(len(messages)) for messages in turns.values())
            raise RowRefused(
                "no_boundary",
                f"{where}: expected conversations that differ in their last message only, got {differ} messages "
                f"after the {len(shared)} that they share.",
            )
    if not prompt:
        raise UsageError(f"{where}: expected a prompt, got none: add a prompt column, or the messages before the response.")
    for name, messages in turns.items():
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise UsageError(
                f"{where}: {name}: expected one assistant message after a shared prompt, "
                f"got the roles {', '.join(shown(m['role']) for m in messages) or 'of no message'}."
            )
        if not messages[0]["content"].strip():
            raise RowRefused("empty", f"{where}: {name}: expected a response, got an empty one: fix it, or pass --empty drop.")
    return prompt, [(turns[name][0], label) for name, label in labels.items()]


def _labels(row: RawRow, where: str) -> dict[str, bool]:
    """The columns that hold responses, each with its label; a column without a value in this row does not count."""
    given = [name for name in ("chosen", "rejected", "completion") if row.get(name) is not None]
    if "completion" in given and len(given) > 1:  # a table with the columns of both shapes may have empty cells
        given = [name for name in given if row[name] != ""]
    if given == ["chosen", "rejected"]:
        return {"chosen": True, "rejected": False}
    if given != ["completion"]:
        got = ", ".join(given or [shown(name)[1:-1] for name in list(row)[:10] if row[name] is not None]) or "none"
        raise UsageError(f"{where}: expected the columns {SHAPES}, got {got}.")
    label = row.get("label")
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise UsageError(f"{where}: label: expected true or false (or 1, 0), got {shown(label)}.")
    return {"completion": bool(label)}


def _shared(conversations: list[list[Message]]) -> list[Message]:
    """The messages with which all conversations begin; without the last where they are the same to their end."""
    shared = 0
    for turns in zip(*conversations, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    return conversations[0][: min(shared, min(map(len, conversations)) - 1)]


def _messages(value: Any, role: str, where: str) -> list[Message]:
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UsageError(f"{where}: expected text or a list of {{role, content}} messages, got {shown(value)}.")
    for number, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(text := message.get(key), str):
                got = f"{shown(text) if key in message else 'none'} as the {key} of message {number}"
                raise UsageError(f"{where}: expected text or a list of {{role, content}} messages, got {got}.")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UsageError(f"{where}: expected text, got half a character ({shown(text[error.start])}).") from error
        if message.get("tool_calls"):
            raise UsageError(f"{where}: expected messages of text, got tool calls in message {number}: write them as text.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
