"""Checks on the input of public functions: each failure is one sentence saying what was expected and what came."""

import torch
from torch import Tensor

IGNORE = -100  # label of a position that is not a response token


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_floating(name: str, value: object, shape: tuple[int, ...] | None = None) -> None:
    """`value` is a floating-point tensor, of `shape` if one is given."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {describe(value)}.")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {describe(value)}.")


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: value.device for name, value in tensors.items() if value is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"expected all tensors on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}.")


def check_label_shape(labels: object, shape: tuple[int, ...]) -> None:
    """`labels` is an integer tensor of `shape`."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected an integer tensor, got {describe(labels)}.")
    if tuple(labels.shape) != shape:
        raise ValueError(f"labels: expected shape {shape}, one per position, got {describe(labels)}.")


def check_labels(labels: Tensor, shape: tuple[int, ...], vocab: int) -> None:
    """`labels` is an integer tensor of `shape` holding token ids in [0, vocab) or -100."""
    check_label_shape(labels, shape)
    bad = (labels != IGNORE) & ((labels < 0) | (labels >= vocab))
    if bad.any():
        position = first_position(bad)
        raise ValueError(
            f"labels: expected token ids from 0 to {vocab - 1}, or {IGNORE} where there is no response token, "
            f"got {labels[position].item()} at position {list(position)}."
        )


def check_bool(name: str, value: object, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.bool or tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected a bool tensor of shape {shape}, got {describe(value)}.")


def check_logits(name: str, logits: Tensor, labels: Tensor) -> None:
    """Logits (..., V) are sound wherever `labels` (...) marks a response token.

    -inf is legal except at the target; NaN and +inf are not.
    """
    response = labels != IGNORE
    bad = (logits.isnan() | logits.isposinf()) & response.unsqueeze(-1)
    if bad.any():
        position = first_position(bad)
        raise ValueError(f"{name}: expected finite values or -inf, got {logits[position].item()} at position {list(position)}.")
    target = logits.gather(-1, labels.long().clamp(min=0).unsqueeze(-1)).squeeze(-1)
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


def check_positive(name: str, value: float, zero: bool = False) -> None:
    """A hyper-parameter that is a positive number (or 0, if `zero`)."""
    if not isinstance(value, (int, float)) or not (value > 0 or (zero and value == 0)):
        raise ValueError(f"{name}: expected a {'non-negative' if zero else 'positive'} number, got {value!r}.")
