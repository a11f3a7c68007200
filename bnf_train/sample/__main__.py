"""python -m bnf_train.sample: a model's own answers to prompts, labelled, as rows to train on.

    python -m bnf_train.sample --model path/to/model --prompts prompts.jsonl --check number --output rows.jsonl
    python -m bnf_train.sample --model path/to/model --prompts prompts.jsonl --reward_model path/to/rm --output rows.jsonl
    python -m bnf_train.sample --server http://localhost:8000/v1 --server_model NAME --prompts prompts.jsonl --output rows.jsonl

Answers are kept as they come, in OUTPUT.partial.jsonl: the same command goes on where it was stopped, with the same answers as
if it had not been.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from bnf_train import cli
from bnf_train.errors import UsageError
from bnf_train.sample.flags import add_drawing, check_drawing


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags of the command.

    Raises:
      UsageError: one is missing, or has a value that it cannot have.

    Example:
      >>> parse(["--model", "m", "--prompts", "p.jsonl", "--output", "rows.jsonl"]).temperature
      0.8
    """
    parser = cli.Parser(prog="python -m bnf_train.sample", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", metavar="MODEL", help="a model folder or hub name, whose answers are drawn on this machine")
    add("--server", metavar="URL", help="or an OpenAI-compatible server, as http://host:port/v1; its key in OPENAI_API_KEY")
    add("--server_model", metavar="NAME", help="what the server calls its model")
    add("--concurrency", type=int, default=8, metavar="N", help="prompts that the server has at once (default: %(default)s)")
    add(
        "--prompts",
        required=True,
        metavar="FILE",
        help="rows with a prompt: a file, or a training split of a folder or hub dataset (another: NAME=SPLIT)",
    )
    add("--output", required=True, metavar="FILE", help="the rows, a new .jsonl file")
    add_drawing(add)
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    add("--check", metavar="NAME", help="label answers by a check, as --check of python -m bnf_train; half right is right")
    add("--reward_model", metavar="MODEL", help="or score them by a sequence-classification model of one label")
    add("--batch_size", type=int, default=64, metavar="N", help="answers drawn at once by --model (default: %(default)s)")
    add("--bf16", action="store_true", help="multiply in bf16, by autocast")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with a model")
    add("--disable_tqdm", action="store_true", help="no progress bar")
    add("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.read(arguments)
    _check_source(flags)
    _check_numbers(flags)
    if flags.check is not None and flags.reward_model is not None:
        raise UsageError("--check, --reward_model: expected one of them, got both; leave one out.")
    if flags.form == "pairs" and flags.check is None and flags.reward_model is None:
        raise UsageError("--form pairs: needs labels to tell best from worst; add --check or --reward_model.")
    if Path(flags.output).suffix != ".jsonl":
        raise UsageError(f"--output {flags.output}: expected a file whose name ends in .jsonl.")
    return flags


def _check_source(flags: argparse.Namespace) -> None:
    if (flags.model is None) == (flags.server is None):
        got = "neither" if flags.model is None else "both"
        raise UsageError(f"--model, --server: expected one of them, got {got}.")
    if (flags.server is None) != (flags.server_model is None):
        raise UsageError(
            "--server, --server_model: expected both or neither; --server_model is the server's name of its model."
        )
    if flags.server is not None and not flags.server.startswith(("http://", "https://")):
        raise UsageError(f"--server {flags.server}: expected an address such as http://localhost:8000/v1.")


def _check_numbers(flags: argparse.Namespace) -> None:
    for name in ("batch_size", "concurrency"):
        if (value := getattr(flags, name)) < 1:
            raise UsageError(f"--{name}: expected at least 1, got {value}.")
    if flags.seed < 0:
        raise UsageError(f"--seed: expected at least 0, got {flags.seed}.")
    check_drawing(flags)


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_sample, arguments)


def _sample(arguments: list[str], failure: cli.Failure) -> None:
    flags = parse(arguments)
    failure.out_of_memory = lambda: f"lower --batch_size (now {flags.batch_size}), or add --bf16."
    failure.stopped = "Stopped; the same command goes on from the answers that are there."
    from rich.console import Console

    from bnf_train.sample.run import sample  # imports transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    sample(flags, Console(highlight=False, soft_wrap=True))


if __name__ == "__main__":
    sys.exit(main())
