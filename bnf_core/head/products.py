"""Matrix products of the head: narrow operands, sums kept in float32 or better, whatever the device offers for it.

Three kinds of hardware:
  CUDA                     multiplies bf16 and fp16 and hands out the float32 sums as they are
  a CPU with AMX           multiplies float32 copies of bf16 numbers in its bf16 unit, exactly, when asked to
  a CPU with AVX512-BF16   multiplies bf16, but its sums come out rounded to bf16: for exact sums float32 copies must do
Elsewhere narrow operands are copied to float32, which is exact and no slower than the emulation would be.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["bf16_unit", "multiplies", "product"]


@functools.cache
def multiplies(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the device multiplies operands of `dtype` faster than their float32 copies."""
    if device_type != "cpu":
        return True
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and bool(fast_bf16))


def product(a: Tensor, b: Tensor, out: Tensor, *, beta: int = 0, exact: bool = True) -> Tensor:
    """out = a @ b + beta * out, summed in the dtype of `out` or better; beta is 0 or 1.

    exact: every digit of the sums is kept; otherwise they may be rounded to the operands' dtype on their way.
    """
    if a.dtype == b.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, out=out) if beta else torch.mm(a, b, out=out)
    if a.is_cuda:
        kept = {"out_dtype": out.dtype}
        return torch.addmm(out, a, b, **kept, out=out) if beta else torch.mm(a, b, **kept, out=out)
    if exact or not multiplies(a.dtype, a.device.type):
        a, b = a.to(out.dtype), b.to(out.dtype)
        with bf16_unit():  # without AMX this changes nothing: float32 products stay float32
            return torch.addmm(out, a, b, beta=beta, out=out) if beta else torch.mm(a, b, out=out)
    rounded = torch.mm(a, b)
    return out.add_(rounded) if beta else out.copy_(rounded)


@contextlib.contextmanager
def bf16_unit() -> Iterator[None]:
    """float32 operands are multiplied as the bf16 numbers that they hold, by the CPU's AMX (restored afterwards)."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
