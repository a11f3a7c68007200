"""Checks on the input of public functions: each failure is one sentence saying what was expected and what came."""

import math
import reprlib

import numpy as np
import torch
from torch import Tensor

NUMBER = (int, float, np.integer, np.floating)
IGNORE = -100  # label of a position that is not a response token


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {reprlib.repr(value)}"  # a few elements of a long list


def at_least_float32(values: Tensor) -> Tensor:
    """In the dtype that it is computed in: float64 stays, all others become float32."""
    return values if values.dtype == torch.float64 else values.float()


def check_floating(name: str, value: object, shape: tuple[int, ...] | None = None) -> None:
    """`value` is a floating-point tensor, of `shape` if one is given."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {describe(value)}.")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {describe(value)}.")


def check_head(hidden: object, weight: object) -> None:
    """A head's operands: floating-point, (tokens, dim) and (vocab, dim)."""
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    assert isinstance(hidden, Tensor)
    assert isinstance(weight, Tensor)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(
            "hidden and weight: expected shapes (tokens, dim) and (vocab, dim), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: value.device for name, value in tensors.items() if value is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"expected all tensors on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}.")


def label_ids(labels: object, shape: tuple[int, ...]) -> Tensor:
    """`labels`, an integer tensor of `shape`, as int64: narrow dtypes compare with -100 wrapped around."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected an integer tensor, got {describe(labels)}.")
    if tuple(labels.shape) != shape:
        raise ValueError(f"labels: expected shape {shape}, one per position, got {describe(labels)}.")
    ids = labels.long()
    return ids if labels.dtype.is_signed else ids.clamp(min=-1)  # no unsigned number is -100


def holds_numbers(x: Tensor) -> bool:
    """Whether there is data to look at: not on the meta device, nor while torch.compile or FakeTensorMode trace shapes."""
    return not (x.is_meta or torch.compiler.is_compiling() or type(x).__name__ in ("FakeTensor", "FunctionalTensor"))


def check_labels(labels: object, shape: tuple[int, ...], vocab: int) -> Tensor:
    """`labels` is an integer tensor of `shape` holding token ids in [0, vocab) or -100; returns them as int64."""
    ids = label_ids(labels, shape)
    if not holds_numbers(ids):
        return ids
    assert isinstance(labels, Tensor)
    bad = (ids != IGNORE) & ((ids < 0) | (ids >= vocab))
    if bad.any():
        position = first_position(bad)
        raise ValueError(
            f"labels: expected token ids from 0 to {vocab - 1}, or {IGNORE} where there is no response token, "
            f"got {labels[position].item()} at position {list(position)}."
        )
    return ids


def check_bool(name: str, value: object, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.bool or tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected a bool tensor of shape {shape}, got {describe(value)}.")


def check_logits(name: str, logits: Tensor, labels: Tensor) -> None:
    """Logits (..., V) are sound wherever `labels` (...), int64, marks a response token.

    -inf is legal except at the target; NaN and +inf are not.
    """
    response = labels != IGNORE
    bad = (logits.isnan() | logits.isposinf()) & response.unsqueeze(-1)
    if bad.any():
        position = first_position(bad)
        raise ValueError(f"{name}: expected finite values or -inf, got {logits[position].item()} at position {list(position)}.")
    target = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    bad = target.isneginf() & response
    if bad.any():
        raise ValueError(
            f"{name}: expected a finite logit at the target token, got -inf at position {list(first_position(bad))}: "
            "the response holds a token that the model rules out."
        )


def check_probability(name: str, value: Tensor) -> None:
    bad = ~((value >= 0) & (value <= 1))  # NaN fails both comparisons
    if bad.any():
        position = first_position(bad)
        raise ValueError(
            f"{name}: expected probabilities from 0 to 1, got {value[position].item()} at position {list(position)}."
        )


def first_position(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in bad.nonzero()[0])


def check_number(name: str, value: object) -> float:
    """A hyper-parameter that is a finite number; returns it as a float."""
    if (number := _finite(value)) is None:
        raise ValueError(f"{name}: expected a finite number, got {_shown(value)}.")
    return number


def check_positive(name: str, value: object, zero: bool = False) -> float:
    """A hyper-parameter that is a finite positive number (or 0, if `zero`); returns it as a float."""
    number, kind = _finite(value), "non-negative" if zero else "positive"
    if number is None:
        raise ValueError(f"{name}: expected a finite {kind} number, got {_shown(value)}.")
    if number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name}: expected a {kind} number, got {_shown(value)}.")
    return number


def check_reference_point(z0: object) -> float:
    """KTO's z0: a finite number, or a tensor that holds one; returns it as a float, a constant for the gradient."""
    if isinstance(z0, Tensor):
        check_floating("z0", z0, ())
        z0 = z0.item()
    return check_number("z0", z0)


def _finite(value: object) -> float | None:
    """As a float, if it is a finite number (of NumPy's too); True and tensors are none."""
    number = isinstance(value, NUMBER) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None  # type: ignore[arg-type]


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (int, float)) else describe(value)
