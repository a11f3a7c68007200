"""Rows of preference data to token ids; what is cut or left out on the way is counted."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bnf_train.data.conversations import Message, RowRefused, Sides, to_conversations
from bnf_train.data.read import RawRow
from bnf_train.data.render import Renderer
from bnf_train.data.rows import Counts, Response, Row, Rules
from bnf_train.errors import WHY_NOT_STREAMED, UsageError

CHUNK = 512  # rows that are tokenised at once


def tokenize(
    rows: Sequence[RawRow], tokenizer: PreTrainedTokenizerBase, max_length: int, source: str, rules: Rules | None = None
) -> tuple[list[Row], Counts]:
    """Rows rendered with the model's chat template, and what was cut or left out.

    Raises:
      UsageError: the tokenizer has no chat template or EOS, a row is not as `rules` ask, or no row is left.
    """
    if not isinstance(rows, Sequence):
        raise UsageError(f"{source}: a stream instead of a table, but {WHY_NOT_STREAMED}; load it without streaming.")
    renderer, rules, counts = Renderer(tokenizer), rules or Rules(), Counts(len(rows))
    kept: list[Row] = []
    seen: set[bytes] = set()
    refused: RowRefused | None = None
    quiet = True if int(os.environ.get("RANK", 0)) else None  # None: on a terminal only
    with tqdm(total=len(rows), desc=f"tokenising {Path(source).name}", leave=False, disable=quiet) as progress:
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            conversations = list(_conversations(chunk, first, source, rules, counts, seen))
            rendered = renderer([(prompt, [m for m, _ in sides], f"{source}, row {n}") for prompt, sides, n in conversations])
            for (prompt, sides, number), parts in zip(conversations, rendered, strict=True):
                where = f"{source}, row {number}"
                if any(part.prompt_length is None for part in parts):
                    refused = refused or RowRefused("no_boundary", f"{where}: {NO_PREFIX}")
                    _leave_out(rules, counts, number, refused)
                    continue
                counts.rewritten += [number for part in parts if part.rewritten]
                responses = [
                    Response(part.input_ids, part.prompt_length or 0, label)
                    for part, (_, label) in zip(parts, sides, strict=True)
                ]
                if _fits(responses, max_length, where, number, rules, counts):
                    kept.append(Row(json.dumps(prompt, sort_keys=True), responses, number))
            progress.update(len(chunk))
    if not kept:
        if refused is not None and len(counts.no_boundary) == len(rows):
            raise UsageError(f"{str(refused)[:-1]} (and so in all {len(rows)} rows).") from refused
        left_out = "; ".join(counts.sentences(rules)) or "there was none"
        raise UsageError(f"{source}: no row is left at --max_length {max_length}: {left_out}.")
    return kept, counts


NO_PREFIX = (
    "the chat template does not render the prompt as a token prefix of prompt and response, "
    "so the response has no certain beginning."
)


def _conversations(
    chunk: Sequence[RawRow], first: int, source: str, rules: Rules, counts: Counts, seen: set[bytes]
) -> Iterable[tuple[list[Message], Sides, int]]:
    for number, raw in enumerate(chunk, first + 1):
        where = f"{source}, row {number}"
        try:
            prompt, sides = to_conversations(raw, where)
        except RowRefused as refused:
            _leave_out(rules, counts, number, refused)
            continue
        key = hashlib.blake2b(json.dumps([prompt, sides]).encode(), digest_size=16).digest()
        if key in seen:
            counts.duplicates.append(number)
            if rules.duplicates == "error":
                raise UsageError(f"{where}: the same as a row before: remove one, or pass --duplicates keep or drop.")
            if rules.duplicates == "drop":
                continue
        seen.add(key)
        if len(sides) == 2 and sides[0][0] == sides[1][0]:
            counts.same_sides.append(number)
        yield prompt, sides, number


def _leave_out(rules: Rules, counts: Counts, number: int, refused: RowRefused) -> None:
    if getattr(rules, refused.rule) == "error":
        raise refused
    getattr(counts, refused.rule).append(number)


def _fits(responses: list[Response], max_length: int, where: str, number: int, rules: Rules, counts: Counts) -> bool:
    """Whether the row stays; its responses are cut where they are too long."""
    longest = max(responses, key=lambda response: len(response.input_ids))
    if len(longest.input_ids) <= max_length:
        return True
    if rules.too_long == "error":
        raise UsageError(
            f"{where}: prompt and response have {longest.prompt_length} + {longest.tokens} tokens, more than "
            f"--max_length {max_length}: raise it, or pass --too_long cut or drop."
        )
    if rules.too_long == "drop" or longest.prompt_length >= max_length:
        counts.dropped.append(number)
        return False
    for response in responses:
        counts.cut += [number] * (len(response.input_ids) > max_length)
        response.input_ids = response.input_ids[:max_length]
    return True
