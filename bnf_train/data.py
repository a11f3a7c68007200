"""Rows of preference data to token ids, and what is cut or left out on the way."""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bnf_train.conversations import Message, RowRefused, Sides, to_conversations
from bnf_train.errors import UsageError
from bnf_train.objectives import resolve
from bnf_train.read import WHY_NOT_STREAMED, RawRow, has_splits, read_rows
from bnf_train.render import Renderer, show

if TYPE_CHECKING:
    from rich.console import Console

    from bnf_train.config import BNFConfig

__all__ = [
    "Counts",
    "Response",
    "Row",
    "Rules",
    "has_splits",
    "mask_pairs",
    "read_and_tokenize",
    "read_rows",
    "split_by_prompt",
    "tokenize",
]


@dataclass
class Response:
    """One response with its prompt, as token ids; `ref_log_odds` is filled in by the reference pass."""

    input_ids: list[int]
    prompt_length: int
    preferred: bool
    ref_log_odds: Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.input_ids) - self.prompt_length


@dataclass
class Row:
    """One row of the data: a pair of responses (preferred first), or a single one."""

    prompt: str
    responses: list[Response]
    number: int = 0  # in its source, from 1


@dataclass(frozen=True)
class Rules:
    """What becomes of rows that are not as they should be; flags have the same names and help."""

    too_long: str = "cut"  # cut the response's end (a prompt that leaves it no room drops the row), drop, error
    empty: str = "error"  # drop, error
    no_boundary: str = "drop"  # drop, error
    duplicates: str = "keep"  # keep, drop, error


@dataclass
class Counts:
    """How many rows there were, and the numbers of those that were not taken as they stand."""

    rows: int = 0
    cut: list[int] = field(default_factory=list)  # once for each response
    dropped: list[int] = field(default_factory=list)  # too long
    empty: list[int] = field(default_factory=list)
    no_boundary: list[int] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)
    same_sides: list[int] = field(default_factory=list)
    rewritten: list[int] = field(default_factory=list)

    def sentences(self, rules: Rules) -> list[str]:
        """One for each kind that there is, with its flag and row numbers."""
        explained = {
            "cut": "responses cut at the end (--too_long cut)",
            "dropped": "rows dropped as too long (--too_long)",
            "empty": "rows dropped because a response is empty (--empty drop)",
            "no_boundary": "rows dropped because their prompt is no prefix of prompt and response (--no_boundary drop)",
            "duplicates": f"exact duplicates of a row before (--duplicates {rules.duplicates})",
            "same_sides": "pairs with the same response on both sides, from which there is nothing to learn",
            "rewritten": "responses whose text the chat template changes",
        }
        return [f"{len(at):,} {text}: {_numbers(at)}" for name, text in explained.items() if (at := getattr(self, name))]


def _numbers(rows: list[int]) -> str:
    rows = sorted(set(rows))
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:5]))}{more}"


# --- tokens ----------------------------------------------------------------------------------------------------------

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


# --- which rows are trained on ---------------------------------------------------------------------------------------


def read_and_tokenize(
    config: "BNFConfig", tokenizer: PreTrainedTokenizerBase, console: "Console"
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, tokenised; what was cut or dropped is printed."""
    if config.pairing_ratio < 1 and resolve(config)[1]:
        raise UsageError(
            f"--pairing_ratio {config.pairing_ratio:g}: makes single responses of pairs, and --objective {config.objective} "
            "compares the two sides of a pair; leave it out, or use --objective bnf."
        )
    rules = Rules(config.too_long, config.empty, config.no_boundary, config.duplicates)

    def tokenized(source: str, split: str) -> list[Row]:
        raw = read_rows(source, split)
        if not raw:
            return []
        rows, counts = tokenize(raw, tokenizer, config.max_length, source, rules)
        tokens = sum(r.tokens for row in rows for r in row.responses)
        console.print(
            f"{source}, {split}: {counts.rows} rows, {tokens:,} response tokens; at --max_length {config.max_length}, "
            f"{len(counts.cut)} responses cut, {len(counts.dropped)} rows dropped."
        )
        for sentence in counts.sentences(rules):
            console.print(f"  {sentence}")
        return rows

    assert config.dataset is not None
    train_rows = tokenized(config.dataset, "train")
    if config.eval_dataset:
        held_out = tokenized(config.eval_dataset, "test")
        if not held_out:
            raise UsageError(f"--eval_dataset {config.eval_dataset}: expected a split named test, got none.")
    else:
        held_out = tokenized(config.dataset, "test") if has_splits(config.dataset) else []
    if not held_out:
        train_rows, held_out = split_by_prompt(train_rows, config.eval_size, config.seed)
    if config.pairing_ratio < 1:
        pairs = sum(len(row.responses) == 2 for row in train_rows)
        train_rows = mask_pairs(train_rows, config.pairing_ratio, config.seed)
        left = sum(len(row.responses) == 2 for row in train_rows)
        console.print(
            f"--pairing_ratio {config.pairing_ratio:g}: of {pairs} training pairs {left} stay whole, "
            f"{pairs - left} lose one side at random (--seed {config.seed})."
        )
    show(train_rows[: config.show_examples], tokenizer, console)
    return train_rows, held_out


def digest(rows: Iterable[Row]) -> str:
    """Of all that training sees of them, in their order."""
    content = hashlib.blake2b(digest_size=16)
    for row in rows:
        content.update(repr([(r.input_ids, r.prompt_length, r.preferred) for r in row.responses]).encode())
    return content.hexdigest()


def mask_pairs(rows: list[Row], pairing_ratio: float, seed: int) -> list[Row]:
    """Rows of which a share `pairing_ratio` of the pairs stays whole; of the others one side, drawn at random, is removed.

    Table 6 of the paper: the removed side is masked, so that the row is a single response.
    """
    pairs = [i for i, row in enumerate(rows) if len(row.responses) == 2]
    draw = random.Random(seed)
    masked = set(draw.sample(pairs, round((1 - pairing_ratio) * len(pairs))))
    return [replace(row, responses=[draw.choice(row.responses)]) if i in masked else row for i, row in enumerate(rows)]


def split_by_prompt(rows: list[Row], size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; all rows of a prompt go to the same side."""
    wanted = round(size * len(rows)) if size < 1 else int(size)
    by_prompt = Counter(row.prompt for row in rows)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    held_out: set[str] = set()
    taken = 0
    for prompt in prompts[:-1]:  # one prompt stays for training
        if taken >= wanted:
            break
        held_out.add(prompt)
        taken += by_prompt[prompt]
    return [r for r in rows if r.prompt not in held_out], [r for r in rows if r.prompt in held_out]
