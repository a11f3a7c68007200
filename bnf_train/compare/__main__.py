"""python -m bnf_train.compare: several objectives from one starting point, on the same rows, in the same order and steps.

    python -m bnf_train.compare --arms bnf dpo "simpo beta=2.5 gamma=0.5" --model path/to/model --dataset pairs.jsonl
    python -m bnf_train.compare --config proofs/experiments/collapse.yaml

An arm is an objective and flags of `python -m bnf_train` for it alone; all other flags of bnf_train are for every arm.
Each arm is a run in a process of its own under OUTPUT_DIR/arms, with the reference's log-odds computed once for all.
Arms that have finished are not run again: the same command goes on after an interruption, and takes up new arms.
"""

import argparse
import json
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bnf_train import demo
from bnf_train.compare.arm import Measures, paragraphs, train_arm
from bnf_train.compare.report import table, write
from bnf_train.errors import Interrupted, UsageError, is_out_of_memory
from bnf_train.flags import parse, read_yaml

# of every arm, unless the command or the --config file says otherwise
DEFAULTS = {
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "save_strategy": "no",
    "show_examples": 0,
    "report_to": "none",
}
OWN = ("arms", "learning_rates", "seeds", "probe", "responses", "max_new_tokens", "keep_models", "output_dir")


@dataclass(frozen=True)
class Arm:
    """One run: `name` is the same for all seeds of an arm, `arguments` are flags of bnf_train."""

    name: str
    seed: int
    folder: Path
    arguments: list[str]
    shared: dict[str, Any] = field(default_factory=dict)  # keys of the --config file, and what is measured

    def finished(self) -> dict[str, Any] | None:
        """What the run left, or None.

        Raises:
          UsageError: it was run with other flags, another --config file, or measured otherwise.
        """
        path = self.folder / "arm.json"
        if not path.is_file():
            return None
        try:
            result: dict[str, Any] = json.loads(path.read_text())
        except ValueError:  # the machine went down before it was on the disk
            return None
        now = json.loads(json.dumps(self.shared, default=str))
        then = result.get("shared", now)
        if changed := sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key)):
            raise UsageError(
                f"{path}: this arm was run with {changed[0]} {then.get(changed[0])} in place of {now.get(changed[0])}; remove "
                f"{self.folder} or pass another --output_dir."
            )
        if result["arguments"] != self.arguments:
            raise UsageError(
                f"{path}: this arm was run with other flags ({shlex.join(result['arguments'])}); remove {self.folder} or "
                "pass another --output_dir."
            )
        return result

    def run(self, measures: Measures, before: bool) -> dict[str, Any]:
        """Trains in a process of its own, so that its memory is its own, too; a run that fails is one line of the result."""
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed run left of it
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            try:
                result = process.submit(train_arm, self.arguments, measures, before).result()
            except BrokenProcessPool:
                return self._about() | {"failed": "its process was killed, out of memory?"}
            except UsageError as error:
                return self._about() | {"failed": str(error)}
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return self._about() | {"failed": f"out of memory ({' '.join(str(error).split())[:200]})"}
        result |= self._about()
        partial = self.folder / "arm.json.tmp"
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, self.folder / "arm.json")
        return result

    def _about(self) -> dict[str, Any]:
        about = {"name": self.name, "seed": self.seed, "arguments": self.arguments, "shared": self.shared}
        return json.loads(json.dumps(about, default=str))


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        compare(arguments)
    except UsageError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted) as stop:  # of this process, or of an arm's
        print("Stopped; the same command goes on with the arms that have not finished.", file=sys.stderr)
        return stop.code if isinstance(stop, Interrupted) else 130
    return 0


def compare(arguments: Sequence[str]) -> None:
    """Runs the arms that have not finished, and writes the report after each."""
    from rich.console import Console

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "python -m bnf_train.compare: drives one device; for several, run each arm with accelerate launch -m bnf_train, "
            "and compare the models with python -m bnf_train.analyze."
        )
    options, common = _options(arguments)
    output = Path(options["output_dir"])
    if output.exists() and (not output.is_dir() or (not (output / "common.yaml").exists() and any(output.iterdir()))):
        raise UsageError(f"--output_dir {output}: expected a new or empty folder, or that of a comparison to go on with.")
    measures = Measures(
        Path(options["probe"]), options["responses"], options["max_new_tokens"], keep_model=options["keep_models"]
    )
    paragraphs(measures.probe)
    output.mkdir(parents=True, exist_ok=True)
    in_file = {key: value for key, value in common.items() if key != "flags"}
    (output / "common.yaml").write_text(yaml.safe_dump(DEFAULTS | {"reference_cache": str(output / "reference")} | in_file))
    shared = in_file | {name: options[name] for name in ("probe", "responses", "max_new_tokens")}
    arms = list(_arms(options, common["flags"], output, shared))
    for arm in arms:
        parse(arm.arguments)  # what is wrong in the last arm is said before the first one is run
    results = [arm.finished() for arm in arms]
    console = Console(soft_wrap=True, highlight=False)
    started = {result["seed"] for result in results if result and result["curve"][0]["step"] == 0}
    for number, arm in enumerate(arms):
        if results[number] is None:
            console.rule(f"arm {number + 1} of {len(arms)}: {arm.name}, seed {arm.seed}")
            results[number] = result = arm.run(measures, before=arm.seed not in started)
            if "failed" in result:
                console.print(f"failed: {result['failed']}")
            else:
                started.add(arm.seed)
            write(output, [result for result in results if result])
    done = [result for result in results if result]
    write(output, done)
    console.print(table(done))
    console.print(f"report.html, compare.json, compare.md, curves.png and tradeoff.png in {output}")
    if failed := sum("failed" in result for result in done):
        raise UsageError(f"{failed} of {len(done)} arms failed (see above); the same command tries them again.")


