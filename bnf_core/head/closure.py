"""A loss on the log-odds of some tokens: one of the caller's own is called, checked and differentiated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnf_core._checks import describe

__all__ = ["NamedLoss", "TokenLoss", "value_and_slope"]

TokenLoss = Callable[..., Tensor]  # (log_odds, *per_token) -> loss of each token


class NamedLoss(NamedTuple):
    """A loss with its derivative in the log-odds, same arguments: inside an operator autograd does not record."""

    loss: TokenLoss
    slope: TokenLoss


def value_and_slope(
    token_loss: TokenLoss | NamedLoss, log_odds: Tensor, per_token: tuple[Tensor, ...], wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the losses of some tokens, and if `wanted` the derivative of each in its log-odds, both constants.

    Raises:
      ValueError: token_loss gives anything but one loss per token, or depends on something else with a gradient.
    """
    if isinstance(token_loss, NamedLoss):
        slope = token_loss.slope(log_odds, *per_token) if wanted else None
        return token_loss.loss(log_odds, *per_token).sum(), slope
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
        (found,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return total.detach(), torch.zeros_like(log_odds) if found is None else found.detach()


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
