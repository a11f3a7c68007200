"""BNF on Ray Train: python bnf_train/examples/ray_train.py WORKERS [flags of bnf_train, --output_dir among them]

Ray starts the workers, a GPU or else a CPU each, on the machines of its cluster, or on this one where there is none. When it
loses one it starts all of them again, and the run goes on from its last checkpoint with the weights of an undisturbed one.
Paths are absolute, because workers have folders of their own, and --output_dir is where all machines see it.
"""

import sys

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from transformers import TrainerCallback

from bnf_train.flags import parse
from bnf_train.run import run


class Report(TrainerCallback):
    """What is logged, for Ray's dashboard and its result."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        ray.train.report({**logs, "step": state.global_step})


def train(flags):
    """In each worker: the same entry point as `python -m bnf_train`."""
    run(parse([*flags["flags"], "--resume_from_checkpoint", "auto"]), callbacks=[Report()])


if __name__ == "__main__":
    workers, *flags = sys.argv[1:]
    scaling = ScalingConfig(num_workers=int(workers), use_gpu=torch.cuda.is_available())
    again = RunConfig(failure_config=FailureConfig(max_failures=3))  # so many losses of a worker
    result = TorchTrainer(train, train_loop_config={"flags": flags}, scaling_config=scaling, run_config=again).fit()
    print(result.metrics)
