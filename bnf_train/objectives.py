"""--objective: one of bnf_core's by name, or a user's own by module:function or path/to/file.py:function.

Hyper-parameters are the keyword-only parameters of the function, with its defaults: they are listed nowhere else.
A function of one's own takes (log_odds, batch), as those of `bnf_core.OBJECTIVES` do, and returns one loss per
response, or, with the attribute `pairwise = True`, one per pair. It may say what it is with `bnf_core.objective`; one per
token, written as the loss of a token, trains in one pass through the head.
"""

import argparse
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers.hf_argparser import string_to_bool

from bnf_core import OBJECTIVES, Objective, ObjectiveSpec, TokenBatch, objective_spec
from bnf_train import functions
from bnf_train.errors import UsageError, nearest, one_line


class Resolved(NamedTuple):
    """An objective with its hyper-parameters bound, and whether it has one loss per pair (else one per response)."""

    objective: Objective
    pairwise: bool

    @property
    def spec(self) -> ObjectiveSpec:
        """What it says of itself: per token, response or pair, and whether it needs the reference."""
        return objective_spec(self.objective)


def resolve(name: str, given: Mapping[str, Any]) -> Resolved:
    """The objective that `--objective name` means with the hyper-parameters `given`, tried on one pair.

    Raises:
      UsageError: no such function, a hyper-parameter out of range or missing, or a result of another shape.
    """
    function = find(name)
    pairwise = is_pairwise(name, function)
    known = hyperparameters(function)
    for key in given:
        if key not in known:
            has = " ".join(f"--{other}" for other in known) or "none"
            raise UsageError(f"--{key}: --objective {name} has no such hyper-parameter; it has {has}.")
    for key, parameter in known.items():
        if key not in given and parameter.default is inspect.Parameter.empty:
            raise UsageError(f"--{key} is missing: --objective {name} has no default for it.")
    objective = functools.partial(function, **given) if given else function
    _try(name, objective, pairwise)
    return Resolved(objective, pairwise)


@functools.cache  # a user's file is run once
def find(name: str) -> Objective:
    """The function that `--objective name` means."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if functions.parts(name) is None:
        raise UsageError(
            f"--objective {name}: expected one of {', '.join(sorted(OBJECTIVES))}, or a function of your own as "
            f"module:function or path/to/file.py:function{nearest(name, OBJECTIVES)}."
        )
    function = functions.load("objective", name)
    try:
        required = {k: 0.0 for k, p in hyperparameters(function).items() if p.default is p.empty}
        inspect.signature(function).bind(None, None, **required)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"--objective {name}: expected a function of (log_odds, batch), hyper-parameters keyword-only, got {error}."
        ) from error
    return function


def is_pairwise(name: str, function: Objective) -> bool:
    """One loss per pair: as an objective says itself, and a user's own undecorated with `pairwise = True`."""
    pairwise = getattr(function, "pairwise", False)
    if not isinstance(pairwise, bool):
        raise UsageError(f"--objective {name}: expected its attribute pairwise to be True or False, got {pairwise!r}.")
    return objective_spec(function).per == "pair"


def is_per_token(name: str) -> bool:
    """A token's loss depends on that token alone: one pass of three products through the head, and rows may be cut."""
    return objective_spec(find(name)).per == "token"


def has_reference_point(name: str) -> bool:
    """It needs KTO's estimate of the KL divergence in each step, from prompts with another prompt's response."""
    return objective_spec(find(name)).reference_point


def hyperparameters(function: Objective) -> dict[str, inspect.Parameter]:
    return {k: p for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def defaults(name: str) -> dict[str, Any]:
    return {k: p.default for k, p in hyperparameters(find(name)).items() if p.default is not p.empty}


def flags(chosen: Objective) -> dict[str, dict[str, Any]]:
    """argparse's options for each hyper-parameter of bnf_core's objectives, and of `chosen`."""
    defaults: dict[str, dict[str, Any]] = {}
    for name, function in {**OBJECTIVES, "this objective": chosen}.items():
        if name in OBJECTIVES or chosen not in OBJECTIVES.values():
            for key, parameter in hyperparameters(function).items():
                defaults.setdefault(key, {})[name] = parameter.default
    own = hyperparameters(chosen)
    return {
        key: {
            "type": _type_of(own[key]) if key in own else _number,
            "default": argparse.SUPPRESS,
            "metavar": "VALUE",
            "help": "of " + ", ".join(k if v is inspect.Parameter.empty else f"{k} ({v})" for k, v in by_objective.items()),
        }
        for key, by_objective in defaults.items()
    }


def _type_of(parameter: inspect.Parameter) -> Any:
    kind = parameter.annotation if parameter.default is parameter.empty else type(parameter.default)
    return {bool: string_to_bool, int: int, str: str}.get(kind, _number)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


_number.__name__ = "number"  # what argparse's message calls it


def _try(name: str, objective: Objective, pairwise: bool) -> None:
    """One pair where policy = reference: the losses must be as many as claimed, finite, and have a gradient."""
    log_odds = torch.zeros(5, requires_grad=True)
    batch = TokenBatch(
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([True, False]),
        pair=torch.tensor([0, 0]),
        ref_log_odds=torch.zeros(5),
        entropy=torch.ones(5),
        z0=torch.zeros(()),
    )
    try:
        losses = objective(log_odds, batch)
    except Exception as error:  # a user's own may raise anything
        reason = str(error).rstrip(".") if isinstance(error, ValueError) else f"{type(error).__name__}: {one_line(error, 300)}"
        raise UsageError(f"--objective {name}: {reason}.") from error
    shape = (1,) if pairwise else (2,)
    if not isinstance(losses, torch.Tensor) or tuple(losses.shape) != shape:
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise UsageError(
            f"--objective {name}: expected one loss per {'pair' if pairwise else 'response'}, shape {shape} for one pair "
            f"of responses, got {got}" + ("." if pairwise else "; where it is one per pair, set its attribute pairwise = True.")
        )
    if not losses.isfinite().all() or not losses.requires_grad:
        got = "one without a gradient" if losses.isfinite().all() else str(losses.tolist())
        raise UsageError(f"--objective {name}: expected finite, differentiable losses where policy = reference, got {got}.")
