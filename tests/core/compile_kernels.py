"""Compiles, for GPUs that are not here, every kernel that the head would launch, and prints what became of each.

    python tests/core/compile_kernels.py 80,90,100          # compute capabilities; not under TRITON_INTERPRET
    python tests/core/compile_kernels.py 90 SmolLM2-135M    # of one head only

The launches are the launcher's own: the head runs on meta tensors, which have shapes and no numbers, and Triton's own
specialisation of arguments (alignment, divisibility) turns each launch into a signature. A line of JSON a kernel.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bnf_core.fused import BNF_LOSS
from bnf_core.head.chunked import log_odds_backward, log_odds_forward, one_pass
from bnf_core.head.transform import HeadOptions
from bnf_core.head.triton import TRITON, Launch, record_launches

# tokens, dim, vocab, softcap; GPT-2's rows are not aligned, "long" has more exponentials than an int32 counts
HEADS = {
    "Llama-3-8B": (8192, 4096, 128256, None),
    "Gemma-2-9B": (8192, 3584, 256000, 30.0),
    "SmolLM2-135M": (2048, 576, 49152, None),
    "GPT-2": (2048, 768, 50257, None),
    "a few tokens": (100, 768, 50257, None),
    "long": (20000, 16384, 256001, None),
}
SIZES = "a few tokens", "long"  # whose tiles have other sizes; their options are the others'
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class NoGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _: int) -> int:
        return 0


def launches(heads: list[str]) -> dict[str, Launch]:
    """By what makes a difference to the compiler, so that each is compiled once."""
    found: dict[str, Launch] = {}
    for (name, head), dtype, (bias, scale) in itertools.product(HEADS.items(), DTYPES, ((False, 1.0), (True, 0.0625))):
        tokens, dim, vocab, softcap = head
        if name not in heads or (dtype == torch.float64 and name != "GPT-2"):  # that is for gradcheck, not for models
            continue
        if name in SIZES and (dtype != torch.bfloat16 or bias):
            continue

        def record(launch: Launch, name: str = name) -> None:
            kinds = [(x.dtype, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x for x in launch.arguments]
            integers = [(x == 1, x % 16 == 0) if type(x) is int else x for x in kinds]
            key = repr((launch.kernel.__name__, integers, sorted(launch.options.items())))
            found.setdefault(key, launch)
            names.setdefault(key, name)

        options: dict[str, Any] = {"device": "meta", "dtype": dtype}
        hidden, weight = torch.empty(tokens, dim, **options), torch.empty(vocab, dim, **options)
        offset = torch.empty(vocab, **options) if bias else None
        labels, values = torch.empty(tokens, dtype=torch.long, device="meta"), torch.empty(2, tokens, device="meta")
        head_options, wanted = HeadOptions(softcap, scale, dtype), (True, True, bias)
        with record_launches(record):
            one_pass(hidden, weight, offset, labels, head_options, TRITON, wanted, BNF_LOSS, tuple(values))
            operands = hidden, weight, offset, labels, head_options
            log_odds, _, lse = log_odds_forward(*operands, TRITON)
            log_odds_backward(log_odds, lse, *operands, TRITON, wanted)
    return found


names: dict[str, str] = {}


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    """Registers, shared memory, spills, and the width of the offsets that rows are found by."""
    kernel = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    row: dict[str, Any] = {"shared": kernel.metadata.shared, "threads": 32 * kernel.metadata.num_warps}
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([f"{tools}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    row |= {"registers": usage["REG"], "spilled": 0}
    if usage["STACK"] + usage["LOCAL"]:  # a function's own stack, or spills: the assembler knows
        row["spilled"] = _spills(kernel.asm["ptx"], tools, capability)
    # the row's own offset, before the columns' (int32, less than a row) are added
    scalar = re.findall(r"tt\.addptr %\w+, %\w+ : !tt\.ptr<\w+>, (i\d+)", kernel.asm["ttir"])
    return row | {"offsets": sorted(set(scalar))}


def _spills(ptx: str, tools: str, capability: int) -> int:
    """Bytes of spill stores and loads."""
    assembler = f"{tools}/ptxas-blackwell" if capability >= 100 else f"{tools}/ptxas"
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={target[1]}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


if __name__ == "__main__":
    capabilities, *chosen = sys.argv[1:]
    for capability, (key, launch) in itertools.product(capabilities.split(","), launches(chosen or list(HEADS)).items()):
        driver.set_active(NoGPU(int(capability)))  # whose number is that of the device: kernels are kept for each
        row: dict[str, Any] = {"capability": int(capability), "kernel": launch.kernel.__name__, "head": names[key]}
        row |= {k: v for k, v in launch.options.items() if k in ("WIDTH", "SOFTCAP", "SUMS", "MEAN")}
        try:
            row |= compiled(launch, int(capability))
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[-2000:]}"
        print(json.dumps(row), flush=True)
