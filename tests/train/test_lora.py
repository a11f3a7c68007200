"""LoRA: it starts as the reference, trains what it should, and what it saves is the trained model."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from preference_rows import PAIRS
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_bitsandbytes_available

from bnf_core import bnf, objective_spec
from bnf_train.__main__ import main
from bnf_train.config import BNFConfig
from bnf_train.errors import UsageError
from bnf_train.flags import parse
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.load import load_model
from bnf_train.model.lora import add_lora, quantization
from bnf_train.training.checkpoint import checkpoints
from bnf_train.training.trainer import BNFTrainer

IDS = torch.arange(1, 25).view(2, 12)
POSITIONS = torch.arange(3, 11)
LABELS = IDS.flatten()[POSITIONS + 1]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=request.param,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def config_of(folder: Path, *flags: str) -> BNFConfig:
    required = ("--model", str(folder), "--dataset", "unused", "--output_dir", str(folder / "out"))
    return parse([*required, "--use_peft", "--lora_r", "4", *flags])


def with_head(folder: Path) -> Any:
    model = load_model(str(folder))
    attach_log_odds_head(model)
    return model


def log_odds_of(model: Any, **more: Tensor) -> Any:
    return model(input_ids=IDS, response_positions=POSITIONS, response_labels=LABELS, **more)


@pytest.mark.parametrize("whole", [(), ("lm_head",), ("embed_tokens",)], ids=lambda x: "-".join(x) or "frozen head")
def test_at_the_start_it_is_the_reference_and_then_the_head_follows_its_own_weight(
    folder: Path, whole: tuple[str, ...]
) -> None:
    reference = log_odds_of(with_head(folder))[0].detach()
    flags = ("--lora_modules_to_save", *whole) if whole else ()
    model = add_lora(with_head(folder), config_of(folder, *flags))
    torch.testing.assert_close(log_odds_of(model)[0], reference, rtol=1e-6, atol=1e-6)  # w = 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    log_odds, _ = log_odds_of(model)
    assert (log_odds - reference).abs().max() > 1e-2
    logits = model(input_ids=IDS).logits.flatten(0, 1)[POSITIONS]
    others = logits.scatter(1, LABELS.unsqueeze(1), -torch.inf).logsumexp(1)
    torch.testing.assert_close(log_odds, logits.gather(1, LABELS.unsqueeze(1)).squeeze(1) - others, rtol=1e-4, atol=1e-4)
    log_odds.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    tied = model.config.tie_word_embeddings
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    head_and_embeddings = 2 * len(whole) if not tied else 1  # tied: one weight, whichever of its names was given
    assert len(trained) == (0 if not whole else head_and_embeddings if tied else 1), trained


def test_a_frozen_head_costs_two_products_and_a_trained_one_three(folder: Path) -> None:
    def head_products(*flags: str) -> float:
        model = add_lora(with_head(folder), config_of(folder, *flags))
        more = {"token_loss": objective_spec(bnf).weighted_token_loss, "per_token": [torch.ones(len(LABELS))] * 3}
        with FlopCounterMode(display=False) as counter:
            log_odds_of(model, **more)[0].backward()
        with FlopCounterMode(display=False) as backbone:
            hidden = model.base_model.model.model(input_ids=IDS, use_cache=False).last_hidden_state
            hidden.sum().backward()
        product = 2 * len(LABELS) * model.config.vocab_size * model.config.hidden_size
        return (counter.get_total_flops() - backbone.get_total_flops()) / product

    assert head_products() == pytest.approx(2)
    assert head_products("--lora_modules_to_save", "lm_head") == pytest.approx(3)


@pytest.mark.parametrize("flags", [(), ("--lora_modules_to_save", "lm_head")], ids=["frozen head", "trained head"])
def test_the_saved_adapter_merged_is_the_trained_model(
    folder: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    from bnf_train.training import trainer

    trained: list[Any] = []
    original = trainer.BNFTrainer.save_model
    monkeypatch.setattr(
        trainer.BNFTrainer, "save_model", lambda self, *a, **k: (trained.append(self.model), original(self, *a, **k))
    )
    arguments = ["--model", str(folder), "--dataset", str(write_rows(PAIRS)), "--output_dir", str(tmp_path / "out")]
    arguments += ["--eval_size", "0", "--batch_size", "4", "--learning_rate", "1e-2", "--warmup_steps", "0", "--bf16", "false"]
    arguments += ["--save_strategy", "no", "--disable_tqdm", "true", "--use_peft", "--lora_r", "4", *flags]
    assert main(arguments) == 0
    with torch.no_grad():
        expected = trained[-1].eval()(input_ids=IDS).logits
        base = AutoModelForCausalLM.from_pretrained(folder)
        before = base(input_ids=IDS).logits
        merged = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - before).abs().max() > 1e-2
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_stopped_and_resumed_the_adapter_is_the_same(
    folder: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, with a head trained whole and random numbers drawn (dropout); SIGTERM comes in the middle of the third step."""
    step, count = BNFTrainer.training_step, 0

    def training_step(self: BNFTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    def train(output: str, *flags: str) -> int:
        arguments = ["--model", str(folder), "--dataset", str(rows), "--output_dir", str(tmp_path / output), "--eval_size", "0"]
        arguments += ["--batch_size", "4", "--per_device_train_batch_size", "2", "--num_train_epochs", "2", "--bf16", "false"]
        arguments += ["--learning_rate", "1e-2", "--save_strategy", "steps", "--save_steps", "100", "--disable_tqdm", "true"]
        arguments += ["--use_peft", "--lora_r", "4", "--lora_dropout", "0.01", "--lora_modules_to_save", "lm_head", *flags]
        return main(arguments)

    rows = write_rows(PAIRS)
    assert train("undisturbed") == 0
    monkeypatch.setattr(BNFTrainer, "training_step", training_step)
    assert train("stopped") == 128 + signal.SIGTERM
    assert [c.name for c in checkpoints(tmp_path / "stopped")] == ["checkpoint-2"]
    assert train("stopped", "--resume_from_checkpoint", "auto") == 0
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stopped", "undisturbed"))
    assert ours.keys() == theirs.keys()
    assert any("lora_" in name for name in ours)
    assert any("lm_head" in name or "embed_tokens" in name for name in ours)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_what_cannot_be_is_refused_with_a_reason(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"a low-rank step of the head .* --lora_modules_to_save"):
        add_lora(with_head(folder), config_of(folder, "--lora_target_modules", "q_proj", "lm_head"))
    with pytest.raises(UsageError, match="--lora_target_modules no_such"):
        add_lora(with_head(folder), config_of(folder, "--lora_target_modules", "no_such"))
    if load_model(str(folder)).config.tie_word_embeddings:
        with pytest.raises(UsageError, match="unties them"):
            add_lora(with_head(folder), config_of(folder, "--lora_target_modules", "q_proj", "embed_tokens"))
    with pytest.raises(UsageError, match="--lora_r: expected"):
        config_of(folder, "--lora_r", "0")
    four_bits = config_of(folder, "--load_in_4bit")
    if not is_bitsandbytes_available():
        with pytest.raises(UsageError, match="--load_in_4bit: needs bitsandbytes"):
            quantization(four_bits)
    four_bits.use_peft = False
    with pytest.raises(UsageError, match=r"--load_in_4bit: .* add --use_peft"):
        quantization(four_bits)


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")
def test_four_bits_compute_what_their_weights_say(folder: Path, write_rows: Callable[..., Path]) -> None:
    """Log-odds and the adapter's gradient are those of a float32 model with the weights that 4 bits stand for."""
    config = config_of(folder, "--load_in_4bit", "--bf16", "false")
    found = []
    for whole in (False, True):
        model = load_model(str(folder), quantization=quantization(config))
        if whole:
            model = model.dequantize().float()
            config.load_in_4bit = False
        attach_log_odds_head(model)
        torch.manual_seed(1)
        adapted = add_lora(model, config)
        log_odds, _ = log_odds_of(adapted)
        log_odds.sum().backward()
        found.append([log_odds.detach(), *(p.grad for p in adapted.parameters() if p.requires_grad)])
    assert len(found[0]) == len(found[1]) > 10
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
