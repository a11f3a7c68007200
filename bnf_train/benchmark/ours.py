"""A run of bnf_train, measured. In a file of its own, so that a process of another method does not hold what this imports."""

import tempfile

from bnf_train.benchmark.task import Task, figures, tokens_of
from bnf_train.flags import parse
from bnf_train.run import run


def bnf_apart(task: Task) -> dict[str, float]:
    """The same, each response with a prompt of its own."""
    return bnf(task, "--no_share_prompts")


def bnf(task: Task, *flags: str) -> dict[str, float]:
    """python -m bnf_train on the rows, 4 responses in a micro-batch."""
    responses = len(task.responses())
    rows = 4 * len(task.read()) // responses  # two pairs, or four single rows
    with tempfile.TemporaryDirectory() as folder:
        config = parse(
            [
                *(f"--model={task.model}", f"--dataset={task.rows}", f"--max_length={task.max_length}"),
                *(f"--output_dir={folder}/out", "--eval_size=0", "--save_strategy=no", "--no_reference_cache"),
                *(f"--per_device_train_batch_size={rows}", f"--batch_size={4 * rows}", "--optim=adamw_torch_fused"),
                *("--learning_rate=2e-5", "--show_examples=0", "--disable_tqdm=true", "--report_to=none", *flags, *task.flags),
            ]
        )
        trainer = run(config)
    seconds = next(log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log)
    return figures(tokens_of(task, trainer.processing_class), seconds, trainer.reference_seconds)
