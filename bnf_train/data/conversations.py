"""Which messages of a row are prompt and which are response, whatever its shape."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from bnf_train.data.files import RawRow
from bnf_train.data.rows import RowRefused
from bnf_train.data.values import label_or_value, list_or_text, messages_or_text, shown

Message = dict[str, Any]
Span = tuple[int, int, float]  # first character, the one behind the last, weight

SHAPES = "(prompt, chosen, rejected), (prompt, completion, label) or (prompt, completions, labels)"
RESPONSES = ("chosen", "rejected", "completion", "completions")
SPANS = {"chosen": "chosen_spans", "rejected": "rejected_spans", "completion": "spans", "completions": "spans"}  # beside them
COLUMNS = ("prompt", "conversations", *RESPONSES, "label", "labels", "score", "scores", "system", "tools", *SPANS.values())
MOST_SCORE = 100  # a score stands in place of +1 or -1: a larger one is of another kind
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}  # its names of roles that templates know by others


@dataclass
class Answer:
    """One response: its message, and its weight in the loss: 1 where preferred, -1 where not, or the row's own score."""

    message: Message
    score: float
    spans: list[Span] = field(default_factory=list)  # what characters of its text weigh; all others weigh 1
    before: list[Message] = field(default_factory=list)  # messages of its own between the prompt and it
    silent: set[int] = field(default_factory=set)  # places in prompt and `before` of messages of weight 0


@dataclass
class Conversation:
    """A row before any template."""

    prompt: list[Message]
    answers: list[Answer]
    tools: list[Any] | None = None
    pair: bool = False  # the answers are the two sides of a pair, the preferred one first
    text: bool = False  # the prompt is plain text, not messages
    used: set[str] = field(default_factory=set)  # columns
    scored: bool = False  # the answers have scores of their own


def to_conversation(row: RawRow, where: str, several_turns: bool = False) -> Conversation:
    """The row in one form, whatever its shape.

    Args:
      several_turns: responses may have more messages before the last.

    Raises:
      RowRefused: the row has no known shape, a response is empty, or where the prompt ends is not certain.
    """
    sides, used = _sides(row, where)
    turns = [_messages(value, "assistant", f"{where}: {name}") for name, value, _ in sides]
    raw_prompt = row.get("prompt") if row.get("prompt") is not None else row.get("conversations")
    prompt = [] if raw_prompt is None else _messages(raw_prompt, "user", f"{where}: prompt")
    is_text = isinstance(raw_prompt, str) and len(prompt) == 1 and prompt[0]["content"] == raw_prompt
    if not any(m["content"].strip() or m.get("tool_calls") for m in prompt):
        prompt, is_text = [], False
    if all(len(messages) > 1 for messages in turns) and not (prompt and _begin_apart(turns, prompt)):
        prompt, turns = _whole_conversations(
            prompt, turns, where, several_turns
        )  # whole conversations: what they share is the prompt
    if not prompt:
        raise RowRefused(
            "malformed", f"{where}: expected a prompt, got none: add a prompt column, or the messages before the response."
        )
    for (name, _, _), messages in zip(sides, turns, strict=True):
        last = messages[-1:] if several_turns and _goes_on(prompt, messages) else messages
        if len(last) > 1 and last[0]["role"] == "assistant":
            raise RowRefused(
                "several_turns",
                f"{where}: {name}: a response of {len(messages)} messages, and responses of several turns are not supported "
                "but by --train_on all_assistant.",
            )
        if len(last) != 1 or last[0]["role"] != "assistant":
            raise RowRefused(
                "malformed",
                f"{where}: {name}: expected one assistant message after a shared prompt, "
                f"got the roles {', '.join(shown(m['role']) for m in messages) or 'of no message'}.",
            )
        if not last[0]["content"].strip() and not last[0].get("tool_calls"):
            raise RowRefused("empty", f"{where}: {name}: expected a response, got an empty one.")
    prompt = _with_system(row, prompt, where)
    prompt, silent = _without_weights(prompt, f"{where}: prompt")
    spans, columns = _spans_beside(row, sides, where)
    answers = [
        _answer(messages, side, beside, (len(prompt), silent), where)
        for messages, side, beside in zip(turns, sides, spans, strict=True)
    ]
    pair = [name for name, _, _ in sides] == ["chosen", "rejected"]
    tools, more = _tools(row, where), used | columns | {name for name in ("tools", "system") if row.get(name) is not None}
    more |= {name for name in ("prompt", "conversations") if raw_prompt is not None and row.get(name) is raw_prompt}
    scored = bool(used & {"score", "scores"})
    return Conversation(prompt, answers, tools, pair, is_text, more, scored)


