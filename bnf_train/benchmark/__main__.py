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
    return parser.read_known(arguments)


def _benchmark(arguments: list[str], failure: cli.Failure) -> None:
    options, flags = _flags(arguments)
    failure.out_of_memory = lambda: f"lower {'--layers or --tokens' if options.mfu else '--max_length'}."
    figures = _mfu(options) if options.mfu else _compare(options, tuple(flags))
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

    methods: dict[str, Callable[..., dict[str, float]]] = {"bnf_train": ours.bnf, "bare": peers.bare}
    if find_spec("trl"):
        methods |= {
            "trl_sft": peers.trl_sft, "trl_dpo": peers.trl_dpo, "trl_dpo_precomputed": peers.trl_dpo_precomputed,
            "trl_kto": peers.trl_kto,
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


def _alone(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """In a process of its own, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


if __name__ == "__main__":
    sys.exit(main())
