"""python -m bnf_train.benchmark: training speed and peak memory, beside TRL's trainers where TRL is installed.

    python -m bnf_train.benchmark --model path/to/SmolLM2-135M-Instruct --dataset pairs.jsonl --rows 32
    python -m bnf_train.benchmark --mfu --layers 8            # one GPU: share of its measured peak, Llama-3-8B's shape
    python -m bnf_train.benchmark --mfu --lora

The first trains one epoch on the first rows of pairs, each method in a process of its own: micro-batches of 4 responses, 4
of them a step, fused AdamW, no gradient checkpointing. bnf_train holds float32 weights under bf16 autocast, as it
always does; TRL's models are loaded in bf16, which is less work and memory. "bare" is a step of plain transformers on 4
equally long sequences, with no padding and nothing recorded: what there is to reach. Tokens are those of prompt and response.

The second takes optimizer steps on one packed batch of random tokens, with random weights, and compares the floating-point
operations that the model needs (attention over the responses included) with matrix products of the same device, in the
dtype that the step multiplies in: bf16, or float32 on a CPU without a unit for bf16, as a run of bnf_train does there.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bnf_train.config import bf16_in_hardware
from bnf_train.data import read_rows, tokenize
from bnf_train.errors import UsageError

GIB = 2**30
LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 5e5,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What every method trains on."""

    model: str
    rows: str  # a JSONL file of pairs
    max_length: int
    flags: tuple[str, ...] = ()  # of bnf_train


def bnf(task: Task) -> dict[str, float]:
    """python -m bnf_train on the rows."""
    from bnf_train.flags import parse
    from bnf_train.run import run

    with tempfile.TemporaryDirectory() as folder:
        config = parse(
            [
                *(f"--model={task.model}", f"--dataset={task.rows}", f"--max_length={task.max_length}"),
                *(f"--output_dir={folder}/out", "--eval_size=0", "--save_strategy=no", "--no_reference_cache"),
                *("--per_device_train_batch_size=2", "--batch_size=8", "--optim=adamw_torch_fused", "--learning_rate=2e-5"),
                *("--show_examples=0", "--disable_tqdm=true", "--report_to=none", *task.flags),
            ]
        )
        trainer = run(config)
    seconds = next(log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log)
    return _figures(_tokens(task, trainer.processing_class), seconds, trainer.reference_seconds)


