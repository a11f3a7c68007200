"""From rows to token ids: what is response, what is prompt, and what is refused."""

import datetime
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_rows import PAIRS
from rich.console import Console
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from bnf_train.__main__ import main
from bnf_train.data import (
    Collator,
    Counts,
    Response,
    Row,
    Rules,
    mask_pairs,
    read_and_tokenize,
    read_rows,
    split_by_prompt,
    tokenize,
)
from bnf_train.data.conversations import to_conversation
from bnf_train.data.show import show
from bnf_train.errors import UsageError
from bnf_train.flags import parse
from bnf_train.model.load import load_tokenizer

SYSTEM, USER, WELL, BADLY = (
    {"role": "system", "content": "be brief"},
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
    "ultrafeedback": (
        {
            "prompt": "hello",
            "chosen": [SYSTEM, USER, WELL],
            "rejected": [SYSTEM, USER, BADLY],
            "messages": [USER],
            "score": 1.5,
        },
        ([SYSTEM, USER], PAIR[1]),
    ),
    "message-prompt-beside-text": (
        {"prompt": [SYSTEM, USER], "chosen": "well", "rejected": [BADLY]},
        ([SYSTEM, USER], PAIR[1]),
    ),
    "single-conversation": ({"completion": [USER, WELL], "label": 1.0}, ([USER], [(WELL, True)])),
    "same-turn-twice": (
        {"chosen": [USER, WELL, USER, WELL], "rejected": [USER, WELL, USER, BADLY]},
        ([USER, WELL, USER], [(WELL, True), (BADLY, False)]),
    ),
    "extra-keys-of-messages": (
        {"prompt": [USER | {"name": "Ann"}], "chosen": [WELL | {"thinking": "Hm."}], "rejected": [BADLY]},
        ([USER | {"name": "Ann"}], [(WELL | {"thinking": "Hm."}, True), (BADLY, False)]),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hello"}],
            "chosen": {"from": "gpt", "value": "well"},
            "rejected": {"from": "gpt", "value": "badly"},
        },
        ([SYSTEM, USER], PAIR[1]),
    ),
    "system-column": (
        {"system": "be brief", "prompt": "hello", "chosen": "well", "rejected": "badly"},
        ([SYSTEM, USER], PAIR[1]),
    ),
    "system-column-and-message": (
        {"system": "be brief ", "prompt": [SYSTEM, USER], "chosen": "well", "rejected": "badly"},
        ([SYSTEM, USER], PAIR[1]),
    ),
    "parts-of-text": (
        {
            "prompt": [USER | {"content": [{"type": "text", "text": "hel"}, {"text": "lo"}]}],
            "chosen": "well",
            "rejected": "badly",
        },
        PAIR,
    ),
    "label-as-text": ({"prompt": "hello", "completion": "badly", "label": "False"}, ([USER], [(BADLY, False)])),
    "completions": (
        {"prompt": "hello", "completions": ["well", [BADLY], "so so"], "labels": [True, 0, "false"]},
        ([USER], [(WELL, True), (BADLY, False), (BADLY | {"content": "so so"}, False)]),
    ),
    "tool-call-without-text": (
        {
            "prompt": [
                USER,
                WELL | {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
                USER,
            ],
            "chosen": "well",
            "rejected": "badly",
        },
        (
            [USER, WELL | {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}, USER],
            PAIR[1],
        ),
    ),
    "empty-cells-of-the-other-shape": (
        {"prompt": "hello", "chosen": "", "rejected": "", "completion": "well", "label": True},
        ([USER], [(WELL, True)]),
    ),
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
    "label-missing": ({"prompt": "a", "completion": "b"}, "label: expected true or false .*got null"),
    "label-2": ({"prompt": "a", "completion": "b", "label": 2}, "label: expected true or false .*got 2"),
    "label-nan": ({"prompt": "a", "completion": "b", "label": float("nan")}, "label: expected true or false .*got nan"),
    "both-shapes": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": True},
        "got chosen, rej",
    ),
    "one-side": ({"prompt": "a", "chosen": "b", "rejected": None}, "expected the columns .*, got chosen"),
    "empty-side": ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected: expected a response, got an empty one"),
    "empty-prompt": ({"prompt": " ", "chosen": "a", "rejected": "b"}, "expected a prompt, got none"),
    "no-messages": ({"prompt": "a", "chosen": [], "rejected": "b"}, "chosen: expected one assistant message"),
    "other-prompt": (
        {"prompt": "bye", "chosen": [USER, WELL], "rejected": [USER, BADLY]},
        "prompt: expected a part of",
    ),
    "several-turns": (
        {"prompt": "bye", "chosen": [WELL, USER, WELL], "rejected": [WELL, USER, BADLY]},
        "chosen: a response of 3 messages, and responses of several turns are not supported",
    ),
    "two-system-messages": (
        {"system": "be long", "prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b"},
        "system: expected no system message in the prompt beside it",
    ),
    "an-image": (
        {"prompt": [USER | {"content": [{"type": "image", "url": "x"}]}], "chosen": "a", "rejected": "b"},
        "expected parts of text in message 1, got image",
    ),
    "score-nan": (
        {"prompt": "a", "completion": "b", "score": float("nan")},
        "score: expected a finite number of .*got nan",
    ),
    "score-text": (
        {"prompt": "a", "completion": "b", "score": "good"},
        "score: expected a finite number of .*got 'good'",
    ),
    "uneven-lists": (
        {"prompt": "a", "completions": ["b", "c"], "labels": [True]},
        "completions, labels: expected two lists of one length, .*got 2 and 1",
    ),
    "no-completions": ({"prompt": "a", "completions": [], "labels": []}, "and something in them, got 0 and 0"),
    "calls-no-list": ({"prompt": "a", "completion": [WELL | {"tool_calls": 5}], "label": 1}, "expected a list, got 5"),
    "a-call-of-text": (
        {"prompt": "a", "completion": [WELL | {"tool_calls": [{"function": "f"}]}], "label": 1},
        "expected a function, got 'f'",
    ),
    "a-score-too-long": ({"prompt": "a", "completion": "b", "score": 10**400}, "score: expected a finite number"),
    "half-a-character-in-system": ({"system": "\ud800", "prompt": "a", "completion": "b", "label": 1}, "system: .*half a char"),
    "half-a-character-in-tools": (
        {"tools": [{"name": "\ud800"}], "prompt": "a", "completion": "b", "label": 1},
        "tools: .*half a char",
    ),
    "tools-no-list": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "tools": "f"},
        "tools: expected a list of JSON schemas, got 'f'",
    ),
    "different-first-turns": (
        {"chosen": [USER, WELL], "rejected": [USER | {"content": "bye"}, WELL]},
        "differ in their last message only, got 2 and 2 messages after the 0",
    ),
    "one-goes-on": (
        {"chosen": [USER, WELL], "rejected": [USER, WELL, USER, BADLY]},
        "differ in their last message only, got 1 and 3 messages after the 1",
    ),
    "content-null": (
        {"prompt": [USER | {"content": None}], "chosen": "a", "rejected": "b"},
        "got null as the content",
    ),
    "no-role": ({"prompt": [{"content": "a"}], "chosen": "a", "rejected": "b"}, "prompt: .* got none as the role of message 1"),
    "surrogate": (
        {"prompt": "a\ud800", "chosen": "a", "rejected": "b"},
        r"prompt: .* half a character \('.ud800",
    ),
    "user-response": ({"prompt": "a", "completion": [USER], "label": True}, "one assistant message"),
}


