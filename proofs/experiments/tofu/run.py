"""python proofs/experiments/tofu/run.py: unlearning on TOFU. A model memorises fictitious authors, then forgets two of them.

    python proofs/experiments/tofu/run.py --model path/to/SmolLM2-135M-Instruct --output_dir runs/tofu
    python proofs/experiments/tofu/run.py --model path/to/SmolLM2-135M-Instruct --output_dir runs/tofu --quick
    python proofs/experiments/tofu/run.py --model meta-llama/Llama-2-7b-chat-hf --data locuslab/TOFU --learn_epochs 5 \\
        --learn_rate 1e-5 --learn_rows 32 --rows_per_step 64 --learning_rates 5e-6 1e-5 --workers 1 --tokens_per_pass 4096

Rows to forget are dispreferred, rows to retain preferred. Flags that are not listed here are those of python -m bnf_train, for
every training. The same command goes on after an interruption, and takes up new methods, learning rates and seeds.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from tofu_data import RETAINED, complete, embedded
from tofu_metrics import forget_quality, rouge_recall
from tofu_report import report
from tofu_stages import Arm, Experiment, Settings

from bnf_train import cli
from bnf_train.errors import UsageError

METHODS = [
    *("gradient_ascent", "gradient_difference", "npo", "tnpo", "sim_npo", "unlikelihood", "wga", "bnf", "bnf_one_sided"),
]
# what a flag is that is not given: on a GPU minutes in all, on two CPU cores about two hours, with --quick ten minutes
GPU: dict[str, Any] = {
    "authors": 20, "learn_epochs": 6.0, "epochs": 5.0, "learning_rates": [1e-5, 3e-5, 1e-4], "seeds": [0, 1], "eval_rows": 100,
    "methods": METHODS, "workers": 3,
}  # fmt: skip
CPU: dict[str, Any] = GPU | {"learn_epochs": 5.0, "epochs": 2.0, "learning_rates": [3e-5, 1e-4], "eval_rows": 20, "workers": 1}
QUICK: dict[str, Any] = CPU | {
    "authors": 4, "learning_rates": [1e-4], "seeds": [0], "eval_rows": 10,
    "methods": ["gradient_ascent", "npo", "bnf", "bnf_one_sided"],
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_main, arguments)


def _main(arguments: list[str], failure: cli.Failure) -> None:
    options, flags = read_options(arguments)
    failure.stopped = "Stopped; the same command goes on with the stages that have not finished."
    console = Console(soft_wrap=True, highlight=False)
    same: list[Any] = [{"answer": 0.0, "perturbed": [0.0]}]
    rouge_recall([""], [""])  # what is missing is said before anything is trained
    forget_quality(same, same)
    tofu = complete(options["data"], options["forget"]) if options["data"] else embedded(options["authors"])
    settings = Settings(
        options["model"], f"{options['data']} {options['forget']}" if options["data"] else f"{options['authors']} authors",
        options["learn_epochs"], options["learn_rate"], options["learn_rows"], options["epochs"], options["rows_per_step"] // 2,
        options["eval_rows"] or None, options["max_length"], options["max_new_tokens"], flags,
    )  # fmt: skip
    experiment = Experiment(Path(options["output_dir"]), tofu, settings, console, bars=sys.stderr.isatty())
    arms = [Arm(m, rate, seed) for seed in options["seeds"] for m in options["methods"] for rate in options["learning_rates"]]
    experiment.begin(arms)
    console.print(_plan(experiment, options, len(arms)))
    started = time.perf_counter()
    experiment.learn(arms)
    experiment.unlearn_all(arms, options["workers"])
    table = report(experiment, arms)
    console.print(Markdown(table) if sys.stdout.isatty() else table)
    minutes = (time.perf_counter() - started) / 60
    console.print(f"{minutes:.1f} minutes. results.json, results.md and unlearning.png in {options['output_dir']}")
    if failed := sum("failed" in (experiment.found(arm.name) or {}) for arm in arms):
        raise UsageError(f"{failed} of {len(arms)} arms failed (see above); the same command tries them again.")


def _plan(experiment: Experiment, options: dict[str, Any], arms: int) -> str:
    """All that a default may have decided."""
    tofu, settings = experiment.tofu, experiment.settings
    rates, seeds = (", ".join(f"{value:g}" for value in options[name]) for name in ("learning_rates", "seeds"))
    return (
        f"{len(tofu.forget)} rows to forget, {len(tofu.retain)} to retain, learned in {settings.learn_epochs:g} epochs at "
        f"{settings.learn_rate:g}. {arms} arms: {', '.join(options['methods'])}; learning rates {rates}; seeds {seeds}; "
        f"{settings.epochs:g} passes over the rows to forget, {settings.each} of them in a step. Asked of each other set: "
        f"{settings.eval_rows or 'all'} rows. On {experiment.config.device.type}."
    )


def read_options(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The experiment's own options, and flags of bnf_train for every training."""
    parser = cli.Parser(
        prog="python proofs/experiments/tofu/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", metavar="MODEL", help="Model folder or hub name, with a chat template.")
    add("--output_dir", metavar="FOLDER", help="Where all of it goes. Default: runs/tofu.")
    add("--quick", action="store_true", help="Four authors, four methods, one learning rate, one seed.")
    add("--data", metavar="DATA", help="All of TOFU: a folder with its files, or locuslab/TOFU. Default: the 20 authors here.")
    add("--forget", choices=sorted(RETAINED), help="Of --data, what is forgotten. Default: forget10.")
    add("--authors", type=int, metavar="N", help="Without --data: so many authors, of whom two are forgotten.")
    add("--methods", nargs="+", metavar="NAME", help=f"Or any objective of bnf_train. Default: {' '.join(METHODS)}.")
    add("--learning_rates", nargs="+", type=float, metavar="LR", help="Of unlearning; every method at each.")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="Of the order of rows, and of which are retained in which step.")
    add("--epochs", type=float, metavar="N", help="Passes over the rows to forget.")
    add("--rows_per_step", type=int, metavar="N", help="Of unlearning, half of them to forget. Default: 16.")
    add("--learn_epochs", type=float, metavar="N", help="Passes in which the rows are memorised.")
    add("--learn_rate", type=float, metavar="LR", help="Learning rate of that. Default: 3e-4.")
    add("--learn_rows", type=int, metavar="N", help="Rows of an optimizer step of that. Default: 16.")
    add("--workers", type=int, metavar="N", help="Processes that unlearn at once on a GPU. Default: 3; on a CPU 1.")
    add("--eval_rows", type=int, metavar="N", help="Rows asked of retain, real authors and world facts each. 0: all.")
    add("--max_length", type=int, metavar="N", help="Longest question with answer, in tokens. Default: 512.")
    add("--max_new_tokens", type=int, metavar="N", help="Where a greedy answer is cut. Default: 80.")
    own, flags = parser.read_known(arguments)
    given = vars(own)
    options: dict[str, Any] = {
        "data": None, "forget": "forget10", "rows_per_step": 16, "learn_rate": 3e-4, "learn_rows": 16, "max_length": 512,
        "max_new_tokens": 80, "output_dir": "runs/tofu",
    }  # fmt: skip
    usual = QUICK if given.pop("quick", False) else GPU if torch.cuda.is_available() else CPU
    options |= usual | given
    _check(options, given, flags)
    return options, flags


def _check(options: dict[str, Any], given: dict[str, Any], flags: Sequence[str]) -> None:
    if "model" not in options:
        raise UsageError("--model is missing: a model folder or hub name, such as HuggingFaceTB/SmolLM2-135M-Instruct.")
    if options["data"] is None and "forget" in given:
        raise UsageError("--forget: has no effect without --data; add it, or leave it out.")
    if options["data"] is not None and "authors" in given:
        raise UsageError("--authors: has no effect with --data; leave it out.")
    if options["rows_per_step"] < 2 or options["rows_per_step"] % 2:
        raise UsageError(f"--rows_per_step: expected an even number of at least 2, got {options['rows_per_step']}.")
    for name in ("workers", "learn_rows", "epochs", "learn_epochs", "learn_rate", "max_length", "max_new_tokens"):
        if not options[name] > 0:
            raise UsageError(f"--{name}: expected more than 0, got {options[name]}.")
    if options["eval_rows"] < 0:
        raise UsageError(f"--eval_rows: expected a number of rows, or 0 for all, got {options['eval_rows']}.")
    if any(cli.underscored(flag).partition("=")[0] == "--use_peft" for flag in flags):
        raise UsageError("--use_peft: what is memorised would be an adapter, from which no arm can start; leave it out.")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
