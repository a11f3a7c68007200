"""The arms of a comparison: which ones there are, which have finished, each in a process of its own."""

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bnf_train import cli
from bnf_train.compare.arm import Measures, paragraphs
from bnf_train.compare.process import Running
from bnf_train.compare.report import table, write
from bnf_train.errors import UsageError
from bnf_train.flags import parse

# of every arm, unless the command or the --config file says otherwise
DEFAULTS = {
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "save_strategy": "no",
    "show_examples": 0,
    "report_to": "none",
}
SEED = "{seed}"  # in a flag: the arm's
NO_PROBE = "none"
SECONDS_BETWEEN_REPORTS = 30.0


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

    @property
    def log(self) -> Path:
        """What it prints, where arms run side by side."""
        return self.folder.with_name(self.folder.name + ".log")

    def remove(self) -> None:
        """Removes what a killed run left of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def failed(self, why: str) -> dict[str, Any]:
        return self._about() | {"failed": why}

    def keep(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Leaves what the run measured where `finished` finds it, and returns it with what the arm is."""
        kept = dict(result) | self._about()
        partial = self.folder / "arm.json.tmp"
        partial.write_text(json.dumps(kept, indent=1) + "\n")
        os.replace(partial, self.folder / "arm.json")
        return kept

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
    probe = None if options["probe"] in (None, NO_PROBE) else Path(options["probe"])
    measures = Measures(
        probe, options["responses"], options["max_new_tokens"], keep_model=options["keep_models"], pages=options["arm_reports"]
    )
    paragraphs(measures.probe)
    output.mkdir(parents=True, exist_ok=True)
    found = list(arms(options, common, output))
    for arm in found:
        parse(arm.arguments)  # what is wrong in the last arm is said before the first one is run
    done = _run(found, measures, options["jobs"], output)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table(done))
    console.print(f"report.html, compare.json, compare.md and figures in {output}")
    if failed := sum("failed" in result for result in done):
        raise UsageError(f"{failed} of {len(done)} arms failed (see above); the same command tries them again.")


def _run(found: Sequence[Arm], measures: Measures, jobs: int, output: Path) -> list[dict[str, Any]]:
    """The results of all arms: of those that have finished what they left; the others run, `jobs` at a time."""
    console = Console(soft_wrap=True, highlight=False)
    results = [arm.finished() for arm in found]
    todo = [number for number, result in enumerate(results) if result is None]
    # arms measure the starting point, too, until one of their seed has
    started = {result["seed"] for result in results if result and result["curve"][0]["step"] == 0}
    running: dict[Any, tuple[int, Running]] = {}
    written = time.monotonic()
    try:
        while todo or running:
            while todo and len(running) < jobs:
                number = todo.pop(0)
                arm = found[number]
                console.rule(f"arm {number + 1} of {len(found)}: {arm.name}, seed {arm.seed}")
                arm.remove()
                arm.folder.parent.mkdir(exist_ok=True)
                begun = Running(arm.arguments, measures, arm.seed not in started, jobs, None if jobs == 1 else arm.log)
                running[begun.ended] = number, begun
            for ended in wait(list(running)):
                number, begun = running[ended]
                arm, result = found[number], begun.result()
                del running[ended]
                if isinstance(result, str):
                    more = "" if jobs == 1 else f" (see {arm.log})"
                    console.print(f"{arm.name}, seed {arm.seed}, failed: {result}{more}")
                    results[number] = arm.failed(result)
                else:
                    results[number] = arm.keep(result)
                    if begun.before:
                        started.add(arm.seed)
            if jobs == 1 or time.monotonic() - written > SECONDS_BETWEEN_REPORTS:
                write(output, [result for result in results if result])
                written = time.monotonic()
    finally:
        for _, begun in running.values():
            begun.stop()
    done = [result for result in results if result]
    write(output, done)
    return done


def arms(options: Mapping[str, Any], common: Mapping[str, Any], output: Path) -> Iterator[Arm]:
    """Every arm at every learning rate with every seed; seed by seed, so that an early look at the report is fair.

    Leaves in the folder `output` what is the same for all of them. Arguments are those of `compare`.
    """
    in_file = {key: value for key, value in common.items() if key != "flags"}
    of_a_seed = [word for key, value in in_file.items() if SEED in str(value) for word in _words(key, value)]
    for_all = {key: value for key, value in in_file.items() if SEED not in str(value)}
    (output / "common.yaml").write_text(yaml.safe_dump(DEFAULTS | {"reference_cache": str(output / "reference")} | for_all))
    shared = in_file | {name: options[name] for name in ("probe", "responses", "max_new_tokens")}
    flags = [*of_a_seed, *common["flags"]]
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
                all_flags = [word.replace(SEED, str(seed)) for word in [*flags, *chosen]]
                arguments = [f"--config={output / 'common.yaml'}", *all_flags, f"--output_dir={folder}"]
                yield Arm(name, seed, folder, arguments, shared)


def _words(key: str, value: Any) -> list[str]:
    """A key of a YAML file as a flag."""
    return [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]


def _number(value: Any) -> float:
    try:
        return float(value)  # YAML reads 1e-5 as text
    except (TypeError, ValueError):
        raise UsageError(f"--learning_rates: expected numbers, got {value}.") from None
