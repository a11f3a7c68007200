"""Memory of a process: one function per term, in bytes."""

import subprocess
import sys
from typing import Any

import torch

from bnf_core import head_workspace
from bnf_train.plan.size import ModelSize

GIB, MIB = 2**30, 2**20
CUDA_CONTEXT = 1 * GIB  # an allowance for CUDA's context, NCCL and the allocator's rounding; not measured
# What glibc's heap keeps of freed memory between what stays, as a share of activations, bf16 copies and head: fitted, not
# derived. Measured, bf16 autocast, gradients accumulated: 0.51 (a 47 M Llama, 788 positions), 0.51 (SmolLM2-135M, 844
# positions, 2 micro-batches a step), 0.74 (988 positions, 4 micro-batches a step).
HEAP_SHARE = 0.6
OPTIMIZER_BYTES = {"sgd": 0, "adamw_torch_8bit": 2, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "adamw_torch_4bit": 1}
ADAMW_BYTES = 8  # two float32 moments of each trainable parameter
ZERO3_LIVE_PARAMETERS = 10**9  # DeepSpeed's default of stage3_max_live_parameters
ROW_BYTES = 44  # a token id in a Python list (pointer and integer), and its reference log-odds
TRAINS_FIRST = """
import psutil, torch, transformers
import bnf_train.run
layer = torch.nn.Linear(256, 256)
optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
for bf16 in (True, False):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        layer(torch.randn(256, 256)).float().sum().backward()
optimizer.step()
print(psutil.Process().memory_info().rss)
"""


def weight_bytes(size: ModelSize, strategy: str, gpus: int, width: int = 4) -> int:
    """4 P; sharded 4 P / G and what is gathered at a time: two layers, embedding and head (FSDP2), or 10^9 weights (ZeRO-3).

    Held, gathered and updated in float32 (`width` 4); bf16 autocast multiplies copies, see `autocast_bytes`.
    """
    if strategy == "DDP":
        return width * size.total
    around = size.embedding + (0 if size.tied else size.head)
    gathered = 2 * size.largest_layer + around if strategy == "FSDP2" else ZERO3_LIVE_PARAMETERS
    return width * (size.total // gpus + min(gathered, size.total))


def autocast_bytes(size: ModelSize, bf16: bool) -> int:
    """2 bytes for each weight of the backbone's matrix products: bf16 copies, which backward needs again. The head has none."""
    return 2 * size.backbone_linear if bf16 else 0


def gradient_bytes(size: ModelSize, trainable: int, strategy: str, gpus: int, width: int = 4) -> int:
    """4 L, twice under DDP, which reduces from buckets of its own; sharded 4 L / G and the layer at work."""
    if strategy == "DDP":
        return width * trainable * (2 if gpus > 1 else 1)
    return width * (trainable // gpus + min(size.largest_layer, trainable))


def optimizer_bytes(trainable: int, strategy: str, gpus: int, optim: str) -> int:
    """8 L of AdamW (two float32 moments), over G where sharded."""
    each = OPTIMIZER_BYTES.get(optim, ADAMW_BYTES)
    return each * trainable // (1 if strategy == "DDP" else gpus)


def head_bytes(vocab: int, dim: int, tokens: int, device: str, bf16: bool, width: int = 4, frozen: bool = False) -> int:
    """What the head says that it will hold beyond gradients, for the response tokens of a micro-batch."""

    narrow = torch.bfloat16 if bf16 else torch.float32
    weight = torch.float32 if width == 4 else torch.bfloat16
    options: dict[str, Any] = {"hidden_dtype": narrow, "weight_dtype": weight, "compute": narrow}
    return sum(head_workspace(tokens, dim, vocab, gpu=device != "cpu", frozen=frozen, **options).values())


def rows_bytes(tokens: int) -> int:
    """44 bytes a token: its id in a Python list, and the reference log-odds. In the memory of the host."""
    return ROW_BYTES * tokens


def base_bytes() -> int:
    """Python with torch, transformers and the trainer, before any model: measured in a process of its own."""
    done = subprocess.run([sys.executable, "-c", TRAINS_FIRST], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def heap_bytes(held: int) -> int:
    """0.6 of activations, bf16 copies and head: holes in the heap of a CPU process, an empirical share (see HEAP_SHARE)."""
    return round(HEAP_SHARE * held)
