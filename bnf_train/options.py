"""The flags of a run: names, types, defaults and help, a group each. Nothing heavy is imported, so that --help is quick.

`config.BNFConfig` is made of these groups and of transformers.TrainingArguments. A field's help begins with the sentence
that --help shows; --help_all shows all of it, and rare flags, too. What is no default of a flag's own (a path, a device's
ability) has a metavar.
"""

import argparse
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, cast

from bnf_train import demo
from bnf_train.rules import RULES

PROG = "python -m bnf_train"
DESCRIPTION = (
    "Align a language model on preferred and dispreferred responses with the BNF loss. "
    "Without arguments: an embedded model on embedded data, about a minute."
)
CONFIG = "A YAML file with these flags as keys. Flags on the command line override it."

# Optimizers that keep what a bf16 weight rounds away: the argument that makes them, and the package they come from.
FOR_BF16_WEIGHTS = {
    "adamw_torch_8bit": ("bf16_stochastic_round", "torchao"),
    "adamw_torch_4bit": ("bf16_stochastic_round", "torchao"),
    "adamw_anyprecision": ("use_kahan_summation", "torchdistx"),
    "stable_adamw": ("kahan_sum", "optimi"),
}


@dataclass
class Data:
    """data"""

    dataset: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Preference rows: files, folders or hub names. A .json, .jsonl, .csv, .tsv, .parquet, .arrow or .feather "
            "file (also .gz, .bz2, .zst), a folder of such files or of the datasets library, a hub dataset's name or "
            "name:configuration; behind it =split for a split, =0.3 for a share of the rows. Several are mixed. Rows are "
            "(prompt, chosen, rejected), (prompt, completion, label or score) or (prompt, completions, labels or scores), "
            "plain text or chat messages; the prompt may stand in the messages of the responses instead.",
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Held-out rows, as --dataset. Default: the test split of a hub dataset, else --eval_size.",
        },
    )
    eval_size: float = field(
        default=0.1,
        metadata={
            "help": "Share (below 1) or number of rows held out. Where held-out rows do not come by themselves, so many "
            "training rows are kept back, whole prompts at a time. 0 keeps none."
        },
    )
    max_length: int = field(default=4096, metadata={"help": "Longest prompt with response, in tokens."})
    train_on: str = field(
        default="last",
        metadata={
            "help": "Turns in the loss. last: the response, which is the last message; all_assistant: the assistant's messages "
            "before it, too, with its label, but for those with the key weight: 0.",
            "choices": ["last", "all_assistant"],
        },
    )
    score_center: str = field(
        default="none",
        metadata={
            "help": "What scores are counted from. mean: from the mean score of the responses to the same prompt, so that half "
            "of them are pushed down; a response at the mean is left out.",
            "choices": ["none", "mean"],
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Template in place of the model's own. A file with a Jinja template, as in a model's chat_template.jinja.",
        },
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "metavar": "JSON",
            "help": 'Its variables. JSON, such as {"enable_thinking": false}, or keys below chat_template_kwargs in YAML.',
        },
    )
    template_date: str | None = field(
        default=None,
        metadata={
            "metavar": "DAY",
            "help": "Day that templates write as today's. YYYY-MM-DD. Default: the day on which the run began, which a resumed "
            "run keeps.",
        },
    )
    pairing_ratio: float = field(
        default=1.0,
        metadata={
            "help": "Share of training pairs that stay whole. Of the others one side, drawn at random, is removed "
            "(table 6 of the paper)."
        },
    )
    show_examples: int = field(
        default=2, metadata={"help": "Training rows printed at the start. They are shown with what the loss sees."}
    )


def _rule(name: str) -> str:
    rule = RULES[name]
    metadata = {"help": f"{rule.kind}.", "choices": list(rule.choices)}
    return cast(str, field(default=rule.choices[0], metadata=metadata))


@dataclass
class Rows:
    """rows that are not as they should be"""

    too_long: str = _rule("too_long")
    empty: str = _rule("empty")
    malformed: str = _rule("malformed")
    no_boundary: str = _rule("no_boundary")
    several_turns: str = _rule("several_turns")
    template_refuses: str = _rule("template_refuses")
    not_rendered: str = _rule("not_rendered")
    already_rendered: str = _rule("already_rendered")
    duplicates: str = _rule("duplicates")


