"""python -m bnf_train: align a language model with the BNF loss.

Without arguments it trains the embedded demo. For a real one:
    python -m bnf_train --model path/to/model --dataset pairs.jsonl --learning_rate 2e-5
    python -m bnf_train --model meta-llama/Meta-Llama-3-8B-Instruct      # the paper's preset
    accelerate launch -m bnf_train --model ...                          # every GPU of the machine
"""

import sys

from bnf_train import cli, options


def main(arguments: list[str] | None = None) -> int:
    return cli.run(_train, arguments)


def _train(arguments: list[str], failure: cli.Failure) -> None:
    if {"--help", "-h"} & set(arguments):
        print(options.help_text(), end="")
        return
    from bnf_train.flags import parse  # imports transformers
    from bnf_train.run import run

    config = parse(arguments)
    failure.debug = config.tracebacks
    failure.out_of_memory = lambda: (
        f"lower --per_device_train_batch_size (now {config.per_device_train_batch_size}) or --max_length "
        f"(now {config.max_length}), or add --gradient_checkpointing."
    )
    run(config, embedded=not arguments)


if __name__ == "__main__":
    sys.exit(main())
