"""The log-odds head: hidden states in, one log-odds per token out. It never sees a preference."""

import importlib.util
import os
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.autograd import forward_ad

from bnf_core._checks import (
    IGNORE,
    check_floating,
    check_head,
    check_labels,
    check_positive,
    check_same_device,
    describe,
    holds_numbers,
    label_ids,
)
from bnf_core.head.autograd import (
    FOLDS,
    TOKEN_LOSSES,
    ClosureLoss,
    log_odds_op,
    refuse,
    restored,
    token_loss_op,
    wanted_gradients,
)
from bnf_core.head.closure import NamedLoss, TokenLoss
from bnf_core.head.layout import layout
from bnf_core.head.naive import log_odds_naive, token_log_odds, token_loss_naive
from bnf_core.head.products import multiplies
from bnf_core.head.transform import HeadOptions, autocast_dtype, without_autocast

__all__ = [
    "IMPLEMENTATIONS",
    "TOKEN_LOSSES",
    "NamedLoss",
    "head_workspace",
    "linear_log_odds",
    "linear_token_loss",
    "multiplies",
    "token_log_odds",
]

IMPLEMENTATIONS = ("naive", *FOLDS)


def triton_runs_on(device: torch.device) -> bool:
    """Triton is installed, and the device is a GPU or Triton interprets its kernels on the CPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return importlib.util.find_spec("triton") is not None and (device.type == "cuda" or interpreted)


def linear_log_odds(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    labels: Integer[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    implementation: str = "auto",
    chunk_size: int | None = None,
    exact: bool = True,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Log-odds of the target token, and the entropy, straight from hidden states.

    z = cap(logit_scale * (hidden @ weight.T + bias)),   cap(x) = softcap * tanh(x / softcap),
    l = z_y - logsumexp_{j != y} z_j,                    H = -sum_j pi_j log pi_j,

    in nats, without ever holding (tokens, vocab) logits. All that the objectives need of the policy.

    Args:
      hidden: last hidden states of response tokens only. Differentiable.
      weight: the language-model head's weight. Differentiable.
      labels: the token that each hidden state predicts; -100 for none.
      bias: the head's bias. Differentiable.
      softcap: final logit soft-capping (Gemma-2: 30.0); None for none.
      logit_scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
      implementation: "naive" (all logits, autograd), "chunked" (any device), "compiled" (the same, its element-wise
        part through torch.compile), "triton" (the same through a kernel, CUDA), or "auto": "chunked" on a CPU, on a GPU the
        first of "triton", "compiled" and "chunked" whose compiler works there, after one line in the log.
      chunk_size: tokens whose logits are held at a time; None lets the implementation choose.
      exact: logits of bf16 and fp16 operands keep float32's digits. False lets them be rounded to the operands' dtype
        where that is faster (a CPU whose bf16 unit is not AMX); a token's log-odds then carry errors of 0.4 % of its
        logits, which may differ from batch to batch.

    Returns:
      (log_odds, entropy), each (tokens,): float64 if the operands are, else float32, summed in that dtype from
      operands in their own (under autocast: rounded to autocast's). log_odds is differentiable in hidden, weight
      and bias; the entropy is a constant; both are 0 where the label is -100. NaN and infinite logits come out as
      NaN or infinite, never as a finite number.

    Raises:
      ValueError: wrong shape, dtype or device, a label outside the vocabulary, an unknown implementation.

    Example:
      >>> import torch
      >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 5.0], [1.0, -5.0]])
      >>> log_odds, entropy = linear_log_odds(hidden, weight, torch.tensor([0]))
      >>> log_odds  # logits (2, 1, 1): 2 - log(2e)
      tensor([0.3069])
    """
    options, name, labels = _checked(hidden, weight, labels, bias, softcap, logit_scale, implementation, chunk_size, exact)
    if name == "naive":
        kept, (hidden, targets) = _chosen(labels, len(weight), hidden, labels)
        with without_autocast(hidden.device.type):
            log_odds, entropy = log_odds_naive(hidden, weight, targets, bias, options)
        return restored(log_odds, kept, len(labels)), restored(entropy, kept, len(labels))
    log_odds, entropy, _ = log_odds_op(hidden, weight, labels, bias, *_plain(options), name)
    return log_odds, entropy


