"""The embedded default is what its README says."""

import json
from collections import Counter
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnf_train import demo
from bnf_train.data import Counts, read_rows, tokenize
from bnf_train.errors import UsageError
from bnf_train.flags import parse
from bnf_train.model.generate import generate

CHECK = [json.loads(line) for line in demo.CHECK.read_text().splitlines()]


def solve(prompt: str) -> str:
    """The answer, computed from the prompt alone."""
    question, _, rest = prompt.partition(": ")
    words = rest.split()
    match question.split():
        case ["Backward"]:
            return rest[::-1]
        case ["Sort"]:
            return " ".join(sorted(words, key=int))
        case ["Count", letter]:
            return str(rest.count(letter))
        case ["Compute"]:
            first, plus, second = words
            assert plus == "+"
            return str(int(first) + int(second))
        case ["Swap"]:
            return " ".join(reversed(words))
    raise AssertionError(prompt)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.MODEL)


def test_model_is_small_and_answers_what_it_was_taught(tokenizer: Any) -> None:
    with safe_open(demo.MODEL / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    assert model.num_parameters() == 468_768
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = [row for row in CHECK if row["group"] == "others"][:40]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    answers = generate(model, tokenizer, prompts, torch.device("cpu"), max_new_tokens=40, batch_size=40)
    assert not any(answer.cut for answer in answers)  # it ends its turn
    texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
    assert sum(text == row["answer"] for text, row in zip(texts, rows, strict=True)) >= 36


@pytest.mark.parametrize("text", ["Sort: 3 1 2", "Grüße, 世界 🙂\n", "<user> Counting"])
def test_tokenizer_writes_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_preferences_are_the_models_own_samples_with_labels_that_are_true(tokenizer: Any) -> None:
    rows = read_rows(str(demo.PREFERENCES))
    assert all(row["label"] == (row["completion"] == solve(row["prompt"])) for row in rows)
    assert set(Counter(row["prompt"] for row in rows).values()) <= {1, 2, 3, 4, 5}
    assert 0.4 < sum(row["label"] for row in rows) / len(rows) < 0.6
    kept, counts = tokenize(rows, tokenizer, 128, "demo")
    assert counts == Counts(rows=len(rows), left_out=counts.left_out)
    assert set(counts.left_out) == {"duplicates"}  # which are kept: samples are drawn with replacement
    assert len(kept) == len(rows) > 3900


def test_questions_to_measure_on_are_new_and_their_answers_true() -> None:
    assert Counter(row["group"] for row in CHECK) == {"target": 200, "others": 200}
    assert all(row["answer"] == solve(row["prompt"]) for row in CHECK)
    prompts = [row["prompt"] for row in CHECK]
    assert len(set(prompts)) == 400
    assert not {row["prompt"] for row in read_rows(str(demo.PREFERENCES))} & set(prompts)


def test_right_answers_are_counted_where_they_are_the_demos() -> None:
    """Its questions are about its rows: somebody's own rows or check come without them."""
    config = parse([])
    assert (config.check, config.check_dataset, config.check_rows) == ("exact", str(demo.CHECK), len(CHECK))
    assert parse(["--check_samples", "1"]).check_samples == 1
    assert parse(["--dataset", "rows.jsonl"]).check is None
    own = parse(["--check", "contains"])
    assert (own.check, own.check_dataset) == ("contains", None)
    with pytest.raises(UsageError, match="--check_samples: has no effect without --check"):
        parse(["--dataset", "rows.jsonl", "--check_samples", "1"])


def test_prompts_of_the_rounds_are_those_of_the_rows_with_their_answers() -> None:
    prompts = read_rows(str(demo.PROMPTS))
    assert [row["prompt"] for row in prompts] == list(dict.fromkeys(row["prompt"] for row in read_rows(str(demo.PREFERENCES))))
    assert all(row["answer"] == solve(row["prompt"]) for row in prompts)
    assert not {row["prompt"] for row in prompts} & {row["prompt"] for row in CHECK}
