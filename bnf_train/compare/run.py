"""The arms of a comparison: which ones there are, which have finished, each in a process of its own."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bnf_train import cli
from bnf_train.compare.arm import Measures, paragraphs, train_arm
from bnf_train.compare.report import table, write
from bnf_train.errors import UsageError, is_out_of_memory, one_line
from bnf_train.flags import parse

# of every arm, unless the command or the --config file says otherwise
DEFAULTS = {
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "save_strategy": "no",
    "show_examples": 0,
    "report_to": "none",
}


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
                return self._about() | {"failed": f"out of memory ({one_line(error)})"}
        result |= self._about()
        partial = self.folder / "arm.json.tmp"
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, self.folder / "arm.json")
        return result

    def _about(self) -> dict[str, Any]:
        about = {"name": self.name, "seed": self.seed, "arguments": self.arguments, "shared": self.shared}
        return json.loads(json.dumps(about, default=str))


def compare(options: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    """Runs the arms that have not finished, and writes the report after each.

    Args:
      options: the comparison's own flags.
      common: keys of the --config file and, under "flags", flags of bnf_train for every arm.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "python -m bnf_train.compare: drives one device; for several, run each arm with accelerate launch -m bnf_train, "
            "and compare the models with python -m bnf_train.analyze."
        )
    output = Path(options["output_dir"])
    if not (output / "common.yaml").exists():
        cli.check_new_folder(output, ", or that of a comparison to go on with")
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


def _arms(options: Mapping[str, Any], flags: Sequence[str], output: Path, shared: dict[str, Any]) -> Iterator[Arm]:
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
