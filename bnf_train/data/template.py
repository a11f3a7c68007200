"""The chat template of a model: conversations to text, and what the template itself writes around a response.

At inference a model continues the prompt that the template renders with its generation prompt, up to the end of its turn.
So that is what is trained on: the prompt as at inference, then the response, then the end of turn that the template writes.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from bnf_train.data.conversations import Conversation, Message
from bnf_train.data.rows import RowRefused
from bnf_train.errors import UsageError, one_line

REASONING = {"reasoning_content", "reasoning", "thinking"}
SENTINEL = "Qzxjv"  # a response that no template has a reason to change
BLOCK = re.compile(r"<(/?)([A-Za-z_]\w*)>\s*$")  # of tags, no special tokens
OPENED = re.compile(r"<[^<>\s]+>\s*$")  # a tag at the end of a prompt, such as <think>


@dataclass(frozen=True)
class Options:
    """What the user says of templates; flags have the same names and help."""

    chat_template: str | None = None  # a file in place of the model's own
    chat_template_kwargs: Mapping[str, Any] | None = None
    date: str | None = None  # YYYY-MM-DD, for templates that write today's


class Frame(NamedTuple):
    """What the template writes before and after a response."""

    before: str
    after: str


class Written(NamedTuple):
    """A response as text that follows the prompt; `end` closes the turn."""

    text: str
    end: str
    added: str  # what the template wrote before it, beyond white space
    rewritten: bool  # the template would have written other text
    block: str = ""  # a block that the prompt opens and the response does not close, as <think>; or brings a second time


class Template:
    """Renders prompts and responses.

    Raises:
      UsageError: the tokenizer has no chat template or no end-of-sequence token, or the options are no template's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Options | None = None) -> None:
        options = options or Options()
        name = tokenizer.name_or_path
        if options.chat_template is None and not tokenizer.chat_template:
            raise UsageError(
                f"{name}: the tokenizer has no chat template; use an instruction-tuned model, or pass --chat_template FILE."
            )
        if tokenizer.eos_token is None:
            raise UsageError(f"{name}: the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json.")
        self.tokenizer, self.eos = tokenizer, str(tokenizer.eos_token)
        self._given = None if options.chat_template is None else _read(options.chat_template)
        day = datetime.date.fromisoformat(options.date) if options.date else datetime.date.today()
        self.date = datetime.datetime.combine(day, datetime.time())
        self.options: dict[str, Any] = dict(options.chat_template_kwargs or {})
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special = special | set(map(str, tokenizer.all_special_tokens))
        self.special_token = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))
        self.run = re.compile(f"(?:{self.special_token.pattern})+")
        self._left_out: dict[Any, list[int]] = {}

    @functools.cached_property
    def _parts(self) -> bool:
        """Whether the template reads content as a list of parts only, as some of models with images do."""
        source, marked = self.source(), {"role": "user", "content": SENTINEL}
        if "type" not in _names(source):
            return False
        options: dict[str, Any] = {"chat_template": source, "tokenize": False, **self.options}

        def writes(content: Any) -> bool:
            try:
                return SENTINEL in str(self.tokenizer.apply_chat_template([{**marked, "content": content}], **options))
            except Exception:
                return False

        return not writes(SENTINEL) and writes([{"type": "text", "text": SENTINEL}])

    def source(self, tools: Any = None) -> str:
        """The template's text: one of several where the tokenizer has a dictionary of them."""
        given = self._given
        return _dated(str(self.tokenizer.get_chat_template(None, tools=tools or None)) if given is None else given, self.date)

    def __call__(
        self, messages: Sequence[Message], tools: Any = None, *, generate: bool = False, unfinished: bool = False
    ) -> str:
        """The conversation as one text, special tokens included.

        Args:
          generate: end with the generation prompt.
          unfinished: end inside the last message, which is to be continued.
        """
        if self._parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=self.source(tools), tokenize=False,
                add_generation_prompt=generate, continue_final_message=unfinished, **self.options,
            )
        )  # fmt: skip

    def prompt(self, conversation: Conversation, where: str) -> str:
        """As at inference: with the generation prompt, or inside the assistant's turn where the prompt has begun it.

        Raises:
          RowRefused: the template refuses it, leaves a message out, or the prompt has been through a template already.
        """
        messages, tools = conversation.prompt, conversation.tools
        text = next((m["content"] for m in messages if m["role"] == "user"), "") if conversation.text else ""
        own = self.special_token.findall(text)
        if found := [mark for mark in own if mark in self.marks]:
            raise RowRefused(
                "already_rendered",
                f"{where}: prompt: expected plain text, got the chat template's own {found[0]} in it, so that the "
                "template would stand around it twice; --already_rendered as_is uses it as it stands.",
            )
        prefilled = messages[-1]["role"] == "assistant"
        try:
            rendered = self(messages, tools, generate=not prefilled, unfinished=prefilled)
        except Exception as error:  # templates raise errors of their own, and Jinja's
            raise RowRefused(
                "template_refuses", f"{where}: the model's chat template refuses this conversation ({one_line(error)})."
            ) from error
        for index in self.left_out(conversation):
            raise _not_rendered(messages[index], f"{where}: prompt message {index + 1}")
        return rendered

    def left_out(self, conversation: Conversation) -> list[int]:
        """Places of prompt messages of which the template writes nothing: tried once for each sequence of roles."""
        messages = conversation.prompt
        shape = (
            *((m["role"], bool(m["content"]), *sorted(m.keys() - {"content"})) for m in messages),
            bool(conversation.tools),
        )
        if shape not in self._left_out:
            marked = [_marked(m, f"{SENTINEL}{i}.") for i, m in enumerate(messages)]
            try:
                text = self(marked, conversation.tools)
                self._left_out[shape] = [i for i, m in enumerate(marked) if not _writes(text, m)]
            except Exception:  # a template that looks at the text; the row itself was rendered
                self._left_out[shape] = []
        return self._left_out[shape]

    def response(self, conversation: Conversation, message: Message, prompt: str, where: str) -> Written:
        """The text that follows `prompt`, as the template writes it, or else as it stands between what it writes.

        Raises:
          RowRefused: the template refuses it, or it is not certain where the response begins.
        """
        messages, content = conversation.prompt, message["content"]
        if messages[-1]["role"] == "assistant":  # begun in the prompt
            messages, whole = messages[:-1], {**message, "content": messages[-1]["content"] + content}
        else:
            whole = message
        try:
            text = self([*messages, whole], conversation.tools)
        except Exception as error:
            raise RowRefused(
                "template_refuses", f"{where}: the model's chat template refuses this conversation ({one_line(error)})."
            ) from error
        prefilled = messages is not conversation.prompt
        if prefilled and (begun := conversation.prompt[-1]["content"].strip()) and content.strip().startswith(begun):
            raise RowRefused(
                "no_boundary", f"{where}: the response repeats the beginning that the prompt has of it ({begun[:40]!r})."
            )
        own = content if prefilled else not_opened(content, prompt)  # what of it is still to be written
        rest = text[len(prompt) :] if text.startswith(prompt) else None
        if rest is not None and message.get("tool_calls") and not _writes(rest, {**message, "content": ""}):
            raise _not_rendered({**message, "content": ""}, f"{where}: response")
        if rest is not None and own == content and (at := find_in(content, rest)) >= 0:
            body, end = self.closed(rest)
            return Written(self._once(body), end, rest[:at].strip(), False, "" if prefilled else _block(prompt, body))
        if self.frame is None or message.keys() > {"role", "content"}:
            raise RowRefused(
                "no_boundary",
                f"{where}: the chat template does not write the prompt before prompt and response, so the response has no "
                "certain beginning.",
            )
        before = self.frame.before if own == content else ""
        body, end = self.closed(before + own + self.frame.after)
        changed = own == content and find_in(content, text) < 0
        return Written(self._once(body), end, before.strip(), changed, "" if prefilled else _block(prompt, body))

    @functools.cached_property
    def frame(self) -> Frame | None:
        """Learned from one response that says SENTINEL; None where the template refuses it or does not write it."""
        question = {"role": "user", "content": "Name a colour."}
        try:
            prompt = self([question], generate=True)
            text = self([question, {"role": "assistant", "content": SENTINEL}])
        except Exception:
            return None
        if SENTINEL not in text:
            return None
        before, _, after = text.partition(SENTINEL)
        same = next((i for i, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b), min(len(prompt), len(before)))
        return Frame(before[same:], after)

    @functools.cached_property
    def marks(self) -> set[str]:
        """Special tokens that the template writes around messages, which no plain text has."""
        try:
            text = self([{"role": "user", "content": "Name a colour."}], generate=True)
        except Exception:
            return set()
        return set(self.special_token.findall(text)) - {str(self.tokenizer.bos_token)} if self.special else set()

    @functools.cached_property
    def openings(self) -> set[str]:
        """Special tokens that the template writes before a user's text."""
        try:
            text = self([{"role": "user", "content": SENTINEL}], generate=True)
        except Exception:
            return set()
        return set(self.special_token.findall(text.partition(SENTINEL)[0]))

    def closed(self, rest: str) -> tuple[str, str]:
        """What follows a prompt, in two: the response, and the special tokens right behind it; the EOS where there is none."""
        after = self.frame.after if self.frame is not None else ""
        if after and rest.endswith(after):
            body = rest[: -len(after)]
        else:
            body, after = rest, ""
            while match := re.search(rf"(?:{self.special_token.pattern})\s*\Z", body):
                body, after = body[: match.start()], match[0] + after
        first = self.run.search(after)
        if first is None:
            return body + after.rstrip(), self.eos
        return body + after[: first.start()], first[0]

    def _once(self, body: str) -> str:
        """Without the end of turn that the data bring along."""
        ends = {self.eos} | ({m[0]} if self.frame and (m := self.run.search(self.frame.after)) else set())
        while tail := next((end for end in ends if body.rstrip().endswith(end)), None):
            body = body.rstrip().removesuffix(tail)
        return body

    def as_is(self, prompt: str, response: str) -> tuple[str, Written]:
        """Prompt and response that have been through a template, as they stand."""
        body = self._once(response)
        _, end = self.closed(self.frame.after if self.frame else "")
        return prompt, Written(body, end, "", False)

    def unread(self, names: set[str], keys: set[str], tools: Any = None) -> list[str]:
        """Sentences about the columns and keys that the rows carry and the template does not read."""
        known = _names(self.source(tools))
        said = []
        if "tools" in names and "tools" not in known:
            said.append("column tools: not used, because the chat template does not read it")
        known = known | (REASONING if known & REASONING else set())  # transformers passes one under every name
        if ignored := sorted(keys - known - {"role", "content"}):
            said.append(
                f"keys of messages that are not used, because the chat template does not read them: {', '.join(ignored)}"
            )
        return said

    def fingerprint(self) -> str:
        """All that rendering depends on beside the rows."""
        template = self._given if self._given is not None else self.tokenizer.chat_template
        return json.dumps([template, self.options], sort_keys=True, default=str)