def bare(task: Task) -> dict[str, float]:
    """Steps of plain transformers, 4 x 4 sequences as long as the rows' mean."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = _device()
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    length = round(_tokens(task, AutoTokenizer.from_pretrained(task.model)) / (2 * len(_pairs(task))))
    ids = torch.randint(len(model.get_input_embeddings().weight), (4, length), device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(4):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        times.append(time.perf_counter() - start)
    return _figures(16 * length, median(times[1:]))


def trl_sft(task: Task) -> dict[str, float]:
    return _trl(task, "sft")


def trl_dpo(task: Task) -> dict[str, float]:
    return _trl(task, "dpo")


def trl_dpo_precomputed(task: Task) -> dict[str, float]:
    return _trl(task, "dpo", precompute_ref_log_probs=True)


def trl_kto(task: Task) -> dict[str, float]:
    return _trl(task, "kto")


METHODS: dict[str, Callable[[Task], dict[str, float]]] = {
    "bnf_train": bnf, "bare": bare, "trl_sft": trl_sft, "trl_dpo": trl_dpo, "trl_dpo_precomputed": trl_dpo_precomputed,
    "trl_kto": trl_kto,
}  # fmt: skip


def _trl(task: Task, kind: str, **options: Any) -> dict[str, float]:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16)

    def says(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    pairs = [
        (says("user", r["prompt"]), *(says("assistant", r[side]) for side in ("chosen", "rejected"))) for r in _pairs(task)
    ]
    singles = [(prompt, side, label) for prompt, *sides in pairs for side, label in zip(sides, (True, False), strict=True)]
    rows: dict[str, list[dict[str, Any]]] = {
        "dpo": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs],
        "kto": [{"prompt": p, "completion": s, "label": label} for p, s, label in singles],
        "sft": [{"prompt": p, "completion": s} for p, s, _ in singles],
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = getattr(trl, f"{kind.upper()}Config")(
            output_dir=folder, per_device_train_batch_size=2 if kind == "dpo" else 4, gradient_accumulation_steps=4,
            num_train_epochs=1, learning_rate=2e-5, save_strategy="no", report_to="none", max_length=task.max_length,
            gradient_checkpointing=False, bf16=False, use_cpu=not torch.cuda.is_available(), optim="adamw_torch_fused",
            logging_steps=1, disable_tqdm=True, **options,
        )  # fmt: skip
        start = time.perf_counter()
        trainer = getattr(trl, f"{kind.upper()}Trainer")(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows[kind]), processing_class=tokenizer
        )
        ready = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - ready
    # TRL computes a reference ahead of time as soon as it trains, or while it is set up
    before = ready - start if options else 0.0
    return _figures(_tokens(task, tokenizer), seconds, before)


def mfu(layers: int, tokens: int, lora: bool, steps: int, config: dict[str, Any] | None = None) -> dict[str, float]:
    """Steps on one packed batch of 8 responses with a model of Llama-3-8B's shape and `layers` layers.

    operations of a step = (6 full, or 4 with a frozen base) x weights that multiply a token x tokens, and the same
    multiple of a layer's 2 d sum over responses of length^2 for causal attention: what the model needs, whatever is recomputed.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from bnf_train.data import model_inputs, packed
    from bnf_train.model.attention import attend_varlen
    from bnf_train.model.head import attach_log_odds_head

    device = _device()
    dtype = torch.bfloat16 if bf16_in_hardware(device.type == "cpu") else torch.float32
    shape = LlamaConfig(**(LLAMA_3_8B | {"num_hidden_layers": layers} | (config or {})), attn_implementation="sdpa")
    with device:
        torch.set_default_dtype(dtype if lora else torch.float32)
        model = LlamaForCausalLM(shape)
        torch.set_default_dtype(torch.float32)
    attend_varlen(model)
    attach_log_odds_head(model)
    embedded = model.get_input_embeddings().weight.numel()
    multiplying = sum(p.numel() for p in model.parameters()) - (0 if shape.tie_word_embeddings else embedded)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    length = tokens // 8
    ids = torch.randint(shape.vocab_size, (1, 8 * length), device=device)
    places = torch.arange(8 * length, device=device).view(8, length)[:, :-1].flatten()
    inputs = model_inputs(packed(ids[0].split(length))) | {
        "response_positions": places, "response_labels": ids[0, places + 1],
        "ref_log_odds": torch.zeros(len(places), device=device),
        "coefficient": torch.full((len(places),), 1 / len(places), device=device),
    }  # fmt: skip
    times = []
    for _ in range(steps + 2):
        _wait(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, *_ = model(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        times.append(time.perf_counter() - start)
    attention = layers * 2 * shape.hidden_size * 8 * length**2
    operations = (4 if lora else 6) * (multiplying * 8 * length + attention / 2)
    achieved, peak = operations / median(times[2:]), _peak_operations(device, dtype)
    return _figures(8 * length, median(times[2:])) | {
        "tera_operations_per_second": achieved / 1e12, "peak_of_products": peak / 1e12, "mfu": achieved / peak,
        "bits": torch.finfo(dtype).bits,
    }  # fmt: skip


def _peak_operations(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of matrix products, the best of some."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = []
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def _figures(tokens: int, seconds: float, before: float = 0.0) -> dict[str, float]:
    if torch.cuda.is_available():
        peak = float(torch.cuda.max_memory_allocated())
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    speed = {"tokens_per_second": tokens / seconds, "with_reference": tokens / (seconds + before)}
    return {"tokens": tokens, **speed, "peak_gib": peak / GIB}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _pairs(task: Task) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(task.rows).read_text().splitlines()]


def _tokens(task: Task, tokenizer: Any) -> int:
    """Of all prompts and responses, as bnf_train cuts them: to their end-of-turn tokens, no longer than max_length."""
    rows, _ = tokenize(read_rows(task.rows, "train"), tokenizer, task.max_length, task.rows)
    return sum(len(response.input_ids) for row in rows for response in row.responses)


def _alone(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """In a process of its own, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bnf_train.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a model folder or hub name")
    add("--dataset", help="a JSONL file with prompt, chosen, rejected")
    add("--rows", type=int, default=32, help="how many of its rows (default: %(default)s)")
    add("--max_length", type=int, default=512, help="in tokens (default: %(default)s)")
    add("--only", help="methods, by commas (default: all that are installed)")
    add("--repeats", type=int, default=1, help="rounds over all methods; the figures are medians (default: %(default)s)")
    add("--json", help="write the figures there, too")
    add("--mfu", action="store_true", help="share of the measured peak instead")
    add("--layers", type=int, default=32, help="with --mfu: layers of Llama-3-8B (default: %(default)s)")
    add("--tokens", type=int, default=4096, help="with --mfu: tokens a step (default: %(default)s)")
    add("--lora", action="store_true", help="with --mfu: LoRA on a frozen base, in bf16 where the device multiplies it")
    add("--steps", type=int, default=5, help="with --mfu: steps measured (default: %(default)s)")
    options, flags = parser.parse_known_args(arguments)
    try:
        figures = _mfu(options) if options.mfu else _compare(options, tuple(flags))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _mfu(options: argparse.Namespace) -> dict[str, Any]:
    figures = _alone(mfu, options.layers, options.tokens, options.lora, options.steps)
    print(
        f"{options.layers} layers, {'LoRA' if options.lora else 'full'}, {options.tokens} tokens a step: "
        f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['tera_operations_per_second']:.1f} of "
        f"{figures['peak_of_products']:.1f} tera-operations/s in {'bf16' if figures['bits'] == 16 else 'float32'} = "
        f"{figures['mfu']:.0%}, peak {figures['peak_gib']:.1f} GiB"
    )
    return figures


def _compare(options: argparse.Namespace, flags: tuple[str, ...]) -> dict[str, Any]:
    if not options.model or not options.dataset:
        raise UsageError("--model and --dataset are needed (or --mfu).")
    known = [name for name in METHODS if not name.startswith("trl") or find_spec("trl")]
    chosen = options.only.split(",") if options.only else known
    if unknown := [name for name in chosen if name not in known]:
        raise UsageError(f"--only {unknown[0]}: expected some of {', '.join(known)}.")
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        try:
            file.writelines(Path(options.dataset).read_text().splitlines(keepends=True)[: options.rows])
        except OSError as error:
            raise UsageError(f"--dataset {options.dataset}: {(error.strerror or str(error)).lower()}.") from error
        file.flush()
        task = Task(options.model, file.name, options.max_length, flags)
        print(f"{'':22}{'tokens/s':>10}{'with reference':>16}{'peak GiB':>10}")
        for _ in range(options.repeats):
            for name in chosen:
                figures[name].append(_alone(METHODS[name], task))
                shown = {key: median(run[key] for run in figures[name]) for key in figures[name][0]}
                print(
                    f"{name:22}{shown['tokens_per_second']:10.0f}{shown['with_reference']:16.0f}{shown['peak_gib']:10.2f}",
                    flush=True,
                )
    return dict(figures)


if __name__ == "__main__":
    sys.exit(main())
