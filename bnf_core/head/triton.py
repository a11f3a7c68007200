"""A tile of logits becomes exponentials and sums over them on a GPU: the third fold, one kernel that reads it once.

Everything else of the head is the loop that CPUs use (`chunked.py`), its products cuBLAS's. The kernel also runs under
Triton's interpreter (TRITON_INTERPRET=1), and compiles for a GPU where there is none (`record_launches`, from which the
tests compile what would be launched, and the roofline counts it).
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnf_core.head.folds import ROOM, Fold, Rows, Tile
from bnf_core.head.transform import HeadOptions

__all__ = ["TRITON", "Launch", "record_launches"]

BLOCK = 1024  # entries of a row that a program holds at once
WARPS = 4  # 8 entries a thread, two loads of 16 bytes

if os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter has no libdevice
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def _tanh(x, _semantic=None):  # type: ignore[no-untyped-def]
        return tl.core.tensor(TensorHandle(np.tanh(x.handle.data), x.handle.dtype), x.type)
else:
    from triton.language.extra.libdevice import tanh as _tanh  # type: ignore[no-redef]


@triton.jit  # type: ignore[untyped-decorator]
def fold_kernel(  # type: ignore[no-untyped-def]
    raw, others, bias, labels, minus_log2_base, z_target, sumexp, sum_log2, start, raw_stride, others_stride,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, LOG2_E: tl.constexpr, SUMS: tl.constexpr,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a tile: see `Fold.run`. `others`, `bias` and SOFTCAP may be None; offsets are int64."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(labels + row) - start
    base = tl.load(minus_log2_base + row)
    total = tl.zeros([BLOCK], base.dtype)
    weighted = tl.zeros([BLOCK], base.dtype)
    at_target = tl.zeros([BLOCK], base.dtype)
    for first in range(0, WIDTH, BLOCK):
        j = first + tl.arange(0, BLOCK)
        x = tl.load(raw + row * raw_stride + j, mask=j < WIDTH, other=-float("inf")).to(base.dtype)
        if bias is not None:
            x += tl.load(bias + j, mask=j < WIDTH, other=0.0)
        if SOFTCAP is not None:
            x *= SCALE / SOFTCAP
            x = tl.where(tl.abs(x) == float("inf"), x, _tanh(x))  # type: ignore[no-untyped-call]  # ruled out stays so
        at_target = tl.where(j == target, x, at_target)
        x = tl.where(j == target, -float("inf"), x)
        log2 = x * LOG2_E + base
        exponentials = tl.exp2(log2)
        if SUMS:
            total += exponentials
        if MEAN:
            weighted += tl.maximum(log2, -1e30) * exponentials  # 0 where -inf is
        if others is not None:
            if SOFTCAP is not None:
                x = tl.maximum(x, -1.0)
                exponentials *= 1 - x * x
                if not SUMS:
                    exponentials = tl.where(j == target, at_target * at_target - 1, exponentials)
            elif not SUMS:
                exponentials = tl.where(j == target, -1.0, exponentials)
            tl.store(others + row * others_stride + j, exponentials.to(others.dtype.element_ty), mask=j < WIDTH)
    unit: tl.constexpr = SCALE if SOFTCAP is None else SOFTCAP
    tl.store(z_target + row, tl.sum(at_target, 0) * unit, mask=(target >= 0) & (target < WIDTH))
    if SUMS:
        tl.store(sumexp + row, tl.load(sumexp + row) + tl.sum(total, 0))
    if MEAN:
        tl.store(sum_log2 + row, tl.load(sum_log2 + row) + tl.sum(weighted, 0))


@triton.jit  # type: ignore[untyped-decorator]
def statistics_kernel(  # type: ignore[no-untyped-def]
    minus_log2_base, z_target, sumexp, sum_log2, log_odds, entropy, lse, unsound, tokens,
    LN2: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some tokens: see `folds.statistics`. Adds the number of tokens whose sums cannot be trusted to `unsound`."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < tokens
    total = tl.load(sumexp + i, mask=here, other=1.0)
    z = tl.load(z_target + i, mask=here, other=0.0)
    sound = (total > 1 / ROOM) & (total < ROOM)
    tl.atomic_add(unsound, tl.sum(tl.where(here & (sound == 0), 1, 0), 0))
    of_all = tl.log(total) - tl.load(minus_log2_base + i, mask=here, other=0.0) * LN2
    odds = z - of_all
    total = tl.where(total == 0, 1.0, total)
    of_others = tl.log(total) - tl.load(sum_log2 + i, mask=here, other=0.0) / total * LN2
    of_others = tl.maximum(of_others, 0.0, propagate_nan=tl.PropagateNan.ALL)
    small = tl.exp(-tl.abs(odds))  # the smaller of the two odds
    # H of (target or not): log(1 + s) + s |l| / (1 + s); its last term is 0 where l is infinite
    binary = tl.log(1 + small) + tl.where(small == 0, 0.0, small * tl.abs(odds) / (1 + small))
    miss = tl.where(odds > 0, small, 1.0) / (1 + small)
    tl.store(sumexp + i, total, mask=here)
    tl.store(log_odds + i, odds, mask=here)
    tl.store(entropy + i, binary + miss * of_others, mask=here)
    tl.store(lse + i, of_all, mask=here)


class Launch(NamedTuple):
    """What a kernel is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constants, and num_warps


_recorder: ContextVar[Callable[[Launch], object] | None] = ContextVar("recorder", default=None)


@contextmanager
def record_launches(record: Callable[[Launch], object]) -> Iterator[None]:
    """Hands every launch of this context to `record`. Launches on meta tensors are recorded, and nothing else."""
    token = _recorder.set(record)
    try:
        yield
    finally:
        _recorder.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """On the device of the first argument, whichever is the current one."""
    if (record := _recorder.get()) is not None:
        record(Launch(kernel, grid, arguments, options))
    device = arguments[0].device
    if device.type != "meta":
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, **options)


def _run(tile: Tile, rows: Rows, bias: Tensor | None, start: int, options: HeadOptions, sums: bool, with_mean: bool) -> None:
    raw, others = tile.raw, tile.others
    tokens, width = raw.shape
    # a cap, or float64, takes more registers an entry
    block = BLOCK if options.softcap is None and rows.sumexp.dtype == torch.float32 else BLOCK // 2
    launch(
        fold_kernel,
        (tokens,),
        raw,
        others,
        bias,
        rows.labels,
        rows.minus_log2_base,
        rows.z_target,
        rows.sumexp,
        rows.sum_log2,
        start,
        raw.stride(0),
        0 if others is None else others.stride(0),
        WIDTH=width,
        SCALE=options.logit_scale,
        SOFTCAP=options.softcap,
        LOG2_E=options.per_ratio,
        SUMS=sums,
        MEAN=with_mean,
        BLOCK=min(block, triton.next_power_of_2(width)),
        num_warps=WARPS,
    )


def _statistics(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, block = len(rows.labels), 128
    log_odds, entropy, lse = (torch.empty_like(rows.z_target) for _ in range(3))
    unsound = torch.zeros((), dtype=torch.int32, device=lse.device)
    launch(
        statistics_kernel,
        (triton.cdiv(tokens, block),),
        rows.minus_log2_base,
        rows.z_target,
        rows.sumexp,
        rows.sum_log2,
        log_odds,
        entropy,
        lse,
        unsound,
        tokens,
        LN2=math.log(2),
        ROOM=ROOM,
        BLOCK=block,
        num_warps=WARPS,
    )
    return log_odds, entropy, lse, unsound


TRITON = Fold(_run, _statistics, gpu=True)