def _marked(message: Message, mark: str) -> Message:
    """With the mark in place of the text, and of the names of the functions that it calls."""
    marked = {**message, "content": mark if message["content"] else ""}
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [
            {**c, "function": {**c["function"], "name": mark}} if "function" in c else {**c, "name": mark} for c in calls
        ]
    return marked


def _writes(text: str, message: Message) -> bool:
    """Whether the text has the content of a message, and the names of the functions that it calls."""
    names = [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls", ())]
    return all(part in text for part in (message["content"], *names))


def _not_rendered(message: Message, where: str) -> RowRefused:
    what = repr(message["content"][:60]) if message["content"] else "a tool call, which may be written as text instead"
    return RowRefused("not_rendered", f"{where}: the model's chat template writes nothing of it ({message['role']}: {what}).")


def _block(prompt: str, body: str) -> str:
    """A tag that the generation prompt leaves open and the response does not close, or that stands there twice."""
    match = BLOCK.search(prompt)
    if match is None:
        return ""
    tag = f"<{match[2]}>"
    if match[1]:  # closed in the prompt
        return tag if body.lstrip().startswith(tag) else ""
    return "" if f"</{match[2]}>" in body else tag


@functools.lru_cache
def _dated(template: str, date: datetime.datetime) -> str:
    """The template with the date of the run in place of strftime_now, which would read the clock at every row."""
    if "strftime_now" not in template:
        return template
    written = {name: date.strftime(name) for name in _names(template) if "%" in name}
    return f"{{% macro strftime_now(format) %}}{{{{ {json.dumps(written)}[format] }}}}{{% endmacro +%}}{template}"


def not_opened(content: str, prompt: str) -> str:
    """The response without the tag that the prompt has opened already, such as <think>."""
    match = OPENED.search(prompt)
    if match is None:
        return content
    tag = match[0].strip()
    if not content.lstrip().startswith(tag):
        return content
    rest = content.lstrip()[len(tag) :]
    return rest.removeprefix(match[0][len(tag) :])


def find_in(part: str, text: str) -> int:
    """Where a part stands in a text, whatever became of its white space; -1: nowhere."""
    if (at := text.find(part.strip())) >= 0:
        return at
    places = [i for i, c in enumerate(text) if not c.isspace()]
    at = "".join(text.split()).find("".join(part.split()))
    return places[at] if 0 <= at < len(places) else at


def _read(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_plain(text))
    except (OSError, ValueError) as error:
        raise UsageError(f"--chat_template {path}: expected a file with a Jinja template, got {one_line(error)}.") from error
    except jinja2.TemplateError as error:
        raise UsageError(f"--chat_template {path}: expected a Jinja template, got {one_line(error)}.") from error
    return text


def _plain(template: str) -> str:
    """Without the {% generation %} of transformers, which Jinja alone does not know."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


@functools.lru_cache
def _names(template: str) -> set[str]:
    """Variables, attributes and keys that a template reads."""
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_plain(template))
    except jinja2.TemplateError:
        return set()
    names = {node.name for node in tree.find_all(nodes.Name)} | {node.attr for node in tree.find_all(nodes.Getattr)}
    return names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
