"""One training run in the order in which it happens: read, score with the reference, train, report."""

import gc
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import transformers
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count

from bnf_core import Objective, objective_spec
from bnf_train import cli, demo, objectives, report
from bnf_train.checks import Asked, log_values
from bnf_train.config import BNFConfig, resumes
from bnf_train.data import (
    Collator,
    Options,
    Row,
    Rules,
    Template,
    by_prompt,
    check_ids,
    digest,
    mismatch,
    read_and_tokenize,
    spared,
)
from bnf_train.errors import UsageError
from bnf_train.model.answers import Measured, Questions, read_questions
from bnf_train.model.attention import attend_varlen, attention_width
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.load import context_length, load_model, load_tokenizer
from bnf_train.model.lora import add_lora, check_modules, quantization
from bnf_train.model.probe import can_pack, can_share_prompts, switch_off_dropout
from bnf_train.training import checkpoint, distributed
from bnf_train.training.checking import LogRight, ask_trained, ask_untrained, kept, taken_over
from bnf_train.training.reference_cache import add_ref_log_odds, check_same_tokens, weights_digest
from bnf_train.training.trainer import BNFTrainer
from bnf_train.training.tryout import try_out


def run(
    config: BNFConfig,
    embedded: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    ask_before: bool = True,
    leave: Literal["all", "metrics", "nothing"] = "all",
) -> BNFTrainer:
    """From rows to report; its trainer, with the trained model.

    Args:
      embedded: no flag was given: say that the model is the embedded one.
      ask_before: --check counts right answers before training, too, not only after it.
      leave: "metrics" is the model and metrics.json, without a report, figures and a card; "nothing" is for whoever measures
        the trained model and needs no more of it.
    """
    console = Console(quiet=not config.should_log, soft_wrap=True, highlight=False)
    if config.model == str(demo.MODEL):
        rows_of = (
            "its own answers to short tasks, each of them checked"
            if config.dataset == str(demo.PREFERENCES)
            else config.dataset
        )
        console.print(f"{'No arguments: t' if embedded else 'T'}he embedded demo model, on {rows_of}.")
    try_out(config)
    resumed = _checkpoint(config, console)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.set_seed(config.seed)
    rows = _read(config, resumed, console)
    objective, pairwise = _objective(config, rows)
    if objective_spec(objective).reference_point:
        rows.mismatched.extend(mismatch(rows.train, config.max_length))
        rows.mismatched.extend(mismatch(rows.held_out, config.max_length, before=rows.train))
        console.print(
            f"The reference point of {config.objective} is estimated in each step, from every prompt with another prompt's "
            "response: one forward pass more."
        )
    questions = _questions(config, rows, console)
    model, collator, reference_seconds = _score(config, rows, resumed, console)
    measured = None if questions is None else Measured(questions)
    if measured is not None and ask_before:
        measured.before = _ask_before(model, config, rows, measured.questions, resumed)
    log_right = [] if measured is None else [LogRight(measured, config.check_steps)]
    transformers.set_seed(config.seed)  # whether the reference pass drew random numbers or found its cache
    trainer = BNFTrainer(
        model=add_lora(model, config),
        args=config,
        objective=objective,
        pairwise=pairwise,
        starts_at_reference=not resumed and not config.ref_model,
        data_collator=collator,
        train_dataset=rows.train,
        eval_dataset=rows.held_out or None,
        processing_class=rows.tokenizer,
        callbacks=[*callbacks, *log_right],
    )
    trainer.reference_seconds = reference_seconds
    for callback in log_right:
        callback.trainer = trainer
        trainer.beside = kept(callback.measured)
    _train(trainer, config, resumed, console)
    if leave != "nothing":
        _report(trainer, config, rows, collator, measured, console, pages=leave == "all")
    return trainer


@dataclass(frozen=True)
class _Rows:
    """What is trained on and what is held out, with the tokenizer that made their token ids."""

    train: list[Row]
    held_out: list[Row]
    tokenizer: PreTrainedTokenizerBase
    mismatched: list[Row] = field(
        default_factory=list
    )  # prompts with another prompt's response, where the objective needs them

    @property
    def scored(self) -> list[Row]:
        """All that the reference is asked for."""
        return self.train + self.held_out + self.mismatched


def _checkpoint(config: BNFConfig, console: Console) -> Path | None:
    """The checkpoint to go on from; the output folder is new where there is none."""
    output = Path(config.output_dir or "")
    if not resumes(config.resume_from_checkpoint):
        cli.check_new_folder(output)
    with config.main_process_first():
        resumed = checkpoint.to_resume(config.resume_from_checkpoint, output, console.print, config.should_save)
    if resumed:  # on another day templates write what they wrote
        config.template_date = checkpoint.arguments_of(resumed).get("template_date") or config.template_date
    return resumed


