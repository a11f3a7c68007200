"""Rows of preference data to token ids; what is cut or left out on the way is counted."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bnf_train.data.conversations import Conversation, to_conversation
from bnf_train.data.files import RawRow
from bnf_train.data.rows import Counts, Response, Row, RowRefused, Rules
from bnf_train.data.template import Options, Template, Written
from bnf_train.data.values import shown
from bnf_train.errors import WHY_NOT_STREAMED, UsageError
from bnf_train.rules import RULES

CHUNK = 512  # rows that are tokenised at once


class _Text(NamedTuple):
    """A row as text."""

    number: int
    conversation: Conversation
    prompt: str
    responses: list[Written]


def tokenize(
    rows: Sequence[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source: str,
    rules: Rules | None = None,
    options: Options | None = None,
) -> tuple[list[Row], Counts]:
    """Rows rendered with the model's chat template, and what was cut or left out.

    Raises:
      UsageError: the tokenizer has no chat template or EOS, a row is not as `rules` ask, or no row is left.
    """
    if not isinstance(rows, Sequence):
        raise UsageError(f"{source}: a stream instead of a table, but {WHY_NOT_STREAMED}; load it without streaming.")
    run = _Run(tokenizer, max_length, source, rules or Rules(), Template(tokenizer, options), Counts(len(rows)))
    kept: list[Row] = []
    quiet = True if int(os.environ.get("RANK", 0)) else None  # None: on a terminal only
    with tqdm(total=len(rows), desc=f"tokenising {Path(source).name}", leave=False, disable=quiet) as progress:
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            kept += run.tokens(list(run.texts(chunk, first + 1)))
            progress.update(len(chunk))
    run.counts.unused = run.unused()
    if not kept:
        run.nothing_left()
    return kept, run.counts


class _Run:
    """The state of one call of `tokenize`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, source: str, rules: Rules, template: Template, counts: Counts
    ) -> None:
        self.tokenizer, self.max_length, self.source = tokenizer, max_length, source
        self.rules, self.template, self.counts = rules, template, counts
        self.refused: RowRefused | None = None  # the first
        self._seen: set[bytes] = set()
        self._columns: set[str] = set()  # that have a value somewhere
        self._used: set[str] = set()
        self._keys: set[str] = set()  # of messages
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        first = tokenizer.convert_ids_to_tokens(ids)[0] if ids else ""
        self._dummy_prefix = str(first).startswith("▁")  # sentencepiece puts a space before a text

    # --- text ---------------------------------------------------------------------------------------------------------

    def texts(self, rows: Sequence[RawRow], first: int) -> Iterator[_Text]:
        for number, raw in enumerate(rows, first):
            where = f"{self.source}, row {number}"
            try:
                text = self._text(raw, number, where)
            except RowRefused as refused:
                if self.rules[refused.rule] == "error":
                    raise refused.with_way_out() from refused
                self.refused = self.refused or refused
                self.counts.leave_out(refused.rule, number)
                continue
            if text is not None:
                yield text

    def _text(self, raw: RawRow, number: int, where: str) -> _Text | None:
        self._columns |= {name for name, value in raw.items() if value is not None}
        conversation = to_conversation(raw, where)
        self._used |= conversation.used
        counted = [answer for answer in conversation.answers if answer.score]
        self.counts.zero += [number] * (len(conversation.answers) - len(counted))
        if not counted:
            return None
        conversation.answers = counted
        if self._is_duplicate(conversation, number, where):
            return None
        for message in (*conversation.prompt, *(answer.message for answer in conversation.answers)):
            self._keys |= message.keys()
        messages = [answer.message for answer in conversation.answers]
        try:
            prompt = self.template.prompt(conversation, where)
        except RowRefused as refused:
            choice = self.rules[refused.rule]
            if refused.rule != "already_rendered" or choice not in ("as_is", "text"):
                raise
            if choice == "as_is":
                pairs = [self.template.as_is(conversation.prompt[-1]["content"], m["content"]) for m in messages]
                return _Text(number, conversation, pairs[0][0], [written for _, written in pairs])
            conversation.text = False
            prompt = self.template.prompt(conversation, where)
        return _Text(number, conversation, prompt, [self.template.response(conversation, m, prompt, where) for m in messages])

    def _is_duplicate(self, conversation: Conversation, number: int, where: str) -> bool:
        """Whether the row is left out as an exact duplicate."""
        content = [conversation.prompt, conversation.tools, [(a.message, a.score) for a in conversation.answers]]
        key = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()
        if key not in self._seen:
            self._seen.add(key)
            return False
        self.counts.leave_out("duplicates", number)
        if self.rules["duplicates"] == "error":
            raise UsageError(f"{where}: the same as a row before: remove one, or pass --duplicates keep or drop.")
        return self.rules["duplicates"] == "drop"

    # --- tokens -------------------------------------------------------------------------------------------------------

    def tokens(self, texts: Sequence[_Text]) -> Iterator[Row]:
        """Prompt and response tokenised apart, as the model meets them at inference."""
        if not texts:  # the tokenizer takes no empty batch
            return
        prompts = [self._one_bos(ids) for ids in self._ids([text.prompt for text in texts])]
        answers = [(text, written) for text in texts for written in text.responses]
        responses = iter(self._responses(answers, {t.number: ids for t, ids in zip(texts, prompts, strict=True)}))
        for text, prompt in zip(texts, prompts, strict=True):
            row = self._row(text, prompt, [next(responses) for _ in text.responses])
            if row is not None:
                yield row

    def _responses(self, answers: Sequence[tuple[_Text, Written]], prompts: dict[int, list[int]]) -> list[list[int]]:
        apart = self._ids([written.text + written.end for _, written in answers])
        if not self._dummy_prefix:
            return apart
        # a text of its own would begin with a space that it has not behind a prompt
        whole = [self._one_bos(ids) for ids in self._ids([text.prompt + w.text + w.end for text, w in answers])]
        found = []
        for (text, _), joined, alone in zip(answers, whole, apart, strict=True):
            prompt = prompts[text.number]
            found.append(joined[len(prompt) :] if joined[: len(prompt)] == prompt else alone)
        return found

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _one_bos(self, ids: list[int]) -> list[int]:
        """Data that were rendered before begin with a BOS of their own, behind the template's."""
        bos = self.tokenizer.bos_token_id
        doubled = 0
        while bos is not None and ids[doubled : doubled + 2] == [bos, bos]:
            doubled += 1
        return ids[doubled:]

    def _row(self, text: _Text, prompt: list[int], responses: list[list[int]]) -> Row | None:
        number, conversation, counts = text.number, text.conversation, self.counts
        where = f"{self.source}, row {number}"
        longest = max(map(len, responses))
        if not prompt or not all(responses):
            raise UsageError(f"{where}: expected a prompt and responses of at least one token.")
        if len(prompt) + longest > self.max_length:
            if self.rules["too_long"] == "error":
                raise UsageError(
                    f"{where}: prompt and response have {len(prompt)} + {longest} tokens, more than "
                    f"--max_length {self.max_length}: raise it, or pass --too_long cut or drop."
                )
            if self.rules["too_long"] == "drop" or len(prompt) >= self.max_length:
                counts.leave_out("too_long", number)
                return None
            counts.cut += [number for response in responses if len(prompt) + len(response) > self.max_length]
        counts.rewritten += [number for written in text.responses if written.rewritten]
        counts.added += [number for written in text.responses if written.added]
        counts.added_text = counts.added_text or next((w.added for w in text.responses if w.added), "")
        kept = [(prompt + response)[: self.max_length] for response in responses]
        if conversation.pair and kept[0] == kept[1]:
            counts.same_sides.append(number)
        key = json.dumps([conversation.prompt, conversation.tools], sort_keys=True)
        answers = [
            Response(ids, len(prompt), answer.score > 0, score=answer.score if conversation.scored else None)
            for ids, answer in zip(kept, conversation.answers, strict=True)
        ]
        return Row(key, answers, number, self.source, group=not conversation.pair and len(answers) > 1)

    # --- the end ------------------------------------------------------------------------------------------------------

    def unused(self) -> list[str]:
        """A sentence for every column and key of messages that plays no part."""
        said = self.template.unread(self._columns & self._used, self._keys)
        if unknown := sorted(map(str, self._columns - self._used)):
            names = ", ".join(shown(name).strip("'") for name in unknown[:10]) + (", …" if len(unknown) > 10 else "")
            said.insert(0, f"columns that are not used: {names}")
        return [f"{self.source}: {sentence}." for sentence in said]

    def nothing_left(self) -> None:
        by_default = self.refused is not None and RULES[self.refused.rule].choices[0] == "drop"  # nobody asked for it
        if self.refused is not None and by_default and len(self.counts.left_out[self.refused.rule]) == self.counts.rows:
            raise UsageError(f"{str(self.refused).rstrip('.')} (and so in all {self.counts.rows} rows).") from self.refused
        left_out = "; ".join(self.counts.sentences(self.rules)) or "there was none"
        raise UsageError(f"{self.source}: no row is left at --max_length {self.max_length}: {left_out}.")
