"""python -m bnf_train.data: what would be trained on. Nothing is trained, and no weights are read.

    python -m bnf_train.data rows.jsonl --model path/to/model
    python -m bnf_train.data rows.jsonl --model path/to/model --max_length 512 --empty drop --show_examples 20

Counts, lengths, labels and groups of the rows, what is dropped and why, and five rows as the model would see them: what
stands at the start of a run. Flags are those of `python -m bnf_train` (its --help lists them).
"""

import sys

from bnf_train import cli


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_card, arguments)


def _card(arguments: list[str], failure: cli.Failure) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    from rich.console import Console

    from bnf_train.data import read_and_tokenize
    from bnf_train.flags import parse
    from bnf_train.model.load import context_length, load_tokenizer

    sources = ["--dataset", arguments[0]] if arguments and not arguments[0].startswith("-") else []
    config = parse(["--show_examples", "5", *sources, *arguments[len(sources) // 2 :]])
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    config.max_length = min(config.max_length, context_length(config.model, config.trust_remote_code) or config.max_length)
    train, held_out = read_and_tokenize(config, tokenizer, Console(soft_wrap=True, highlight=False))
    print(f"{len(train):,} rows to train on, {len(held_out):,} held out.")


if __name__ == "__main__":
    sys.exit(main())
