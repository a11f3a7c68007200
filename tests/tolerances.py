"""How close is close: errors are counted in units of the dtype's rounding at the size of the logits."""

import torch
from torch import Tensor


def scale(*logits: Tensor) -> float:
    """1 + the largest finite |logit|: a logit of size s carries an absolute error of s roundings, and so does l."""
    finite = [x[x.isfinite()].abs().max().item() for x in logits if x.isfinite().any()]
    return 1 + max(finite, default=0.0)


def assert_close(actual: Tensor, exact: Tensor, *, units: float, size: float = 1.0, absolute: float = 0.0) -> None:
    """|actual - exact| <= units * eps * size * (|exact| + absolute), infinities equal; NaN never passes.

    `size` is `scale` of the logits behind the value. `absolute` admits cancellation where the value itself has it.
    """
    eps = torch.finfo(actual.dtype).eps
    tiny = torch.finfo(actual.dtype).tiny
    actual, exact = actual.detach().double(), exact.detach().double()
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = torch.where(actual == exact, 0.0, (actual - exact).abs())
    allowed = units * eps * size * (exact.abs() + absolute) + tiny
    worst = (error / allowed).flatten().argmax() if error.numel() else None
    assert bool((error <= allowed).all()), (
        f"off by {error.flatten()[worst]:.3g} of {exact.flatten()[worst]:.17g}: "
        f"{actual.flatten()[worst]:.17g}; allowed {allowed.flatten()[worst]:.3g}"
    )
