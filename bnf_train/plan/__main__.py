"""python -m bnf_train.plan: what a run would take, from the model's configuration alone. Nothing is trained.

    python -m bnf_train.plan --model path/to/model --dataset pairs.jsonl --max_length 512
    python -m bnf_train.plan --model meta-llama/Meta-Llama-3-8B-Instruct --gpus 8 --json plan.json

Flags are those of `python -m bnf_train`, and a few of its own (--help). Weights are not needed: the model is built from
its config.json on tensors without memory, and one forward and backward pass over the largest micro-batch is traced there.
Symbols: P parameters, L trainable ones, G GPUs, V vocabulary, d hidden width, N tokens, n length of a response with its
prompt. All sizes are in bytes, GiB = 2^30 of them.

Measured: full fine-tuning on a CPU in bf16 autocast, where the plan was within 4 % of three runs' peaks (see HEAP_SHARE).
Formulas only, never measured: all rows of GPUs, LoRA, gradient checkpointing. --torch_compile is not accounted for.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnf_train import cli
from bnf_train.errors import UsageError


def _flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The plan's own flags, and what is left for training's."""
    parser = cli.Parser(
        prog="python -m bnf_train.plan",
        description=(__doc__ or "").partition("\n")[0],
        epilog="Every other flag is one of python -m bnf_train.",
    )
    numbers: dict[str, tuple[Any, Any, str]] = {
        "utilization": (float, 0.4, "share of the peak that training reaches"),
        "peak_tflops": (float, 312.0, "peak of one GPU in bf16, 10^12 FLOP/s (A100: 312, H100: 989)"),
        "gpus": (int, 8, "GPUs that DDP, FSDP2 and ZeRO-3 spread over"),
        "rows": (int, None, "pairs, in place of reading --dataset (default for a dataset of the hub: 60,000)"),
        "prompt_tokens": (int, 200, "tokens of a prompt, estimated where they cannot be counted"),
        "response_tokens": (int, 400, "tokens of a response, estimated where they cannot be counted"),
    }
    for name, (kind, default, text) in numbers.items():
        more = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text + more)
    parser.add_argument("--json", metavar="FILE", help="write the plan there too, as JSON; - prints JSON only")
    flags, rest = parser.read_known(arguments)
    for name in numbers:
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name}: expected a number above 0, got {value}.")
    if flags.utilization > 1:
        raise UsageError(f"--utilization: expected a share of at most 1, got {flags.utilization}.")
    return flags, rest


def _plan(arguments: list[str], failure: cli.Failure) -> None:
    flags, rest = _flags(arguments)
    from rich.console import Console

    from bnf_train.flags import parse  # imports transformers
    from bnf_train.plan.estimate import plan
    from bnf_train.plan.table import tables

    # --rows stands in place of a dataset, and of what the config says when there is none
    result = plan(parse(rest if flags.rows is None else [*rest, "--dataset", "rows"]), flags)
    text = json.dumps(result, indent=2) + "\n"
    if flags.json == "-":
        print(text, end="")
        return
    if flags.json:
        Path(flags.json).write_text(text)
    console = Console(highlight=False)
    for table in tables(result):
        console.print(table)


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_plan, arguments)


if __name__ == "__main__":
    sys.exit(main())
