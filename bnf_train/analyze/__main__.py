"""python -m bnf_train.analyze: how far policies moved from their reference, figures 3 and 4 of the paper.

    python -m bnf_train.analyze --policy runs/bnf runs/dpo --reference path/to/model --data held_out.jsonl
    python -m bnf_train.analyze --policy runs/bnf --reference path/to/model --data held_out.jsonl --greedy 1000

On the responses of the data, or (--greedy) on each policy's own greedy responses to the first prompts, as the paper does;
then response lengths are reported too (table 5). Definitions with formulas: `bnf_core.analysis`. Writes analysis.json,
figure3.png and figure4.png. One model is in memory at a time, and never its full logits.
"""

import argparse
import contextlib
import gc
import json
import logging
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnf_train import cli
from bnf_train.analyze.figures import BINS, LABELS, METRICS, table, write
from bnf_train.errors import UsageError, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bnf_train.data import Response


# --- responses and what a model says of them ---------------------------------------------------------------------------


@dataclass
class Sample:
    """Responses with the rows of the data that they answer; `cut`: generation stopped at --max_new_tokens."""

    responses: list["Response"]
    rows: list[int]
    cut: list[bool] | None = None  # None: the data's own responses
    texts: list[str] = field(default_factory=list)


@dataclass
class Scores:
    """Log-odds and logit of each response token under one model, flat over the responses in their order; float32."""

    log_odds: "Tensor"
    logits: "Tensor"


@dataclass
class Setting:
    """How models are run."""

    tokenizer: "PreTrainedTokenizerBase"
    device: "torch.device"
    bf16: bool
    batch_size: int
    max_new_tokens: int
    trust_remote_code: bool


def load(name: str, flag: str, setting: Setting) -> "PreTrainedModel":
    """A model folder, a hub name, or a folder of a LoRA adapter, which is merged into its base model.

    Raises:
      UsageError: as `load_model`, under the name of `flag`.
    """
    from bnf_train.model.load import load_model

    base = base_of(name, flag)
    with _named(flag, name, base):
        model = load_model(base, setting.trust_remote_code)
    if base != name:
        import peft

        if not (Path(name) / "adapter_model.safetensors").is_file():
            raise UsageError(f"{flag} {name}: expected the adapter's weights in adapter_model.safetensors, found none.")
        try:
            model = peft.PeftModel.from_pretrained(model, name).merge_and_unload()
        except Exception as error:  # peft and safetensors raise a dozen unrelated types
            if is_out_of_memory(error):
                raise
            why = " ".join(str(error).split())[:200]
            raise UsageError(f"{flag} {name}: the adapter does not fit {base} ({why}).") from error
    return model.to(setting.device).eval()


def base_of(name: str, flag: str) -> str:
    """The model that an adapter belongs to, from its adapter_config.json; any other name is its own."""
    path = Path(name) / "adapter_config.json"
    if not path.is_file():
        return name
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not base or not isinstance(base, str):
        raise UsageError(f"{flag} {name}: its adapter_config.json names no base_model_name_or_path; put the base model there.")
    return base


@contextlib.contextmanager
def _named(flag: str, name: str, base: str) -> Iterator[None]:
    """Errors under the flag that they are about: what loads models and data knows them as --model and --dataset."""
    try:
        yield
    except UsageError as error:
        about = "" if base == name else f"{flag} {name} is an adapter, and its base model: "
        raise UsageError(about + str(error).replace("--model", flag).replace("--dataset", "--data")) from error


