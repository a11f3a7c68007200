"""python -m bnf_train.compare: several objectives from one starting point, on the same rows, in the same order and steps.

    python -m bnf_train.compare --arms bnf dpo "simpo beta=2.5 gamma=0.5" --model path/to/model --dataset pairs.jsonl
    python -m bnf_train.compare --config proofs/experiments/collapse.yaml

An arm is an objective and flags of `python -m bnf_train` for it alone; all other flags of bnf_train are for every arm.
Each arm is a run in a process of its own under OUTPUT_DIR/arms, with the reference's log-odds computed once for all.
Arms that have finished are not run again: the same command goes on after an interruption, and takes up new arms.
{seed} in a flag is the arm's seed: --model worlds/{seed}/model has a model for each.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnf_train import cli
from bnf_train.errors import UsageError

PROBE = Path(__file__).parent / "probe.txt"  # prose on 24 subjects, written for this: nothing of any preference data
OWN = (
    "arms", "learning_rates", "seeds", "probe", "responses", "max_new_tokens", "keep_models", "arm_reports", "jobs",
    "output_dir",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_compare, arguments)


def _compare(arguments: list[str], failure: cli.Failure) -> None:
    failure.stopped = "Stopped; the same command goes on with the arms that have not finished."
    options, common = read_options(arguments)
    from bnf_train.compare.run import compare  # imports torch

    compare(options, common)


def read_options(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The comparison's own options; keys of the --config file and, under "flags", flags for every arm."""
    parser = cli.Parser(
        prog="python -m bnf_train.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", metavar="FILE", help="A YAML file with these flags, and those of bnf_train for every arm, as keys.")
    add("--arms", nargs="+", metavar="ARM", help='An objective, and flags for it alone: bnf "dpo beta=0.1".')
    add("--learning_rates", nargs="+", metavar="LR", help="Every arm at each of them. Default: bnf_train's --learning_rate.")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="Every arm with each of them. Default: 0 1.")
    add("--jobs", type=int, metavar="N", help="So many arms at a time, each with its share of the cores. Default: 1.")
    add("--probe", metavar="FILE", help="Text outside the preference data, with blank lines. Default: built in; none: none.")
    add("--responses", type=int, metavar="N", help="Held-out prompts answered greedily after training. Default: 8; 0: none.")
    add("--max_new_tokens", type=int, metavar="N", help="Where an answer is cut. Default: 256.")
    add("--keep_models", action="store_true", help="Keep the weights of every arm.")
    add("--no_arm_reports", dest="arm_reports", action="store_false", help="No report of each arm: quicker, for large grids.")
    add("--output_dir", metavar="FOLDER", help="Where all of it goes. Default: runs/compare.")
    own, flags = parser.read_known(arguments)
    given = vars(own)
    from bnf_train.flags import read_yaml  # imports transformers

    in_file = read_yaml(given["config"]) if "config" in given else {}
    in_file = {str(key).replace("-", "_"): value for key, value in in_file.items()}
    options: dict[str, Any] = {
        "learning_rates": [], "seeds": [0, 1], "probe": str(PROBE), "responses": 8, "max_new_tokens": 256,
        "keep_models": False, "arm_reports": True, "jobs": 1, "output_dir": "runs/compare",
    }  # fmt: skip
    options |= {key: in_file.pop(key) for key in OWN if key in in_file}
    options |= {key: value for key, value in given.items() if key in OWN}
    if not isinstance(options.get("arms"), list) or not options["arms"]:
        raise UsageError('--arms is missing: name at least one, such as --arms bnf dpo "simpo beta=2.5 gamma=0.5".')
    for key in ("seeds", "learning_rates"):
        if not isinstance(options[key], list):
            options[key] = [options[key]]
    for key, least, values in (
        ("seeds", 0, options["seeds"]),
        ("responses", 0, [options["responses"]]),
        ("max_new_tokens", 1, [options["max_new_tokens"]]),
        ("jobs", 1, [options["jobs"]]),
    ):
        if wrong := [v for v in values if not isinstance(v, int) or isinstance(v, bool) or v < least]:
            raise UsageError(f"--{key}: expected whole numbers of at least {least}, got {wrong[0]}.")
    return options, in_file | {"flags": flags}


if __name__ == "__main__":
    sys.exit(main())
