"""A causal language model whose forward ends in the log-odds head instead of full logits."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bnf_core import linear_log_odds, token_log_odds
from bnf_train.errors import UsageError


def attach_log_odds_head(model: PreTrainedModel) -> None:
    """Let `model(input_ids, ..., response_positions=, response_labels=)` return (log_odds, entropy).

    response_positions (tokens,) are flat places in (sequences * length) whose hidden state predicts the token
    response_labels (tokens,). Only those hidden states reach the head. Called without them, the model is what it was.
    It is the model's own forward that changes, on this instance, so that whatever wraps it (autocast, DDP, FSDP,
    gradient checkpointing) sees the head's weight used inside the module that owns it; saving is not affected.

    Raises:
      UsageError: the head's log-odds differ from those of the model's own logits (a head of an unknown kind).
    """
    original = model.forward
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise UsageError(f"{type(model).__name__}: no linear language-model head found; this architecture is not supported.")
    options: dict[str, Any] = {"softcap": _softcap(model), "logit_scale": _logit_scale(model)}

    def forward(
        *args: Any, response_positions: Tensor | None = None, response_labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if response_positions is None or response_labels is None:
            return original(*args, **kwargs)
        hidden = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, response_positions)
        return linear_log_odds(hidden, head.weight, response_labels, bias=getattr(head, "bias", None), **options)

    model.forward = forward
    _verify(model)


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


@torch.no_grad()
def _verify(model: PreTrainedModel) -> None:
    """The head computes what the model's own logits say, on a few tokens: nothing is silently another model."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    vocab = model.get_output_embeddings().weight.shape[0]
    ids = torch.randint(vocab, (1, 9), generator=torch.Generator().manual_seed(0)).to(device)
    expected, _ = token_log_odds(model(input_ids=ids[:, :-1]).logits, ids[:, 1:])
    positions = torch.arange(8, device=device)
    log_odds, _ = model(input_ids=ids[:, :-1], response_positions=positions, response_labels=ids[0, 1:])
    model.train(training)
    error = (log_odds - expected[0]).abs().max().item()
    if not error < 1e-2:
        raise UsageError(
            f"{type(model).__name__}: the log-odds head is off by {error:.2g} nats from the model's own logits, "
            "so its head is of a kind that is not supported."
        )
