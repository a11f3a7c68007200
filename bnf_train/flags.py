"""Flags, a YAML file and the presets to a config. A flag goes before the file, that before the preset, that before defaults."""

import argparse
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from bnf_core import OBJECTIVES
from bnf_train import checks, cli, demo, inherited, objectives
from bnf_train.config import PRESETS, BNFConfig
from bnf_train.errors import UsageError, nearest, one_line
from bnf_train.options import CONFIG, DESCRIPTION, PROG

_NO_KEYS = {"config", "help_all"}


class _Parser(cli.Parser, HfArgumentParser):
    """Fills a config's fields."""

    help_flag = "--help_all"

    def given(self, arguments: Sequence[str]) -> dict[str, Any]:
        """What `arguments` say, without defaults."""
        unset = object()
        blank = argparse.Namespace(**{action.dest: unset for action in self._actions})
        given = {k: v for k, v in vars(self.read(arguments, blank)).items() if v is not unset}
        for name, value in given.items():
            if isinstance(value, float) and not math.isfinite(value):
                self.error(f"--{name}: expected a number, got {value}")
        return given

    def arguments_of(self, values: Mapping[str, Any], path: str) -> list[str]:
        """A file's keys as flags, so that both are read by the same rules."""
        actions = {name[2:]: action for name, action in self._option_string_actions.items() if name.startswith("--")}
        arguments: list[str] = []
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in actions or name in _NO_KEYS:
                close = nearest(name, actions.keys() - _NO_KEYS)
                raise UsageError(f"{path}: unknown key {key}{close} ({PROG} {self.help_flag} lists every flag).")
            action = actions[name]
            if value is False and "no" in map(str, action.choices or ()):
                value = "no"  # YAML reads a bare no as false
            if value is None or (value is False and action.nargs == "?" and action.const is not True):
                continue
            if action.nargs == 0:  # --no_...
                arguments += [f"--{name}"] if value else []
            elif value is True and action.nargs == "?":
                arguments += [f"--{name}"]
            elif isinstance(value, list) and action.nargs == "+":
                arguments += [f"--{name}", *map(str, value)]
            elif isinstance(value, (list, dict)):
                arguments += [f"--{name}={json.dumps(value)}"]
            else:
                arguments += [f"--{name}={value}"]
        return arguments


def parse(arguments: Sequence[str], others: Collection[str] = ()) -> BNFConfig:
    """Flags to a config. A flag goes before the --config file, that before the model's preset, that before the defaults.

    Args:
      others: keys of the --config file that another command reads.
    """
    flags_only = cli.without_debug(arguments)
    early = _Parser(add_help=False)
    for name in ("--config", "--objective"):
        early.add_argument(name)
    first, _ = early.read_known(flags_only)
    in_file = {} if first.config is None else read_yaml(first.config)
    in_file = {key: value for key, value in in_file.items() if str(key).replace("-", "_") not in others}
    debug_in_file = in_file.pop("debug") if isinstance(in_file.get("debug"), bool) else False
    chosen = first.objective or str(in_file.get("objective") or BNFConfig.objective)

    parser = _parser(chosen)
    flags = parser.given(flags_only)
    try:
        file = parser.given(parser.arguments_of(in_file, str(first.config)))
    except UsageError as error:
        raise UsageError(str(error) if str(first.config) in str(error) else f"{first.config}: {error}") from error
    for one, other in (("batch_size", "gradient_accumulation_steps"), ("gradient_accumulation_steps", "batch_size")):
        if one in flags and other not in flags:
            file.pop(other, None)  # they say the same thing, and a flag goes before the file
    given = file | flags
    given.pop("config", None)
    if not (given.get("use_peft") or given.get("load_in_4bit")) and (
        name := next((f for f in flags if f.startswith("lora_")), "")
    ):
        raise UsageError(f"--{name}: has no effect without --use_peft true; add it, or leave both out.")
    demos = given.get("model", str(demo.MODEL)) == str(demo.MODEL) and not {"dataset", "check"} & given.keys()
    if given.get("check") is None and not demos and (name := next((f for f in given if f.startswith("check_")), "")):
        raise UsageError(f"--{name}: has no effect without --check; add it, or leave it out.")
    inherited.check(given)  # also where one says what is the default
    model = given.get("model", str(demo.MODEL))
    preset = dict(PRESETS.get(model, {}))
    if {"gradient_accumulation_steps", "per_device_train_batch_size"} & given.keys():
        preset.pop("batch_size", None)  # belongs with the preset's own
    if "model" not in given and "dataset" in given:  # the demo model on somebody's data: as long as it can
        preset.pop("max_length")
    if {"dataset", "check", "check_dataset"} & given.keys():  # the demo's questions are about the demo's rows
        preset = {name: value for name, value in preset.items() if not name.startswith("check")}
    sources = given.get("dataset", [])
    given |= {"dataset": " + ".join(sources)} if sources else {}
    own = {name: given.pop(name) for name in list(given) if name not in BNFConfig.__dataclass_fields__}
    try:
        config = BNFConfig(**{"model": model} | preset | given)
    except (ValueError, TypeError) as error:  # TrainingArguments' own checks
        raise UsageError(one_line(error, 500) + ".") from error
    config.datasets = sources or config.datasets
    config.tracebacks = debug_in_file or len(flags_only) < len(arguments)
    config.hyperparameters = objectives.defaults(config.objective) | own
    _, pairwise = objectives.resolve(config.objective, config.hyperparameters)  # refuses what the objective does not have
    if config.check is not None:
        checks.resolve(config.check)
    if config.pairing_ratio < 1 and pairwise:
        raise UsageError(
            f"--pairing_ratio {config.pairing_ratio:g}: makes single responses of pairs, and --objective {config.objective} "
            "compares the two sides of a pair; leave it out, or use --objective bnf."
        )
    return config


def _parser(objective: str) -> _Parser:
    """Every flag: TrainingArguments', the project's own, and the objectives'."""
    parser = _Parser(
        BNFConfig,
        prog=PROG,
        description=DESCRIPTION,
        epilog="--debug without a value shows the traceback of an error. --help is short: the flags that most runs need.",
        add_help=False,
    )
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=CONFIG)
    parser.add_argument("--help_all", action="help", default=argparse.SUPPRESS, help="Every flag.")
    parser._option_string_actions["--dataset"].nargs = "+"  # one field, in which their names are joined
    group = parser.add_argument_group(
        "hyper-parameters of objectives (default)", f"Objectives: {', '.join(sorted(OBJECTIVES))}."
    )
    for name, options in objectives.flags(objectives.find(objective)).items():
        if f"--{name}" in parser._option_string_actions:
            raise UsageError(f"--objective {objective}: --{name} is a flag already; rename that hyper-parameter.")
        aliases = {f"--{name}", f"--{name.rstrip('_')}"} - parser._option_string_actions.keys()
        group.add_argument(*sorted(aliases, reverse=True), dest=name, **options)
    return parser


def read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"--config {path}: {(error.strerror or str(error)).lower()}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        reason = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
        raise UsageError(f"{where}: expected YAML, got {reason}.") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected keys and values, such as `objective: bnf`, got {type(values).__name__}.")
    seen = set()
    for key, _ in tree.value:
        if (name := str(key.value).replace("-", "_")) in seen:  # YAML takes the last one without a word
            raise UsageError(f"{path}, line {key.start_mark.line + 1}: the key {name} stands there a second time.")
        seen.add(name)
    return values
