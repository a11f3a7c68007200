"""Flags, presets and defaults: which wins, and what is refused."""

import pytest
import torch

from bnf_train.config import PRESETS, parse
from bnf_train.errors import UsageError

DATA = ["--model", "some/model", "--dataset", "x.jsonl", "--output_dir", "unused"]


@pytest.mark.parametrize(
    ("model", "dataset", "rate"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.2", "princeton-nlp/mistral-instruct-ultrafeedback", 5e-7),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "princeton-nlp/llama3-ultrafeedback-armorm", 6e-7),
        ("google/gemma-2-9b-it", "princeton-nlp/gemma2-ultrafeedback-armorm", 8e-7),
    ],
)
def test_presets_are_the_papers(model: str, dataset: str, rate: float) -> None:
    config = parse(["--model", model])
    assert (config.dataset, config.learning_rate, config.batch_size, config.max_length) == (dataset, rate, 128, 4096)
    assert (config.lr_scheduler_type, config.warmup_steps, config.num_train_epochs) == ("cosine", 0.1, 1)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size == 128
    assert config.optim.startswith("adamw")


def test_no_argument_is_the_embedded_demo() -> None:
    config = parse([])
    assert "demo" in config.model
    assert str(config.dataset).endswith("preferences.jsonl")


def test_a_flag_wins_over_the_preset_and_the_preset_over_the_default() -> None:
    model = "google/gemma-2-9b-it"
    config = parse(["--model", model, "--learning-rate", "1e-6", "--dataset=y.jsonl"])
    assert (config.learning_rate, config.dataset) == (1e-6, "y.jsonl")
    assert PRESETS[model]["learning_rate"] == 8e-7


def test_every_flag_of_training_arguments_works() -> None:
    config = parse([*DATA, "--max_steps", "7", "--weight-decay", "0.1", "--optim", "adafactor", "--seed", "3"])
    assert (config.max_steps, config.weight_decay, config.optim, config.seed) == (7, 0.1, "adafactor", 3)


def test_cpu_needs_no_flag() -> None:
    config = parse(DATA)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert config.device.type == "cpu"
    assert parse([*DATA, "--bf16", "true"]).bf16
    assert not parse([*DATA, "--bf16", "false"]).bf16


@pytest.mark.parametrize(
    ("flags", "per_step", "accumulate"),
    [
        ([], 128, 128),
        (["--batch_size", "32", "--per_device_train_batch_size", "4"], 32, 8),
        (["--per_device_train_batch_size", "3"], 126, 42),
        (["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"], 8, 2),
    ],
)
def test_batch_size_counts_rows_of_the_whole_step(flags: list[str], per_step: int, accumulate: int) -> None:
    config = parse([*DATA, *flags])
    assert (config.batch_size, config.gradient_accumulation_steps) == (per_step, accumulate)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "some/model"], "--dataset is missing"),
        ([*DATA, "--max_length", "1"], "--max_length: expected at least 2"),
        ([*DATA, "--eval_size", "-1"], "--eval_size"),
        ([*DATA, "--batch_size", "10", "--per_device_train_batch_size", "4"], "--batch_size 10: expected a multiple of the 4"),
        ([*DATA, "--batch_size", "8", "--gradient_accumulation_steps", "3"], "leave one out"),
        ([*DATA, "--fp16", "--bf16"], "At most one of fp16 and bf16"),
    ],
)
def test_contradictions_are_one_sentence(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(flags)


@pytest.mark.parametrize("flags", [["--objective", "dop"], ["--no_such_flag", "1"], ["--max_length", "long"]])
def test_unknown_flags_and_values_are_named(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=flags[0]):
        parse([*DATA, *flags])