def _goes_on(prompt: list[Message], messages: list[Message]) -> bool:
    """Whether messages go on after a prompt, turn by turn, to an assistant's last."""
    turns = (prompt[-1]["role"] == "assistant") != (messages[0]["role"] == "assistant") if messages else False
    return turns and messages[-1]["role"] == "assistant"


def _answer(
    messages: list[Message], side: tuple[str, Any, float], beside: Any, prompt: tuple[int, set[int]], where: str
) -> Answer:
    """Of the messages of a response, behind a prompt of so many messages with these silent ones."""
    (name, _, score), (length, silent) = side, prompt
    (*before, message), zero = _without_weights(messages, f"{where}: {name}")
    at = len(before)
    own = message.pop("spans", None)
    if beside is not None and own is not None:
        raise RowRefused("malformed", f"{where}: {name}: expected spans once, got them in the message and beside it.")
    spans = _spans(own if beside is None else beside, message["content"], f"{where}: {name}")
    return Answer(message, 0.0 if at in zero else score, spans, before, silent | {length + i for i in zero if i < at})


def _without_weights(messages: list[Message], where: str) -> tuple[list[Message], set[int]]:
    """Assistant messages without their key `weight`, and the places of those that have 0; others do not count anyway."""
    zero = set()
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and "weight" in message:
            weight = message["weight"]
            if isinstance(weight, bool) or weight not in (0, 1):
                raise RowRefused("malformed", f"{where}: weight of message {number + 1}: expected 0 or 1, got {shown(weight)}.")
            zero |= set() if weight else {number}
    stripped = [{k: v for k, v in m.items() if k != "weight" or m["role"] != "assistant"} for m in messages]
    return stripped, zero


def _spans_beside(row: RawRow, sides: list[tuple[str, Any, float]], where: str) -> tuple[list[Any], set[str]]:
    """The spans in the columns beside the responses, None where there are none, and the columns."""
    kinds = [name.split()[0] for name, _, _ in sides]  # completions have a number, too
    columns = {SPANS[kind] for kind in kinds if row.get(SPANS[kind]) is not None}
    if kinds[:1] != ["completions"]:
        return [row.get(SPANS[kind]) for kind in kinds], columns
    spans = list_or_text(row.get("spans"))
    if spans is None or spans == "":
        return [None] * len(sides), columns
    if not isinstance(spans, list) or len(spans) != len(sides):
        got = len(spans) if isinstance(spans, list) else shown(spans)
        raise RowRefused("malformed", f"{where}: spans: expected a list for each of {len(sides)} completions, got {got}.")
    return spans, columns


def _spans(value: Any, text: str, where: str) -> list[Span]:
    """In the order of the text."""
    value = list_or_text(value)
    if value is None or value == "":
        return []
    found = [_span(span, where) for span in value] if isinstance(value, list) else [_span(value, where)]
    found.sort()
    end = 0
    for span in found:
        if not end <= span[0] < span[1] <= len(text):
            raise RowRefused(
                "malformed",
                f"{where}: spans: expected start < end within the {len(text)} characters of the response, none over another, "
                f"got {list(span)}.",
            )
        end = span[1]
    return found


