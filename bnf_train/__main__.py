"""python -m bnf_train: align a language model with the BNF loss.

Without arguments it trains the embedded demo. For a real one:
    python -m bnf_train --model path/to/model --dataset pairs.jsonl --learning_rate 2e-5
    python -m bnf_train --model meta-llama/Meta-Llama-3-8B-Instruct      # the paper's preset
    accelerate launch -m bnf_train --model ...                          # every GPU of the machine
"""

import gc
import json
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bnf_train.errors import Interrupted, UsageError, is_out_of_memory

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from bnf_train.collate import Collator
    from bnf_train.config import BNFConfig
    from bnf_train.trainer import BNFTrainer


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    from bnf_train.config import parse  # imports transformers: after the interpreter has said nothing is wrong

    config = None
    try:
        config = parse(arguments)
        run(config, embedded=not arguments)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except Exception as error:
        if config is not None and is_out_of_memory(error):
            reason = " ".join(str(error).split())[:200].rstrip(".")
            sentence = (
                f"out of memory ({reason}); lower --per_device_train_batch_size (now {config.per_device_train_batch_size}) "
                f"or --max_length (now {config.max_length}), or add --gradient_checkpointing."
            )
        elif isinstance(error, UsageError):
            sentence = str(error)
        else:
            raise
        if config.tracebacks if config else "--debug" in arguments:
            traceback.print_exc()
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    return 0


def run(config: "BNFConfig", embedded: bool = False, callbacks: Sequence["TrainerCallback"] = ()) -> "BNFTrainer":
    """One training run, from rows to report, in the order in which it happens; its trainer, with the trained model."""
    import torch
    import transformers
    from rich.console import Console

    from bnf_train import checkpoint, data, demo, report
    from bnf_train.data import read_and_tokenize
    from bnf_train.load import context_length, load_tokenizer
    from bnf_train.lora import add_lora
    from bnf_train.objectives import resolve
    from bnf_train.reference_cache import add_ref_log_odds, check_same_tokens
    from bnf_train.scale_out import gathered, trained
    from bnf_train.trainer import BNFTrainer

    console = Console(quiet=not config.should_log, soft_wrap=True, highlight=False)
    if config.model == str(demo.MODEL):
        rows_of = "400 rows of GSM8K solutions" if config.dataset == str(demo.PREFERENCES) else config.dataset
        console.print(f"{'No arguments: t' if embedded else 'T'}he embedded demo model, on {rows_of}.")
    output = Path(config.output_dir or "")
    in_use = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if in_use and not checkpoint.resumes(config.resume_from_checkpoint):
        raise UsageError(f"--output_dir {output}: expected a new or empty folder; remove it or pass another.")
    with config.main_process_first():
        resumed = checkpoint.to_resume(config.resume_from_checkpoint, output, console.print, config.should_save)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.set_seed(config.seed)

    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    if config.ref_model:
        check_same_tokens(config.ref_model, tokenizer, config.trust_remote_code)
    for flag, name in (("--model", config.model), ("--ref_model", config.ref_model)):
        context = context_length(name, config.trust_remote_code, flag) if name else None
        if context is not None and context < config.max_length:
            console.print(f"--max_length {config.max_length} is more than {name} was made for: {context} it is.")
            config.max_length = context
    train_rows, held_out = read_and_tokenize(config, tokenizer, console)
    config.rows_digest = data.digest(train_rows)
    if not held_out:  # the preset evaluates, and --eval_size 0 leaves nothing to do it on
        config.eval_strategy, config.eval_on_start = transformers.IntervalStrategy.NO, False
    if resumed:
        checkpoint.check_same_run(resumed, json.loads(config.to_json_string()))
    objective, pairwise = resolve(config)
    if pairwise and any(len(row.responses) == 1 for row in train_rows + held_out):
        raise UsageError(
            f"--objective {config.objective} compares the two sides of a pair, and {config.dataset} has single responses; "
            "use --objective bnf, or rows with prompt, chosen, rejected."
        )
    model, collator = _with_head(config, config.ref_model or config.model, tokenizer, console)
    started = time.perf_counter()
    with gathered(model):
        add_ref_log_odds(
            model,
            train_rows + held_out,
            collator,
            config.device,
            torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None,
            config.per_device_eval_batch_size,
            cache=None if config.no_reference_cache else Path(config.reference_cache or ""),
            template=tokenizer.chat_template or "",
            say=console.print,
            progress=not config.disable_tqdm,
        )
    reference_seconds = time.perf_counter() - started
    if config.ref_model:
        del model
        gc.collect()  # it refers to itself; gone before the policy is loaded, so that there is never room needed for two
        model, collator = _with_head(config, config.model, tokenizer, console)
    transformers.set_seed(config.seed)  # whether the reference pass drew random numbers or found its cache
    model = add_lora(model, config)

    trainer = BNFTrainer(
        model=model,
        args=config,
        objective=objective,
        pairwise=pairwise,
        starts_at_reference=not resumed and not config.ref_model,
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=held_out or None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.reference_seconds = reference_seconds
    console.print(
        f"Training {trained(model) / 1e6:.1f} M parameters on {config.device.type}, "
        f"{'bf16 autocast' if config.bf16 else 'float32'}, {config.batch_size} rows a step, "
        f"learning rate {config.learning_rate:g}, objective {config.objective}."
    )
    trainer.train(resume_from_checkpoint=resumed and str(resumed))
    last = trainer.state.log_history[-2] if len(trainer.state.log_history) > 1 else {}  # [-1] is the summary of the run
    evaluated = "eval_loss" in last and last["step"] == trainer.state.global_step and not config.load_best_model_at_end
    held_out_metrics = last if evaluated else trainer.evaluate() if held_out else {}
    trainer.save_model()
    examples = report.examples(model, held_out, collator, tokenizer, config.device, bool(config.bf16))  # on every process
    if trainer.is_world_process_zero():
        with checkpoint.naming_a_full_disk(output):
            tokenizer.save_pretrained(output)
            report.write(output, config, trainer.state.log_history, held_out_metrics, examples)
        console.print(report.table(held_out_metrics))
        console.print(f"Model, report.html, metrics.json and metrics.png in {output}")
    return trainer


def _with_head(
    config: "BNFConfig", name: str, tokenizer: "PreTrainedTokenizerBase", console: "Console"
) -> tuple["PreTrainedModel", "Collator"]:
    """The model `name` with the log-odds head, and the collator that it can do with."""
    import torch

    from bnf_train.collate import Collator, attention_width
    from bnf_train.load import load_model
    from bnf_train.lora import quantization
    from bnf_train.model_head import attach_log_odds_head, can_pack
    from bnf_train.packed_attention import attend_by_response
    from bnf_train.scale_out import compile_layers, gathered

    flag = "--model" if name == config.model else "--ref_model"
    model = load_model(name, config.trust_remote_code, getattr(torch, config.dtype), quantization(config), flag)
    if config.packing:
        attend_by_response(model)
    with gathered(model):
        attach_log_odds_head(model)
        packed = config.packing and can_pack(model)
    if config.packing and not packed:
        console.print(f"{name}: packed responses would see each other in this architecture, so they are padded.")
    if config.torch_compile:
        compile_layers(model, config.compile_backend, config.torch_compile_mode)
    return model, Collator(tokenizer.pad_token_id, packed, attention_width(model))


if __name__ == "__main__":
    sys.exit(main())
