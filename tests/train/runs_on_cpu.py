"""`python -m bnf_train` in the processes of a launcher, once for each line of the file named, a JSON object:

{"flags": [...], "stop": [process, micro-batch]}, the second where that process is to get SIGTERM before that micro-batch.

For `accelerate launch --config_file ... runs_on_cpu.py runs.jsonl`. Accelerate chooses FSDP and DeepSpeed for GPUs only;
everything after that choice (sharding, PyTorch's collectives over gloo) runs on CPUs as it stands, so this makes the choice.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from matplotlib.figure import Figure

from bnf_train.__main__ import main
from bnf_train.training.trainer import BNFTrainer


def choose_fsdp() -> None:
    init = AcceleratorState.__init__

    def __init__(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = __init__


def choose_deepspeed() -> None:
    init = PartialState.__init__

    def __init__(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
        init(self, **kwargs | {"backend": "gloo"})

    PartialState.__init__ = __init__
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    import deepspeed

    # gloo, in place of shared memory through C++ that each process would compile, waiting for the other's lock file
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def stop_at(process: int, micro_batch: int) -> Any:
    """A training_step that sends SIGTERM to its own process."""
    step, count = BNFTrainer.training_step, 0

    def training_step(self: BNFTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == micro_batch and self.args.process_index == process:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    return training_step


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        choose_fsdp()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        choose_deepspeed()
    Figure.savefig = lambda *_, **__: None  # rendering takes longer than the run
    training_step = BNFTrainer.training_step
    for line in Path(sys.argv[1]).read_text().splitlines():
        run = json.loads(line)
        AcceleratorState._reset_state()
        if PartialState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        stop = run.get("stop")
        BNFTrainer.training_step = stop_at(*stop) if stop else training_step
        status = main(run["flags"])
        if status != (128 + signal.SIGTERM if stop else 0):
            sys.exit(status or 1)
    torch.distributed.destroy_process_group()