@dataclass
class Model:
    """model and reference"""

    model: str = field(
        default=str(demo.MODEL),
        metadata={
            "metavar": "MODEL",
            "help": "Model folder or hub name. A model of the paper brings its preset: dataset, learning rate.",
        },
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype of the weights. bfloat16 needs an --optim that loses no update to rounding: "
            + ", ".join(FOR_BF16_WEIGHTS),
            "choices": ["float32", "bfloat16"],
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a hub model."})
    ref_model: str | None = field(
        default=None,
        metadata={
            "metavar": "MODEL",
            "help": "Another reference than --model. Default: --model as it is before training.",
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "metavar": "FOLDER",
            "help": "Keeps the reference's log-odds. The next run on the same weights and rows reads them; 4 bytes a "
            "response token. Default: bnf_train in the cache folder of Hugging Face (HF_HOME).",
        },
    )
    no_reference_cache: bool = field(
        default=False, metadata={"help": "Compute them anew, keep nothing. They are the reference's log-odds."}
    )


@dataclass
class Objective:
    """objective"""

    objective: str = field(
        default="bnf",
        metadata={
            "help": "Loss: bnf, bnf_one_sided, dpo, kto, … or my_file.py:my_function. A name of bnf_core.OBJECTIVES, or a "
            "function of your own as module:function or path/to/file.py:function. Its hyper-parameters (--beta, …) are flags."
        },
    )


@dataclass
class Training:
    """training"""

    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the rows."})
    batch_size: int | None = field(
        default=None,
        metadata={
            "metavar": "N",
            "help": "Rows per optimizer step over all devices. A pair is one row. Sets gradient_accumulation_steps. "
            "Default: 128 as in the paper.",
        },
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows per forward pass (a pair is one)."})
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={"metavar": "N", "help": "Forward passes per optimizer step. Default: what --batch_size needs."},
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Responses one behind the other, no padding. Those of a batch do not see each other (--no_packing: padded)."
        },
    )
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "A prompt of several responses is computed once. They stand behind it in a pack; single rows with the same "
            "prompt are kept together and shuffled as one. An architecture that cannot is found out, and said."
        },
    )
    tokens_per_pass: int | None = field(
        default=None,
        metadata={
            "metavar": "N",
            "help": "Tokens a pass: less memory, same gradient. A packed batch with more tokens is computed in several "
            "passes; one process only. Default: 640 on a CPU, else 0, which is no limit.",
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bf16 autocast over float32 weights. Default: where the device multiplies bf16 in hardware.",
            "nargs": "?",
            "const": True,
        },
    )


@dataclass
class LoRA:
    """LoRA"""

    use_peft: bool = field(default=False, metadata={"help": "Train an adapter. The frozen base is the reference."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: float = field(default=32, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on what enters the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "metavar": "NAME",
            "help": "Layers with an adapter. Names, or one regular expression for whole names. Default: every linear layer but "
            "the head.",
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"metavar": "NAME", "help": "Modules trained whole beside it. As lm_head. Default: none."},
    )
    lora_kwargs: str | None = field(
        default=None,
        metadata={
            "metavar": "JSON",
            "help": 'More of peft\'s LoraConfig. JSON, such as {"use_dora": true} or {"use_rslora": true}, or keys below '
            "lora_kwargs in YAML.",
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: the base in 4 bits. Needs bitsandbytes and --use_peft."},
    )


@dataclass
class Checks:
    """right answers"""

    check: str | None = field(
        default=None,
        metadata={
            "metavar": "NAME",
            "help": "Count them, before and after, by this check. Which says whether an answer is right: number (its last "
            "number is that of the row's column answer), exact (it is that), contains (that stands in it), regex=PATTERN "
            "(found in it), math_verify (the package), or a function of your own, (prompt, answer, row) -> bool or a share "
            "of right, as module:function or path/to/file.py:function.",
        },
    )
    check_dataset: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Prompts to ask, in place of held-out ones. Rows as --dataset, or with a column prompt (or question) alone "
            "beside those that the check reads; the test split where there is one. They are counted apart by the column group. "
            "Default: the held-out rows.",
        },
    )
    check_rows: int = field(default=200, metadata={"help": "At most so many prompts. Drawn by --seed."})
    check_samples: int = field(
        default=4, metadata={"help": "Answers sampled to a prompt, beside the greedy one. For pass@k; 0: none."}
    )
    check_temperature: float = field(default=1.0, metadata={"help": "Of the samples."})
    check_max_new_tokens: int = field(default=256, metadata={"help": "Where an answer is cut, in tokens."})
    check_steps: int | None = field(
        default=None,
        metadata={"metavar": "N", "help": "While training, too. Every N optimizer steps. Default: only before and after."},
    )


