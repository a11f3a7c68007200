"""Which tokens count: earlier turns of the assistant, messages of weight 0, spans of a response."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_templates import (
    CALL,
    CHANNELS,
    CHATML,
    FORGETS_THOUGHTS,
    MARKS,
    RESPONSE_MARKS,
    SYSTEM,
    SYSTEM_IN_LAST_USER,
    THINKS_ALWAYS,
    THINKS_IF_ASKED,
    TOOLS,
    TWO_ENDS,
    USER,
    turn,
)
from test_trainer import one_step
from transformers import PreTrainedTokenizerFast

from bnf_train.data import Collator, Counts, Response, Row, Rules, digest, passes, tokenize
from bnf_train.data.show import show
from bnf_train.errors import UsageError
from bnf_train.model.load import load_model
from bnf_train.training.reference_cache import _by_content, _left_out

AGAIN, GREEN = turn("user", "Another."), turn("assistant", "Green.")
TALK = [USER, GREEN, AGAIN]
THOUGHT = turn("assistant", "<think>\nLeaf.\n</think>\n\nGreen.")


@pytest.fixture
def marked(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return tokenizer


def row(prompt: Any, completion: Any = "Blue.", **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": True, **columns}


def read(
    tokenizer: PreTrainedTokenizerFast, *rows: dict[str, Any], train_on: str = "all_assistant", **rules: str
) -> tuple[list[Response], Counts]:
    found, counts = tokenize(list(rows), tokenizer, 1000, "x.jsonl", Rules(**rules), train_on=train_on)
    return [response for row in found for response in row.responses], counts


def shown(tokenizer: PreTrainedTokenizerFast, response: Response) -> str:
    """The text, what counts in brackets, and what it counts where that is not 1."""
    text, weights = "", [0.0] * response.prompt_length + (response.weights or [1.0] * response.tokens)
    ids, at = response.input_ids, 0
    while at < len(ids):
        end = next((i for i in range(at, len(ids)) if weights[i] != weights[at]), len(ids))
        part = tokenizer.decode(ids[at:end])
        text += part if not weights[at] else f"[{part}]" if weights[at] == 1 else f"[{part}]{weights[at]:g}"
        at = end
    return text


START, SAID = "<|im_start|>", "<|im_end|>\n<|im_start|>"
CHATML_TALK = f"{START}user\nName a colour.{SAID}assistant\n[Green.<|im_end|>]\n{START}user\nAnother.{SAID}assistant\n"
PLACES = {
    "as chatml": (CHATML, TALK, CHATML_TALK + "[Blue.<|im_end|>]"),
    "the system message in the last user's": (
        SYSTEM_IN_LAST_USER,
        [SYSTEM, *TALK],
        "<|turn|>Name a colour.<|stop|>[ Green.<|im_end|>]<|turn|>Be brief.\n\nAnother.<|stop|>[ Blue.<|im_end|>]",
    ),
    "a block in the last answer only": (
        THINKS_IF_ASKED,
        TALK,
        CHATML_TALK + "[<think>\n\n</think>\n\nBlue.<|im_end|>]",
    ),
    "a block that the prompt opens": (
        THINKS_ALWAYS,
        TALK,
        CHATML_TALK.replace("[Green", "<think>\n[\n</think>\n\nGreen") + "<think>\n[\n</think>\n\nBlue.<|im_end|>]",
    ),
    "a thought in an opened block": (
        THINKS_ALWAYS,
        [USER, THOUGHT, AGAIN],
        CHATML_TALK.replace("[Green", "<think>\n[Leaf.\n</think>\n\nGreen") + "<think>\n[\n</think>\n\nBlue.<|im_end|>]",
    ),
    "a thought that the template forgets": (
        FORGETS_THOUGHTS,
        [USER, turn("assistant", "<think>\nLeaf.</think>Green."), AGAIN],
        "<|turn|>Name a colour.<|part|>[Green.<|im_end|>]<|turn|>Another.<|part|><think>\n[Blue.<|im_end|>]",
    ),
    "an end of its own behind the last answer": (
        TWO_ENDS,
        TALK,
        "<|user|>\nName a colour.<|stop|>\n<|assistant|>\n[Green.<|stop|>]\n<|user|>\nAnother.<|stop|>\n<|assistant|>\n"
        "[Blue.<|stop|>]",
    ),
    "an end of two tokens": (
        RESPONSE_MARKS,
        TALK,
        "<|turn|>user<|part|>Name a colour.<|part|><|stop|><|turn|>assistant<|part|>[Green.<|part|><|stop|>]"
        "<|turn|>user<|part|>Another.<|part|><|stop|><|turn|>assistant<|part|>[Blue.<|part|><|stop|>]",
    ),
    "another end behind earlier answers": (
        CHANNELS,
        TALK,
        "<|turn|>user<|part|>Name a colour.<|stop|><|turn|>assistant[<|channel|>final<|part|>Green.<|stop|>]"
        "<|turn|>user<|part|>Another.<|stop|><|turn|>assistant[<|channel|>final<|part|>Blue.<|im_end|>]",
    ),
    "a call": (
        TOOLS,
        [USER, turn("assistant", None) | {"tool_calls": [CALL]}, turn("tool", "wet")],
        f"{START}user\nName a colour.{SAID}assistant\n"
        '[CALL [{"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}]<|im_end|>]\n'
        f"{START}tool\nwet{SAID}assistant\n[Blue.<|im_end|>]",
    ),
    "an answer twice, and one that is begun": (
        CHATML,
        [USER, GREEN, USER, GREEN, AGAIN, turn("assistant", "Dark ")],
        f"{START}user\nName a colour.{SAID}assistant\n[Green.<|im_end|>]\n" * 2
        + f"{START}user\nAnother.{SAID}assistant\nDark [Blue.<|im_end|>]",
    ),
    "of weight 0": (
        CHATML,
        [USER, {**GREEN, "weight": 0}, USER, {**GREEN, "weight": 1.0}, AGAIN],
        f"{START}user\nName a colour.{SAID}assistant\nGreen.<|im_end|>\n"
        + f"{START}user\nName a colour.{SAID}assistant\n[Green.<|im_end|>]\n{START}user\nAnother.{SAID}assistant\n[Blue.<|im_end|>]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "prompt", "expected"), PLACES.values(), ids=PLACES)
def test_earlier_turns_count_where_the_template_writes_them(
    marked: PreTrainedTokenizerFast, template: str, prompt: list[dict[str, Any]], expected: str
) -> None:
    marked.chat_template = template
    (response,), counts = read(marked, row(prompt))
    assert shown(marked, response) == expected
    (last,), without = read(marked, row(prompt), train_on="last")
    assert last.input_ids == response.input_ids
    assert last.weights is None
    assert shown(marked, last) == expected[: expected.rfind("[")].translate({ord(c): None for c in "[]"}) + (
        expected[expected.rfind("[") :]
    ) or "CALL" in expected
    assert counts.unused == without.unused == []
    assert (counts.turns, without.turns) == ([1] * (expected.count("[Green") + expected.count("Green.<|stop|>]") or 1), []) or (
        len(counts.turns) == 1
    )


def test_a_conversation_without_earlier_turns_is_what_it_was(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML
    assert read(marked, row([SYSTEM, USER])) == read(marked, row([SYSTEM, USER]), train_on="last")
    silent = [USER, {**GREEN, "weight": 0}, AGAIN]
    assert read(marked, row(silent)) == read(marked, row(silent), train_on="last") == read(marked, row(TALK), train_on="last")


@pytest.mark.parametrize(
    ("template", "prompt", "rules"),
    [
        (CHATML.replace("m['content']", "m['content'] | upper"), TALK, {}),
        (CHATML, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n", {"x": "as_is"}),
    ],
    ids=["upper case", "rendered before"],
)
def test_a_turn_without_a_certain_place_is_refused(
    marked: PreTrainedTokenizerFast, template: str, prompt: Any, rules: dict[str, str]
) -> None:
    marked.chat_template = template
    rules = {"already_rendered": "as_is"} if rules else {"not_rendered": "drop"}
    other = row([USER], "BLUE.")
    if not rules.get("already_rendered"):
        prompt = [turn(m["role"], m["content"].upper()) for m in prompt]
        template = template.replace(" | upper", " | replace('GREEN.', 'GRN')")
        marked.chat_template = template
        rules = {"not_rendered": "error"}
    try:
        responses, counts = read(marked, other, row(prompt), **rules)
    except UsageError as refused:
        assert "not_rendered" in str(refused) or "no_boundary" in str(refused)
    else:
        assert (len(responses), counts.left_out) == (1, {"no_boundary": [2]})
