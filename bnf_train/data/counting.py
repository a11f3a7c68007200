"""Which tokens count in the loss, beside the response as a whole: earlier turns of the assistant, and spans of a response.

Both are found as characters of the rendered text. A token belongs to the span in which its first character lies, white space
at its beginning left out: tokenizers differ in whether the space before a word is a part of it.
"""

import bisect
from collections.abc import Sequence

from bnf_train.data.conversations import Answer, Conversation, Message, Span
from bnf_train.data.rows import RowRefused
from bnf_train.data.template import SENTINEL, Template, Written, find_in, not_opened


def token_weights(text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[Span], outside: float) -> list[float]:
    """What each token of a text counts; `offsets` are where each begins and ends, `spans` are in order.

    >>> token_weights("a bc", [(0, 1), (1, 3), (3, 4)], [(2, 3, 0.5)], 1.0)
    [1.0, 0.5, 1.0]
    """
    starts = [start for start, *_ in spans]
    weights = []
    for start, end in offsets:
        written = text[start:end]
        at = start + (len(written) - len(written.lstrip()) if written.strip() else 0)
        number = bisect.bisect_right(starts, at) - 1
        inside = number >= 0 and at < spans[number][1]
        weights.append(float(spans[number][2] if inside else outside))
    return weights


# --- spans of a response ---------------------------------------------------------------------------------------------------


def placed(answer: Answer, prompt: str, written: Written, where: str) -> list[Span]:
    """The spans of a response's own text as spans of what is written of it.

    Raises:
      RowRefused: the text is not written as it stands.
    """
    if not answer.spans:
        return []
    content = answer.message["content"]
    own = not_opened(content, prompt)
    text = written.text + written.end
    after = text.find(written.added) + len(written.added) if written.added else 0
    at = text.find(own.strip(), after)
    if at < 0 or not own.strip() or not content.endswith(own):
        raise RowRefused(
            "no_boundary", f"{where}: the chat template changes the text of the response, so its spans have no certain place."
        )
    shift = at - (len(content) - len(own.lstrip()))
    return [(start + shift, end + shift, weight) for start, end, weight in answer.spans]


# --- earlier turns ---------------------------------------------------------------------------------------------------------


def earlier_turns(template: Template, conversation: Conversation, silent: set[int], prompt: str, where: str) -> list[Span]:
    """Where in a rendered prompt the assistant's turns stand, each with its end of turn; without the silent messages.

    A last turn that the response goes on with is none of them.

    Raises:
      RowRefused: the place of one is not certain.
    """
    messages = conversation.prompt
    finished = len(messages) - (messages[-1]["role"] == "assistant")
    found: list[Span] = []
    for index in range(finished):
        if messages[index]["role"] != "assistant" or index in silent:
            continue
        place = _by_prefix(template, conversation, index, prompt) or _by_mark(template, conversation, index, prompt)
        if place is None or place[0] >= place[1] or (found and place[0] < found[-1][1]):
            raise RowRefused(
                "no_boundary",
                f"{where}: prompt message {index + 1}: where the chat template writes it is not certain, so it cannot count "
                "(--train_on all_assistant).",
            )
        found.append((*place, 1.0))
    return found


def check_one_turn(template: Template, prompt: str, goes_on: bool, where: str) -> None:
    """A prompt that has been through a template has no earlier turns.

    Raises:
      RowRefused: it has some, or whether it has is not certain.
    """
    question: Message = {"role": "user", "content": "Name a colour."}
    asked, plain = template([question], generate=True), template([question])
    opens = asked[len(plain) :].strip() if asked.startswith(plain) else ""
    if goes_on or not opens or prompt.count(opens) > 1:
        raise RowRefused(
            "no_boundary",
            f"{where}: the assistant's turns in a prompt that has been through a chat template have no certain places "
            "(--train_on all_assistant).",
        )


def _by_prefix(template: Template, conversation: Conversation, index: int, prompt: str) -> tuple[int, int] | None:
    """Where the prompt goes on from what is rendered of the messages before, and up to and with this one."""
    messages, tools = conversation.prompt, conversation.tools
    message = messages[index]
    try:
        head, whole = template(messages[:index], tools, generate=True), template(messages[: index + 1], tools)
    except Exception:  # a template that refuses a part of the conversation
        return None
    if not whole.startswith(head) or not prompt.startswith(whole):
        return None
    body = whole[len(head) :]
    own = not_opened(message["content"], head)
    calls = [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls", ())]
    if find_in(own, body) < 0 or not all(name in body for name in calls):
        return None
    text, end = template.closed(body)
    return len(head), len(head) + len(text + end if body.startswith(text + end) else text)


def _by_mark(template: Template, conversation: Conversation, index: int, prompt: str) -> tuple[int, int] | None:
    """Where another text stands, once it is rendered in place of this one."""
    messages = conversation.prompt
    message, begun = messages[index], messages[-1]["role"] == "assistant"
    if message.keys() > {"role", "content"} or not message["content"].strip():
        return None
    marked = [*messages[:index], {**message, "content": SENTINEL}, *messages[index + 1 :]]
    try:
        text = template(marked, conversation.tools, generate=not begun, unfinished=begun)
    except Exception:  # a template that looks at the text
        return None
    before, _, after = text.partition(SENTINEL)
    start, stop = len(before), len(prompt) - len(after)
    if text.count(SENTINEL) != 1 or start >= stop or not prompt.startswith(before) or not prompt.endswith(after):
        return None
    written, content = prompt[start:stop], message["content"]
    if "".join(written.split()) != "".join(content.split()) and written.strip() not in content:
        return None
    stop += _end_of_turn(template, after)
    own = template.frame.before if template.frame else ""  # what the model writes before its text
    return start - len(own) if before.endswith(own) else start, stop


def _end_of_turn(template: Template, after: str) -> int:
    """How much of what follows a turn's text closes it: what closes a last turn, or a special token that opens none."""
    last = template.frame.after if template.frame else ""
    if (run := template.run.search(last)) and after.startswith(last[: run.end()]):
        return run.end()
    token = template.special_token.match(after.lstrip()) if template.special else None
    if token is None or token[0] in template.openings:
        return 0
    return len(after) - len(after.lstrip()) + token.end()
