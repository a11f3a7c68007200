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
        text += part if not weights[at] else f"⟦{part}⟧" if weights[at] == 1 else f"⟦{part}⟧{weights[at]:g}"
        at = end
    return text


START, SAID = "<|im_start|>", "<|im_end|>\n<|im_start|>"
CHATML_TALK = f"{START}user\nName a colour.{SAID}assistant\n⟦Green.<|im_end|>⟧\n{START}user\nAnother.{SAID}assistant\n"
PLACES = {
    "as chatml": (CHATML, TALK, CHATML_TALK + "⟦Blue.<|im_end|>⟧"),
    "the system message in the last user's": (
        SYSTEM_IN_LAST_USER,
        [SYSTEM, *TALK],
        "<|turn|>Name a colour.<|stop|>⟦ Green.<|im_end|>⟧<|turn|>Be brief.\n\nAnother.<|stop|>⟦ Blue.<|im_end|>⟧",
    ),
    "a block in the last answer only": (
        THINKS_IF_ASKED,
        TALK,
        CHATML_TALK + "⟦<think>\n\n</think>\n\nBlue.<|im_end|>⟧",
    ),
    "a block that the prompt opens": (
        THINKS_ALWAYS,
        TALK,
        CHATML_TALK.replace("⟦Green", "<think>\n⟦\n</think>\n\nGreen") + "<think>\n⟦\n</think>\n\nBlue.<|im_end|>⟧",
    ),
    "a thought in an opened block": (
        THINKS_ALWAYS,
        [USER, THOUGHT, AGAIN],
        CHATML_TALK.replace("⟦Green", "<think>\n⟦Leaf.\n</think>\n\nGreen") + "<think>\n⟦\n</think>\n\nBlue.<|im_end|>⟧",
    ),
    "a thought that the template forgets": (
        FORGETS_THOUGHTS,
        [USER, turn("assistant", "<think>\nLeaf.</think>Green."), AGAIN],
        "<|turn|>Name a colour.<|part|>⟦Green.<|im_end|>⟧<|turn|>Another.<|part|><think>\n⟦Blue.<|im_end|>⟧",
    ),
    "an end of its own behind the last answer": (
        TWO_ENDS,
        TALK,
        "<|user|>\nName a colour.<|stop|>\n<|assistant|>\n⟦Green.<|stop|>⟧\n<|user|>\nAnother.<|stop|>\n<|assistant|>\n"
        "⟦Blue.<|stop|>⟧",
    ),
    "an end of two tokens": (
        RESPONSE_MARKS,
        TALK,
        "<|turn|>user<|part|>Name a colour.<|part|><|stop|><|turn|>assistant<|part|>⟦Green.<|part|><|stop|>⟧"
        "<|turn|>user<|part|>Another.<|part|><|stop|><|turn|>assistant<|part|>⟦Blue.<|part|><|stop|>⟧",
    ),
    "another end behind earlier answers": (
        CHANNELS,
        TALK,
        "<|turn|>user<|part|>Name a colour.<|stop|><|turn|>assistant⟦<|channel|>final<|part|>Green.<|stop|>⟧"
        "<|turn|>user<|part|>Another.<|stop|><|turn|>assistant⟦<|channel|>final<|part|>Blue.<|im_end|>⟧",
    ),
    "a call": (
        TOOLS,
        [USER, turn("assistant", None) | {"tool_calls": [CALL]}, turn("tool", "wet")],
        f"{START}user\nName a colour.{SAID}assistant\n"
        '⟦CALL [{"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}]<|im_end|>⟧\n'
        f"{START}tool\nwet{SAID}assistant\n⟦Blue.<|im_end|>⟧",
    ),
    "an answer twice, and one that is begun": (
        CHATML,
        [USER, GREEN, USER, GREEN, AGAIN, turn("assistant", "Dark ")],
        f"{START}user\nName a colour.{SAID}assistant\n⟦Green.<|im_end|>⟧\n" * 2
        + f"{START}user\nAnother.{SAID}assistant\nDark ⟦Blue.<|im_end|>⟧",
    ),
    "of weight 0": (
        CHATML,
        [USER, {**GREEN, "weight": 0}, USER, {**GREEN, "weight": 1.0}, AGAIN],
        f"{START}user\nName a colour.{SAID}assistant\nGreen.<|im_end|>\n"
        + CHATML_TALK
        + "⟦Blue.<|im_end|>⟧",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "prompt", "expected"), PLACES.values(), ids=PLACES)
