"""Matrix products of the head: rounded operands, sums kept in float32 or better, whatever the device offers for it.

Four kinds of hardware:
  CUDA                     multiplies bf16 and fp16 and hands out the float32 sums as they are
  a CPU with AMX           multiplies float32 copies of bf16 numbers in its bf16 unit, exactly, when asked to
  a CPU with AVX512-BF16   multiplies bf16, but its sums come out rounded to bf16: for exact sums float32 copies must do
  any other CPU            rounded operands are copied to float32, which is exact and no slower than the emulation would be
"""

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["exact_unit", "multiplies", "on_huge_pages", "product", "rounding_scratch"]


@functools.cache
def multiplies(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the device multiplies operands of `dtype` faster than their float32 copies."""
    if device_type != "cpu":
        return True
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and bool(fast_bf16))


def product(a: Tensor, b: Tensor, out: Tensor, *, beta: int = 0, scratch: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """out = a @ b + beta * out, summed in float32 or better, kept in the dtype of `out`; beta is 0 or 1.

    With `scratch` (`rounding_scratch`), sums may be rounded to the operands' dtype before they are added to `out`.
    """
    if a.dtype == b.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, out=out) if beta else torch.mm(a, b, out=out)
    if a.device.type != "cpu":
        kept = out.dtype
        return torch.addmm(out, a, b, out_dtype=kept, out=out) if beta else torch.mm(a, b, out_dtype=kept, out=out)
    if scratch is None:
        with exact_unit(a.dtype, "cpu"):
            return product(a.to(out.dtype), b.to(out.dtype), out, beta=beta)
    width = b.shape[1]
    rows = len(scratch[0]) // width
    for a_rows, out_rows in zip(torch.split(a, rows), torch.split(out, rows), strict=True):
        rounded, in_float32 = (space[: out_rows.numel()].view(-1, width) for space in scratch)
        torch.mm(a_rows, b, out=rounded)
        if beta:
            out_rows.add_(in_float32.copy_(rounded))  # mixed dtypes would take new memory for `in_float32` in every call
        else:
            out_rows.copy_(rounded)
    return out


def rounding_scratch(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the sums that `product` rounds, some rows of `width` at a time."""
    size = max(2**19, width)
    return torch.empty(size, dtype=dtype, device=device), torch.empty(size, dtype=torch.float32, device=device)


class _Setting:
    """PyTorch's setting for float32 products of one kind of device: one for the process, so its users are counted."""

    def __init__(self, backend: object, value: str) -> None:
        self.backend, self.value, self.lock, self.users, self.before = backend, value, threading.Lock(), 0, ""

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.users:
                self.before = self.backend.fp32_precision  # type: ignore[attr-defined]
                self.backend.fp32_precision = self.value  # type: ignore[attr-defined]
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    self.backend.fp32_precision = self.before  # type: ignore[attr-defined]


_UNITS = {  # by what float32 operands hold, and where: the unit that multiplies those numbers without loss
    (torch.bfloat16, "cpu"): _Setting(torch.backends.mkldnn.matmul, "bf16"),  # type: ignore[attr-defined]
    (torch.float16, "cuda"): _Setting(torch.backends.cuda.matmul, "tf32"),
}


def exact_unit(holding: torch.dtype, device_type: str) -> contextlib.AbstractContextManager[None]:
    """float32 operands that hold `holding` numbers are multiplied as those, exactly, where the device has a unit for it.

    bf16 numbers on a CPU with AMX, fp16 numbers on CUDA (tf32 has as many digits). The setting is the process's: it is
    restored when its last user leaves, and products of other threads meanwhile may use that unit, too.
    """
    setting = _UNITS.get((holding, device_type))
    return contextlib.nullcontext() if setting is None else setting()


def on_huge_pages(x: Tensor) -> Tensor:
    """x, new and not yet written to; Linux is asked to back it with huge pages, which are several times faster to touch."""
    if sys.platform == "linux" and x.device.type == "cpu":
        page, start, end = 2**21, x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
        start += -start % page
        if end - start >= page:
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 14)  # MADV_HUGEPAGE; advice may be refused
    return x


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
