"""What bnf_train is measured beside: a step of plain transformers, and TRL's trainers."""

import importlib
import tempfile
import time
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bnf_train.benchmark.task import Task, figures, this_device, tokens_of, wait
from bnf_train.config import bf16_in_hardware


def bare(task: Task) -> dict[str, float]:
    """Steps of plain transformers, 4 x 4 sequences as long as the rows' mean."""
    device = this_device()
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    length = round(tokens_of(task, AutoTokenizer.from_pretrained(task.model)) / len(task.responses()))
    ids = torch.randint(len(model.get_input_embeddings().weight), (4, length), device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(4):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16_in_hardware(device.type == "cpu")):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        times.append(time.perf_counter() - start)
    return figures(16 * length, median(times[1:]))


def trl_sft(task: Task) -> dict[str, float]:
    return _trl(task, "sft")


def trl_dpo(task: Task) -> dict[str, float]:
    return _trl(task, "dpo")


def trl_dpo_precomputed(task: Task) -> dict[str, float]:
    return _trl(task, "dpo", precompute_ref_log_probs=True)


def trl_kto(task: Task) -> dict[str, float]:
    return _trl(task, "kto")


def trl_dpo_same(task: Task) -> dict[str, float]:
    return _trl(task, "dpo", same=True)


def trl_kto_same(task: Task) -> dict[str, float]:
    return _trl(task, "kto", same=True)


def _trl(task: Task, kind: str, same: bool = False, **options: Any) -> dict[str, float]:
    """A trainer of TRL; `same`: in bnf_train's arithmetic (float32 weights, bf16 autocast where there is a unit for it)."""
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32 if same else torch.bfloat16)
    bf16 = same and bf16_in_hardware(not torch.cuda.is_available())

    def says(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    singles = [(says("user", p), says("assistant", answer), label) for p, answer, label in task.responses()]
    rows: dict[str, list[dict[str, Any]]] = {
        "dpo": [{"prompt": p, "chosen": c, "rejected": r} for (p, c, _), (_, r, _) in zip(*[iter(singles)] * 2, strict=False)],
        "kto": [{"prompt": p, "completion": answer, "label": label} for p, answer, label in singles],
        "sft": [{"prompt": p, "completion": answer} for p, answer, _ in singles],
    }
    trl, datasets = map(importlib.import_module, ("trl", "datasets"))  # of no use to `bare`, and memory in its figure
    with tempfile.TemporaryDirectory() as folder:
        arguments = getattr(trl, f"{kind.upper()}Config")(
            output_dir=folder, per_device_train_batch_size=2 if kind == "dpo" else 4, gradient_accumulation_steps=4,
            num_train_epochs=1, learning_rate=2e-5, save_strategy="no", report_to="none", max_length=task.max_length,
            gradient_checkpointing=False, bf16=bf16, use_cpu=not torch.cuda.is_available(), optim="adamw_torch_fused",
            logging_steps=1, disable_tqdm=True, **options,
        )  # fmt: skip
        start = time.perf_counter()
        trainer = getattr(trl, f"{kind.upper()}Trainer")(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows[kind]), processing_class=tokenizer
        )
        ready = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - ready
    # TRL computes a reference ahead of time as soon as it trains, or while it is set up
    before = ready - start if options else 0.0
    return figures(tokens_of(task, tokenizer), seconds, before)
