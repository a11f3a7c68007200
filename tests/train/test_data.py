"""From rows to token ids: what is response, what is prompt, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from bnf_train.collate import Collator
from bnf_train.data import Response, Row, read_rows, split_by_prompt, to_conversations, tokenize
from bnf_train.errors import UsageError

USER, WELL, BADLY = (
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "well"},
    {"role": "assistant", "content": "badly"},
)
PAIR = ([USER], [(WELL, True), (BADLY, False)])
ACCEPTED = {
    "plain-pair": ({"prompt": "hello", "chosen": "well", "rejected": "badly"}, PAIR),
    "message-pair": ({"prompt": [USER], "chosen": [WELL], "rejected": [BADLY]}, PAIR),
    "whole-conversations": ({"chosen": [USER, WELL], "rejected": [USER, BADLY]}, PAIR),
    "conversations-beside-a-prompt": ({"prompt": "hello", "chosen": [USER, WELL], "rejected": [USER, BADLY]}, PAIR),
    "longer-conversation": (
        {"chosen": [USER, BADLY, USER, WELL], "rejected": [USER, BADLY, USER, BADLY]},
        ([USER, BADLY, USER], [(WELL, True), (BADLY, False)]),
    ),
    "identical-sides": ({"chosen": [USER, WELL], "rejected": [USER, WELL]}, ([USER], [(WELL, True), (WELL, False)])),
    "plain-single": ({"prompt": "hello", "completion": "badly", "label": False}, ([USER], [(BADLY, False)])),
    "integer-label": ({"prompt": "hello", "completion": "well", "label": 1}, ([USER], [(WELL, True)])),
    "message-single": ({"prompt": [USER], "completion": [WELL], "label": True}, ([USER], [(WELL, True)])),
    "empty-other-columns": (
        {"prompt": "hello", "chosen": None, "rejected": None, "completion": "well", "label": True},
        ([USER], [(WELL, True)]),
    ),
}
REFUSED = {
    "no-columns": ({"text": "hello"}, r"expected the columns \(prompt, chosen, rejected\).*got text"),
    "label": ({"prompt": "a", "completion": "b", "label": "good"}, "label: expected true or false .*got 'good'"),
    "empty-completion": ({"prompt": "a", "completion": " ", "label": True}, "expected a response, got an empty one"),
    "no-prompt": ({"chosen": "a", "rejected": "b"}, "expected a prompt, got none"),
    "number": ({"prompt": 3, "completion": "b", "label": True}, "prompt: expected text or a list of"),
    "user-response": ({"prompt": "a", "completion": [USER], "label": True}, "one assistant message"),
}


@pytest.mark.parametrize(("row", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_rows_become_conversations(row: dict[str, Any], expected: Any) -> None:
    assert to_conversations(row, "WHERE") == expected


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        to_conversations(row, "WHERE")


def test_response_ends_with_its_end_of_turn_and_no_more(tokenizer: PreTrainedTokenizerFast) -> None:
    rows, _ = tokenize([ACCEPTED["plain-pair"][0]], tokenizer, 100, "x.jsonl")
    for response, text in zip(rows[0].responses, ("well", "badly"), strict=True):
        ids = response.input_ids
        assert tokenizer.decode(ids[response.prompt_length :]) == text + "<|im_end|>"  # not the newline after it
        assert tokenizer.decode(ids[: response.prompt_length]) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_end_of_turn_is_added_where_the_template_has_none(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    rows, _ = tokenize([{"prompt": "a", "completion": "b", "label": True}], tokenizer, 100, "x.jsonl")
    response = rows[0].responses[0]
    assert tokenizer.decode(response.input_ids[response.prompt_length :]) == "b <|im_end|>"


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UsageError, match=r"x.jsonl, row 1: the chat template does not render the prompt as a token prefix"):
        tokenize([{"prompt": "a", "completion": "b", "label": True}], tokenizer, 100, "x.jsonl")


def test_truncation_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    raw = [{"prompt": "p" * n, "completion": "c" * 10, "label": True} for n in (1, 10, 50)]
    length = len(tokenize(raw[1:2], tokenizer, 1000, "x")[0][0].responses[0].input_ids)
    rows, counts = tokenize(raw, tokenizer, length - 3, "x.jsonl")
    assert counts == {"rows": 3, "cut": 1, "dropped": 1}
    assert [row.responses[0].tokens for row in rows] == [11, 8]
    with pytest.raises(UsageError, match="no row is left"):
        tokenize(raw, tokenizer, 5, "x.jsonl")


@given(shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans()), min_size=1, max_size=4))
def test_collator_lines_up_positions_and_labels(shapes: list[tuple[int, int, bool, bool]]) -> None:
    """Also where the response holds the padding token: masks come from positions, not from ids."""
    rows = []
    for prompt, length, preferred, paired in shapes:
        response = Response([7] * prompt + list(range(length)), prompt, preferred, torch.arange(length) / 10)
        rows.append(Row("p", [response] * (1 + paired)))
    batch = Collator(pad_token_id=0)(rows)
    responses = [r for row in rows for r in row.responses]
    following = batch["input_ids"].flatten()[batch["response_positions"] + 1]
    assert torch.equal(following, batch["response_labels"])
    assert batch["response"].bincount().tolist() == [r.tokens for r in responses]
    assert batch["attention_mask"].sum(1).tolist() == [len(r.input_ids) for r in responses]
    assert batch["row"].bincount().tolist() == [len(row.responses) for row in rows]
    assert torch.equal(batch["ref_log_odds"], torch.cat([torch.arange(r.tokens) / 10 for r in responses]))


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2), st.sampled_from([0.0, 0.1, 0.5, 2.0]), st.integers(0, 3))
def test_split_keeps_a_prompt_on_one_side(prompts: list[str], size: float, seed: int) -> None:
    rows = [Row(p, []) for p in prompts]
    train, held_out = split_by_prompt(rows, size, seed)
    assert len(train) + len(held_out) == len(rows)
    assert train
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert bool(held_out) == (size > 0 and round(size * len(rows) if size < 1 else size) > 0 and len(set(prompts)) > 1)


def test_json_lines_may_hold_any_character(write_rows: Callable[..., Path]) -> None:
    row = {"prompt": "a\u2028b\x85c", "completion": "d", "label": True}  # what str.splitlines would cut in two
    assert read_rows(str(write_rows([row]))) == [row]


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_other_file_formats(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{suffix}")(str(path))
    assert read_rows(str(path)) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b", "label": true}\n{"prompt": \n', "line 2: expected a JSON object"),
        ("[1, 2]\n", "expected JSON objects"),
        ("", "expected JSON objects"),
    ],
)
def test_damaged_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_rows(str(path))
    with pytest.raises(UsageError, match="no such file"):
        read_rows(str(tmp_path / "none.jsonl"))
