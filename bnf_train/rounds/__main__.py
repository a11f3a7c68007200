"""python -m bnf_train.rounds: sample, check, train, and again with the result as the next policy and reference.

    python -m bnf_train.rounds                                     # the demo: three rounds
    python -m bnf_train.rounds --rounds 3 --model path/to/model --dataset prompts.jsonl --check number --output_dir runs/rounds

All other flags are those of python -m bnf_train, for every round: --model, --check, --check_dataset, --objective, ...
--per_device_eval_batch_size says how many prompts are answered at once.
Killed at any moment, the same command goes on, and ends as if it had not been; with more --rounds it adds some.
"""

import argparse
import sys
from collections.abc import Sequence

from bnf_train import cli
from bnf_train.rounds.flags import add_own
from bnf_train.sample.flags import add_drawing


def parser() -> cli.Parser:
    """The flags of the command that are none of `python -m bnf_train`.

    Example:
      >>> parser().read_known(["--samples", "4", "--learning-rate", "1e-4"])[0].samples
      4
    """
    result = cli.Parser(
        prog="python -m bnf_train.rounds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_own(result.add_argument)
    add_drawing(result.add_argument_group("answers, as in python -m bnf_train.sample").add_argument)
    return result


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_rounds, arguments)


def _rounds(arguments: Sequence[str], failure: cli.Failure) -> None:
    failure.stopped = "Stopped; the same command goes on from here."
    own = parser()
    own.read_known(cli.without_debug(arguments))  # --help, and what is no number, before anything heavy is imported
    from bnf_train.rounds.run import rounds
    from bnf_train.rounds.settings import read

    rounds(read(own, cli.without_debug(arguments)))


if __name__ == "__main__":
    sys.exit(main())