def _read(config: BNFConfig, resumed: Path | None, console: Console) -> _Rows:
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    if config.ref_model:
        check_same_tokens(config.ref_model, tokenizer, config.trust_remote_code)
    for flag, name in (("--model", config.model), ("--ref_model", config.ref_model)):
        context = context_length(name, config.trust_remote_code, flag) if name else None
        if context is not None and context < config.max_length:
            console.print(f"--max_length {config.max_length} is more than {name} was made for: {context} it is.")
            config.max_length = context
    if resumed:
        checkpoint.check_same_run(resumed, json.loads(config.to_json_string()), console.print)
    train, held_out = read_and_tokenize(config, tokenizer, console)
    if config.chat_template:  # the model goes with the template that it was trained with
        tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    config.rows_digest = digest(train)
    if resumed:
        checkpoint.check_same(resumed, "rows_digest", config.rows_digest)
    if not held_out:  # the preset evaluates, and --eval_size 0 leaves nothing to do it on
        config.eval_strategy, config.eval_on_start = transformers.IntervalStrategy.NO, False
    return _Rows(train, held_out, tokenizer)


def _objective(config: BNFConfig, rows: _Rows) -> tuple[Objective, bool]:
    objective, pairwise = objectives.resolve(config.objective, config.hyperparameters)
    if pairwise and any(not row.pair for row in rows.train + rows.held_out):
        raise UsageError(
            f"--objective {config.objective} compares the two sides of a pair, and {config.dataset} has single responses; "
            "use --objective bnf, or rows with prompt, chosen, rejected."
        )
    return objective, pairwise


def _questions(config: BNFConfig, rows: _Rows, console: Console) -> Questions | None:
    """What --check asks."""
    if config.check is None:
        return None
    return read_questions(
        config.check, config.check_dataset, rows.held_out, rows.tokenizer, console, rows=config.check_rows,
        context=context_length(config.model, config.trust_remote_code), trained_on={row.prompt for row in rows.train},
        rules=Rules.of(config), options=Options(**config.template_options()),
        samples=config.check_samples, temperature=config.check_temperature, max_new_tokens=config.check_max_new_tokens,
        seed=config.seed, batch_size=config.per_device_eval_batch_size,
    )  # fmt: skip


def _ask_before(
    model: PreTrainedModel, config: BNFConfig, rows: _Rows, questions: Questions, resumed: Path | None
) -> list[Asked]:
    """The answers before training; of a resumed run, what its first part has measured."""
    kept_before = taken_over(resumed, questions) if resumed else None
    return ask_untrained(model, rows.tokenizer, questions, config) if kept_before is None else kept_before


def _score(config: BNFConfig, rows: _Rows, resumed: Path | None, console: Console) -> tuple[PreTrainedModel, Collator, float]:
    """Fills in the rows' reference log-odds; the policy, the collator that it can do with, and the seconds that it took."""
    distributed.load_in_float32(config)
    model, collator = _with_head(config, config.ref_model or config.model, rows, console)
    started = time.perf_counter()
    with distributed.gathered(model):
        config.reference_digest = config.model_digest = _digest(model, config, "reference_digest", resumed)
        add_ref_log_odds(
            model,
            rows.scored,
            collator,
            config.device,
            torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None,
            config.per_device_eval_batch_size,
            cache=None if config.no_reference_cache else Path(config.reference_cache or ""),
            weights=config.reference_digest,
            template=Template(rows.tokenizer, Options(**config.template_options())).fingerprint(),
            say=console.print,
            progress=not config.disable_tqdm,
        )
    seconds = time.perf_counter() - started
    if config.ref_model:
        del model
        gc.collect()  # it refers to itself; gone before the policy is loaded, so that there is never room needed for two
        model, collator = _with_head(config, config.model, rows, console)
        with distributed.gathered(model):
            config.model_digest = _digest(model, config, "model_digest", resumed)
    return model, collator, seconds


def _digest(model: PreTrainedModel, config: BNFConfig, name: str, resumed: Path | None) -> str:
    """Of the weights, on the process that writes checkpoints; the same as when training began."""
    if config.process_index > 0:
        return ""
    found = weights_digest(model)
    if resumed:
        checkpoint.check_same(resumed, name, found)
    return found


