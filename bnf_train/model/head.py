"""A causal language model whose forward ends in the log-odds head instead of full logits."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bnf_core import linear_bnf_loss, linear_log_odds, token_log_odds
from bnf_train.data import model_inputs, packed
from bnf_train.errors import UsageError


def attach_log_odds_head(model: PreTrainedModel) -> None:
    """Let `model(input_ids, ..., response_positions=, response_labels=)` return (log_odds, entropy).

    response_positions (tokens,) are flat places in (sequences * length) whose hidden state predicts the token
    response_labels (tokens,). Only those hidden states reach the head. With ref_log_odds and coefficient (tokens,) it
    returns (loss, log_odds, entropy) of `linear_bnf_loss`, which saves a matrix product. Called without
    response_positions, the model is what it was.
    It is the forward of the model and of its head that changes, on these instances, so that whatever wraps or shards
    them (autocast, DDP, FSDP, ZeRO, peft) sees the head's weight used inside the module that owns it, where its hooks
    have gathered it; saving is not affected.

    Raises:
      UsageError: the head's log-odds differ from those of the model's own logits (a head of an unknown kind).
    """
    original = model.forward
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise UsageError(f"{type(model).__name__}: no linear language-model head found; this architecture is not supported.")
    options: dict[str, Any] = {"softcap": _softcap(model), "logit_scale": _logit_scale(model)}

    def forward(
        *args: Any,
        response_positions: Tensor | None = None,
        response_labels: Tensor | None = None,
        ref_log_odds: Tensor | None = None,
        coefficient: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if response_positions is None or response_labels is None:
            return original(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # peft's wrapper fills in None
        hidden = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, response_positions)
        # the head of now: peft may have put its own in the place of the one above
        return model.get_output_embeddings()(hidden, response_labels, ref_log_odds, coefficient, **options)

    model.forward = forward
    give_log_odds(head)
    _verify(model)


def give_log_odds(head: nn.Module) -> None:
    """Let `head(hidden, response_labels, ...)` return log-odds in place of logits; a bound method, so that a copy of
    the head computes with the copy's weight."""
    head.forward = MethodType(_head_forward, head)


def _head_forward(
    head: Any,
    hidden: Tensor,
    response_labels: Tensor | None = None,
    ref_log_odds: Tensor | None = None,
    coefficient: Tensor | None = None,
    **options: Any,
) -> Any:
    if response_labels is None:
        return type(head).forward(head, hidden)
    weight, bias = head.weight, getattr(head, "bias", None)
    if ref_log_odds is None or coefficient is None:
        return linear_log_odds(hidden, weight, response_labels, bias=bias, **options)
    return linear_bnf_loss(hidden, weight, response_labels, ref_log_odds, coefficient, bias=bias, **options)


def _softcap(model: PreTrainedModel) -> float | None:
    """Gemma's final_logit_softcapping."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return None if cap is None else float(cap)


def _logit_scale(model: PreTrainedModel) -> float:
    """The factor between the head's product and the logits: Cohere multiplies, Granite divides, Falcon-H1 multiplies."""
    config = model.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:
        return float(scale)
    if (scale := getattr(config, "logits_scaling", None)) is not None:
        return 1 / float(scale)
    return float(getattr(config, "lm_head_multiplier", None) or 1)


def _verify(model: PreTrainedModel) -> None:
    """The head computes what the model's own logits say, on a few tokens: nothing is silently another model."""
    ids = _some_ids(model, 9)
    with _unrounded(model.get_output_embeddings()):
        expected, _ = token_log_odds(_evaluated(model, input_ids=ids[:, :-1]).logits, ids[:, 1:])
    positions = torch.arange(8, device=ids.device)
    log_odds, _ = _evaluated(model, input_ids=ids[:, :-1], response_positions=positions, response_labels=ids[0, 1:])
    error = (log_odds - expected[0]).abs().max().item()
    if not error < 1e-2:
        raise UsageError(
            f"{type(model).__name__}: the log-odds head is off by {error:.2g} nats from the model's own logits, "
            "so its head is of a kind that is not supported."
        )


@contextmanager
def _unrounded(head: nn.Module) -> Iterator[None]:
    """The model's logits in float32 where its head is in bf16: there it rounds them to 3 digits, and we do not.

    Whatever the head and the model do to them (bias, scale, softcap) is then done in float32, by their own code.
    """
    forward = head.forward
    if next(head.parameters()).dtype in (torch.bfloat16, torch.float16):
        single = copy.deepcopy(head).float()
        head.forward = lambda hidden: single(hidden.float())
    try:
        yield
    finally:
        head.forward = forward


def can_pack(model: PreTrainedModel) -> bool:
    """Whether responses that stand one behind the other in a sequence do not see each other, by trying it.

    cu_seq_lens and positions that start again at 0 keep them apart, with the attention implementations and the
    architectures that can. Where it does not, the second response's log-odds differ from what they are alone: by more
    than float32's rounding; in bf16, whose rounding is larger, by a good part of what seeing the first one does to them.
    """
    first, second = _some_ids(model, 17)[0].split([8, 9])
    labels, places = second[1:], torch.arange(8, device=second.device)
    alone, _ = _evaluated(model, input_ids=second.unsqueeze(0), response_positions=places, response_labels=labels)
    batch = packed([first, second]) | {"response_positions": places + 8, "response_labels": labels}
    noise = 1e-3
    if model.dtype.itemsize < 4:
        names = ("input_ids", "response_positions", "response_labels")
        seeing, _ = _evaluated(model, **{name: batch[name] for name in names})
        noise = 0.1 * (seeing - alone).abs().max().item()
    try:
        together, _ = _evaluated(model, **model_inputs(batch))
    except (TypeError, ValueError, RuntimeError):  # an architecture without position_ids, or that takes no cu_seq_lens
        return False
    return bool((together - alone).abs().max() < noise)


@torch.no_grad()
def _evaluated(model: PreTrainedModel, **inputs: Any) -> Any:
    training = model.training
    output = model.eval()(**inputs)
    model.train(training)
    return output


def _some_ids(model: PreTrainedModel, length: int) -> Tensor:
    vocab, device = model.get_output_embeddings().weight.shape[0], next(model.parameters()).device
    return torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
