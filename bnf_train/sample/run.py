"""One call in the order in which it happens: prompts, answers with their labels, rows."""

import argparse
import hashlib
import json
import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm

from bnf_train.data import Options, Prompt, Rules, prompts, read_rows, unrendered
from bnf_train.errors import UsageError
from bnf_train.model.load import context_length, load_model, load_tokenizer
from bnf_train.sample.answers import Answers, Partial
from bnf_train.sample.labels import Label, by_check, by_reward
from bnf_train.sample.local import from_model
from bnf_train.sample.rows import rows, sentences
from bnf_train.sample.server import Server

ASKED = ("model", "server", "server_model", "prompts", "samples", "temperature", "top_p", "max_new_tokens", "seed", "check",
         "reward_model")  # fmt: skip
PARTIAL = ".partial.jsonl"  # in place of .jsonl: the answers, until all are there
OF_MODEL = ("batch_size", "bf16")  # on which answers of --model depend, too


class NoRows(UsageError):
    """No row comes of the answers in the form that was asked for."""


@dataclass(frozen=True)
class Setting:
    """What `bnf_train.rounds` says of sampling as it does of training; the command has no flags for it.

    Attributes:
      options: of the chat template, the day that it writes among them.
      device: None: the accelerator, where there is one.
      dtype: of the model's weights.
      autocast: None: by --bf16.
      keep_answers: the file of all answers with their values stays beside the rows, as `Partial` wrote it.
    """

    rules: Rules = field(default_factory=Rules)
    options: Options = field(default_factory=Options)
    device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    keep_answers: bool = False


def sample(flags: argparse.Namespace, console: Console, setting: Setting | None = None) -> None:
    """Writes the rows, and says what was counted.

    Raises:
      UsageError: what cannot be read, drawn, labelled or written; `NoRows` where no row comes of the answers.
    """
    setting = setting or Setting()
    output = Path(flags.output)
    if output.exists():
        raise UsageError(f"--output {output}: expected a new file; remove it or pass another.")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: no such folder as {output.parent}; make it first.")
    device = setting.device or _accelerator()
    asked = _prompts(flags, console, setting)
    label = _label(flags, asked, device)
    names = (*ASKED, *(OF_MODEL if flags.model is not None else ()))
    arguments = {name: getattr(flags, name) for name in names} | {"rows": _digest(asked)}
    path = output.with_suffix(PARTIAL)
    with Partial(path, arguments) as partial:
        if partial.resumed:
            console.print(f"{path}: answers to {partial.resumed:,} prompts are there; going on.", markup=False)
        quiet = True if flags.disable_tqdm else None  # None: on a terminal only
        with (
            tqdm(total=len(asked), initial=partial.resumed, desc="prompts", disable=quiet) as bar,
            closing(_drawn(flags, asked, partial, device, setting)) as drawn,  # a server is asked no more where labelling fails
        ):
            for place, answers in drawn:
                partial.add(place, answers if label is None else label(asked[place], answers))
                bar.update()
    found = [partial.found[place] for place in range(len(asked))]
    written = _write(output, asked, found, flags)
    if not setting.keep_answers:
        path.unlink()
    for sentence in sentences(found, written, flags.form, flags.reward_model is not None, flags.max_new_tokens):
        console.print(sentence, markup=False)
    console.print(f"{output}: {written:,} rows ({flags.form}).", markup=False)


def _accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _prompts(flags: argparse.Namespace, console: Console, setting: Setting) -> list[Prompt]:
    try:
        raw = read_rows(flags.prompts)
        if flags.model is None:
            return unrendered(raw, flags.prompts)
        tokenizer = load_tokenizer(flags.model, flags.trust_remote_code)
        found, counts = prompts(raw, tokenizer, flags.prompts, setting.rules, setting.options)
    except UsageError as error:
        raise UsageError(str(error).replace("--dataset", "--prompts")) from error
    counts.unused = []
    for sentence in counts.sentences(setting.rules):
        console.print(f"  {sentence}", markup=False)
    context = context_length(flags.model, flags.trust_remote_code)
    fitting = [prompt for prompt in found if context is None or len(prompt.ids) + flags.max_new_tokens <= context]
    if not fitting:
        raise UsageError(
            f"--max_new_tokens {flags.max_new_tokens}: the model was made for {context} tokens in all, and the shortest prompt "
            f"of {flags.prompts} has {min(len(prompt.ids) for prompt in found)}; lower it."
        )
    if len(fitting) < len(found):
        console.print(
            f"  {len(found) - len(fitting):,} prompts left out: with an answer they are longer than {context} tokens."
        )
    return fitting


def _label(flags: argparse.Namespace, asked: list[Prompt], device: torch.device) -> Label | None:
    if flags.check is not None:
        return by_check(flags.check, asked)
    return None if flags.reward_model is None else by_reward(flags.reward_model, device, flags.trust_remote_code)


def _drawn(
    flags: argparse.Namespace, asked: list[Prompt], partial: Partial, device: torch.device, setting: Setting
) -> Generator[tuple[int, Answers], None, None]:
    """Answers to all prompts that have none yet."""
    if len(partial.found) == len(asked):
        return
    how = {"temperature": flags.temperature, "top_p": flags.top_p}
    if flags.server is not None:
        how |= {"max_tokens": flags.max_new_tokens}
        server = Server(flags.server, flags.server_model, flags.samples, flags.seed, how, flags.concurrency)
        yield from server(asked, set(partial.found))
        return
    model = load_model(flags.model, flags.trust_remote_code, setting.dtype).to(device)
    tokenizer = load_tokenizer(flags.model, flags.trust_remote_code)
    autocast = setting.autocast or (torch.bfloat16 if flags.bf16 else None)
    yield from from_model(
        model, tokenizer, asked, set(partial.found), device, autocast, samples=flags.samples, batch_size=flags.batch_size,
        seed=flags.seed, max_new_tokens=flags.max_new_tokens, **how,
    )  # fmt: skip


def _digest(asked: list[Prompt]) -> str:
    """Of all that is asked, and the columns beside it."""
    content = [[prompt.ids, prompt.key, prompt.columns] for prompt in asked]
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _write(output: Path, asked: list[Prompt], found: list[Answers], flags: argparse.Namespace) -> int:
    """All rows at once: a file with some of them never has the name. The number of rows, or of prompts with one."""
    made: list[dict[str, Any]] = []
    for prompt, answers in zip(asked, found, strict=True):
        made += rows(prompt, answers, flags.form, flags.reward_model is not None)
    if not made:
        raise NoRows(
            f"--form {flags.form}: no row comes of these answers, which are empty, or alike for every prompt; they are kept: "
            "the same call with --form singles or groups goes on with them."
        )
    try:
        unfinished = output.with_suffix(".unfinished.jsonl")
        unfinished.write_text(
            "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in made), encoding="utf-8"
        )
        os.replace(unfinished, output)
    except OSError as error:
        raise UsageError(f"--output {output}: {(error.strerror or str(error)).lower()}.") from error
    return len(made)