def linear_token_loss(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    labels: Integer[Tensor, " tokens"],
    token_loss: TokenLoss,
    *per_token: Tensor,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    implementation: str = "auto",
    chunk_size: int | None = None,
    exact: bool = True,
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Sum over tokens of any loss of a token's log-odds, value and gradients in one pass.

    L = sum_t token_loss(l_t, per_token_t),     l as in `linear_log_odds`.

    A token's loss depends on that token alone, so its gradient is known while its logits are still there: dhidden,
    dweight and dbias are computed in forward, three matrix products in all (two where the weight is frozen, one
    where nothing asks for a gradient). The derivative of token_loss comes from autograd on vectors of length tokens.

    Args:
      hidden, weight, labels, bias, softcap, logit_scale, implementation, chunk_size, exact: as for `linear_log_odds`.
      token_loss: (log_odds, *per_token) -> loss of each token, differentiable in log_odds. Called on some of the tokens
        at a time; each must not depend on the others. Whatever else it uses is a constant: a parameter inside it would get
        no gradient, and is refused. torch.compile breaks its graph here, but for the losses in TOKEN_LOSSES (BNF's).
      per_token: tensors of one entry per token, constants.

    Returns:
      (loss, log_odds, entropy): a differentiable scalar, and two detached vectors (tokens,), 0 where the label is
      -100. Without response tokens the loss is a differentiable 0. Its gradients can be used once.

    Raises:
      ValueError: as `linear_log_odds`, a per-token tensor of another length, or a token_loss that gives anything but one
        loss a token or depends on something else that requires a gradient.
      RuntimeError: double backward, vmap or forward mode (also of `linear_log_odds`), but for "naive"; gradients used twice.

    Example:
      Cross-entropy, -log pi_y = -log sigmoid(l), of logits (2, 1, 1):

      >>> import torch
      >>> hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
      >>> weight = torch.tensor([[2.0, 0.0], [1.0, 5.0], [1.0, -5.0]])
      >>> loss, log_odds, entropy = linear_token_loss(
      ...     hidden, weight, torch.tensor([0]), lambda l: -torch.nn.functional.logsigmoid(l)
      ... )
      >>> loss.backward()
      >>> loss.detach(), hidden.grad  # sum_j (pi_j - 1[j = y]) w_j
      (tensor(0.5514), tensor([[-0.4239,  0.0000]]))
    """
    options, name, labels = _checked(hidden, weight, labels, bias, softcap, logit_scale, implementation, chunk_size, exact)
    for i, values in enumerate(per_token):
        if not isinstance(values, Tensor) or values.dim() < 1 or len(values) != len(labels):
            raise ValueError(f"per_token[{i}]: expected a tensor of {len(labels)} entries, got {describe(values)}.")
    check_same_device(hidden=hidden, **{f"per_token[{i}]": values for i, values in enumerate(per_token)})
    constants = [values.detach() for values in per_token]
    if name == "naive":
        kept, (hidden, targets, *constants) = _chosen(labels, len(weight), hidden, labels, *constants)
        with without_autocast(hidden.device.type):
            loss, log_odds, entropy = token_loss_naive(hidden, weight, targets, bias, options, token_loss, tuple(constants))
        return loss, restored(log_odds, kept, len(labels)), restored(entropy, kept, len(labels))
    wanted = wanted_gradients(hidden, weight, bias)
    for known, named in TOKEN_LOSSES.items():
        if named.loss is token_loss:
            results = token_loss_op(hidden, weight, labels, bias, constants, known, *_plain(options), name, wanted)
            return results[0], results[1], results[2]
    call: Any = _with_a_function_of_yours
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg="linear_token_loss calls a function of yours on some tokens at a time.")
        call = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    loss, log_odds, entropy, *_ = call(hidden, weight, labels, bias, constants, token_loss, options, name, wanted)
    return loss, log_odds, entropy


def _with_a_function_of_yours(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if not holds_numbers(hidden):
        raise RuntimeError("linear_token_loss: expected tensors that hold numbers, for a loss that is a function of yours.")
    results: tuple[Tensor, ...] = ClosureLoss.apply(hidden, *arguments)  # type: ignore[no-untyped-call]
    return results


def _has_tangent(x: Tensor | None) -> bool:
    """An operator would drop it without a word."""
    if x is None or torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _plain(options: HeadOptions) -> tuple[float | None, float, torch.dtype, int | None, bool]:
    """What operators take."""
    return options.softcap, options.logit_scale, options.compute, options.chunk_size, options.exact


def _chosen(labels: Tensor, vocab: int, *values: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """The response tokens' entries, and where they are; None: everywhere (a traced call leaves all in place)."""
    check_labels(labels, tuple(labels.shape), vocab)
    if not holds_numbers(labels):
        return None, list(values)
    kept = (labels != IGNORE).nonzero().squeeze(-1)
    return kept, [x.index_select(0, kept) for x in values]


def head_workspace(
    tokens: int,
    dim: int,
    vocab: int,
    *,
    hidden_dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    gpu: bool = False,
    frozen: bool = False,
    softcap: float | None = None,
    exact: bool = True,
) -> dict[str, int]:
    """What one call of `linear_token_loss` will hold beyond its inputs and their gradients, before it is made.

    The sizes of its pieces follow from shapes and dtypes alone, so this is what it allocates, but for vectors of length
    tokens and what a product needs inside.

    Args:
      tokens, dim, vocab: the shapes of hidden (tokens, dim) and weight (vocab, dim).
      hidden_dtype, weight_dtype: their dtypes.
      compute: autocast's dtype; None: no autocast.
      gpu: sizes for a GPU in place of a CPU's.
      frozen: the weight asks for no gradient.
      softcap, exact: as for `linear_log_odds`.

    Returns:
      Bytes by what they are for.

    Example:
      >>> import torch
      >>> held = head_workspace(8192, 4096, 128256, hidden_dtype=torch.bfloat16, weight_dtype=torch.bfloat16, gpu=True)
      >>> {name: size // 2**20 for name, size in held.items() if size}  # doctest: +NORMALIZE_WHITESPACE
      {'logits of a tile': 64, 'exponentials': 2004, 'hidden states, scaled': 64, 'float32 sum of dhidden': 32}
    """
    options = HeadOptions(softcap, 1.0, compute or torch.promote_types(hidden_dtype, weight_dtype), None, exact)
    sizes = layout(
        tokens,
        dim,
        vocab,
        options,
        hidden_dtype=hidden_dtype,
        weight_dtype=weight_dtype,
        on_gpu=gpu,
        wanted=(True, not frozen, False),
    )
    return sizes.workspace(scratch=not gpu)


def _checked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    implementation: str,
    chunk_size: int | None,
    exact: bool,
) -> tuple[HeadOptions, str, Tensor]:
    check_head(hidden, weight)
    ids = label_ids(labels, (hidden.shape[0],))
    if bias is not None:
        check_floating("bias", bias, (weight.shape[0],))
    check_same_device(hidden=hidden, weight=weight, labels=labels, bias=bias)
    softcap = None if softcap is None else check_positive("softcap", softcap)
    logit_scale = check_positive("logit_scale", logit_scale)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 token, got {chunk_size}.")
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation: expected one of {', '.join(['auto', *IMPLEMENTATIONS])}, got {implementation!r}.")
    if implementation == "triton" and not triton_runs_on(hidden.device):
        raise ValueError(f"implementation: 'triton' needs the triton package and a CUDA device, got {hidden.device}.")
    compute = torch.promote_types(hidden.dtype, weight.dtype)
    if compute != torch.float64:  # which autocast leaves alone
        compute = autocast_dtype(hidden.device.type) or compute
    if implementation != "naive" and any(_has_tangent(x) for x in (hidden, weight, bias)):
        refuse("forward-mode differentiation")
    return HeadOptions(softcap, logit_scale, compute, chunk_size, exact), implementation, ids