def greedy(model: "PreTrainedModel", prompts: Sequence["Response"], rows: Sequence[int], setting: Setting) -> Sample:
    """The model's greedy responses, up to the first end-of-turn token or --max_new_tokens. Before the head is attached."""
    import torch
    from transformers import GenerationConfig

    from bnf_train.data import Response

    pad, ends = int(setting.tokenizer.pad_token_id), _ends(model, setting.tokenizer)
    # in the place of the checkpoint's own, which may sample or penalise repetition
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=setting.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=pad
    )
    generated: dict[int, list[int]] = {}
    for batch in _batches([p.prompt_length for p in prompts], setting.batch_size, "greedy responses"):
        ids = [prompts[i].input_ids[: prompts[i].prompt_length] for i in batch]
        longest = max(map(len, ids))
        inputs = torch.tensor([[pad] * (longest - len(x)) + x for x in ids], device=setting.device)
        mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in ids], device=setting.device)
        with torch.no_grad(), torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.bf16):
            out = model.generate(input_ids=inputs, attention_mask=mask)[:, longest:]
        for i, tokens in zip(batch, out.tolist(), strict=True):
            end = next((k for k, token in enumerate(tokens) if token in ends), len(tokens) - 1)
            generated[i] = tokens[: end + 1]
    answers = [generated[i] for i in range(len(prompts))]
    return Sample(
        [
            Response(p.input_ids[: p.prompt_length] + answer, p.prompt_length, True)
            for p, answer in zip(prompts, answers, strict=True)
        ],
        list(rows),
        [answer[-1] not in ends for answer in answers],
        [str(setting.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers],
    )


def _ends(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """What ends a turn: the tokenizer's EOS, and what the checkpoint says (gemma: <end_of_turn>)."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return {int(end) for end in (*several, tokenizer.eos_token_id) if end is not None}


def score(model: "PreTrainedModel", sample: Sample, setting: Setting) -> Scores:
    """Log-odds and target logits of every response token, from the same hidden states. `model` has the log-odds head.

    Batches are those of the responses alone, so that two models are run alike, and equal ones give equal numbers.

    Raises:
      UsageError: NaN or infinite log-odds.
    """
    import torch

    from bnf_core import analysis
    from bnf_train.data import Collator, Row, model_inputs

    collator = Collator(int(setting.tokenizer.pad_token_id))
    seen: list[Tensor] = []

    def keep_logits(head: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden, labels = args[:2]
        seen.append(analysis.target_logits(hidden, head.weight, labels, bias=getattr(head, "bias", None), **options))

    values: dict[int, tuple[Tensor, Tensor]] = {}
    hook = model.get_output_embeddings().register_forward_pre_hook(keep_logits, with_kwargs=True)
    try:
        for batch in _batches([len(r.input_ids) for r in sample.responses], setting.batch_size, "log-odds"):
            inputs = model_inputs(collator([Row("", [sample.responses[i]]) for i in batch]))
            with torch.no_grad(), torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.bf16):
                log_odds, _ = model(**{name: value.to(setting.device) for name, value in inputs.items()})
            lengths = [sample.responses[i].tokens for i in batch]
            parts = zip(log_odds.float().cpu().split(lengths), seen.pop().float().cpu().split(lengths), strict=True)
            for i, (mine, logits) in zip(batch, parts, strict=True):
                if not (mine.isfinite().all() and logits.isfinite().all()):
                    raise UsageError(
                        f"row {sample.rows[i]}: a response has NaN or infinite log-odds under {model.name_or_path}; look for "
                        "damaged weights, or leave out --bf16."
                    )
                values[i] = mine, logits
    finally:
        hook.remove()
    ordered = [values[i] for i in range(len(sample.responses))]
    return Scores(torch.cat([x for x, _ in ordered]), torch.cat([z for _, z in ordered]))


def _batches(lengths: Sequence[int], size: int, what: str) -> Iterator[list[int]]:
    """Places of sequences of about one length, longest first, behind a progress bar on a terminal."""
    from tqdm.auto import tqdm

    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    with tqdm(total=len(order), desc=what, leave=False, disable=None) as progress:
        for start in range(0, len(order), size):
            yield order[start : start + size]
            progress.update(size)


# --- figures 3 and 4 as numbers ------------------------------------------------------------------------------------------


def shifts(sample: Sample, policy: Scores, reference: Scores) -> tuple[dict[str, list[float]], "Tensor"]:
    """Each metric of each response (figure 3), and the log-likelihood shift of each token (figure 4)."""
    import torch

    from bnf_core import analysis

    lengths = torch.tensor([r.tokens for r in sample.responses])
    response = torch.arange(len(lengths)).repeat_interleave(lengths)
    odds, logits = (policy.log_odds, reference.log_odds), (policy.logits, reference.logits)
    values = {
        "log_likelihood_shift": analysis.log_likelihood_shift(*odds, response),
        "logit_shift": analysis.logit_shift(*logits, response),
        "log_likelihood_shift_per_token": analysis.log_likelihood_shift(*odds, response, normalized=True),
        "logit_shift_per_token": analysis.logit_shift(*logits, response, normalized=True),
        "gini": analysis.gini(analysis.token_logit_shift(*logits), response),
    }
    return {name: x.tolist() for name, x in values.items()}, analysis.token_log_likelihood_shift(*odds)


def report_of(sample: Sample, values: dict[str, list[float]]) -> dict[str, Any]:
    """One policy's entry in analysis.json: a list per metric over the responses, and means and medians."""
    each: dict[str, list[Any]] = {"row": sample.rows, "tokens": [r.tokens for r in sample.responses], **values}
    if sample.cut is None:
        each["preferred"] = [r.preferred for r in sample.responses]
    else:
        each |= {"cut": sample.cut, "text": sample.texts}
    groups = {"all": list(range(len(sample.rows)))}
    if sample.cut is None:
        sides = {name: [i for i, r in enumerate(sample.responses) if r.preferred is label] for name, label in LABELS.items()}
        groups |= {name: side for name, side in sides.items() if side}
    return {"summary": {name: _summary(each, at) for name, at in groups.items()}, "responses": each}


def _summary(each: dict[str, list[Any]], at: Sequence[int]) -> dict[str, Any]:
    def both(name: str) -> dict[str, float]:
        values = [each[name][i] for i in at]
        return {"mean": statistics.fmean(values), "median": statistics.median(values)}

    return {"responses": len(at)} | {name: both(name) for name in ("tokens", *METRICS)}


def bins(token_shifts: dict[str, "Tensor"], bins_of: str) -> dict[str, Any]:
    """Figure 4: deciles of one policy's token shifts, and the share of every policy's tokens between them."""
    from bnf_core import analysis

    edges = analysis.percentile_edges(token_shifts[bins_of].double(), BINS)
    shares = {name: analysis.bin_shares(x.double(), edges).tolist() for name, x in token_shifts.items()}
    return {"bins_of": bins_of, "edges": edges.tolist(), "shares": shares}


# --- the run ---------------------------------------------------------------------------------------------------------------


def analyze(flags: argparse.Namespace, console: "Console") -> dict[str, Any]:
    """Everything that is drawn, as it stands in analysis.json."""
    import torch

    from bnf_train.model.head import attach_log_odds_head
    from bnf_train.model.load import load_tokenizer

    names = dict(zip(_names(flags), flags.policy, strict=True))
    bins_of = flags.bins_of or next(iter(names))
    if bins_of not in names:
        raise UsageError(f"--bins_of {bins_of}: expected the name of a policy, one of {', '.join(names)}.")
    base = base_of(flags.reference, "--reference")
    with _named("--reference", flags.reference, base):
        tokenizer = load_tokenizer(base, flags.trust_remote_code)
    for path in flags.policy:
        _check_same_tokens(path, tokenizer, flags.trust_remote_code)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    setting = Setting(
        tokenizer,
        device or torch.device("cpu"),
        flags.bf16 == "true",
        flags.batch_size,
        flags.max_new_tokens,
        flags.trust_remote_code,
    )
    given = _data(flags, tokenizer, console)

    def scored_by(path: str, flag: str, samples: dict[str, Sample]) -> tuple[Sample, dict[str, Scores]]:
        """Its greedy responses, or those given, and its scores of them, or of `samples` if there are any."""
        model = load(path, flag, setting)
        mine = greedy(model, given.responses, given.rows, setting) if flags.greedy else given
        attach_log_odds_head(model)
        # the data's own responses are one sample, whoever is asked about it
        distinct = {id(sample): sample for sample in (samples or {"": mine}).values()}
        scored = {key: score(model, sample, setting) for key, sample in distinct.items()}
        return mine, {name: scored[id(sample)] for name, sample in (samples or {"": mine}).items()}

    samples, policies = {}, {}
    for name, path in names.items():
        console.print(f"{name}: {path}")
        samples[name], scores = scored_by(path, "--policy", {})
        policies[name] = scores[""]
        gc.collect()  # a model refers to itself: gone before the next one is loaded
    console.print(f"reference: {flags.reference}")
    own, references = scored_by(flags.reference, "--reference", samples)

    result: dict[str, Any] = {
        "reference": flags.reference,
        "data": flags.data,
        "responses": f"each policy's own, greedy, at most {flags.max_new_tokens} tokens" if flags.greedy else "of the data",
        "bf16": setting.bf16,
        "max_length": flags.max_length,
        "units": METRICS,
        "policies": {},
    }
    if flags.greedy:
        tokens = [r.tokens for r in own.responses]
        lengths = {"mean": statistics.fmean(tokens), "median": statistics.median(tokens)}
        result["reference_length"] = lengths | {"tokens": tokens, "cut": own.cut, "text": own.texts}
        for name, sample in (*samples.items(), ("reference", own)):
            if cut := sum(sample.cut or ()):
                console.print(f"{name}: {cut} of {len(sample.rows)} responses cut at --max_new_tokens {flags.max_new_tokens}.")
    token_shifts = {}
    for name, sample in samples.items():
        values, token_shifts[name] = shifts(sample, policies[name], references[name])
        result["policies"][name] = {"path": names[name], **report_of(sample, values)}
    return result | {"figure4": bins(token_shifts, bins_of)}


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


def _check_same_tokens(path: str, tokenizer: "PreTrainedTokenizerBase", trust_remote_code: bool) -> None:
    from bnf_train.model.load import load_tokenizer

    base = base_of(path, "--policy")
    with _named("--policy", path, base):
        other = load_tokenizer(base, trust_remote_code)
    if other.get_vocab() != tokenizer.get_vocab():
        raise UsageError(f"--policy {path}: its tokenizer has another vocabulary than --reference's; use models of one family.")


def _data(flags: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", console: "Console") -> Sample:
    """The data's responses; with --greedy the first distinct prompts, as responses whose answers are not looked at."""
    from bnf_train import data
    from bnf_train.model.load import context_length

    # every model can be loaded by now as far as its tokenizer goes
    bases = [base_of(name, "--policy") for name in (flags.reference, *flags.policy)]
    limits = [context_length(base, flags.trust_remote_code) for base in bases]
    context = min((limit for limit in limits if limit), default=flags.max_length + flags.max_new_tokens)
    if context < flags.max_length:
        console.print(f"--max_length {flags.max_length} is more than the models were made for: {context} it is.")
        flags.max_length = context
    with _named("--data", flags.data, flags.data):
        raw = (data.read_rows(flags.data, "test") if data.has_splits(flags.data) else []) or data.read_rows(flags.data)
        raw = raw[: flags.rows]
        rules = data.Rules(empty="drop") if flags.greedy else data.Rules()
        rows, counts = data.tokenize(raw, tokenizer, flags.max_length, flags.data, rules)
    for sentence in counts.sentences(rules):
        console.print(f"  {sentence}")
    if not flags.greedy:
        pairs = [(response, row.number) for row in rows for response in row.responses]
        tokens = sum(response.tokens for response, _ in pairs)
        console.print(f"{flags.data}: {len(pairs):,} responses of {len(rows):,} rows, {tokens:,} tokens.")
        return Sample([response for response, _ in pairs], [number for _, number in pairs])
    first: dict[str, tuple[Any, int]] = {}
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


# --- flags -----------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m bnf_train.analyze", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--policy", nargs="+", required=True, metavar="MODEL", help="model folders, hub names, or folders of LoRA adapters")
    add("--reference", required=True, metavar="MODEL", help="the model that they were trained from")
    add("--data", required=True, help="preference rows, as --dataset of python -m bnf_train; its test split where it has one")
    add("--output_dir", default="runs/analysis", help="a new or empty folder (default: %(default)s)")
    add("--names", nargs="+", metavar="NAME", help="what the policies are called (default: the names of their folders)")
    add("--bins_of", metavar="NAME", help="the policy whose deciles are figure 4's bins (default: the first)")
    add("--rows", type=int, metavar="N", help="only the first N rows of the data")
    add("--greedy", type=int, metavar="N", help="greedy responses of every model to the first N prompts, not the data's own")
    add("--max_new_tokens", type=int, default=512, metavar="N", help="longest greedy response (default: %(default)s)")
    add("--max_length", type=int, default=512, metavar="N", help="longest prompt with response (default: %(default)s)")
    add("--batch_size", type=int, default=8, metavar="N", help="responses of one forward pass (default: %(default)s)")
    add("--bf16", nargs="?", const="true", default="false", choices=("true", "false"), help="multiply in bf16, by autocast")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with a model")
    add("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.read(arguments)
    for name in ("rows", "greedy", "max_new_tokens", "max_length", "batch_size"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise UsageError(f"--{name}: expected at least 1, got {value}.")
    return flags


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_analyze, arguments)


def _analyze(arguments: list[str], failure: cli.Failure) -> None:
    flags = parse(arguments)
    failure.out_of_memory = lambda: f"lower --batch_size (now {flags.batch_size}), or add --bf16."
    run(flags)


def run(flags: argparse.Namespace) -> None:
    from rich.console import Console

    folder = Path(flags.output_dir)
    cli.check_new_folder(folder)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console = Console(highlight=False, soft_wrap=True)
    result = analyze(flags, console)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, result)
    except OSError as error:
        raise UsageError(f"--output_dir {folder}: {(error.strerror or str(error)).lower()}.") from error
    Console(highlight=False).print(table(result))
    console.print(f"analysis.json, figure3.png and figure4.png in {folder}")


if __name__ == "__main__":
    sys.exit(main())