@pytest.mark.parametrize(("row", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_rows_become_conversations(row: dict[str, Any], expected: Any) -> None:
    found = to_conversation(row, "WHERE")
    assert (found.prompt, [(a.message, a.score == 1) for a in found.answers]) == expected


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        to_conversation(row, "WHERE")


# --- rendering -------------------------------------------------------------------------------------------------------

SINGLE = {"prompt": "a", "completion": "b", "label": True}
FOR_MESSAGE = "{% for m in messages %}"
WITHOUT_EOS = FOR_MESSAGE + "{{ m['content'] + ' ' }}{% endfor %}"


def response_text(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> tuple[str, str]:
    """Prompt and response as they are trained on."""
    response = tokenize([row], tokenizer, 1000, "x.jsonl")[0][0].responses[0]
    return tokenizer.decode(response.input_ids[: response.prompt_length]), tokenizer.decode(
        response.input_ids[response.prompt_length :]
    )


def test_response_ends_with_its_end_of_turn_and_no_more(tokenizer: PreTrainedTokenizerFast) -> None:
    rows, _ = tokenize([ACCEPTED["plain-pair"][0]], tokenizer, 100, "x.jsonl")
    for response, text in zip(rows[0].responses, ("well", "badly"), strict=True):
        ids = response.input_ids
        assert tokenizer.decode(ids[response.prompt_length :]) == text + "<|im_end|>"  # not the newline after it
        assert tokenizer.decode(ids[: response.prompt_length]) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "completion", "expected"),
    [
        (WITHOUT_EOS, "b", ("a ", "b<|im_end|>")),
        (WITHOUT_EOS, "b<|im_end|>", ("a ", "b<|im_end|>")),
        (WITHOUT_EOS, "b<|im_start|>", ("a ", "b<|im_start|><|im_end|>")),  # a special token of the data ends no turn
        (FOR_MESSAGE + "{{ m['content'] + '<|im_end|>' }}{% endfor %}", "b<|im_end|>", ("a<|im_end|>", "b<|im_end|>")),
        (FOR_MESSAGE + "{{ m['content'] + '<|turn|> \n' }}{% endfor %}", "b", ("a<|turn|> \n", "b<|turn|>")),  # as gemma's
        (
            FOR_MESSAGE + "{{ m['content'] + '<|turn|><|im_end|>' }}{% endfor %}",
            "b",
            ("a<|turn|><|im_end|>", "b<|turn|><|im_end|>"),
        ),
        ("{{ '<s>' }}" + WITHOUT_EOS, "b", ("<s>a ", "b<|im_end|>")),
    ],
    ids=["no-eos", "eos-in-the-data", "other-token-in-the-data", "eos-in-both", "not-the-eos", "two", "bos"],
)
def test_one_bos_and_one_end_of_turn(
    tokenizer: PreTrainedTokenizerFast, template: str, completion: str, expected: tuple[str, str]
) -> None:
    """Whatever template and data write of them, and though the tokenizer by itself puts a BOS before every text."""
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>", "<|turn|>"]})
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = template
    assert response_text(tokenizer, SINGLE | {"completion": completion}) == expected


def test_text_that_begins_with_a_bos_does_not_double_the_templates(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}" + WITHOUT_EOS
    assert response_text(tokenizer, SINGLE | {"prompt": "<s>a"}) == ("<s>a ", "b<|im_end|>")


REWRITES_SOME = FOR_MESSAGE + (
    "{{ 'long ' if messages | length > 1 and messages[0]['content'] == 'odd' }}{{ m['content'] + '<|im_end|>' }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
)


def test_a_prompt_that_prompt_and_response_do_not_begin_with(tokenizer: PreTrainedTokenizerFast) -> None:
    """The response stands between what the template writes around others; only a call, which it alone can write, cannot."""
    tokenizer.chat_template = REWRITES_SOME
    assert response_text(tokenizer, SINGLE | {"prompt": "odd"}) == ("odd<|im_end|>", "b<|im_end|>")
    call = [WELL | {"content": None, "tool_calls": [{"name": "f"}]}]
    raw = [SINGLE, SINGLE | {"prompt": "odd", "completion": call}, SINGLE | {"prompt": "c", "completion": call}]
    rows, counts = tokenize(raw, tokenizer, 100, "x.jsonl")
    assert [row.number for row in rows] == [1, 3]
    assert counts == Counts(rows=3, left_out={"no_boundary": [2]})
    assert counts.sentences(Rules())[0].endswith("not certain where their response begins (--no_boundary drop): row 2")
    expected = r"x.jsonl, row 2: the chat template does not write the prompt before prompt and response"
    with pytest.raises(UsageError, match=expected):
        tokenize(raw, tokenizer, 100, "x.jsonl", Rules(no_boundary="error"))
    with pytest.raises(UsageError, match=r"x.jsonl, row 1: the chat template .* \(and so in all 2 rows\)"):
        tokenize([raw[1], raw[1] | {"label": False}], tokenizer, 100, "x.jsonl")


def test_a_template_that_changes_the_response_is_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = FOR_MESSAGE + "{{ m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
    _, counts = tokenize([SINGLE, SINGLE | {"completion": "<think>why</think>b"}], tokenizer, 100, "x.jsonl")
    assert counts == Counts(rows=2, rewritten=[2])


def test_what_the_template_refuses_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = FOR_MESSAGE + (
        "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    system = {"prompt": [{"role": "system", "content": "Be brief."}, USER], "completion": "b", "label": True}
    with pytest.raises(
        UsageError,
        match=r"row 2: .* refuses this conversation \(System role not supported\); fix it, or pass --template_refuses drop\.$",
    ):
        tokenize([SINGLE, system], tokenizer, 100, "x.jsonl")
    tokenizer.chat_template = "{% for"
    with pytest.raises(UsageError, match=r"x.jsonl, row 1: the model's chat template refuses"):
        tokenize([SINGLE], tokenizer, 100, "x.jsonl")
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match=r"no chat template; use an instruction-tuned model, or pass --chat_template FILE\.$"):
        tokenize([SINGLE], tokenizer, 100, "x.jsonl")


def test_a_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end-of-sequence token; set eos_token"):
        tokenize([SINGLE], tokenizer, 100, "x.jsonl")


# --- rules -----------------------------------------------------------------------------------------------------------


def test_truncation_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    raw = [{"prompt": "p" * n, "completion": "c" * 10, "label": True} for n in (1, 10, 50)]
    length = len(tokenize(raw[1:2], tokenizer, 1000, "x")[0][0].responses[0].input_ids)
    rows, counts = tokenize(raw, tokenizer, length - 3, "x.jsonl")
    assert counts == Counts(rows=3, left_out={"too_long": [3]}, cut=[2])
    assert [row.responses[0].tokens for row in rows] == [11, 8]
    rows, counts = tokenize(raw, tokenizer, length - 3, "x.jsonl", Rules(too_long="drop"))
    assert counts == Counts(rows=3, left_out={"too_long": [2, 3]})
    assert [row.number for row in rows] == [1]
    message = f"x.jsonl, row 2: prompt and response have {length - 11} \\+ 11 tokens, more than --max_length {length - 3}"
    with pytest.raises(UsageError, match=message):
        tokenize(raw, tokenizer, length - 3, "x.jsonl", Rules(too_long="error"))
    with pytest.raises(UsageError, match=r"no row is left at --max_length 5: 3 rows dropped as too long .*: rows 1, 2, 3\.$"):
        tokenize(raw, tokenizer, 5, "x.jsonl")


def test_empty_responses_stop_or_are_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    raw = [SINGLE, SINGLE | {"completion": "\n"}]
    with pytest.raises(UsageError, match=r"x.jsonl, row 2: completion: expected a response, got an empty one"):
        tokenize(raw, tokenizer, 100, "x.jsonl")
    rows, counts = tokenize(raw, tokenizer, 100, "x.jsonl", Rules(empty="drop"))
    assert counts == Counts(rows=2, left_out={"empty": [2]})
    assert len(rows) == 1
    with pytest.raises(UsageError, match=r"no row is left .* because a response is empty \(--empty drop\): row 1"):
        tokenize(raw[1:], tokenizer, 100, "x.jsonl", Rules(empty="drop"))


def test_duplicates_are_counted_and_kept_or_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    """The same text as messages is a duplicate; another label, or more text, is not."""
    raw = [
        SINGLE,
        SINGLE | {"label": False},
        SINGLE | {"completion": "bb"},
        SINGLE,
        SINGLE | {"prompt": [USER | {"content": "a"}]},
    ]
    for rule, kept in (("keep", 5), ("drop", 3)):
        rows, counts = tokenize(raw, tokenizer, 100, "x.jsonl", Rules(duplicates=rule))
        assert counts == Counts(rows=5, left_out={"duplicates": [4, 5]})
        assert len(rows) == kept
    with pytest.raises(UsageError, match=r"x.jsonl, row 4: the same as a row before"):
        tokenize(raw, tokenizer, 100, "x.jsonl", Rules(duplicates="error"))


def test_rows_do_not_depend_on_the_chunk_that_they_are_in(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = [SINGLE | {"prompt": "p" * n, "completion": "c" * (n % 7)} for n in range(1, 40)]
    once = tokenize(raw, tokenizer, 57, "x.jsonl", Rules(empty="drop"))
    assert once[1].left_out["empty"] == [7, 14, 21, 28, 35]
    assert once[1].left_out["too_long"]
    monkeypatch.setattr("bnf_train.data.tokens.CHUNK", 4)
    assert tokenize(raw, tokenizer, 57, "x.jsonl", Rules(empty="drop")) == once


def test_a_stream_is_refused_with_the_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    import datasets

    stream = datasets.Dataset.from_list([SINGLE]).to_iterable_dataset()
    with pytest.raises(UsageError, match="a stream instead of a table, but every response is scored once by the reference"):
        tokenize(stream, tokenizer, 100, "x")
    with pytest.raises(UsageError, match="--streaming: not possible, because every response is scored"):
        parse(["--streaming"])
    with pytest.raises(UsageError, match="a stream instead of a file"):
        read_rows("/dev/null")


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_pairing_ratio_masks_one_side_of_the_other_pairs(ratio: float) -> None:
    """Table 6: an exact share of pairs, both sides about as often, the same at the same seed; single responses stay."""
    pairs = [Row(f"p{i}", [Response([i, 1], 1, True), Response([i, 2], 1, False)], i) for i in range(400)]
    rows = [*pairs, Row("single", [Response([0, 1], 1, True)])]
    masked = mask_pairs(rows, ratio, seed=1)
    assert [(row.prompt, row.number) for row in masked] == [(row.prompt, row.number) for row in rows]
    assert sum(len(row.responses) == 2 for row in masked) == ratio * 400
    singles = [row.responses[0] for row in masked[:-1] if len(row.responses) == 1]
    assert all(response in pairs[response.input_ids[0]].responses for response in singles)
    assert abs(sum(response.preferred for response in singles) - len(singles) / 2) < 4 * (len(singles) / 4) ** 0.5 + 1
    assert masked[-1] == rows[-1]
    assert mask_pairs(rows, ratio, seed=1) == masked
    assert (mask_pairs(rows, ratio, seed=2) == masked) == (ratio == 1)
    assert all(len(row.responses) == 2 for row in pairs)  # the caller's own


def test_examples_show_the_mask_without_colour(tokenizer: PreTrainedTokenizerFast) -> None:
    rows, _ = tokenize([ACCEPTED["plain-pair"][0], SINGLE | {"completion": "\x1b[31mred"}], tokenizer, 100, "x.jsonl")
    text = io.StringIO()
    show(rows, tokenizer, Console(file=text, soft_wrap=True, highlight=False))
    assert "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n" in text.getvalue()
    for line in (
        "Row 1: 24 prompt tokens, which are not in the loss",
        "preferred, 5 tokens: ⟦well<|im_end|>⟧",
        "dispreferred, 6 tokens: ⟦badly<|im_end|>⟧",
        "⟦\\x1b[31mred<|im_end|>⟧",
    ):
        assert line in text.getvalue()
    coloured = io.StringIO()
    show(rows, tokenizer, Console(file=coloured, soft_wrap=True, highlight=False, force_terminal=True, color_system="standard"))
    assert "\x1b[2m<|im_start|>user" in coloured.getvalue()  # dim
    assert "\x1b[32m⟦well<|im_end|>⟧\x1b[0m" in coloured.getvalue()
    assert "\x1b[31m⟦badly<|im_end|>⟧\x1b[0m" in coloured.getvalue()


def test_a_run_prints_what_it_did_with_the_rows(
    tokenizer: PreTrainedTokenizerFast, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows([*PAIRS, PAIRS[0], PAIRS[1] | {"chosen": ""}, PAIRS[2] | {"rejected": PAIRS[2]["chosen"]}])
    flags = ["--dataset", str(rows), "--eval_size", "0", "--empty", "drop", "--duplicates", "drop"]
    flags += ["--pairing-ratio", "0.25", "--show-examples", "1", "--output_dir", str(tmp_path / "out")]
    text = io.StringIO()
    console = Console(file=text, soft_wrap=True, highlight=False)
    train_rows, held_out = read_and_tokenize(parse(flags), tokenizer, console)
    assert [len(row.responses) for row in train_rows].count(2) == 2
    assert not held_out
    printed = text.getvalue()
    for line in (
        "11 rows, ",
        "1 rows dropped because a response is empty (--empty drop): row 10",
        "1 exact duplicates of a row before (--duplicates drop): row 9",
        "1 pairs with the same response on both sides, from which there is nothing to learn: row 11",
        "of 9 training pairs 2 stay whole, 7 lose one side at random (--seed 42)",
        "Row 1: ",
    ):
        assert line in printed
    assert "Row 2: " not in printed
    with pytest.raises(UsageError, match=r"--pairing_ratio 0\.25: makes single responses of pairs, and --objective dpo"):
        read_and_tokenize(parse([*flags, "--objective", "dpo"]), tokenizer, Console(quiet=True))


# --- batches and splits ----------------------------------------------------------------------------------------------


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


def test_packing_is_chosen_where_it_is_less_work() -> None:
    from bnf_train.data.collate import worth_packing

    assert worth_packing([10, 100, 20, 30], float("inf"))
    assert not worth_packing([100, 100, 100, 95], float("inf"))  # nearly no padding
    assert worth_packing([100, 200, 150, 90], 3456)
    assert not worth_packing([100, 200, 150, 90] * 8, 1152)  # attention over 4,000 positions is more than the padding
    assert not worth_packing([7], float("inf"))


def test_several_data_sets_are_mixed(
    model_folder: Path, tmp_path: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with counts and held-out metrics of its own; a share is drawn by the seed; no held-out prompt is trained on."""
    one, two = write_rows(PAIRS, "one.jsonl"), write_rows([row | {"prompt": f"{row['prompt']}?"} for row in PAIRS], "two.jsonl")
    output = tmp_path / "out"
    flags = ["--model", str(model_folder), "--dataset", str(one), f"{two}=0.5", "--eval_size", "2", "--max_steps", "1"]
    flags += ["--batch_size", "2", "--output_dir", str(output), "--disable_tqdm", "true", "--save_strategy", "no"]
    assert main(flags) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{one}, train: 8 rows" in said
    assert f"{two}=0.5, train: 4 rows" in said
    assert "2 data sets: 8 rows, shuffled (--seed 42)." in said
    metrics = json.loads((output / "metrics.json").read_text())
    by_source, tokenizer = metrics["held_out_by_dataset"], load_tokenizer(str(model_folder))
    assert list(by_source) == [str(one), f"{two}=0.5"]
    assert sum(m["eval_responses/preferred"] for m in by_source.values()) == 4
    assert metrics["held_out"]["eval_responses/preferred"] == 4
    rows = [read_and_tokenize(parse(flags), tokenizer, Console(quiet=True))[0] for _ in range(2)]
    assert [(row.source, row.number) for row in rows[0]] == [(row.source, row.number) for row in rows[1]]
    shared = write_rows(PAIRS, "shared.jsonl")
    flags[4] = str(shared)
    flags[3] = str(one)
    train, held_out = read_and_tokenize(parse(flags), tokenizer, Console(quiet=True))
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}


def test_scores_are_centred_before_zeros_are_left_out(
    model_folder: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows([{"prompt": "q", "completions": ["a", "b", "c"], "scores": [0, 1, 2]}])
    flags = ["--model", str(model_folder), "--dataset", str(rows), "--score_center", "mean", "--eval_size", "0"]
    (row,), _ = read_and_tokenize(parse(flags), load_tokenizer(str(model_folder)), Console(quiet=True))
    assert [response.score for response in row.responses] == [-1, 1]


def test_a_share_keeps_the_numbers_of_its_rows(model_folder: Path, write_rows: Callable[..., Path]) -> None:
    rows = write_rows([SINGLE | {"prompt": str(number), "completion": str(number)} for number in range(1, 41)])
    flags = ["--model", str(model_folder), "--dataset", f"{rows}=0.3", "--eval_size", "0"]
    tokenizer = load_tokenizer(str(model_folder))
    found, _ = read_and_tokenize(parse(flags), tokenizer, Console(quiet=True))
    assert len(found) == 12
    assert all(f'"content": "{row.number}"' in row.prompt for row in found)


def test_keys_that_are_no_json_do_no_harm(tokenizer: PreTrainedTokenizerFast) -> None:
    row = SINGLE | {"prompt": [USER | {"when": datetime.datetime(2024, 1, 1), "raw": b"x"}]}
    _, counts = tokenize([row], tokenizer, 100, "x.jsonl")
    assert counts.unused == [
        "x.jsonl: keys of messages that are not used, because the chat template does not read them: raw, when."
    ]


def test_a_model_is_saved_with_the_template_that_it_was_trained_with(
    model_folder: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    (own := tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    flags = ["--model", str(model_folder), "--dataset", str(write_rows(PAIRS)), "--output_dir", str(tmp_path / "out")]
    flags += [
        "--chat_template",
        str(own),
        "--max_steps",
        "1",
        "--batch_size",
        "2",
        "--eval_size",
        "0",
        "--disable_tqdm",
        "true",
    ]
    assert main(flags) == 0
    assert load_tokenizer(str(tmp_path / "out")).chat_template == own.read_text()