def test_earlier_turns_count_where_the_template_writes_them(
    marked: PreTrainedTokenizerFast, template: str, prompt: list[dict[str, Any]], expected: str
) -> None:
    marked.chat_template = template
    (response,), counts = read(marked, row(prompt))
    assert shown(marked, response) == expected
    template = {"added": counts.added, "added_text": counts.added_text, "blocks": counts.blocks, "block": counts.block}
    assert counts == Counts(rows=1, turns=[1] * (expected.count("⟦") - 1), **template)
    (last,), without = read(marked, row(prompt), train_on="last")
    before, _, own = expected.rpartition("⟦")
    assert shown(marked, last) == before.replace("⟦", "").replace("⟧", "") + "⟦" + own
    assert last.weights is None
    assert without == Counts(rows=1, **template)


def test_a_conversation_without_earlier_turns_is_what_it_was(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML
    assert read(marked, row([SYSTEM, USER])) == read(marked, row([SYSTEM, USER]), train_on="last")
    silent = [USER, {**GREEN, "weight": 0}, AGAIN]
    assert read(marked, row(silent)) == read(marked, row(silent), train_on="last") == read(marked, row(TALK), train_on="last")


COUNTS_LETTERS = SYSTEM_IN_LAST_USER.replace("| trim +", "| trim + (m['content'] | length | string) +")
RENDERED = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [(COUNTS_LETTERS, [SYSTEM, *TALK]), (CHATML, RENDERED + "b<|im_end|>\n" + RENDERED)],
    ids=["a text that changes with its length", "rendered before"],
)
def test_a_turn_without_a_certain_place_is_refused(marked: PreTrainedTokenizerFast, template: str, prompt: Any) -> None:
    marked.chat_template = template
    rows = [row(RENDERED if isinstance(prompt, str) else [USER]), row(prompt)]
    responses, counts = read(marked, *rows, already_rendered="as_is")
    assert (len(responses), counts.left_out) == (1, {"no_boundary": [2]})
    assert len(read(marked, *rows, train_on="last", already_rendered="as_is")[0]) == 2
    with pytest.raises(UsageError, match=r"row 2: .*certain.*--train_on all_assistant.*fix it, or pass --no_boundary drop"):
        read(marked, *rows, already_rendered="as_is", no_boundary="error")


