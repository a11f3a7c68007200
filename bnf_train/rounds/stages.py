"""The three stages of a round, each for a process of its own: sample, train, ask."""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from rich.console import Console

from bnf_train.checks import by_group
from bnf_train.config import BNFConfig
from bnf_train.data import Collator, Options, Response, Rules
from bnf_train.errors import UsageError
from bnf_train.model.answers import Questions, ask, counted, read_questions
from bnf_train.model.generate import Generated
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.load import context_length, load_model, load_tokenizer
from bnf_train.model.score import longest_first, score
from bnf_train.rounds.files import Folder, write_json, write_rows
from bnf_train.rounds.settings import Settings
from bnf_train.run import run
from bnf_train.sample.local import numbered_seed
from bnf_train.sample.run import PARTIAL, NoRows, Setting, sample
from bnf_train.training.checking import autocast
from bnf_train.training.checkpoint import checkpoints


def seeds(seed: int, number: int) -> dict[str, int]:
    """Of sampling and training in a round: others in each.

    >>> len({value for number in (1, 2, 3) for value in seeds(0, number).values()})
    6
    """
    return {"sampling": numbered_seed(seed, 2 * number), "training": numbered_seed(seed, 2 * number + 1)}


def sample_round(settings: Settings, model: str, folder: Folder, template_date: str) -> None:
    """Answers of `model` to the round's prompts, labelled, as rows: rows.jsonl and answers.jsonl.

    Raises:
      UsageError: what `sample` raises.
    """
    transformers.utils.logging.set_verbosity_error()
    config, drawing = settings.config(), settings.drawing
    config.template_date = template_date
    console = Console(highlight=False, soft_wrap=True)
    flags = argparse.Namespace(
        **drawing, model=model, prompts=str(folder.prompts), output=str(folder.rows), check=config.check,
        seed=seeds(config.seed, folder.number)["sampling"], batch_size=config.per_device_eval_batch_size * drawing["samples"],
        bf16=bool(config.bf16), trust_remote_code=config.trust_remote_code, disable_tqdm=config.disable_tqdm,
        server=None, server_model=None, concurrency=1, reward_model=None,
    )  # fmt: skip
    setting = Setting(
        Rules.of(config), Options(**config.template_options()), config.device, getattr(torch, config.dtype), autocast(config),
        keep_answers=True,
    )  # fmt: skip
    _drop_other_batches(folder, flags.batch_size, console)
    try:
        sample(flags, console, setting)
    except NoRows as error:
        raise UsageError(
            f"--form {drawing['form']}: no row comes of these answers, which are empty, or alike for every prompt; begin a new "
            "--output_dir with other prompts, more --samples or another --form."
        ) from error
    settle(folder)


def _drop_other_batches(folder: Folder, batch_size: int, console: Console) -> None:
    """Answers depend on what is drawn at once: those of another size are drawn anew, so that all of a round are of one."""
    partial = folder.rows.with_suffix(PARTIAL)
    first = partial.read_bytes().partition(b"\n") if partial.exists() else (b"", b"", b"")
    if not first[1]:
        return
    before = json.loads(first[0])["arguments"]["batch_size"]
    if before != batch_size:
        console.print(f"{batch_size} answers are drawn at once, {before} were: this round's are drawn from the beginning.")
        partial.unlink()


def settle(folder: Folder) -> None:
    """Gives the answers their name, once the rows made of them are there."""
    partial = folder.rows.with_suffix(PARTIAL)
    if folder.rows.exists() and partial.exists():
        os.replace(partial, folder.answers)


def train_round(settings: Settings, model: str, folder: Folder, template_date: str) -> None:
    """A run of bnf_train on the round's rows, from its last checkpoint where there is one: model/ and trained.json."""
    config = settings.config()
    going_on = bool(checkpoints(folder.model))
    if not going_on:
        shutil.rmtree(folder.model, ignore_errors=True)  # what a killed run left before its first checkpoint
    config.model, config.dataset, config.datasets = model, str(folder.rows), [str(folder.rows)]
    config.check = config.check_dataset = None  # asked by a stage of its own: the same questions after each round
    config.seed, config.template_date = seeds(config.seed, folder.number)["training"], template_date
    config.output_dir, config.resume_from_checkpoint = str(folder.model), "auto" if going_on else None
    if settings.round_caches:
        config.reference_cache = str(folder.reference)
    trainer = run(config)
    metrics = json.loads((folder.model / "metrics.json").read_text())
    held_out = {key: value for key, value in metrics["held_out"].items() if not key.endswith(("runtime", "_per_second"))}
    write_json(folder.trained, {"steps": trainer.state.global_step, "held_out": held_out, "alarms": metrics.get("alarms", [])})


def tidy(folder: Folder) -> None:
    """Removes what only a killed run goes on from."""
    for path in (*checkpoints(folder.model), folder.reference):
        shutil.rmtree(path, ignore_errors=True)


def ask_model(settings: Settings, model: str, folder: Folder, questions: Path, template_date: str) -> None:
    """Right answers of `model`, and the entropy of what it samples: checks.jsonl and right.json."""
    transformers.utils.logging.set_verbosity_error()
    config = settings.config()
    config.template_date = template_date
    tokenizer = load_tokenizer(model, config.trust_remote_code)
    asked = read_questions(
        str(config.check), str(questions), [], tokenizer, Console(quiet=folder.number > 0, highlight=False, soft_wrap=True),
        rows=config.check_rows, context=context_length(model, config.trust_remote_code),
        rules=Rules.of(config), options=Options(**config.template_options()),
        samples=config.check_samples, temperature=config.check_temperature, max_new_tokens=config.check_max_new_tokens,
        seed=config.seed, batch_size=config.per_device_eval_batch_size,
    )  # fmt: skip
    loaded = load_model(model, config.trust_remote_code, getattr(torch, config.dtype)).to(config.device)
    bar = None if config.disable_tqdm else "answers"
    drawn = list[list[Generated]]()
    found = ask(loaded, tokenizer, asked, config.device, autocast(config), progress=bar, generated=drawn)
    lines = zip(asked.prompts, asked.groups, found, strict=True)
    write_rows(
        folder.checks, ({"number": p.number, "group": group, "prompt": p.text} | counted(one) for p, group, one in lines)
    )
    entropy = entropies(loaded, tokenizer, asked, drawn, config)
    write_json(folder.right, {"settings": asked.settings(), "right": asked.values(found), "entropy": entropy})


def entropies(
    model: Any, tokenizer: Any, questions: Questions, drawn: Sequence[Sequence[Generated]], config: BNFConfig
) -> dict[str, float]:
    """By group: the model's entropy at each token of its sampled answers (greedy ones where there are no others), in nats."""
    responses, groups = [], []
    for prompt, group, answers in zip(questions.prompts, questions.groups, drawn, strict=True):
        for answer in answers[min(1, len(answers) - 1) :]:
            responses.append(Response([*prompt.ids, *answer.tokens], len(prompt.ids), True))
            groups.append(group)
    attach_log_odds_head(model)
    batches = longest_first([len(response.input_ids) for response in responses], config.per_device_eval_batch_size)
    scored = score(
        model, [[responses[i] for i in batch] for batch in batches], Collator(int(tokenizer.pad_token_id or 0)), config.device,
        autocast(config),
    )  # fmt: skip
    places = [i for batch in batches for i in batch]
    of = {i: one.entropy.double().tolist() for i, one in zip(places, scored, strict=True)}
    return {group: fmean(value for i in at for value in of[i]) for group, at in by_group(groups).items()}
