"""One analysis in the order in which it happens: check names and data, run every policy, then the reference, compare."""

import argparse
import gc
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bnf_train import data
from bnf_train.analyze.figures import DISPLACEMENT, METRICS
from bnf_train.analyze.shifts import Sample, Scores, bins, report_of, scores, shifts
from bnf_train.checks import Asked
from bnf_train.config import template_options
from bnf_train.data import Collator, Response, Row
from bnf_train.errors import UsageError
from bnf_train.model.answers import Questions, ask, counted, read_questions
from bnf_train.model.attention import attend_varlen, attention_width
from bnf_train.model.generate import generate
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.load import context_length, load_tokenizer
from bnf_train.model.lora import base_of, errors_about, load_merged
from bnf_train.model.probe import can_pack, can_share_prompts


def analyze(flags: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything that is drawn, as it stands in analysis.json."""
    names = dict(zip(_names(flags), flags.policy, strict=True))
    bins_of = flags.bins_of or next(iter(names))
    if bins_of not in names:
        raise UsageError(f"--bins_of {bins_of}: expected the name of a policy, one of {', '.join(names)}.")
    tokenizer = _tokenizer(flags.reference, "--reference", flags)
    for path in flags.policy:
        of_policy = _tokenizer(path, "--policy", flags)
        if of_policy.get_vocab() != tokenizer.get_vocab():
            raise UsageError(
                f"--policy {path}: its tokenizer has another vocabulary than --reference's; use models of one family."
            )
        if of_policy.chat_template != tokenizer.chat_template and flags.chat_template is None:
            console.print(f"--policy {path}: its chat template is not --reference's, which is used (--chat_template).")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device, autocast = device or torch.device("cpu"), torch.bfloat16 if flags.bf16 == "true" else None
    given = _data(flags, tokenizer, console)
    questions = _questions(flags, tokenizer, console)
    asked: dict[str, list[Asked]] = {}  # the answers of each model, by its path

    def scored_by(path: str, flag: str, samples: dict[str, Sample]) -> tuple[Sample, dict[str, Scores]]:
        """Its greedy responses, or those given, and its scores of them, or of `samples` if there are any."""
        model = load_merged(path, flag, flags.trust_remote_code).to(device).eval()
        mine = greedy(model, given, tokenizer, device, autocast, flags) if flags.greedy else given
        if questions is not None:
            asked[path] = ask(model, tokenizer, questions, device, autocast, progress="answers")
        attend_varlen(model)
        attach_log_odds_head(model)
        # the data's own responses are one sample for all models: scored once
        distinct = {id(sample): sample for sample in (samples or {"": mine}).values()}
        scored = {}
        for key, sample in distinct.items():
            rows = [Row("", [response]) for response in sample.responses]
            packed = can_pack(model, rows, flags.batch_size, True, device)
            shared = packed and can_share_prompts(model, rows, device)
            collator = Collator(int(tokenizer.pad_token_id), packed, attention_width(model), shared)
            scored[key] = scores(model, sample, collator, device, autocast, flags.batch_size)
        return mine, {name: scored[id(sample)] for name, sample in (samples or {"": mine}).items()}

    samples, policies = {}, {}
    for name, path in names.items():
        console.print(f"{name}: {path}")
        samples[name], of = scored_by(path, "--policy", {})
        policies[name] = of[""]
        gc.collect()  # a model refers to itself: gone before the next one is loaded
    console.print(f"reference: {flags.reference}")
    own, references = scored_by(flags.reference, "--reference", samples)

    result: dict[str, Any] = {
        "reference": flags.reference,
        "data": flags.data,
        "responses": f"each policy's own, greedy, at most {flags.max_new_tokens} tokens" if flags.greedy else "of the data",
        "bf16": autocast is not None,
        "max_length": flags.max_length,
        "train_on": flags.train_on,
        "chat_template": flags.chat_template or "the reference's",
        "chat_template_kwargs": flags.chat_template_kwargs,
        "units": METRICS | DISPLACEMENT,
        "policies": {},
    }
    if flags.greedy:
        tokens = [r.tokens for r in own.responses]
        lengths = {"mean": statistics.fmean(tokens), "median": statistics.median(tokens)}
        result["reference_length"] = lengths | {"tokens": tokens, "cut": own.cut, "text": own.texts}
        for name, sample in (*samples.items(), ("reference", own)):
            if cut := sum(sample.cut or ()):
                console.print(f"{name}: {cut} of {len(sample.rows)} responses cut at --max_new_tokens {flags.max_new_tokens}.")
    if questions is not None:
        result["right"] = _right(questions, {"reference": flags.reference} | names, asked)
    token_shifts = {}
    for name, sample in samples.items():
        values, token_shifts[name] = shifts(sample, policies[name], references[name])
        result["policies"][name] = {"path": names[name], **report_of(sample, values)}
    return result | {"figure4": bins(token_shifts, bins_of)}


def _questions(flags: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, console: Console) -> Questions | None:
    """What --check asks every model."""
    if flags.check is None:
        return None
    source, flag = (flags.check_dataset, "--check_dataset") if flags.check_dataset else (flags.data, "--data")
    with errors_about(flag, source):
        return read_questions(
            flags.check, source, [], tokenizer, console, rows=flags.check_rows, context=_context(flags),
            rules=data.Rules.of(flags), options=data.Options(**template_options(flags)),
            samples=flags.check_samples, temperature=flags.check_temperature, max_new_tokens=flags.check_max_new_tokens,
            seed=flags.seed, batch_size=flags.batch_size,
        )  # fmt: skip


def _right(questions: Questions, paths: dict[str, str], asked: dict[str, list[Asked]]) -> dict[str, Any]:
    """Right answers of each model by group, and those to each prompt."""
    models = {name: questions.values(asked[path]) for name, path in paths.items()}
    prompts = [
        {"number": prompt.number, "group": group} | {name: counted(asked[path][i]) for name, path in paths.items()}
        for i, (prompt, group) in enumerate(zip(questions.prompts, questions.groups, strict=True))
    ]
    return {"settings": questions.settings(), "models": models, "prompts": prompts}


def greedy(
    model: PreTrainedModel,
    given: Sample,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    autocast: torch.dtype | None,
    flags: argparse.Namespace,
) -> Sample:
    """The model's greedy responses to the prompts of `given`, up to the first end-of-turn token or --max_new_tokens."""
    prompts = [r.input_ids[: r.prompt_length] for r in given.responses]
    options = {"max_new_tokens": flags.max_new_tokens, "batch_size": flags.batch_size}
    with tqdm(total=len(prompts), desc="greedy responses", leave=False, disable=None) as bar:
        found = generate(model, tokenizer, prompts, device, autocast, done=bar.update, **options)
    return Sample(
        [Response(p + answer.tokens, len(p), True) for p, answer in zip(prompts, found, strict=True)],
        list(given.rows),
        [answer.cut for answer in found],
        [str(tokenizer.decode(answer.tokens, skip_special_tokens=True)) for answer in found],
    )


def _names(flags: argparse.Namespace) -> list[str]:
    """Names of the series: --names, else the last part of each path where that tells them apart."""
    if flags.names and len(flags.names) != len(flags.policy):
        raise UsageError(f"--names: expected one for each of the {len(flags.policy)} policies, got {len(flags.names)}.")
    short = [Path(path.rstrip("/")).name or path for path in flags.policy]
    names = flags.names or (short if len(set(short)) == len(short) else flags.policy)
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{'--names' if flags.names else '--policy'}: expected different ones, got {name} twice.")
    return list(names)


def _tokenizer(path: str, flag: str, flags: argparse.Namespace) -> PreTrainedTokenizerBase:
    base = base_of(path, flag)
    with errors_about(flag, path, base):
        return load_tokenizer(base, flags.trust_remote_code)


def _data(flags: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, console: Console) -> Sample:
    """The data's responses; with --greedy the first distinct prompts, as responses whose answers are not looked at."""
    context = _context(flags) or flags.max_length + flags.max_new_tokens
    if context < flags.max_length:
        console.print(f"--max_length {flags.max_length} is more than the models were made for: {context} it is.")
        flags.max_length = context
    with errors_about("--data", flags.data):
        raw = (data.read_rows(flags.data, "test") if data.has_splits(flags.data) else []) or data.read_rows(flags.data)
        raw = raw[: flags.rows]
        rules = data.Rules.of(flags)
        if flags.greedy:
            rules["empty"] = "drop"
        rows, counts = data.tokenize(
            raw, tokenizer, flags.max_length, flags.data, rules, data.Options(**template_options(flags)), flags.train_on
        )
    for sentence in counts.sentences(rules):
        console.print(f"  {sentence}")
    if flags.greedy:
        return _prompts(rows, flags, context, console)
    pairs = [(response, row.number) for row in rows for response in row.responses]
    tokens = sum(response.tokens for response, _ in pairs)
    console.print(f"{flags.data}: {len(pairs):,} responses of {len(rows):,} rows, {tokens:,} tokens.")
    return Sample([response for response, _ in pairs], [number for _, number in pairs])


def _context(flags: argparse.Namespace) -> int | None:
    """The tokens that all models were made for; None where none of them says."""
    # every model can be loaded by now as far as its tokenizer goes
    bases = [base_of(name, "--policy") for name in (flags.reference, *flags.policy)]
    limits = [context_length(base, flags.trust_remote_code) for base in bases]
    return min((limit for limit in limits if limit), default=None)


def _prompts(rows: list[data.Row], flags: argparse.Namespace, context: int, console: Console) -> Sample:
    first: dict[str, tuple[Response, int]] = {}
    for row in rows:
        first.setdefault(row.prompt, (row.responses[0], row.number))
    chosen = list(first.values())[: flags.greedy]
    if len(chosen) < flags.greedy:
        console.print(f"--greedy {flags.greedy}: {flags.data} has {len(chosen)} distinct prompts; all of them are used.")
    longest, number = max((prompt.prompt_length, number) for prompt, number in chosen)
    if longest + flags.max_new_tokens > context:
        raise UsageError(
            f"--max_new_tokens {flags.max_new_tokens}: the prompt of {flags.data}, row {number}, has {longest} tokens, and the "
            f"models were made for {context} in all; lower it, or lower --max_length to leave out long rows."
        )
    return Sample([prompt for prompt, _ in chosen], [number for _, number in chosen])
