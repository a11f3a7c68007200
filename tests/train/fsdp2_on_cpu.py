"""`python -m bnf_train` with FSDP2 on CPU processes, once for each line of flags (JSON lists) in the file named.

Accelerate chooses FSDP for GPUs only; everything after that choice (its sharding, PyTorch's collectives over gloo)
runs on CPUs as it stands, so this makes the choice and starts the program. Under torchrun, with the environment that
`accelerate launch --config_file fsdp2.yaml` sets.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from bnf_train.__main__ import main

_init = AcceleratorState.__init__


def _choose_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    AcceleratorState.__init__ = _choose_fsdp
    for line in Path(sys.argv[1]).read_text().splitlines():
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        if (status := main(json.loads(line))) != 0:
            sys.exit(status)
