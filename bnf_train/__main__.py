"""python -m bnf_train: align a language model with the BNF loss.

Without arguments it trains the embedded demo. For a real one:
    python -m bnf_train --model path/to/model --dataset pairs.jsonl --learning_rate 2e-5
    python -m bnf_train --model meta-llama/Meta-Llama-3-8B-Instruct      # the paper's preset
    accelerate launch -m bnf_train --model ...                          # every GPU of the machine
"""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bnf_train.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from bnf_train.config import BNFConfig
    from bnf_train.data import Row


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    from bnf_train.config import parse  # imports transformers: after the interpreter has said nothing is wrong

    try:
        run(parse(arguments), embedded=not arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: "BNFConfig", embedded: bool = False) -> None:
    """One training run, from rows to report, in the order in which it happens."""
    import transformers
    from rich.console import Console

    from bnf_core import OBJECTIVES, PAIRWISE
    from bnf_train import demo, report
    from bnf_train.collate import Collator
    from bnf_train.load import context_length, load_model, load_tokenizer
    from bnf_train.model_head import attach_log_odds_head
    from bnf_train.reference_cache import add_ref_log_odds
    from bnf_train.trainer import BNFTrainer

    console = Console(quiet=not config.should_log, soft_wrap=True, highlight=False)
    if config.model == str(demo.MODEL):
        rows_of = "400 rows of GSM8K solutions" if config.dataset == str(demo.PREFERENCES) else config.dataset
        console.print(f"{'No arguments: t' if embedded else 'T'}he embedded demo model, on {rows_of}.")
    output = Path(config.output_dir or "")
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not config.resume_from_checkpoint:
        raise UsageError(f"--output_dir {output}: expected a new or empty folder; remove it or pass another.")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.set_seed(config.seed)

    context = context_length(config.model, config.trust_remote_code)
    if context is not None and context < config.max_length:
        console.print(f"--max_length {config.max_length} is more than {config.model} was made for: {context} it is.")
        config.max_length = context
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    train_rows, held_out = _rows(config, tokenizer, console)
    if config.objective in PAIRWISE and any(len(row.responses) == 1 for row in train_rows + held_out):
        raise UsageError(
            f"--objective {config.objective} compares the two sides of a pair, and {config.dataset} has single responses; "
            "use --objective bnf, or rows with prompt, chosen, rejected."
        )
    model = load_model(config.model, config.trust_remote_code)
    attach_log_odds_head(model)
    collator = Collator(tokenizer.pad_token_id)
    add_ref_log_odds(
        model, train_rows + held_out, collator, config.device, bool(config.bf16), config.per_device_eval_batch_size
    )

    trainer = BNFTrainer(
        model=model,
        args=config,
        objective=OBJECTIVES[config.objective],
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=held_out or None,
        processing_class=tokenizer,
    )
    console.print(
        f"Training {model.num_parameters() / 1e6:.1f} M parameters on {config.device.type}, "
        f"{'bf16 autocast' if config.bf16 else 'float32'}, {config.batch_size} rows a step, "
        f"learning rate {config.learning_rate:g}, objective {config.objective}."
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    held_out_metrics = trainer.evaluate() if held_out else {}
    trainer.save_model()
    tokenizer.save_pretrained(output)
    if trainer.is_world_process_zero():
        report.write(output, config, trainer.state.log_history, held_out_metrics)
        console.print(report.table(held_out_metrics))
        console.print(f"Model, metrics.json and metrics.png in {output}")


def _rows(config: "BNFConfig", tokenizer: "PreTrainedTokenizerBase", console: "Console") -> tuple[list["Row"], list["Row"]]:
    """Training and held-out rows, tokenised; what was cut or dropped is printed."""
    from bnf_train import data

    def tokenized(source: str, split: str) -> list["Row"]:
        raw = data.read_rows(source, split)
        if not raw:
            return []
        rows, counts = data.tokenize(raw, tokenizer, config.max_length, source)
        console.print(
            f"{source}, {split}: {counts['rows']} rows, {sum(r.tokens for row in rows for r in row.responses):,} response "
            f"tokens; at --max_length {config.max_length}, {counts['cut']} responses cut, {counts['dropped']} rows dropped."
        )
        return rows

    assert config.dataset is not None
    train_rows = tokenized(config.dataset, "train")
    local = Path(config.dataset).exists()
    held_out = tokenized(config.eval_dataset or config.dataset, "test") if config.eval_dataset or not local else []
    if not held_out:
        train_rows, held_out = data.split_by_prompt(train_rows, config.eval_size, config.seed)
    return train_rows, held_out


if __name__ == "__main__":
    sys.exit(main())
