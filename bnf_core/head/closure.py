"""A loss of one's own on the log-odds of some tokens: called, checked, differentiated."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnf_core._checks import describe

__all__ = ["TokenLoss", "value_and_slope"]

TokenLoss = Callable[..., Tensor]  # (log_odds, *per_token) -> loss of each token


def value_and_slope(
    token_loss: TokenLoss, log_odds: Tensor, per_token: tuple[Tensor, ...], wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the losses of some tokens, and if `wanted` the derivative of each in its log-odds, both constants.

    Raises:
      ValueError: token_loss gives anything but one loss per token, or depends on something else with a gradient.
    """
    if not wanted:
        with torch.no_grad():
            return _checked(token_loss(log_odds, *per_token), log_odds).sum(), None
    with torch.enable_grad():
        leaf = log_odds.detach().requires_grad_()
        value = _checked(token_loss(leaf, *per_token), log_odds)
        if not value.requires_grad:  # a constant
            return value.sum(), torch.zeros_like(log_odds)
        _check_graph(value.grad_fn, leaf)
        total = value.sum()
        (slope,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return total.detach(), torch.zeros_like(log_odds) if slope is None else slope.detach()


def _checked(value: Any, log_odds: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != log_odds.shape:
        raise ValueError(f"token_loss: expected one loss for each of {len(log_odds)} tokens, got {describe(value)}.")
    return value


def _check_graph(node: Any, leaf: Tensor) -> None:
    """Nothing but the log-odds may ask for a gradient: what else did would not get one."""
    nodes, seen = [node], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", leaf)) is not leaf:
            raise ValueError(
                f"token_loss: expected constants beside the log-odds, got {describe(variable)} that requires a gradient; "
                "detach it, or take linear_log_odds, whose result a loss of any kind may follow."
            )
        nodes += [following for following, _ in node.next_functions]
