"""The flags of the rounds themselves, and those of training and sampling that have no place there; quick to import."""

from typing import Any

# keys of a --config file that python -m bnf_train does not know
OWN = ("rounds", "prompts_per_round", "keep", "prompts", "form", "samples", "temperature", "top_p", "max_new_tokens")
KEEP = ("all", "last")
FORMS = ("singles", "groups", "pairs")

_WHOLE = "a round hands whole weights to the next; leave it out"
_OWN_TEMPLATE = "answers are sampled in the model's own chat template; put it into the model's folder"
_OWN_MODEL = "answers are those of the model at hand; leave it out"
REFUSED = {  # and why
    "output": "rows stand in the folder of their round; pass --output_dir",
    "server": _OWN_MODEL,
    "server_model": _OWN_MODEL,
    "concurrency": _OWN_MODEL,
    "reward_model": "answers are labelled by --check; a function of your own may be one (path/to/file.py:function)",
    "ref_model": "each round's reference is the model that it begins with; leave it out",
    "resume_from_checkpoint": "the same command goes on by itself; leave it out",
    "save_only_model": "a round that was killed could not go on from such a checkpoint; leave it out",
    "use_peft": _WHOLE,
    "load_in_4bit": _WHOLE,
    "chat_template": _OWN_TEMPLATE,
    "chat_template_kwargs": _OWN_TEMPLATE,
    "check_steps": "right answers are counted before the first round and after each; leave it out",
}


def add_own(add: Any) -> None:
    """By a parser's `add_argument`."""
    add("--rounds", type=int, default=3, metavar="N", help="how many (default: %(default)s)")
    add(
        "--dataset",
        "--prompts",
        dest="dataset",
        metavar="FILE",
        help="rows with a prompt, and what --check reads of them; where --check_dataset brings no others, --eval_size of the "
        "prompts are kept to be asked. Default: the demo's",
    )
    add(
        "--prompts_per_round",
        type=int,
        default=0,
        metavar="N",
        help="the next N prompts each round, going round (default: all)",
    )
    add(
        "--keep",
        choices=KEEP,
        default="all",
        help="whose weights stay on disk: every round's, or the last (default: %(default)s)",
    )
    add("--output_dir", default="runs/rounds", metavar="FOLDER", help="where all of it goes (default: %(default)s)")
    add("--config", metavar="FILE", help="a YAML file with any of the flags as keys")
