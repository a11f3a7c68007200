"""python -m bnf_train.benchmark: training speed and peak memory, beside TRL's trainers where TRL is installed.

    python -m bnf_train.benchmark --model path/to/SmolLM2-135M-Instruct --dataset pairs.jsonl --rows 32
    python -m bnf_train.benchmark --mfu --layers 8            # one GPU: share of its measured peak, Llama-3-8B's shape
    python -m bnf_train.benchmark --mfu --lora
    python -m bnf_train.benchmark --prefix --model path/to/SmolLM2-135M-Instruct --figure prefix.png

The first trains one epoch on the first rows, each method in a process of its own: micro-batches of 4 responses, 4 of them a
step, fused AdamW, no gradient checkpointing. bnf_train holds float32 weights, under bf16 autocast where there is a unit for
bf16, as it always does, and computes a prompt of several responses once; "apart" it does not. TRL's models are loaded in bf16,
which is less work and memory, or have the "same" arithmetic as bnf_train. "bare" is a step of plain transformers on 4 equally
long sequences, with no padding and nothing recorded. Tokens are those of prompts and responses, as if each had its own prompt.

The second takes optimizer steps on one packed batch of random tokens, with random weights, and compares the floating-point
operations that the model needs (attention over the responses included) with matrix products of the same device, in the
dtype that the step multiplies in: bf16, or float32 on a CPU without a unit for bf16, as a run of bnf_train does there.

The third takes forward and backward passes over groups of responses, with their prompt once and with one each, for several
lengths of prompt and sizes of group, and puts the speed-up beside K (p + r) / (p + K r), which it would be if work went by
positions alone.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from bnf_train import cli
from bnf_train.errors import UsageError
from bnf_train.processes import end_with_parent


def _flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own flags, and what is left for training's."""
    parser = cli.Parser(
        prog="python -m bnf_train.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other flag is one of python -m bnf_train, for its runs.",
    )
    add = parser.add_argument
    add("--model", help="a model folder or hub name")
    add("--dataset", help="a JSONL file with prompt, chosen, rejected, or with prompt, completion, label")
    add("--rows", type=int, default=32, help="how many of its rows (default: %(default)s)")
    add("--max_length", type=int, default=512, help="in tokens (default: %(default)s)")
    add("--only", help="methods, by commas (default: all that are installed)")
    add("--repeats", type=int, default=1, help="rounds over all methods; the figures are medians (default: %(default)s)")
    add("--json", help="write the figures there, too")
    add("--mfu", action="store_true", help="share of the measured peak instead")
    add("--prefix", action="store_true", help="what a shared prompt saves instead, by its length and the responses to it")
    add("--figure", metavar="FILE", help="with --prefix: draw it there (.png, .svg, .pdf)")
    add("--layers", type=int, default=32, help="with --mfu: layers of Llama-3-8B (default: %(default)s)")
    add("--tokens", type=int, default=4096, help="with --mfu or --prefix: tokens a step (default: %(default)s)")
    add("--lora", action="store_true", help="with --mfu: LoRA on a frozen base, in bf16 where the device multiplies it")
    add("--steps", type=int, default=5, help="with --mfu or --prefix: steps measured (default: %(default)s)")
    return parser.read_known(arguments)


def _benchmark(arguments: list[str], failure: cli.Failure) -> None:
    options, flags = _flags(arguments)
    failure.out_of_memory = lambda: f"lower {'--layers or --tokens' if options.mfu else '--max_length'}."
    figures = _mfu(options) if options.mfu else _prefix(options) if options.prefix else _compare(options, tuple(flags))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_benchmark, arguments)


def _mfu(options: argparse.Namespace) -> dict[str, Any]:
    from bnf_train.benchmark.mfu import mfu  # imports torch

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
    from bnf_train.benchmark import ours, peers  # import torch
    from bnf_train.benchmark.task import Task

    methods: dict[str, Callable[..., dict[str, float]]]
    methods = {"bnf_train": ours.bnf, "bnf_train_apart": ours.bnf_apart, "bare": peers.bare}
    if find_spec("trl"):
        methods |= {"trl_sft": peers.trl_sft, "trl_kto": peers.trl_kto, "trl_kto_same": peers.trl_kto_same}
        if _are_pairs(options.dataset):
            methods |= {
                "trl_dpo": peers.trl_dpo, "trl_dpo_same": peers.trl_dpo_same, "trl_dpo_precomputed": peers.trl_dpo_precomputed,
            }  # fmt: skip
    known = list(methods)
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
                figures[name].append(_alone(methods[name], task))
                shown = {key: median(run[key] for run in figures[name]) for key in figures[name][0]}
                print(
                    f"{name:22}{shown['tokens_per_second']:10.0f}{shown['with_reference']:16.0f}{shown['peak_gib']:10.2f}",
                    flush=True,
                )
    return dict(figures)


def _are_pairs(path: str) -> bool:
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        return "chosen" in json.loads(file.readline())
    return False  # said where it is read


def _prefix(options: argparse.Namespace) -> dict[str, Any]:
    from bnf_train.benchmark.prefix import draw, sweep  # imports torch

    if not options.model:
        raise UsageError("--prefix: --model is needed, a model folder or hub name.")
    figures = {"points": sweep(options.model, options.tokens, options.steps)}
    if options.figure:
        draw(figures["points"], Path(options.figure))
        print(f"Drawn to {options.figure}.")
    return figures


def _alone(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """In a process of its own, whose peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as process:
        return process.submit(function, *arguments).result()


if __name__ == "__main__":
    sys.exit(main())
