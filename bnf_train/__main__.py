"""python -m bnf_train: align a language model with the BNF loss.

Without arguments it trains the embedded demo. For a real one:
    python -m bnf_train --model path/to/model --dataset pairs.jsonl --learning_rate 2e-5
    python -m bnf_train --model meta-llama/Meta-Llama-3-8B-Instruct      # the paper's preset
    accelerate launch -m bnf_train --model ...                          # every GPU of the machine
"""

import sys
import traceback

from bnf_train.errors import Interrupted, UsageError, is_out_of_memory


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    from bnf_train.flags import parse  # imports transformers
    from bnf_train.run import run

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


if __name__ == "__main__":
    sys.exit(main())