def _span(value: Any, where: str) -> Span:
    numbers = isinstance(value, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
    sound = numbers and len(value) == 3 and all(abs(x) < 1e15 for x in value)  # NaN is not
    if not sound or value[2] < 0 or any(x % 1 for x in value[:2]):
        got = f"[{', '.join(map(shown, value[:4]))}]" if isinstance(value, list) else shown(value)
        raise RowRefused("malformed", f"{where}: spans: expected [start, end, weight] with a weight from 0, got {got}.")
    return int(value[0]), int(value[1]), float(value[2])


def _sides(row: RawRow, where: str) -> tuple[list[tuple[str, Any, float]], set[str]]:
    """(name, value, score) of each response, and the columns that say so; a column without a value does not count."""
    given = [name for name in RESPONSES if row.get(name) is not None]
    if len(given) > 1 and ("completion" in given or "completions" in given):
        given = [name for name in given if row[name] != ""]  # a table with columns of several shapes may have empty cells
    if given == ["chosen", "rejected"]:
        return [("chosen", row["chosen"], 1.0), ("rejected", row["rejected"], -1.0)], {"chosen", "rejected"}
    if given == ["completion"]:
        name = "label" if label_or_value(row.get("label")) is not None or row.get("score") is None else "score"
        return [("completion", row["completion"], _score(row.get(name), name, where))], {"completion", name}
    if given == ["completions"]:
        name = "labels" if row.get("labels") is not None or row.get("scores") is None else "scores"
        responses, values = list_or_text(row["completions"]), list_or_text(row.get(name))
        if not responses or not isinstance(responses, list) or not isinstance(values, list) or len(responses) != len(values):
            lengths = [len(x) if isinstance(x, list) else shown(x) for x in (responses, values)]
            raise RowRefused(
                "malformed",
                f"{where}: completions, {name}: expected two lists of one length, and something in them, got {lengths[0]} "
                f"and {lengths[1]}.",
            )
        sides = [
            (f"completions {i}", response, _score(value, name.rstrip("s"), f"{where}, completion {i}"))
            for i, (response, value) in enumerate(zip(responses, values, strict=True), 1)
        ]
        return sides, {"completions", name}
    got = ", ".join(given or [shown(name)[1:-1] for name in list(row)[:10] if row[name] is not None]) or "none"
    raise RowRefused("malformed", f"{where}: expected the columns {SHAPES}, got {got}.")


def _score(value: Any, name: str, where: str) -> float:
    """A label as 1 or -1; a score as it is."""
    value = label_or_value(value) if name == "label" else value
    if name == "label":
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowRefused("malformed", f"{where}: label: expected true or false (or 1, 0), got {shown(value)}.")
        return 1.0 if value else -1.0
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= MOST_SCORE:  # NaN is not
        raise RowRefused("malformed", f"{where}: score: expected a finite number of at most {MOST_SCORE}, got {shown(value)}.")
    return number


def _begin_apart(turns: list[list[Message]], prompt: list[Message]) -> bool:
    """Whether responses of several messages go on after the prompt beside them, in place of repeating it."""
    return all(messages[0]["role"] == "assistant" and messages[0] != prompt[0] for messages in turns)


def _whole_conversations(
    prompt: list[Message], turns: list[list[Message]], where: str, several_turns: bool
) -> tuple[list[Message], list[list[Message]]]:
    shared = _shared(turns)
    texts = {message["content"].strip() for message in shared}
    if any(message["content"].strip() not in texts for message in prompt):
        raise RowRefused("no_boundary", f"{where}: prompt: expected a part of the conversations beside it, got other text.")
    rest = [messages[len(shared) :] for messages in turns]
    if not several_turns and any(len(messages) > 1 for messages in rest):
        differ = " and ".join(str(len(messages)) for messages in rest)
        raise RowRefused(
            "several_turns",
            f"{where}: expected conversations that differ in their last message only, got {differ} messages "
            f"after the {len(shared)} that they share.",
        )
    return shared, rest


def _shared(conversations: list[list[Message]]) -> list[Message]:
    """The messages with which all conversations begin; without the last where they are the same to their end."""
    shared = 0
    for turns in zip(*conversations, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    return conversations[0][: min(shared, min(map(len, conversations)) - 1)]


def _with_system(row: RawRow, prompt: list[Message], where: str) -> list[Message]:
    """The prompt behind the text of a `system` column."""
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return prompt
    if not isinstance(system, str):
        raise RowRefused("malformed", f"{where}: system: expected text, got {shown(system)}.")
    _text(system, f"{where}: system")
    if prompt[0]["role"] == "system":
        if prompt[0]["content"].strip() == system.strip():
            return prompt
        raise RowRefused("malformed", f"{where}: system: expected no system message in the prompt beside it, got another one.")
    return [{"role": "system", "content": system}, *prompt]


def _tools(row: RawRow, where: str) -> list[Any] | None:
    tools = list_or_text(row.get("tools"))
    if tools is None or tools in ("", []):
        return None
    _text(json.dumps(tools, ensure_ascii=False, default=str), f"{where}: tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowRefused("malformed", f"{where}: tools: expected a list of JSON schemas, got {shown(row['tools'])}.")
    return [_without_nothing(tool) for tool in tools]


def _without_nothing(value: Any) -> Any:
    """Without the nulls that a table of structs fills in for keys that a schema does not have."""
    if isinstance(value, dict):
        return {key: _without_nothing(v) for key, v in value.items() if v is not None}
    return [_without_nothing(v) for v in value] if isinstance(value, list) else value


def _messages(value: Any, role: str, where: str) -> list[Message]:
    value = messages_or_text(value)
    if isinstance(value, str):
        return [{"role": role, "content": _text(value, where)}]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RowRefused("malformed", f"{where}: expected text or a list of {{role, content}} messages, got {shown(value)}.")
    return [_message(message, number, where) for number, message in enumerate(messages, 1)]


def _message(message: Message, number: int, where: str) -> Message:
    """With role and text content; what else it carries stays, for the templates that read it."""
    if "role" not in message and isinstance(message.get("from"), str):
        rest = {k: v for k, v in message.items() if k not in ("from", "value")}
        message = {"role": SHAREGPT.get(message["from"], message["from"]), "content": message.get("value"), **rest}
    listed = list_or_text(message.get("tool_calls")) or []
    if not isinstance(listed, list):
        raise RowRefused("malformed", f"{where}: tool_calls of message {number}: expected a list, got {shown(listed)}.")
    calls = [_call(call, number, where) for call in listed]
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, number, where) for part in content)
    if content is None and calls:
        content = ""  # the standard form of a call; templates write None as a word
    for key, text in (("role", role), ("content", content)):
        if not isinstance(text, str):
            got = f"{shown(text) if key in message else 'none'} as the {key} of message {number}"
            raise RowRefused("malformed", f"{where}: expected text or a list of {{role, content}} messages, got {got}.")
        _text(text, where)
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls") and v is not None}
    return {"role": role, "content": content, **rest} | ({"tool_calls": calls} if calls else {})


def _part(part: Any, number: int, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "an object without text") if isinstance(part, dict) else shown(part)
    raise RowRefused("malformed", f"{where}: expected parts of text in message {number}, got {kind}.")


def _call(call: Any, number: int, where: str) -> Any:
    """A tool call, its arguments as an object: templates write them as JSON, and text would be quoted twice."""
    if not isinstance(call, dict):
        raise RowRefused("malformed", f"{where}: tool_calls of message {number}: expected objects, got {shown(call)}.")
    call = _without_nothing(call)
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise RowRefused("malformed", f"{where}: tool_calls of message {number}: expected a function, got {shown(function)}.")
    if isinstance(arguments := function.get("arguments"), str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        if isinstance(parsed, dict):
            return (
                {**call, "function": {**function, "arguments": parsed}} if "function" in call else {**call, "arguments": parsed}
            )
    return call


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowRefused("malformed", f"{where}: expected text, got half a character ({shown(text[error.start])}).") from error
    return text