def _with_head(config: BNFConfig, name: str, rows: _Rows, console: Console) -> tuple[PreTrainedModel, Collator]:
    """The model `name` with the log-odds head, and the collator that it can do with."""
    flag = "--model" if name == config.model else "--ref_model"
    model = load_model(name, config.trust_remote_code, getattr(torch, config.dtype), quantization(config), flag)
    if flag == "--model":
        check_modules(model, config)
    with distributed.gathered(model):
        embeddings = len(model.get_input_embeddings().weight)
        check_ids(rows.train + rows.held_out, embeddings, rows.tokenizer)
        if config.packing:
            attend_varlen(model)
        attach_log_odds_head(model)
        if dropped := switch_off_dropout(model):
            console.print(f"{name}: its {', '.join(dropped)} switched off, so that policy and reference are one function.")
        batch_size = max(config.per_device_train_batch_size, config.per_device_eval_batch_size)
        packed = can_pack(model, rows.scored, batch_size, config.packing, config.device)
        shared = config.share_prompts and packed and can_share_prompts(model, rows.scored, config.device)
    if config.packing and not packed:
        console.print(f"{name}: packed responses would see each other in this architecture, so they are padded.")
    if flag == "--model":
        _say_what_is_shared(config, rows.train, shared, packed, console)
    if config.torch_compile:
        distributed.compile_layers(model, config.torch_compile_backend, config.torch_compile_mode)
    pad = int(rows.tokenizer.pad_token_id or 0)
    # which token pads plays no part, so long as there is such a one
    return model, Collator(pad if pad < embeddings else 0, packed, attention_width(model), shared)


def _say_what_is_shared(config: BNFConfig, rows: list[Row], shared: bool, packed: bool, console: Console) -> None:
    if not config.share_prompts:
        return
    groups = by_prompt(rows)
    if len(groups) < len(rows):
        console.print(f"{len(rows):,} rows with {len(groups):,} prompts: those with one are kept together, shuffled as one.")
    if not packed:
        return
    if len(groups) == len(rows) and not any(len(row.responses) > 1 for row in rows):
        return  # no two responses to a prompt
    if not shared:
        console.print(f"{config.model}: this architecture cannot share a prompt, so each response is computed with its own.")
        return
    saved = sum(spared([rows[place] for group in groups for place in group], config.per_device_train_batch_size))
    alone = sum(len(response.input_ids) for row in rows for response in row.responses)
    if saved:
        console.print(
            f"Prompts are computed once: {alone - saved:,} positions an epoch for {alone:,}, "
            f"{alone / (alone - saved):.2f} times fewer (--no_share_prompts)."
        )
    else:
        console.print("Responses of one pass share a prompt: raise --per_device_train_batch_size, so that a pass has several.")


def _train(trainer: BNFTrainer, config: BNFConfig, resumed: Path | None, console: Console) -> None:
    console.print(
        f"Training {get_model_param_count(trainer.model, trainable_only=True) / 1e6:.1f} M parameters on {config.device.type}, "
        f"{'bf16 autocast' if config.bf16 else 'float32'}, {config.batch_size} rows a step, "
        f"learning rate {config.learning_rate:g}, objective {config.objective}."
    )
    if trainer.router_loss:
        console.print(f"Its configuration asks for a router loss (output_router_logits), added {trainer.router_loss:g} times.")
    trainer.train(resume_from_checkpoint=resumed and str(resumed))


def _report(
    trainer: BNFTrainer,
    config: BNFConfig,
    rows: _Rows,
    collator: Collator,
    measured: Measured | None,
    console: Console,
    pages: bool,
) -> None:
    output = Path(config.output_dir or "")
    history = trainer.state.log_history
    last = history[-2] if len(history) > 1 else {}  # [-1] is the summary of the run
    evaluated = "eval_loss" in last and last["step"] == trainer.state.global_step and not config.load_best_model_at_end
    held_out = last if evaluated else trainer.evaluate() if rows.held_out else {}
    by_source = {}
    if len(config.datasets) > 1:
        for source in dict.fromkeys(row.source for row in rows.held_out):
            some = [row for row in rows.held_out if row.source == source]
            by_source[source] = trainer.evaluate(some, metric_key_prefix="eval")
            history.pop()  # not of all held-out rows, as the others are
    trainer.beside = {}
    trainer.save_model()
    if measured is not None:
        measured.after = ask_trained(trainer, measured.questions, "answers after training")
        trainer.log(log_values(measured.questions.values(measured.after)))
    # on every process: the forward of a sharded model needs all of them
    examples = report.examples(trainer.model, rows.held_out, collator, rows.tokenizer, config.device, bool(config.bf16))
    if trainer.is_world_process_zero():
        with checkpoint.naming_a_full_disk(output):
            rows.tokenizer.save_pretrained(output)
            report.write(output, config, history, held_out, examples, by_source, measured, pages)
        console.print(report.table(held_out))
        for source, metrics in by_source.items():
            console.print(source)
            console.print(report.table(metrics))
        if measured is not None:
            console.print(report.right_table(measured.values()))
        console.print(f"Model, {'report.html, metrics.json and metrics.png' if pages else 'metrics.json'} in {output}")
