"""The log-odds head to autograd and to torch.compile: two operators, once for every fold.

`log_odds_op` recomputes the logits in backward; `token_loss_op` computes its gradients in forward, which backward
multiplies by the gradient of the loss. Both are `torch.library` operators, opaque to torch.compile and torch.export, which
see shapes only: what depends on data (labels out of range or ignored) is looked at inside. A token loss that has a name is
an operator; a function of the caller's cannot be one (`ClosureLoss`), so torch.compile breaks its graph there.
Double backward, vmap and forward mode are refused.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from bnf_core._checks import IGNORE, check_labels
from bnf_core.head.chunked import Gradients, log_odds_backward, log_odds_forward, one_pass
from bnf_core.head.closure import NamedLoss, TokenLoss
from bnf_core.head.folds import COMPILED, EAGER, FirstThatCompiles, Fold
from bnf_core.head.transform import HeadOptions, without_autocast

__all__ = ["FOLDS", "TOKEN_LOSSES", "ClosureLoss", "log_odds_op", "refuse", "restored", "token_loss_op", "wanted_gradients"]

TOKEN_LOSSES: dict[str, NamedLoss] = {}


def _triton() -> Fold:
    from bnf_core.head.triton import TRITON  # imported where it is used: slow to import, and optional

    return TRITON


def _triton_run(*arguments: Any) -> None:
    _triton().run(*arguments)


def _triton_statistics(*arguments: Any) -> Any:
    return _triton().statistics(*arguments)


# Triton's kernels, else what torch.compile makes of the same, else eager code
_GPU = Fold(FirstThatCompiles(_triton_run, COMPILED.run), FirstThatCompiles(_triton_statistics, COMPILED.statistics), gpu=True)
FOLDS: dict[str, Callable[[], Fold]] = {"chunked": lambda: EAGER, "compiled": lambda: COMPILED, "triton": _triton}


def _fold(implementation: str, device: torch.device) -> Fold:
    if implementation == "auto":
        return _GPU if device.type == "cuda" else EAGER
    return FOLDS[implementation]()


def _kept(labels: Tensor, vocab: int) -> Tensor | None:
    """Where the response tokens are; None: everywhere. One look at the data."""
    ignored = labels == IGNORE
    bad = (labels >= vocab) | ((labels < 0) & ~ignored)
    some_bad, some_ignored = torch.stack([bad.any(), ignored.any()]).tolist()
    if some_bad:
        check_labels(labels, tuple(labels.shape), vocab)  # names the first
    return (~ignored).nonzero().squeeze(-1) if some_ignored else None


def restored(values: Tensor, kept: Tensor | None, tokens: int) -> Tensor:
    """Back in place among tokens whose label is -100."""
    return values if kept is None else values.new_zeros(tokens, *values.shape[1:]).index_copy(0, kept, values)


def _or_empty(gradients: Gradients, kept: Tensor | None, tokens: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operators return tensors: an empty one for a gradient that nobody asked for."""
    hidden, weight, bias = (like.new_empty(0) if g is None else g for g in gradients)
    return hidden if gradients[0] is None else restored(hidden, kept, tokens), weight, bias


def wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    """A Parameter asks for a gradient under no_grad, too, where none is wanted."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]


@torch.library.custom_op("bnf_core::log_odds", mutates_args=())
def log_odds_op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    compute: torch.dtype,
    chunk_size: int | None,
    exact: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-odds, entropy and logsumexp of the others, (tokens,) each; labels are int64."""
    options = HeadOptions(softcap, logit_scale, compute, chunk_size, exact)
    kept = _kept(labels, len(weight))
    with without_autocast(hidden.device.type):
        chosen, targets = (hidden, labels) if kept is None else (hidden[kept], labels[kept])
        results = log_odds_forward(chosen, weight, bias, targets, options, _fold(implementation, hidden.device))
    log_odds, entropy, lse = (restored(values, kept, len(labels)) for values in results)
    return log_odds, entropy, lse


@log_odds_op.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc_dtype = torch.float64 if options[2] == torch.float64 else torch.float32
    return tuple(hidden.new_empty(hidden.shape[0], dtype=acc_dtype) for _ in range(3))  # type: ignore[return-value]


@torch.library.custom_op("bnf_core::log_odds_backward", mutates_args=())
def log_odds_backward_op(
    coefficient: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    compute: torch.dtype,
    chunk_size: int | None,
    exact: bool,
    implementation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    options = HeadOptions(softcap, logit_scale, compute, chunk_size, exact)
    kept = _kept(labels, len(weight))
    tokens = len(labels)
    if kept is not None:
        coefficient, lse, hidden, labels = coefficient[kept], lse[kept], hidden[kept], labels[kept]
    with without_autocast(hidden.device.type):
        fold, asked = _fold(implementation, hidden.device), (wanted[0], wanted[1], wanted[2])
        gradients = log_odds_backward(coefficient, lse, hidden, weight, bias, labels, options, fold, asked)
        dtypes = hidden.dtype, weight.dtype, lse.dtype if bias is None else bias.dtype
        narrowed = tuple(None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))
        return _or_empty(narrowed, kept, tokens, hidden)  # type: ignore[arg-type]


