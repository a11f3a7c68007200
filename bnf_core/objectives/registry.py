"""The decorator by which an objective says what it is, and the tables that it fills in for this library's own."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Literal, TypeVar, get_args, overload

from jaxtyping import Float
from torch import Tensor

from bnf_core._checks import at_least_float32, check_floating, check_same_device, describe
from bnf_core.batch import TokenBatch

__all__ = [
    "CONSTRAINTS",
    "OBJECTIVES",
    "PAIRWISE",
    "UNPAIRED",
    "Objective",
    "ObjectiveSpec",
    "objective",
    "objective_spec",
]

Objective = Callable[..., Tensor]  # (log_odds, batch, *, hyper-parameters) -> (responses,) or (pairs,)
TokenLoss = Callable[..., Tensor]  # (log_odds, sign[, ref_log_odds], *, hyper-parameters) -> (tokens,)
Constraint = Callable[..., Any]
Per = Literal["token", "response", "pair"]
Function = TypeVar("Function", bound=Objective)

UNPAIRED: dict[str, Objective] = {}  # one loss per response
PAIRWISE: dict[str, Objective] = {}  # one loss per pair
OBJECTIVES: dict[str, Objective] = {}  # both
CONSTRAINTS: dict[str, Constraint] = {}  # C_w, C_l of pairs, by the objective's name


@dataclass(frozen=True)
class ObjectiveSpec:
    """What an objective is.

    Args:
      per: "token" where a token's loss depends on that token alone, so that the head takes it in one pass; "response" or
        "pair" where the loss needs the whole of one.
      reference: it needs the reference's log-odds.
      reference_point: it needs `batch.z0`, which is estimated anew for every step.
      constraint: what multiplies the gradient of the log-likelihood; None where it is not known. Of one per token
        (log_odds, ref_log_odds[, sign]) -> (tokens,), before the mean over the response; of a response (log_odds, batch) ->
        (responses,); of a pair PairLogps -> (C_w, C_l), or, where `weights_tokens`, (log_odds, batch) -> (tokens,).
      weights_tokens: the constraint differs from token to token.
      token_loss: of one per token, (log_odds, sign), and ref_log_odds if `reference`, -> the loss of each token.
      described: by the decorator, not guessed.

    Example:
      >>> from bnf_core import OBJECTIVES
      >>> {name for name, o in OBJECTIVES.items() if not objective_spec(o).reference} == {
      ...     "log_likelihood", "nll_pll", "slic_hf", "simpo", "orpo", "unlikelihood", "wga", "satimp", "sim_npo", "w_reinforce"
      ... }
      True
    """

    per: Per
    reference: bool = True
    reference_point: bool = False
    constraint: Constraint | None = None
    weights_tokens: bool = False
    token_loss: TokenLoss | None = None
    described: bool = True

    def token_constraint(
        self,
        log_odds: Float[Tensor, " tokens"],
        ref_log_odds: Float[Tensor, " tokens"],
        sign: Float[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        """The constraint of each token of a loss per token, whether or not it asks for the label."""
        assert self.constraint is not None
        labels = (sign,) if "sign" in inspect.signature(self.constraint).parameters else ()
        constraint: Tensor = self.constraint(log_odds, ref_log_odds, *labels)
        return constraint

    def weighted_token_loss(
        self,
        log_odds: Float[Tensor, " tokens"],
        sign: Float[Tensor, " tokens"],
        weight: Float[Tensor, " tokens"],
        *ref_log_odds: Float[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        """weight * the loss of each token: what `linear_token_loss` takes, with the tensors of `per_token`."""
        assert self.token_loss is not None
        constants = (values.to(log_odds.dtype) for values in (sign, *ref_log_odds))
        return weight.to(log_odds.dtype) * self.token_loss(log_odds, *constants)

    def per_token(self, batch: TokenBatch, scale: float | Tensor) -> tuple[Tensor, ...]:
        """sign and weight of each token, and ref_log_odds if the loss needs them: its sum is scale * the sum of losses."""
        sign = batch.sign if batch.ref_log_odds is None else batch.sign.to(at_least_float32(batch.ref_log_odds).dtype)
        weight = batch.weighted(scale / batch.lengths.to(sign.dtype))
        weight = weight[batch.response]
        if batch.weight is not None:
            weight = weight * batch.weight.to(weight.dtype)
        constants = sign[batch.response], weight
        return (*constants, _ref_log_odds(batch, "this objective")) if self.reference else constants


@overload
def objective(
    *,
    per: Literal["token"],
    reference: bool = ...,
    constraint: Constraint | None = ...,
    constant: TokenLoss | None = ...,
    listed: bool = ...,
) -> Callable[[TokenLoss], Objective]: ...
@overload
def objective(
    *,
    per: Literal["response", "pair"],
    reference: bool = ...,
    reference_point: bool = ...,
    constraint: Constraint | None = ...,
    weights_tokens: bool = ...,
    listed: bool = ...,
) -> Callable[[Function], Function]: ...
def objective(
    *,
    per: Per,
    reference: bool = True,
    reference_point: bool = False,
    constraint: Constraint | None = None,
    weights_tokens: bool = False,
    constant: TokenLoss | None = None,
    listed: bool = False,
) -> Any:
    """Decorator that says what an objective is; one per token is written as the loss of a token.

    A loss per token, L(l, s[, l_ref]), becomes the objective 1 / |y| sum_t L of each response, and trains in one pass
    through the head, three matrix products in place of four. s is +1 in a preferred response, -1 in a dispreferred one. A
    loss that is not of pairs is weighted by |batch.score| where the batch has scores, and each token's by batch.weight.

    Args:
      per: "token", "response" or "pair".
      reference: it needs the reference's log-odds; a loss per token then takes them as its third argument.
      reference_point, constraint, weights_tokens: see `ObjectiveSpec`.
      constant: of one per token: (log_odds, sign, ref_log_odds, entropy, *, hyper-parameters) -> what the value has beside
        the loss where the batch has the entropy, without a gradient.
      listed: for this library's own: put it into OBJECTIVES, PAIRWISE or UNPAIRED, and CONSTRAINTS, by its name.

    Returns:
      A decorator. The objective is a function (log_odds, batch, *, hyper-parameters) -> loss per response or pair.

    Raises:
      ValueError: another `per`; the objective: no reference where it needs one, or anything but one loss per token.

    Example:
      Unlikelihood, -log(1 - pi_y), on dispreferred responses:

      >>> import torch
      >>> from torch.nn.functional import logsigmoid
      >>> @objective(per="token", reference=False)
      ... def unlikelihood(log_odds, sign, *, strength=1.0):
      ...     return torch.where(sign > 0, -logsigmoid(log_odds), -strength * logsigmoid(-log_odds))
      >>> unlikelihood(torch.zeros(3), TokenBatch(torch.tensor([0, 0, 1]), torch.tensor([True, False])), strength=0.5)
      tensor([0.6931, 0.3466])
    """
    if per not in get_args(Per):
        raise ValueError(f"per: expected one of {', '.join(get_args(Per))}, got {per!r}.")

    def decorate(function: Objective | TokenLoss) -> Objective:
        spec = ObjectiveSpec(per, reference, reference_point, constraint, weights_tokens or per == "token")
        if per == "token":
            spec, function = replace(spec, token_loss=function), _mean_over_tokens(function, reference, constant)
        elif per == "response":
            function = _weighted(function)
        vars(function)["objective_spec"] = spec
        if listed:
            _list(function, spec)
        return function

    return decorate


def objective_spec(objective: Objective) -> ObjectiveSpec:
    """What an objective is, hyper-parameters that functools.partial has bound included.

    A function that no decorator has described is one per pair if it has the attribute `pairwise = True`, else one per
    response, and needs the reference.

    Example:
      >>> from bnf_core import OBJECTIVES
      >>> [objective_spec(OBJECTIVES[name]).per for name in ("bnf", "kto", "dpo")]
      ['token', 'response', 'pair']
    """
    if isinstance(objective, partial):
        spec = objective_spec(objective.func)

        def bound(function: Callable[..., Any]) -> Callable[..., Any]:  # with what it takes of the objective's
            takes = inspect.signature(function).parameters
            return partial(function, **{k: v for k, v in objective.keywords.items() if k in takes})

        return replace(
            spec,
            constraint=spec.constraint and bound(spec.constraint),
            token_loss=spec.token_loss and bound(spec.token_loss),
        )
    said: ObjectiveSpec | None = getattr(objective, "objective_spec", None)
    return said or ObjectiveSpec("pair" if getattr(objective, "pairwise", False) is True else "response", described=False)


def _list(function: Objective, spec: ObjectiveSpec) -> None:
    name = function.__name__
    OBJECTIVES[name] = (PAIRWISE if spec.per == "pair" else UNPAIRED)[name] = function
    if spec.per == "pair" and not spec.weights_tokens and spec.constraint is not None:
        CONSTRAINTS[name] = spec.constraint


def _weighted(function: Objective) -> Objective:
    """The objective times what each response counts."""

    @wraps(function)
    def losses(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, **hyper: Any) -> Float[Tensor, " responses"]:
        return batch.weighted(function(log_odds, batch, **hyper))

    return losses


def _mean_over_tokens(token_loss: TokenLoss, reference: bool, constant: TokenLoss | None) -> Objective:
    """The objective of a loss per token: its mean over the tokens of each response."""
    name = token_loss.__name__

    def losses(log_odds: Float[Tensor, " tokens"], batch: TokenBatch, **hyper: Any) -> Float[Tensor, " responses"]:
        check_floating("log_odds", log_odds, tuple(batch.response.shape))
        check_same_device(log_odds=log_odds, response=batch.response)
        log_odds = at_least_float32(log_odds)
        constants = [batch.sign[batch.response].to(log_odds.dtype)]
        if reference:
            constants.append(_ref_log_odds(batch, name).to(log_odds.dtype))
        values = token_loss(log_odds, *constants, **hyper)
        if not isinstance(values, Tensor) or values.shape != log_odds.shape:
            raise ValueError(f"{name}: expected one loss for each of {len(log_odds)} tokens, got {describe(values)}.")
        if constant is not None and batch.entropy is not None:
            values = values + constant(log_odds.detach(), *constants, batch.entropy.detach().to(log_odds.dtype), **hyper)
        return batch.weighted(batch.mean(values))

    hyper = [p for p in inspect.signature(token_loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    arguments = [inspect.Parameter(k, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in ("log_odds", "batch")]
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(losses, attribute, getattr(token_loss, attribute))
    vars(losses)["__signature__"] = inspect.Signature([*arguments, *hyper])
    return losses


def _ref_log_odds(batch: TokenBatch, name: str) -> Tensor:
    if batch.ref_log_odds is None:
        raise ValueError(f"batch.ref_log_odds: expected the log-odds of the reference for {name}, got None.")
    return batch.ref_log_odds.detach()
