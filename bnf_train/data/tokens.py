"""Rows of preference data to token ids; what is cut or left out on the way is counted."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bnf_train.data.conversations import Answer, Conversation, Span, to_conversation
from bnf_train.data.counting import check_one_turn, earlier_turns, placed, token_weights
from bnf_train.data.files import RawRow
from bnf_train.data.rows import Counts, Response, Row, RowRefused, Rules
from bnf_train.data.template import Options, Template, Written
from bnf_train.data.values import shown
from bnf_train.errors import WHY_NOT_STREAMED, UsageError
from bnf_train.rules import RULES

CHUNK = 512  # rows that are tokenised at once

_Prompt = tuple[str, tuple[Span, ...]]  # with the turns of it that count


class _Side(NamedTuple):
    """A response as text, with the prompt before it."""

    answer: Answer
    prompt: str
    turns: list[Span]  # of the prompt that count, too
    written: Written
    spans: list[Span]  # of the response that do not count 1


class _Text(NamedTuple):
    """A row as text."""

    number: int
    conversation: Conversation
    sides: list[_Side]
    columns: RawRow


class _Encoded(NamedTuple):
    """Token ids, and what each counts; None: all the same."""

    ids: list[int]
    weights: list[float] | None = None


def tokenize(
    rows: Sequence[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source: str,
    rules: Rules | None = None,
    options: Options | None = None,
    train_on: str = "last",
    *,
    numbers: Sequence[int] | None = None,
    keep_zero: bool = False,
    checked: bool = False,
) -> tuple[list[Row], Counts]:
    """Rows rendered with the model's chat template, and what was cut or left out.

    Args:
      train_on: "last": the responses count; "all_assistant": the assistant's turns before them, too, with their label.
      numbers: of the rows in their source; None: 1, 2, 3, ...
      keep_zero: responses of score 0 stay, for `center_scores`.
      checked: whoever checks answers sees all columns.

    Raises:
      UsageError: the tokenizer has no chat template or EOS, a row is not as `rules` ask, or no row is left.
    """
    if not isinstance(rows, Sequence):
        raise UsageError(f"{source}: a stream instead of a table, but {WHY_NOT_STREAMED}; load it without streaming.")
    run = _Run(tokenizer, max_length, source, rules or Rules(), Template(tokenizer, options), Counts(len(rows)))
    run.every_turn, run.keep_zero, run.checked = train_on == "all_assistant", keep_zero, checked
    numbers = range(1, len(rows) + 1) if numbers is None else numbers
    kept: list[Row] = []
    quiet = True if int(os.environ.get("RANK", 0)) else None  # None: on a terminal only
    with tqdm(total=len(rows), desc=f"tokenising {Path(source).name}", leave=False, disable=quiet) as progress:
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            kept += run.tokens(list(run.texts(chunk, numbers[first : first + CHUNK])))
            progress.update(len(chunk))
    run.counts.unused = run.unused()
    if not kept:
        run.nothing_left()
    return kept, run.counts


class _Run:
    """The state of one call of `tokenize`."""

    every_turn = False  # earlier turns of the assistant count, too
    keep_zero = False  # responses of score 0 stay
    checked = False  # all columns are seen by a check of answers

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

    def texts(self, rows: Sequence[RawRow], numbers: Sequence[int]) -> Iterator[_Text]:
        for number, raw in zip(numbers, rows, strict=True):
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
        conversation = to_conversation(raw, where, self.every_turn)
        self._used |= conversation.used
        counted = [answer for answer in conversation.answers if answer.score or (self.keep_zero and conversation.scored)]
        self.counts.zero += [number] * (len(conversation.answers) - len(counted))
        if not counted:
            return None
        conversation.answers = counted
        if self._is_duplicate(conversation, number, where):
            return None
        own = (message for answer in conversation.answers for message in (*answer.before, answer.message))
        for message in (*conversation.prompt, *own):
            self._keys |= message.keys()
        try:
            return _Text(number, conversation, self._sides(conversation, where), raw)
        except RowRefused as refused:
            choice = self.rules[refused.rule]
            if refused.rule != "already_rendered" or choice not in ("as_is", "text"):
                raise
            if choice == "as_is":
                return _Text(number, conversation, [self._as_is(conversation, a, where) for a in conversation.answers], raw)
            conversation.text = False
            return _Text(number, conversation, self._sides(conversation, where), raw)

    def _sides(self, conversation: Conversation, where: str) -> list[_Side]:
        shared: tuple[str, list[Span]] | None = None  # answers without messages of their own before them have one prompt
        sides = []
        for answer in conversation.answers:
            own = replace(conversation, prompt=[*conversation.prompt, *answer.before]) if answer.before else conversation
            if answer.before or shared is None:
                prompt = self.template.prompt(own, where)
                turns = earlier_turns(self.template, own, answer.silent, prompt, where) if self.every_turn else []
                shared = shared if answer.before else (prompt, turns)
            else:
                prompt, turns = shared
            written = _something_left(self.template.response(own, answer.message, prompt, where), where)
            sides.append(_Side(answer, prompt, turns, written, placed(answer, prompt, written, where)))
        return sides

    def _as_is(self, conversation: Conversation, answer: Answer, where: str) -> _Side:
        prompt, written = self.template.as_is(conversation.prompt[-1]["content"], answer.message["content"])
        _something_left(written, where)
        if self.every_turn:
            check_one_turn(self.template, prompt, bool(answer.before), where)
        return _Side(answer, prompt, [], written, placed(answer, prompt, written, where))

    def _is_duplicate(self, conversation: Conversation, number: int, where: str) -> bool:
        """Whether the row is left out as an exact duplicate."""
        answers = [(a.message, a.score, a.spans, a.before, sorted(a.silent)) for a in conversation.answers]
        content = [conversation.prompt, conversation.tools, answers]
        key = hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).digest()
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
        sides = [side for text in texts for side in text.sides]
        prompts = self._prompts(sides)
        responses = iter(self._responses(sides, prompts))
        for text in texts:
            row = self._row(text, [(prompts[_prompt_of(side)], next(responses)) for side in text.sides])
            if row is not None:
                yield row

    def _prompts(self, sides: Sequence[_Side]) -> dict[_Prompt, _Encoded]:
        distinct = list(dict.fromkeys(map(_prompt_of, sides)))
        encoded = self._encoded([prompt for prompt, _ in distinct], [turns and (list(turns), 0) for _, turns in distinct])
        return {key: self._one_bos(of) for key, of in zip(distinct, encoded, strict=True)}

    def _responses(self, sides: Sequence[_Side], prompts: dict[_Prompt, _Encoded]) -> list[_Encoded]:
        apart = self._encoded([s.written.text + s.written.end for s in sides], [s.spans and (s.spans, 1) for s in sides])
        if not self._dummy_prefix:
            return apart
        # a text of its own would begin with a space that it has not behind a prompt
        shifted = [[(a + len(s.prompt), b + len(s.prompt), w) for a, b, w in s.spans] for s in sides]
        whole = self._encoded(
            [s.prompt + s.written.text + s.written.end for s in sides], [spans and (spans, 1) for spans in shifted]
        )
        found = []
        for side, joined, alone in zip(sides, map(self._one_bos, whole), apart, strict=True):
            prompt = prompts[_prompt_of(side)].ids
            behind = _Encoded(joined.ids[len(prompt) :], joined.weights and joined.weights[len(prompt) :])
            found.append(behind if joined.ids[: len(prompt)] == prompt else alone)
        return found

    def _encoded(self, texts: Sequence[str], counts: Sequence[Any]) -> list[_Encoded]:
        """Token ids of texts; where there are (spans, what counts outside of them), what each token counts, too."""
        plain = iter(self._ids([text for text, of in zip(texts, counts, strict=True) if not of]))
        weighed = iter(self._weighed([(text, *of) for text, of in zip(texts, counts, strict=True) if of]))
        return [next(weighed) if of else _Encoded(next(plain)) for of in counts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # the tokenizer takes no empty batch
            return []
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _weighed(self, texts: list[tuple[str, list[Span], float]]) -> list[_Encoded]:
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            raise UsageError(
                f"{self.source}: spans and --train_on all_assistant need a fast tokenizer (one with a tokenizer.json), which "
                f"knows where in the text its tokens stand, got {type(self.tokenizer).__name__}."
            )
        encoded = self.tokenizer(
            [text for text, *_ in texts], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
            return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
        return [
            _Encoded(ids, token_weights(text, offsets, spans, outside))
            for (text, spans, outside), ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _one_bos(self, of: _Encoded) -> _Encoded:
        """Data that were rendered before begin with a BOS of their own, behind the template's."""
        bos = self.tokenizer.bos_token_id
        doubled = 0
        while bos is not None and of.ids[doubled : doubled + 2] == [bos, bos]:
            doubled += 1
        return _Encoded(of.ids[doubled:], of.weights and of.weights[doubled:])

    def _row(self, text: _Text, encoded: list[tuple[_Encoded, _Encoded]]) -> Row | None:
        number, conversation, counts = text.number, text.conversation, self.counts
        where = f"{self.source}, row {number}"
        if not all(prompt.ids and response.ids for prompt, response in encoded):
            raise UsageError(f"{where}: expected a prompt and responses of at least one token.")
        before, behind = max(((len(p.ids), len(r.ids)) for p, r in encoded), key=sum)
        if before + behind > self.max_length:
            if self.rules["too_long"] == "error":
                raise UsageError(
                    f"{where}: prompt and response have {before} + {behind} tokens, more than "
                    f"--max_length {self.max_length}: raise it, or pass --too_long cut or drop."
                )
            if self.rules["too_long"] == "drop" or max(len(p.ids) for p, _ in encoded) >= self.max_length:
                counts.leave_out("too_long", number)
                return None
            counts.cut += [number for p, r in encoded if len(p.ids) + len(r.ids) > self.max_length]
        written = [side.written for side in text.sides]
        counts.rewritten += [number for w in written if w.rewritten]
        counts.added += [number for w in written if w.added]
        counts.blocks += [number for w in written if w.block]
        counts.block = counts.block or next((w.block for w in written if w.block), "")
        counts.added_text = counts.added_text or next((w.added for w in written if w.added), "")
        scores = [side.answer.score for side in text.sides]
        responses = [
            self._response(prompt, response, score, score if conversation.scored else None)
            for (prompt, response), score in zip(encoded, scores, strict=True)
        ]
        counted = [response for response in responses if response.tokens]
        counts.uncounted += [number] * (len(responses) - len(counted))
        counts.turns += [number for side in text.sides for _ in side.turns]
        if not counted:
            return None
        if conversation.pair and len(counted) == 2 and _same(*counted):
            counts.same_sides.append(number)
        key = json.dumps([conversation.prompt, conversation.tools], sort_keys=True, default=str)
        group = not conversation.pair and len(counted) > 1
        return Row(key, counted, number, self.source, group, columns=text.columns)

    def _response(self, prompt: _Encoded, response: _Encoded, sign: float, score: float | None) -> Response:
        ids, start = (prompt.ids + response.ids)[: self.max_length], len(prompt.ids)
        if prompt.weights is None and response.weights is None:
            return Response(ids, start, sign > 0, score=score)
        weights = [*(prompt.weights or [0.0] * start), *(response.weights or [1.0] * len(response.ids))][: self.max_length]
        weights[0] = 0.0  # nothing predicts the first token
        first = min(next((at for at, weight in enumerate(weights) if weight), start), start)
        own = weights[first:]
        return Response(ids, first, sign > 0, score=score, weights=None if set(own) == {1.0} else own)

    # --- the end ------------------------------------------------------------------------------------------------------

    def unused(self) -> list[str]:
        """A sentence for every column and key of messages that plays no part."""
        said = self.template.unread(self._columns & self._used, self._keys)
        if unknown := sorted(map(str, self._columns - self._used)):
            names = ", ".join(shown(name).strip("'") for name in unknown[:10]) + (", …" if len(unknown) > 10 else "")
            what = "that only --check sees" if self.checked else "that are not used"
            said.insert(0, f"columns {what}: {names}")
        return [f"{self.source}: {sentence}." for sentence in said]

    def nothing_left(self) -> None:
        by_default = self.refused is not None and RULES[self.refused.rule].choices[0] == "drop"  # nobody asked for it
        if self.refused is not None and by_default and len(self.counts.left_out[self.refused.rule]) == self.counts.rows:
            raise UsageError(f"{str(self.refused).rstrip('.')} (and so in all {self.counts.rows} rows).") from self.refused
        left_out = "; ".join(self.counts.sentences(self.rules)) or "there was none"
        raise UsageError(f"{self.source}: no row is left at --max_length {self.max_length}: {left_out}.")


def _prompt_of(side: _Side) -> _Prompt:
    return side.prompt, tuple(side.turns)


def _same(one: Response, other: Response) -> bool:
    return (one.input_ids, one.prompt_length, one.weights) == (other.input_ids, other.prompt_length, other.weights)


def _something_left(written: Written, where: str) -> Written:
    """A response that says more than its end of turn: the data's own one, or an opened tag, may have been all of it."""
    if not written.text.strip():
        raise RowRefused("empty", f"{where}: nothing is left of a response once the template's own marks are taken away.")
    return written
