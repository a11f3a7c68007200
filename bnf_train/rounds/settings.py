"""What a call asks for: its own flags, those of training, and whether a folder was begun with the same."""

import argparse
import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnf_train import cli, demo, objectives
from bnf_train.config import BNFConfig
from bnf_train.data import Options, Prompt, Rules, prompts, read_prompts, read_rows
from bnf_train.errors import UsageError
from bnf_train.flags import parse, read_yaml
from bnf_train.model.load import load_tokenizer
from bnf_train.rounds.files import write_json, write_rows
from bnf_train.rounds.flags import FORMS, KEEP, OWN, REFUSED
from bnf_train.rounds.process import LOCK, STAGE_LOCK
from bnf_train.sample.flags import check_drawing

BEGUN, QUESTIONS = "begun.json", "questions.jsonl"
DRAWING = ("form", "samples", "temperature", "top_p", "max_new_tokens")
# of every round's training, unless the command or the --config file says otherwise
TRAINING = {"save_strategy": "steps", "save_steps": 0.2, "save_total_limit": 1, "show_examples": 0}
DEMO = {"temperature": 1.0, "max_new_tokens": 40, "prompts_per_round": 400, "output_dir": "runs/demo-rounds"}
# what a command may leave that ended before the folder was begun
BEFORE = {LOCK, STAGE_LOCK, QUESTIONS, *(f".{name}.tmp" for name in (QUESTIONS, BEGUN))}
# flags of training that change no weight but by rounding; every other one must be as it was when a folder was begun
MAY_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "template_date", "show_examples", "tracebacks", "datasets", "run_name"),
    *(
        "reference_cache",
        "no_reference_cache",
        "disable_tqdm",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "report_to",
    ),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_dir", "project", "trackio_space_id", "local_rank"),
    *("save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    # how much at once: what is to be lowered where memory is short
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "tokens_per_pass"),
    *("packing", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("skip_memory_metrics", "hub_token", "push_to_hub_token", "rows_digest", "reference_digest", "model_digest"),
}
SOURCES = ("dataset", "check_dataset")  # compared by their rows


@dataclass(frozen=True)
class Settings:
    """Of one call.

    Attributes:
      arguments: flags of `python -m bnf_train`, of every round; they are parsed again in each stage's process.
      drawing: how answers are drawn: flags of `python -m bnf_train.sample`.
      source: rows with prompts.
      round_caches: reference log-odds are kept by each round and removed behind it; else in --reference_cache.
    """

    rounds: int
    prompts_per_round: int
    keep: str
    output: Path
    source: str
    drawing: dict[str, Any]
    arguments: list[str]
    round_caches: bool = True

    def config(self) -> BNFConfig:
        """As `python -m bnf_train` reads the flags."""
        return parse(self.arguments, OWN)


def read(parser: cli.Parser, arguments: Sequence[str]) -> Settings:
    """Flags and the --config file to settings; a flag goes before the file.

    Raises:
      UsageError: a flag that does not exist, has no place here, or has a value that it cannot have.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("python -m bnf_train.rounds: drives one device; start it without a launcher.")
    first, others = parser.read_known(arguments)
    in_file = {} if first.config is None else read_yaml(first.config)
    in_file = {str(key).replace("-", "_"): value for key, value in in_file.items()}
    in_file = {key: value for key, value in in_file.items() if value is not None}
    if "prompts" in in_file:
        in_file["dataset"] = in_file.pop("prompts")
    if isinstance(sources := in_file.get("dataset"), list):
        in_file["dataset"] = _only(sources)
    named = {argument[2:].partition("=")[0] for argument in others if argument.startswith("--")} | in_file.keys()
    for name in REFUSED:
        if name in named:
            raise UsageError(f"--{name}: has no place in rounds, because {REFUSED[name]}.")
    demos = "model" not in named and first.dataset is None and "dataset" not in in_file
    parser.set_defaults(**DEMO if demos else {})
    parser.set_defaults(**{name: in_file[name] for name in (*OWN, "dataset", "output_dir") if name in in_file})
    own, others = parser.read_known(arguments)
    _check(own)
    flags = [f"--{name}={value}" for name, value in TRAINING.items() if name not in named]
    flags += [] if own.config is None else [f"--config={own.config}"]
    flags += [] if demos else [f"--dataset={own.dataset}"] if own.dataset is not None else []
    settings = Settings(
        own.rounds, own.prompts_per_round, own.keep, Path(own.output_dir).resolve(), "",
        {name: getattr(own, name) for name in DRAWING}, [*flags, *others], "reference_cache" not in named,
    )  # fmt: skip
    config = settings.config()
    _check_training(config, settings)
    return Settings(**vars(settings) | {"source": str(demo.PROMPTS) if demos else config.datasets[0]})


def _check(own: argparse.Namespace) -> None:
    for name, least in (("rounds", 1), ("prompts_per_round", 0), ("samples", 1), ("max_new_tokens", 1)):
        if not isinstance(value := getattr(own, name), int) or isinstance(value, bool) or value < least:
            raise UsageError(f"--{name}: expected a whole number of at least {least}, got {value}.")
    for name in ("temperature", "top_p"):
        if not isinstance(value := getattr(own, name), (int, float)) or isinstance(value, bool):
            raise UsageError(f"--{name}: expected a number, got {value}.")
    for name, choices in (("keep", KEEP), ("form", FORMS)):
        if (value := getattr(own, name)) not in choices:
            raise UsageError(f"--{name}: expected one of {', '.join(choices)}, got {value}.")
    check_drawing(own)


def _only(sources: Sequence[Any]) -> str:
    if len(sources) != 1:
        raise UsageError(f"--dataset: expected one file of prompts, got {len(sources)}; put them into one.")
    return str(sources[0])


def _check_training(config: BNFConfig, settings: Settings) -> None:
    if config.check is None:
        raise UsageError("--check is missing: it says which answers are right (number, exact, contains, or your own function).")
    _only(config.datasets)
    _, pairwise = objectives.resolve(config.objective, config.hyperparameters)
    if pairwise and settings.drawing["form"] != "pairs":
        raise UsageError(
            f"--objective {config.objective}: compares the two sides of a pair, and --form {settings.drawing['form']} makes "
            "none; add --form pairs."
        )


# --- a folder that was begun -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begun:
    """What all stages share.

    Attributes:
      prompts: to be answered and trained on, in their order.
      template_date: the day that templates write.
      again: how many of them are asked as held-out prompts, too.
      left_out: a sentence for each kind of rows that a rule left out.
    """

    prompts: list[Prompt]
    template_date: str
    again: int
    left_out: list[str]


def check_folder(output: Path) -> None:
    """Raises UsageError where the folder holds something else than rounds."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if BEGUN not in names and not (LOCK in names and names <= BEFORE):
        cli.check_new_folder(output, ", or that of rounds to go on with")


