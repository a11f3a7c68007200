"""Rows of preference data to token ids: read, render with the chat template, tokenise."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bnf_train.errors import UsageError
from bnf_train.load import load_file, load_hub_dataset

Message = dict[str, Any]
SPLITS = {"train": ("train", "train_prefs"), "test": ("test", "test_prefs", "validation")}
FILES = {".parquet": "parquet", ".csv": "csv"}
COLUMNS = ("prompt", "chosen", "rejected", "completion", "label")
SHAPES = "(prompt, chosen, rejected) or (prompt, completion, label)"


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


# --- reading ---------------------------------------------------------------------------------------------------------


def read_rows(source: str, split: str = "train") -> list[dict[str, Any]]:
    """Rows of a local file or of a hub dataset's split; [] where a hub dataset has no such split."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json") or (path.exists() and not path.is_dir() and path.suffix not in FILES):
        return _read_json(path)
    if path.suffix in FILES:
        _check_file(path)
        rows = load_file(FILES[path.suffix], path)
    else:
        splits = load_hub_dataset(source)
        name = next((name for name in SPLITS[split] if name in splits), None)
        if name is None and split == "train":
            raise UsageError(
                f"--dataset {source}: expected a split named {' or '.join(SPLITS[split])}, got {', '.join(splits)}."
            )
        rows = splits[name] if name else []
    return [{k: row[k] for k in row if k in COLUMNS} for row in rows]


def _read_json(path: Path) -> list[dict[str, Any]]:
    _check_file(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {error.lineno}: expected a JSON list of rows, got {error.msg}.") from error
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a string
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UsageError(f"{path}, line {number}: expected a JSON object, got {error.msg}.") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: expected JSON objects, one a row, with the columns {SHAPES}.")
    return rows


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")


# --- rows to conversations -------------------------------------------------------------------------------------------


def to_conversations(row: dict[str, Any], where: str) -> tuple[list[Message], list[tuple[Message, bool]]]:
    """Prompt messages, and each response message with its label (a pair's preferred one first)."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        sides = [(row["chosen"], True), (row["rejected"], False)]
    elif row.get("completion") is not None and row.get("label") is not None:
        if row["label"] not in (True, False, 0, 1):
            raise UsageError(f"{where}: label: expected true or false (or 1, 0), got {row['label']!r}.")
        sides = [(row["completion"], bool(row["label"]))]
    else:
        raise UsageError(f"{where}: expected the columns {SHAPES}, got {', '.join(row) or 'none'}.")
    prompt = _messages(row.get("prompt") or [], "user", f"{where}: prompt")
    conversations = [(_messages(side, "assistant", f"{where}: response"), label) for side, label in sides]
    if all(len(messages) > 1 for messages, _ in conversations):  # whole conversations: what they share is the prompt
        whole = [messages for messages, _ in conversations]
        shared = next((i for i, turns in enumerate(zip(*whole, strict=False)) if turns.count(turns[0]) < len(turns)), 0)
        prompt = whole[0][: shared or len(whole[0]) - 1]
        conversations = [(messages[len(prompt) :], label) for messages, label in conversations]
    if not prompt:
        raise UsageError(f"{where}: expected a prompt, got none: add a prompt column, or the messages before the response.")
    for messages, _ in conversations:
        if len(messages) != 1 or messages[0].get("role") != "assistant":
            raise UsageError(
                f"{where}: expected each response to be one assistant message after a shared prompt, "
                f"got the roles {[m.get('role') for m in messages]}."
            )
        if not str(messages[0].get("content") or "").strip():
            raise UsageError(f"{where}: expected a response, got an empty one: remove the row.")
    return prompt, [(messages[0], label) for messages, label in conversations]


def _messages(value: Any, role: str, where: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        return [{"role": m["role"], "content": m["content"]} for m in value]
    raise UsageError(f"{where}: expected text or a list of {{role, content}} messages, got {str(value)[:60]!r}.")


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokenize(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, source: str
) -> tuple[list[Row], dict[str, int]]:
    """Rows rendered with the model's chat template, and how many responses were cut or rows dropped at max_length."""
    if not tokenizer.chat_template:
        raise UsageError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; use an instruction-tuned model.")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token; set eos_token in it.")
    kept: list[Row] = []
    counts = {"rows": len(rows), "cut": 0, "dropped": 0}
    for number, raw in enumerate(tqdm(rows, desc=f"tokenising {Path(source).name}", leave=False), 1):
        where = f"{source}, row {number}"
        prompt, sides = to_conversations(raw, where)
        responses = [render(tokenizer, prompt, message, label, where) for message, label in sides]
        if any(response.prompt_length >= max_length for response in responses):
            counts["dropped"] += 1
            continue
        for response in responses:
            counts["cut"] += len(response.input_ids) > max_length
            response.input_ids = response.input_ids[:max_length]
        kept.append(Row(json.dumps(prompt, sort_keys=True), responses))
    if not kept:
        raise UsageError(f"{source}: no row is left: every prompt has --max_length {max_length} tokens or more.")
    return kept, counts


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], message: Message, preferred: bool, where: str
) -> Response:
    """Token ids of prompt and response, ending with the end-of-turn token; the boundary is found by token prefix."""

    def template(messages: list[Message], **kwargs: Any) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)
        return ids

    start = template(prompt, add_generation_prompt=True)
    whole = template([*prompt, message])
    if whole[: len(start)] != start:
        raise UsageError(
            f"{where}: the chat template does not render the prompt as a token prefix of prompt and response, "
            "so the response has no certain beginning."
        )
    end = _end_of_turn(tokenizer, whole, len(start))
    ids = [*whole, tokenizer.eos_token_id] if end is None else whole[:end]
    return Response(ids, len(start), preferred)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int) -> int | None:
    """One past the special token that closes the response; what a template writes after it is white space at most."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    last = next((i for i in range(len(ids) - 1, start, -1) if ids[i] in special), None)
    return None if last is None or tokenizer.decode(ids[last + 1 :]).strip() else last + 1


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
