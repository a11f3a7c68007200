"""python -m bnf_train.benchmark: figures of what it says, on a model so small that they mean nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
from preference_rows import PAIRS

from bnf_train.benchmark import Task, _tokens, bare, bnf, main, mfu
from bnf_train.load import load_tokenizer


def test_methods_count_the_same_tokens(model_folder: Path, write_rows: Callable[..., Path]) -> None:
    task = Task(str(model_folder), str(write_rows(PAIRS)), 100, ("--use_cpu=true",))
    tokens = _tokens(task, load_tokenizer(str(model_folder)))
    figures = bnf(task)
    assert figures["tokens"] == tokens
    assert 0 < figures["with_reference"] < figures["tokens_per_second"]
    assert figures["peak_gib"] > 0.1
    assert bare(task)["tokens"] == 16 * round(tokens / 16)


@pytest.mark.parametrize("lora", [False, True])
def test_share_of_the_peak_on_a_small_shape(lora: bool) -> None:
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    figures = mfu(2, 64, lora, 2, shape)
    assert 0 < figures["mfu"] < 1
    weights = 512 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)  # those that multiply a token, and the norms
    expected = (4 if lora else 6) * 64 * weights
    achieved = figures["tera_operations_per_second"] * 1e12 * 64 / figures["tokens_per_second"]
    assert achieved == pytest.approx(expected, rel=0.05)  # attention and norms are the rest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model and --dataset are needed"),
        (["--model", "m", "--dataset", "d", "--only", "sft"], "--only sft: expected some of bnf_train, bare"),
        (["--model", "m", "--dataset", "nowhere.jsonl"], "--dataset nowhere.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