@log_odds_backward_op.register_fake
def _(
    coefficient: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = options[-1]
    found = (
        torch.empty_like(x) if w and x is not None else hidden.new_empty(0)
        for w, x in zip(wanted, (hidden, weight, bias), strict=True)
    )
    return tuple(found)  # type: ignore[return-value]


def _setup_log_odds(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, labels, bias, output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _log_odds_backward(ctx: Any, coefficient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.options)
    if coefficient is None:
        return None, None, None, None, *nothing
    hidden, weight, labels, bias, lse = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = log_odds_backward_op(coefficient, lse, hidden, weight, labels, bias, *ctx.options, wanted)
    dhidden, dweight, dbias = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return dhidden, dweight, None, dbias, *nothing


@torch.library.custom_op("bnf_core::token_loss", mutates_args=())
def token_loss_op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    per_token: Sequence[Tensor],
    token_loss: str,
    softcap: float | None,
    logit_scale: float,
    compute: torch.dtype,
    chunk_size: int | None,
    exact: bool,
    implementation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of TOKEN_LOSSES[token_loss], log-odds, entropy, and the gradients of the sum in hidden, weight and bias."""
    options = HeadOptions(softcap, logit_scale, compute, chunk_size, exact)
    return _token_loss(hidden, weight, labels, bias, per_token, TOKEN_LOSSES[token_loss], options, implementation, wanted)


@token_loss_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, per_token: Sequence[Tensor], name: str, *options: Any
) -> tuple[Tensor, ...]:
    compute, wanted = options[2], options[-1]
    acc_dtype = torch.float64 if compute == torch.float64 else torch.float32
    gradients = []
    for asked, x in zip(wanted, (hidden, weight, bias), strict=True):
        dtype = acc_dtype if x is None or x is bias or x.dtype == torch.float16 else x.dtype
        gradients.append(torch.empty_like(x, dtype=dtype) if asked and x is not None else hidden.new_empty(0))
    tokens = hidden.shape[0]
    return hidden.new_empty((), dtype=acc_dtype), *(hidden.new_empty(tokens, dtype=acc_dtype) for _ in range(2)), *gradients


def _token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    per_token: Sequence[Tensor],
    token_loss: TokenLoss | NamedLoss,
    options: HeadOptions,
    implementation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept, tokens = _kept(labels, len(weight)), len(labels)
    values = tuple(per_token)
    if kept is not None:
        hidden, labels, values = hidden[kept], labels[kept], tuple(x[kept] for x in values)
    with without_autocast(hidden.device.type):
        fold, asked = _fold(implementation, hidden.device), (wanted[0], wanted[1], wanted[2])
        loss, log_odds, entropy, gradients = one_pass(hidden, weight, bias, labels, options, fold, asked, token_loss, values)
        found = _or_empty(gradients, kept, tokens, hidden)
    return loss, restored(log_odds, kept, tokens), restored(entropy, kept, tokens), *found


def _setup_token_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, bias, per_token, *_ = inputs
    ctx.inputs, ctx.per_token, ctx.used = len(inputs), len(per_token), False
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _token_loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    rest = (None,) * (ctx.inputs - 4)
    if grad_loss is None:
        return None, None, None, None, *rest
    tracing = type(grad_loss) is not Tensor  # by torch.compile: no number to look at, and nothing to overwrite
    if torch.is_grad_enabled() and not tracing:
        refuse("double backward")
    if ctx.used:
        raise RuntimeError("linear_token_loss: its gradients were used up by an earlier backward; call it again.")
    ctx.used = not tracing
    found: list[Tensor | None] = []
    for gradient, dtype, asked in zip(ctx.saved_tensors, ctx.dtypes, [ctx.needs_input_grad[i] for i in (0, 1, 3)], strict=True):
        if not asked:
            found.append(None)
        elif tracing:
            found.append((gradient * grad_loss).to(dtype))
        elif grad_loss.device.type == "cpu" and grad_loss == 1:  # on a CPU the comparison is free
            found.append(gradient.to(dtype))
        else:
            found.append(gradient.mul_(grad_loss).to(dtype))
    dhidden, dweight, dbias = found
    return dhidden, dweight, None, dbias, *rest


def _token_loss_op_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    found = _token_loss_backward(ctx, *grads)
    return *found[:4], [None] * ctx.per_token, *found[5:]  # as its inputs are: a list of tensors


class ClosureLoss(torch.autograd.Function):
    """`token_loss_op` with a function in place of a name."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _token_loss(*arguments)

    setup_context = staticmethod(_setup_token_loss)
    backward = staticmethod(_token_loss_backward)

    @staticmethod
    def vmap(*_: Any) -> NoReturn:
        refuse("vmap")


def refuse(what: str, *_: Any) -> NoReturn:
    raise RuntimeError(
        f"the log-odds head computes its gradients itself, so {what} is not supported; "
        "implementation='naive' (all logits, plain autograd) has it."
    )


def _refuse_double_backward(*_: Any) -> NoReturn:
    refuse("double backward")


def _refuse_vmap(*_: Any) -> NoReturn:
    refuse("vmap")


log_odds_op.register_autograd(_log_odds_backward, setup_context=_setup_log_odds)
log_odds_backward_op.register_autograd(_refuse_double_backward)
token_loss_op.register_autograd(_token_loss_op_backward, setup_context=_setup_token_loss)
for _operator in (log_odds_op, log_odds_backward_op, token_loss_op):
    _operator.register_vmap(_refuse_vmap)