@dataclass
class Output:
    """output"""

    output_dir: str | None = field(
        default=None,
        metadata={"metavar": "FOLDER", "help": "Where the model goes. Default: a new folder runs/MODEL-OBJECTIVE."},
    )


RARE = {  # flags for --help_all alone
    *("lora_kwargs", "lora_modules_to_save", "share_prompts", "template_date", "chat_template_kwargs", "no_reference_cache"),
    *("check_rows", "check_samples", "check_temperature", "check_max_new_tokens", "check_steps"),
}
READING = ("train_on", "chat_template", "chat_template_kwargs", "template_date")  # and all of Rows
GROUPS = (Data, Rows, Model, Objective, Training, LoRA, Checks, Output)
# transformers' own that everyone uses, as --help shows them under a group: what stands behind the flag, and what it does
THEIRS: dict[type, dict[str, tuple[str, str]]] = {
    Training: {
        "max_steps": ("N", "Optimizer steps, in place of epochs"),
        "gradient_checkpointing": ("", "Less memory for a fifth more time"),
        "seed": ("42", "Of rows held out, their order, dropout"),
    },
    Output: {
        "eval_strategy": ("no", "When to evaluate (no, epoch, steps)"),
        "save_strategy": ("steps", "When to save (no, epoch, steps)"),
        "resume_from_checkpoint": ("FOLDER", "Go on with a checkpoint, or the last (auto)"),
    },
}


def help_text() -> str:
    """The project's flags with the first sentence on each, and the few of transformers that everyone uses."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage="%(prog)s [--flag value ...]   (lower case: the default)",
        description=DESCRIPTION,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=35),
    )
    for options in GROUPS:
        about = f"--{', --'.join(RULES)}: drop them, or stop (--help_all)" if options is Rows else None
        group = parser.add_argument_group(options.__doc__ or "", about)
        if about:  # a line for all
            continue
        for name, value, text in (*_rows(options), *((k, *row) for k, row in THEIRS.get(options, {}).items())):
            _add(group, name, value, text)
    group = parser.add_argument_group("more")
    _add(group, "config", "FILE", _first_sentence(CONFIG))
    _add(group, "debug", "", "Show the traceback of an error")
    _add(group, "help_all", "", "Flags of transformers and objectives, too")
    return parser.format_help()


def _rows(options: type) -> Iterator[tuple[str, str, str]]:
    """Name, value and text of a group's flags."""
    own: tuple[Field[Any], ...] = fields(options)
    for option in own:
        if option.name in RARE:
            continue
        switch = (option.type is bool and option.default is False) or option.metadata.get("nargs") == "?"
        value = "" if switch else option.metadata.get("metavar", str(option.default).lower())
        choices = option.metadata.get("choices")
        text = _first_sentence(option.metadata["help"])
        yield option.name, value, text + (f" ({', '.join(choices)})" if choices else "")


def _add(group: Any, name: str, value: str, text: str) -> None:
    how: dict[str, Any] = {"metavar": value} if value else {"action": "store_true"}
    group.add_argument(f"--{name}", help=text.replace("%", "%%"), **how)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The flags that say how rows become tokens, for another command's parser."""
    group = parser.add_argument_group("how rows become tokens", f"As {PROG} reads them; its --help_all says more.")
    of_data: tuple[Field[Any], ...] = fields(Data)
    of_rows: tuple[Field[Any], ...] = fields(Rows)
    for option in (*(option for option in of_data if option.name in READING), *of_rows):
        text, choices = _first_sentence(option.metadata["help"]).replace("%", "%%"), option.metadata.get("choices")
        shown = {} if choices else {"metavar": option.metadata["metavar"]}
        group.add_argument(f"--{option.name}", default=option.default, choices=choices, help=text, **shown)


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")