def _options(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The comparison's own options; keys of the --config file and, under "flags", flags for every arm."""
    parser = argparse.ArgumentParser(
        prog="python -m bnf_train.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS, exit_on_error=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", metavar="FILE", help="A YAML file with these flags, and those of bnf_train for every arm, as keys.")
    add("--arms", nargs="+", metavar="ARM", help='An objective, and flags for it alone: bnf "dpo beta=0.1".')
    add("--learning_rates", nargs="+", metavar="LR", help="Every arm at each of them. Default: bnf_train's --learning_rate.")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="Every arm with each of them. Default: 0 1.")
    add("--probe", metavar="FILE", help="Text outside the preference data, paragraphs between blank lines. Default: built in.")
    add("--responses", type=int, metavar="N", help="Held-out prompts answered greedily after training. Default: 8; 0: none.")
    add("--max_new_tokens", type=int, metavar="N", help="Where an answer is cut. Default: 256.")
    add("--keep_models", action="store_true", help="Keep the weights of every arm.")
    add("--output_dir", metavar="FOLDER", help="Where all of it goes. Default: runs/compare.")
    underscored = [re.sub(r"^--[^=]*", lambda m: m[0].replace("-", "_").replace("__", "--", 1), a) for a in arguments]
    try:
        own, flags = parser.parse_known_args(underscored)
    except argparse.ArgumentError as error:
        raise UsageError(f"{str(error).removeprefix('argument ')} (python -m bnf_train.compare --help).") from error
    given = vars(own)
    in_file = read_yaml(given["config"]) if "config" in given else {}
    in_file = {str(key).replace("-", "_"): value for key, value in in_file.items()}
    options: dict[str, Any] = {
        "learning_rates": [], "seeds": [0, 1], "probe": str(demo.PROBE), "responses": 8, "max_new_tokens": 256,
        "keep_models": False, "output_dir": "runs/compare",
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
    ):
        if wrong := [v for v in values if not isinstance(v, int) or isinstance(v, bool) or v < least]:
            raise UsageError(f"--{key}: expected whole numbers of at least {least}, got {wrong[0]}.")
    return options, in_file | {"flags": flags}


def _arms(options: dict[str, Any], flags: Sequence[str], output: Path, shared: dict[str, Any]) -> Iterator[Arm]:
    """Every arm at every learning rate with every seed; seed by seed, so that an early look at the report is fair."""
    names = set()
    for seed in options["seeds"]:
        for spec in options["arms"]:
            try:
                objective, *own = shlex.split(str(spec))
            except ValueError:  # nothing, or a quotation that does not end
                objective, own = "=", []
            if "=" in objective or any("=" not in word for word in own):
                raise UsageError(f'--arms "{spec}": expected an objective and flags as name=value, such as "dpo beta=0.1".')
            for rate in map(_number, options["learning_rates"]) if options["learning_rates"] else [None]:
                name = str(spec) if rate is None else f"{spec} lr={rate:g}"
                folder = output / "arms" / (re.sub(r"[^\w.=-]+", "_", name) + f"-seed{seed}")
                if folder in names:
                    raise UsageError(f'--arms "{spec}": given twice.')
                names.add(folder)
                chosen = [f"--objective={objective}", *(f"--{word}" for word in own), f"--seed={seed}"]
                chosen += [f"--learning_rate={rate}"] if rate is not None else []
                arguments = [f"--config={output / 'common.yaml'}", *flags, *chosen, f"--output_dir={folder}"]
                yield Arm(name, seed, folder, arguments, shared)


def _number(value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e-5 as text
    except (TypeError, ValueError):
        raise UsageError(f"--learning_rates: expected numbers, got {value}.") from None


if __name__ == "__main__":
    sys.exit(main())