def begin(settings: Settings, questions: Path) -> Begun:
    """Reads the prompts, keeps those to be asked in the file `questions`, and writes down what was asked for.

    Raises:
      UsageError: the folder was begun with other flags or rows.
    """
    config, path = settings.config(), settings.output / BEGUN
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    then = json.loads(path.read_text()) if path.exists() else None
    if then is not None:
        config.template_date = then["template_date"]
    rules, options = Rules.of(config), Options(**config.template_options())
    found, counts = prompts(read_rows(settings.source), tokenizer, settings.source, rules, options)
    counts.unused = []
    left_out = counts.sentences(rules)
    if config.check_dataset is not None:
        asked, _ = prompts(read_prompts(config.check_dataset), tokenizer, config.check_dataset, rules, options)
    else:
        found, asked = held_out(found, config.eval_size, config.seed)
    if settings.prompts_per_round > len(found):
        raise UsageError(
            f"--prompts_per_round {settings.prompts_per_round}: {settings.source} has {len(found)} prompts to answer; lower it."
        )
    rows = [dict(prompt.columns) for prompt in asked]
    now = {
        "flags": _flags(settings, config),
        "rows": {"dataset": _digest(dict(prompt.columns) for prompt in found), "check_dataset": _digest(rows)},
        "template_date": config.template_date,
    }
    if then is not None:
        _check_same(then, now, path.parent)
    else:
        write_rows(questions, rows)
        write_json(path, now)
    again = len({prompt.key for prompt in found} & {prompt.key for prompt in asked})
    return Begun(found, options.date or "", again, left_out)


def held_out(found: Sequence[Prompt], size: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to be answered and trained on, and those that are only asked: a seeded draw.

    Raises:
      UsageError: none would be left on one side.
    """
    wanted = round(size * len(found)) if size < 1 else int(size)
    if not 1 <= wanted < len(found):
        raise UsageError(
            f"--eval_size {size:g}: of {len(found)} prompts {wanted} would be asked and {len(found) - wanted} trained on; "
            "expected at least 1 of each: change it, or pass --check_dataset FILE."
        )
    kept = set(random.Random(seed).sample(range(len(found)), wanted))
    return [p for i, p in enumerate(found) if i not in kept], [p for i, p in enumerate(found) if i in kept]


def of_round(found: Sequence[Prompt], number: int, size: int) -> list[Prompt]:
    """The prompts of round `number`, counted from 1: all, or the next `size`, going round.

    >>> [of_round("abcde", number, 2) for number in (1, 2, 3)]
    [['a', 'b'], ['c', 'd'], ['e', 'a']]
    """
    first = (number - 1) * size
    return [found[i % len(found)] for i in range(first, first + size)] if size else list(found)


def _flags(settings: Settings, config: BNFConfig) -> dict[str, Any]:
    own = settings.drawing | {"prompts_per_round": settings.prompts_per_round}
    given = json.loads(config.to_json_string())
    hyperparameters = given.pop("hyperparameters")
    kept = {name: value for name, value in given.items() if name not in MAY_CHANGE}
    return json.loads(json.dumps({"objective": config.objective} | own | hyperparameters | kept | {"dataset": settings.source}))


def _check_same(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    before, given = then["flags"], now["flags"]
    same = {name for name in SOURCES if then["rows"][name] == now["rows"][name]}
    for name in dict.fromkeys([*given, *before]):
        if name not in same and before.get(name) != given.get(name):
            raise UsageError(
                f"--{name} {_shown(given.get(name))}: {folder} was begun with {_shown(before.get(name))}; pass that to go on, "
                "or another --output_dir."
            )
    if changed := [name for name in SOURCES if name not in same]:
        raise UsageError(
            f"--{changed[0]} {given.get(changed[0]) or given['dataset']}: has other rows than when {folder} was begun; restore "
            "them, or pass another --output_dir."
        )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _digest(rows: Any) -> str:
    return hashlib.blake2b(json.dumps(list(rows), sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