def test_responses_of_several_turns(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML
    (whole,), _ = read(marked, row(TALK))
    blue, rows = turn("assistant", "Blue."), [row([USER], [GREEN, AGAIN, turn("assistant", "Blue.")])]
    assert read(marked, *rows)[0] == [whole]
    pair = {"prompt": [USER], "chosen": [GREEN, AGAIN, blue], "rejected": [turn("assistant", "Red?"), AGAIN, blue]}
    conversations = {"chosen": [USER, *pair["chosen"]], "rejected": [USER, *pair["rejected"]]}
    for rows in ([pair], [conversations]):
        responses, counts = read(marked, *rows)
        assert [shown(marked, r) for r in responses] == [
            (CHATML_TALK + "⟦Blue.<|im_end|>⟧").replace("Green.", text) for text in ("Green.", "Red?")
        ]
        assert counts.turns == [1, 1]
    for rows in ([pair], [conversations], [row([USER], [GREEN, AGAIN, blue])]):
        with pytest.raises(UsageError, match="several_turns drop"):
            read(marked, *rows, train_on="last")
    with pytest.raises(UsageError, match="several_turns drop"):
        read(marked, row([USER], [GREEN, AGAIN]))


# --- weights of messages, spans ------------------------------------------------------------------------------------------

TEXT = "Ein grünes Blatt 🍀!"


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([[4, 10, 0.5]], "⟦Ein ⟧⟦grünes⟧0.5⟦ Blatt 🍀!<|im_end|>⟧"),
        ([[17, 18, 2], [0, 3, 0]], "Ein⟦ grünes Blatt ⟧⟦🍀⟧2⟦!<|im_end|>⟧"),
        ([[6, 7, 0.0], [7, 8, 1]], "⟦Ein gr⟧ü⟦nes Blatt 🍀!<|im_end|>⟧"),
        ([[0, len(TEXT), 0]], TEXT + "⟦<|im_end|>⟧"),
        ([[0, 3, 1]], f"⟦{TEXT}<|im_end|>⟧"),
        ([], f"⟦{TEXT}<|im_end|>⟧"),
    ],
)
@pytest.mark.parametrize("train_on", ["last", "all_assistant"])
def test_spans_are_characters_of_the_response(
    marked: PreTrainedTokenizerFast, spans: list[list[float]], expected: str, train_on: str
) -> None:
    marked.chat_template = CHATML
    head = CHATML_TALK if train_on == "all_assistant" else CHATML_TALK.replace("⟦", "").replace("⟧", "")
    message = {**turn("assistant", TEXT), "spans": spans}
    rows = [
        row(TALK, TEXT, spans=spans),
        row(TALK, TEXT, spans=json.dumps(spans)),
        row(TALK, [message]),
        {"prompt": TALK, "chosen": TEXT, "chosen_spans": spans, "rejected": "No."},
        {"prompt": TALK, "chosen": "Yes.", "rejected": [message]},
        {"prompt": TALK, "completions": ["No.", TEXT], "labels": [False, True], "spans": [None, spans]},
        {"prompt": TALK, "chosen": [*TALK, turn("assistant", "No.")], "rejected": [*TALK, message]},
    ]
    responses, counts = read(marked, *rows, train_on=train_on)
    texts = [shown(marked, r) for r in responses]
    assert [text for text in texts if "Blatt" in text] == [head + expected] * len(rows)
    assert counts.unused == []


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (SYSTEM_IN_LAST_USER, " red, blue ", "<|turn|>Name a colour.<|stop|>⟦ red, ⟧⟦blue⟧0.5⟦<|im_end|>⟧"),
        (THINKS_IF_ASKED, "a think blue", "⟦<think>\n\n</think>\n\na think ⟧⟦blue⟧0.5⟦<|im_end|>⟧"),
        (THINKS_ALWAYS, "<think>\nblue, red\n</think>\n\nblue", "⟦blue, red\n</think>\n\n⟧⟦blue⟧0.5⟦<|im_end|>⟧"),
        (TWO_ENDS, "red, blue<|stop|>", "⟦red, ⟧⟦blue⟧0.5⟦<|stop|>⟧"),
    ],
)
def test_spans_follow_the_text_to_where_the_template_writes_it(
    marked: PreTrainedTokenizerFast, template: str, text: str, expected: str
) -> None:
    marked.chat_template = template
    at = text.rfind("blue")
    (response,), _ = read(marked, row([USER], text, spans=[[at, at + 4, 0.5]]))
    assert shown(marked, response).endswith(expected)


def test_a_text_that_the_template_changes_has_no_place_for_spans(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML.replace("m['content']", "m['content'] | replace('a  b', 'a b')")
    rows = [row([USER]), row([USER], "a  b", spans=[[0, 1, 0]])]
    assert read(marked, *rows)[1].left_out == {"no_boundary": [2]}
    assert read(marked, rows[0], row([USER], "a  b"))[1].left_out == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spans": [[0, 6, 1]]}, r"spans: expected start < end within the 5 characters of the response, .* got \[0, 6, 1.0\]"),
        ({"spans": [[0, 2, 1], [1, 3, 1]]}, r"none over another, got \[1, 3, 1.0\]"),
        ({"spans": [[2, 2, 1]]}, r"got \[2, 2, 1.0\]"),
        ({"spans": [[-1, 2, 1]]}, r"got \[-1, 2, 1.0\]"),
        ({"spans": [[0, 2, -1]]}, r"expected \[start, end, weight\] with a weight from 0, got \[0, 2, -1\]"),
        ({"spans": [[0, 2, float("inf")]]}, "with a weight from 0"),
        ({"spans": [[0, 10**400, 1]]}, "a very long number"),
        ({"spans": [[0, 2]]}, r"got \[0, 2\]"),
        ({"spans": [0, 2, 1]}, "got 0"),
        ({"spans": [[0, 1.5, 1]]}, r"got \[0, 1.5, 1\]"),
        ({"spans": [[0, True, 1]]}, r"got \[0, true, 1\]"),
        ({"spans": "all"}, "got 'all'"),
        ({"spans": [[0, 1, 1]], "completion": [{**turn("assistant", "Blue."), "spans": [[0, 1, 1]]}]}, "expected spans once"),
        ({"completion": None, "label": None, "completions": ["a", "b"], "labels": [1, 0], "spans": [[]]}, "for each of 2"),
        ({"completion": [{**turn("assistant", "a"), "weight": 0.5}]}, "weight of message 1: expected 0 or 1, got 0.5"),
        ({"prompt": [USER, {**GREEN, "weight": "no"}, AGAIN]}, "prompt: weight of message 2: expected 0 or 1, got 'no'"),
    ],
)
def test_what_is_no_span_and_no_weight_is_refused(
    marked: PreTrainedTokenizerFast, changes: dict[str, Any], message: str
) -> None:
    marked.chat_template = CHATML
    with pytest.raises(UsageError, match=rf"x.jsonl, row 2.*{message}.*--malformed drop"):
        read(marked, row([USER]), row([USER]) | changes, train_on="last")


