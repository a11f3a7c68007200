"""The plan: sizes, work and memory of a run, as numbers."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from bnf_train.config import BNFConfig
from bnf_train.data import Collator, parse_share, parse_source, read_and_tokenize
from bnf_train.errors import UsageError
from bnf_train.model.attention import NAME, attention_of, attention_width
from bnf_train.model.load import context_length, load_tokenizer
from bnf_train.objectives import has_reference_point, is_per_token
from bnf_train.plan.memory import (
    CUDA_CONTEXT,
    autocast_bytes,
    base_bytes,
    gradient_bytes,
    head_bytes,
    heap_bytes,
    optimizer_bytes,
    rows_bytes,
    weight_bytes,
)
from bnf_train.plan.size import build, size_of
from bnf_train.plan.trace import trace
from bnf_train.plan.work import (
    Data,
    answers,
    attention_flops,
    backbone_flops,
    counted,
    estimated,
    gpu_hours,
    head_flops,
    reference_flops,
)

PAPER = {  # table 7: A100-hours of one training; parameters, by which a local folder is known
    "meta-llama/Meta-Llama-3-8B-Instruct": (40, 8_030_261_248),
    "mistralai/Mistral-7B-Instruct-v0.2": (40, 7_241_732_096),
    "google/gemma-2-9b-it": (56, 9_241_705_984),
}
PAPER_MODEL, PAPER_TFLOPS = "meta-llama/Meta-Llama-3-8B-Instruct", 312.0

ULTRAFEEDBACK_ROWS = 60_000  # about, of the paper's data sets
METHODS = ("full", "lora")
STRATEGIES = ("DDP", "FSDP2", "ZeRO-3")


def plan(config: BNFConfig, flags: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as numbers; bytes, tokens, FLOPs."""
    model = build(config.model, config.trust_remote_code, config.dtype)
    size = size_of(model, config.lora_r)
    data = _data(config, flags, model)
    bf16, width = bool(config.bf16), 2 if config.dtype == "bfloat16" else 4
    assert config.batch_size is not None
    accumulates = config.batch_size > config.per_device_train_batch_size and data.rows > config.per_device_train_batch_size
    several = data.positions["cpu"] < data.positions["cuda"]  # gradients of a pass stay while the next one runs, too
    accumulating = {"cuda": accumulates, "cpu": accumulates or several}
    traces = {
        (on, device): trace(model, batch, bf16, on, accumulating[device])
        for device, batch in data.batches.items()
        for on in (False, True)
    }

    steps_per_epoch = math.ceil(data.rows / config.batch_size)
    limited = config.max_steps > 0  # goes before epochs, as in training
    epochs = config.max_steps / steps_per_epoch if limited else config.num_train_epochs
    steps = config.max_steps if limited else math.ceil(steps_per_epoch * epochs)
    checkpointing = bool(config.gradient_checkpointing)
    flops = {
        "backbone": backbone_flops(size, data.epoch, epochs, checkpointing),
        "attention": attention_flops(size, data.epoch, epochs, checkpointing),
        "head": head_flops(size, data.epoch, epochs, 3 if is_per_token(config.objective) else 4),
        "reference pass": reference_flops(size, data.reference),
    }
    if has_reference_point(
        config.objective
    ):  # mismatched responses, about as long as the others: by the reference, and each step
        flops["reference pass"] *= 2
        flops["KL estimate"] = reference_flops(size, data.epoch) * epochs
    total = sum(flops.values())
    paper = next((name for name, (_, parameters) in PAPER.items() if parameters == size.total), None)
    paper_hours = PAPER[paper or PAPER_MODEL][0]
    copies = autocast_bytes(size, bf16 and width == 4)
    labels = {device: len(batch["response_labels"]) for device, batch in data.batches.items()}

    def memory(method: str, strategy: str, gpus: int, on: bool, device: str, base: int) -> dict[str, Any]:
        lora = method == "lora"
        trainable = size.lora if lora else size.total
        # what the worst moment holds beside weights, optimizer and all gradients: copies, head, and the rest
        traced = traces[on, device]
        beyond = traced.after_forward if lora else traced.most - (0 if accumulating[device] else width * size.total)
        head = size.vocab, size.head // size.vocab, labels[device]
        held = {"bf16 copies": copies}
        held["head"] = 0 if lora else width * size.head + head_bytes(*head, "cpu", bf16, width)
        for name in held:
            held[name] = min(held[name], beyond)
            beyond = max(beyond - held[name], 0)
        if lora:
            held["head"] = head_bytes(*head, device, bf16, width, frozen=True)
        elif device != "cpu":
            held["head"] += head_bytes(*head, device, bf16, width) - head_bytes(*head, "cpu", bf16, width)
        terms = {
            "base": base,
            "weights": weight_bytes(size, strategy, gpus, width) + (4 * size.lora if lora else 0),
            "gradients": gradient_bytes(size, trainable, strategy, gpus, 4 if lora else width),
            "optimizer": optimizer_bytes(trainable, strategy, gpus, str(config.optim.value)),
            **held,
            "activations": beyond,
        }
        if device == "cpu":
            terms["heap"] = heap_bytes(beyond + sum(held.values()))
        return {"method": method, "strategy": strategy, "checkpointing": on, **terms, "total": sum(terms.values())}

    base = base_bytes() + rows_bytes(data.reference.tokens)
    return {
        "model": config.model,
        "parameters": dataclasses.asdict(size) | {"trainable": {"full": size.total, "lora": size.lora}},
        "data": {"source": data.source, "rows": data.rows, "responses": data.responses, "positions": data.positions}
        | {"tokens": data.epoch.tokens, "response_tokens": data.epoch.response_tokens, "computed": data.epoch.positions},
        "rows_per_step": config.batch_size,
        "steps": steps,
        "epochs": epochs,
        "tokens": round(data.epoch.tokens * epochs),
        "checked": answers(config, data.held_out, steps),
        "flops": flops | {"total": total},
        "gpu_hours": gpu_hours(total, flags.peak_tflops, flags.utilization),
        "utilization": flags.utilization,
        "peak_tflops": flags.peak_tflops,
        "paper_model": paper or PAPER_MODEL,
        "paper_gpu_hours": paper_hours,
        "paper_utilization": gpu_hours(total, PAPER_TFLOPS, 1.0) / paper_hours if paper else None,
        "bf16": bf16,
        "gpus": flags.gpus,
        "gpu_memory": [
            memory(method, strategy, flags.gpus, on, "cuda", CUDA_CONTEXT)
            for method in METHODS
            for strategy in STRATEGIES
            for on in (False, True)
        ],
        "cpu_memory": [memory(method, "DDP", 1, on, "cpu", base) for method in METHODS for on in (False, True)],
    }


def _data(config: BNFConfig, flags: argparse.Namespace, model: PreTrainedModel) -> Data:
    """Counted where the dataset is a local file and the model's folder has a tokenizer; else estimated from flags."""

    context = context_length(config.model, config.trust_remote_code)
    config.max_length = min(config.max_length, context or config.max_length)
    width = attention_width(model)
    shares = config.share_prompts and attention_of(model) == NAME
    assert config.dataset is not None
    there = all(Path(parse_source(parse_share(source)[0])[0]).exists() for source in config.datasets)
    if flags.rows is None and there and any(Path(config.model).glob("tokenizer*")):
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        rows, held_out = read_and_tokenize(config, tokenizer, Console(quiet=True))
        return counted(rows, held_out, config, Collator(int(tokenizer.pad_token_id or 0), config.packing, width, shares))
    if flags.rows is None and not there and Path(config.dataset).suffix:
        raise UsageError(f"--dataset {config.dataset}: no such file; without data pass --rows in its place.")
    collator = Collator(0, config.packing, width, shares)
    rows_given = flags.rows or ULTRAFEEDBACK_ROWS
    return estimated(rows_given, flags.prompt_tokens, flags.response_tokens, config, collator)
