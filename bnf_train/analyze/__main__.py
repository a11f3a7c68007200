"""python -m bnf_train.analyze: how far policies moved from their reference, figures 3 and 4 of the paper.

    python -m bnf_train.analyze --policy runs/bnf runs/dpo --reference path/to/model --data held_out.jsonl
    python -m bnf_train.analyze --policy runs/bnf --reference path/to/model --data held_out.jsonl --greedy 1000

On the responses of the data, or (--greedy) on each policy's own greedy responses to the first prompts, as the paper does;
then response lengths are reported too (table 5). Beside the paper's figures stands likelihood displacement: the share of
tokens whose likelihood fell, and the mean probability of the argmax token before and after. Definitions with formulas:
`bnf_core.analysis`. Writes analysis.json, figure3.png, figure4.png and displacement.png. One model is in memory at a time, and
never its full logits. With --check every model answers prompts, and right answers are counted.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from bnf_train import cli, options
from bnf_train.errors import UsageError


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m bnf_train.analyze", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--policy", nargs="+", required=True, metavar="MODEL", help="model folders, hub names, or folders of LoRA adapters")
    add("--reference", required=True, metavar="MODEL", help="the model that they were trained from")
    add("--data", required=True, help="preference rows, as --dataset of python -m bnf_train; its test split where it has one")
    add("--output_dir", default="runs/analysis", help="a new or empty folder (default: %(default)s)")
    add("--names", nargs="+", metavar="NAME", help="what the policies are called (default: the names of their folders)")
    add("--bins_of", metavar="NAME", help="the policy whose deciles are figure 4's bins (default: the first)")
    add("--rows", type=int, metavar="N", help="only the first N rows of the data")
    add("--greedy", type=int, metavar="N", help="greedy responses of every model to the first N prompts, not the data's own")
    add("--max_new_tokens", type=int, default=512, metavar="N", help="longest greedy response (default: %(default)s)")
    add(
        "--check",
        metavar="NAME",
        help="count every model's right answers, as --check of python -m bnf_train, to --data's prompts",
    )
    add("--check_dataset", metavar="FILE", help="other prompts for --check, as of python -m bnf_train")
    add("--check_rows", type=int, default=200, metavar="N", help="at most so many prompts (default: %(default)s)")
    add("--check_samples", type=int, default=4, metavar="N", help="answers sampled to a prompt (default: %(default)s; 0: none)")
    add("--check_temperature", type=float, default=1.0, metavar="T", help="of the samples (default: %(default)s)")
    add("--check_max_new_tokens", type=int, default=256, metavar="N", help="longest answer (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of --check's prompts and samples (default: %(default)s)")
    add("--max_length", type=int, default=512, metavar="N", help="longest prompt with response (default: %(default)s)")
    add("--batch_size", type=int, default=8, metavar="N", help="responses of one forward pass (default: %(default)s)")
    add("--bf16", nargs="?", const="true", default="false", choices=("true", "false"), help="multiply in bf16, by autocast")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with a model")
    add("--debug", action="store_true", help="show the traceback of an error")
    options.add_reading(parser)
    flags = parser.read(arguments)
    if flags.check is None and flags.check_dataset is not None:
        raise UsageError("--check_dataset: has no effect without --check; add it, or leave it out.")
    if flags.greedy and flags.train_on != "last":
        raise UsageError(f"--train_on {flags.train_on}: a greedy response is one turn; leave it out, or --greedy.")
    if not flags.check_temperature > 0:
        raise UsageError(f"--check_temperature: expected more than 0, got {flags.check_temperature}.")
    for name in ("check_samples", "seed"):
        if getattr(flags, name) < 0:
            raise UsageError(f"--{name}: expected at least 0, got {getattr(flags, name)}.")
    for name in (
        *("rows", "greedy", "max_new_tokens", "max_length", "batch_size"),
        *("check_rows", "check_max_new_tokens"),
    ):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise UsageError(f"--{name}: expected at least 1, got {value}.")
    return flags


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_analyze, arguments)


def _analyze(arguments: list[str], failure: cli.Failure) -> None:
    flags = parse(arguments)
    failure.out_of_memory = lambda: f"lower --batch_size (now {flags.batch_size}), or add --bf16."
    run(flags)


def run(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from bnf_train.analyze.figures import displacement_table, right_table, table, write
    from bnf_train.analyze.run import analyze  # imports transformers

    folder = Path(flags.output_dir)
    cli.check_new_folder(folder)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console = Console(highlight=False, soft_wrap=True)
    result = analyze(flags, console)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, result)
    except OSError as error:
        raise UsageError(f"--output_dir {folder}: {(error.strerror or str(error)).lower()}.") from error
    Console(highlight=False).print(table(result))
    Console(highlight=False).print(displacement_table(result))
    if "right" in result:
        Console(highlight=False).print(right_table(result["right"]))
    console.print(f"analysis.json, figure3.png, figure4.png and displacement.png in {folder}")


if __name__ == "__main__":
    sys.exit(main())