def test_a_response_of_weight_0_and_one_of_which_nothing_is_left_do_not_count(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML
    silent = {**turn("assistant", "No."), "weight": 0}
    rows = [{"prompt": [USER], "chosen": "Blue.", "rejected": [silent]}, row([USER], [silent])]
    (response,), counts = read(marked, *rows)
    assert shown(marked, response).endswith("⟦Blue.<|im_end|>⟧")
    assert counts == Counts(rows=2, zero=[1, 2])
    cut = {"prompt": [USER], "chosen": "Blue.", "rejected": "x" * 50, "rejected_spans": [[0, 50, 0]]}
    found, counts = tokenize([cut], marked, len(response.input_ids) + 10, "x.jsonl")
    assert [shown(marked, r) for r in found[0].responses] == [shown(marked, response)]
    assert counts == Counts(rows=1, cut=[1], uncounted=[1])
    assert counts.sentences(Rules())[1] == "1 responses left out because no token of them counts: row 1"
    (response,), _ = read(marked, row(TALK, "Blue.", spans=[[0, 5, 0.5]]))
    found, _ = tokenize([row(TALK, "Blue.", spans=[[0, 5, 0.5]])], marked, len(response.input_ids) - 3, "x.jsonl",
                        train_on="all_assistant")  # fmt: skip
    assert shown(marked, found[0].responses[0]) == CHATML_TALK + "⟦Blu⟧0.5"


def test_pairs_that_differ_in_what_counts_are_no_twins_nor_duplicates(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML
    pair = {"prompt": [USER], "chosen": "Blue.", "rejected": "Blue."}
    weighed = pair | {"rejected_spans": [[0, 1, 0.5]]}
    assert read(marked, pair, weighed, pair)[1] == Counts(rows=3, same_sides=[1, 3], left_out={"duplicates": [3]})
    silent = [USER, {**GREEN, "weight": 0}, AGAIN]
    one, other = tokenize([row(TALK), row(silent)], marked, 1000, "x.jsonl", train_on="all_assistant")[0]
    assert one.prompt == other.prompt
    assert len({digest(rows) for rows in ([one], [other], [one, other])}) == 3


def test_a_slow_tokenizer_is_one_sentence(marked: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    marked.chat_template = CHATML
    monkeypatch.setattr(type(marked), "is_fast", False)
    assert len(read(marked, row([USER]))[0]) == 1
    for rows in (row(TALK), row([USER], spans=[[0, 1, 0]])):
        with pytest.raises(UsageError, match=r"x.jsonl: spans and --train_on all_assistant need a fast tokenizer"):
            read(marked, rows)


# --- from tokens to the loss -----------------------------------------------------------------------------------------------


def test_a_batch_holds_what_counts() -> None:
    responses = [
        Response([5, 6, 7, 8], 1, True, weights=[1.0, 0.0, 0.5]),
        Response([5, 6, 7], 1, False, weights=[0.0, 1.0]),
        Response([5, 9], 1, True),
    ]
    for response in responses:
        response.ref_log_odds = torch.arange(response.tokens, dtype=torch.float32)
    for packed in (True, False):
        batch = Collator(0, packed=packed)([Row("", [response]) for response in responses])
        assert batch["response_labels"].tolist() == [6, 8, 7, 9]
        assert torch.equal(batch["input_ids"].flatten()[batch["response_positions"] + 1], batch["response_labels"])
        assert (batch["response"].tolist(), batch["weight"].tolist()) == ([0, 0, 1, 2], [1, 0.5, 1, 1])
        assert len(batch["ref_log_odds"]) == 4
    first, second, third = passes(Collator(0, packed=True)([Row("", [r]) for r in responses]), 4)
    assert [part["weight"].tolist() for part in (first, second, third)] == [[1, 0.5], [1], [1]]
    assert second["response_positions"].tolist() == [1]
    assert "weight" not in Collator(0)([Row("", responses[1:])])


def test_the_reference_is_kept_by_which_tokens_count() -> None:
    weights = (None, [1.0, 1.0], [1.0, 0.5], [0.0, 1.0], [0.0, 3.0])
    responses = [Response([5, 6, 7], 1, True, weights=w) for w in weights]
    groups = _by_content([Row("", responses)], False)
    assert [[r.weights for r in group] for group in groups] == [list(weights[:3]), list(weights[3:])]
    assert [list(_left_out(r)) for r in responses] == [[], [], [], [-2], [-2]]


def test_examples_show_what_counts(marked: PreTrainedTokenizerFast) -> None:
    marked.chat_template = CHATML
    rows, _ = tokenize([row(TALK, spans=[[0, 4, 0.5]])], marked, 1000, "x.jsonl", train_on="all_assistant")
    show(rows, marked, Console(file=(out := StringIO()), soft_wrap=True))
    assert "preferred, 13 tokens: ⟦Green.<|im_end|>⟧\n<|im_start|>user" in out.getvalue()
    assert out.getvalue().endswith("assistant\n⟦Blue⟧×0.5⟦.<|im_end|>⟧\n\n")  # noqa: RUF001


SHORT = [turn("user", "hi"), turn("assistant", "so"), turn("user", "yes")]


def moved(folder: Path, rows: list[dict[str, Any]], objective: str, **options: Any) -> dict[str, torch.Tensor]:
    """How far one step of plain gradient descent moves the weights: the gradient, in effect."""
    before = load_model(str(folder)).state_dict()
    after = one_step(folder, rows, len(rows), 1, objective, **options)
    return {name: after[name] - weight for name, weight in before.items()}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert any(value.abs().max() > 1e-4 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("objective", ["bnf", "log_likelihood"])
def test_every_turn_is_the_mean_over_the_tokens_of_all(model_folder: Path, objective: str) -> None:
    """The same step as the turns' own rows, each by its share of the tokens: "so" and its end are 3, "well" and its end 5."""
    found = moved(model_folder, [row(SHORT, "well")], objective, train_on="all_assistant")
    first, last = moved(model_folder, [row(SHORT[:1], "so")], objective), moved(model_folder, [row(SHORT, "well")], objective)
    close(found, {name: (3 * first[name] + 5 * last[name]) / 8 for name in first})


@pytest.mark.parametrize("objective", ["bnf", "log_likelihood", "kto_fixed", "dpo", "simpo"])
def test_a_span_of_weight_0_is_left_out(model_folder: Path, objective: str) -> None:
    """The same step as with the beginning of the response in the prompt."""
    spans, begun = [[0, 2, 0]], [*SHORT, turn("assistant", "we")]
    silent = {"prompt": SHORT, "chosen": "well", "rejected": "weak", "chosen_spans": spans, "rejected_spans": spans}
    close(
        moved(model_folder, [silent], objective),
        moved(model_folder, [{"prompt": begun, "chosen": "ll", "rejected": "ak"}], objective),
    )


@pytest.mark.parametrize("objective", ["bnf", "log_likelihood"])
@pytest.mark.parametrize("tokens_per_pass", [0, 40])
def test_a_span_weighs_its_tokens(model_folder: Path, objective: str, tokens_per_pass: int) -> None:
    """A response of 5 tokens, of which 2 weigh 0.5: half of what it is without spans, half of what the others make alone."""
    other = row(SHORT[:1], "no")
    found, whole, rest, alone = (
        moved(model_folder, rows, objective, packed=True, tokens_per_pass=tokens_per_pass)
        for rows in (
            [row(SHORT, "well", spans=[[0, 2, 0.5]]), other],
            [row(SHORT, "well"), other],
            [row(SHORT, "well", spans=[[0, 2, 0]]), other],
            [other],
        )
    )
    # a step is the mean over two responses; rest is over 3 tokens of the 5
    own = {name: (whole[name] - alone[name] / 2) / 2 + (rest[name] - alone[name] / 2) / 2 * 3 / 5 for name in whole}
    close(found, {name: own[name] + alone[name] / 2 for name in own})
