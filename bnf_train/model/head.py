"""A causal language model whose forward ends in the log-odds head instead of full logits."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bnf_core import linear_log_odds, linear_token_loss, token_log_odds
from bnf_train.data import model_inputs, packed
from bnf_train.errors import UsageError

TokenLoss = Callable[..., Tensor]


def attach_log_odds_head(model: PreTrainedModel) -> None:
    """Let `model(input_ids, ..., response_positions=, response_labels=)` return (log_odds, entropy).

    response_positions (tokens,) are flat places in (sequences * length) whose hidden state predicts the token
    response_labels (tokens,). Only those hidden states reach the head. With token_loss and its tensors per_token it
    returns (loss, log_odds, entropy) of `linear_token_loss`, which saves a matrix product. Called without
    response_positions, the model is what it was.
    It is the forward of the model and of its head that changes, on these instances, so that whatever wraps or shards
    them (autocast, DDP, FSDP, ZeRO, peft) sees the head's weight used inside the module that owns it, where its hooks
    have gathered it; saving is not affected. A copy of either, or what pickle makes of it, computes with its own weight.

    Raises:
      UsageError: the head's log-odds differ from those of the model's own logits (a head of an unknown kind).
    """
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise UsageError(f"{type(model).__name__}: no linear language-model head found; this architecture is not supported.")
    give_log_odds(head, model)
    model.forward = ResponseForward(model)
    _verify(model)


def give_log_odds(head: nn.Module, model: PreTrainedModel) -> None:
    """Let `head(hidden, response_labels, ...)` return log-odds of `model` in place of logits."""
    head.forward = LogOddsHead(head, _softcap(model), _logit_scale(model))


class ResponseForward:
    """The forward of `model`: as it was, or from the hidden states of response tokens to the log-odds head."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.original = model, model.forward

    def __call__(
        self,
        *args: Any,
        response_positions: Tensor | None = None,
        response_labels: Tensor | None = None,
        token_loss: TokenLoss | None = None,
        per_token: Sequence[Tensor] = (),
        **kwargs: Any,
    ) -> Any:
        if response_positions is None or response_labels is None:
            return self.original(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # peft's wrapper fills in None
        hidden = self.model.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, response_positions)
        # looked up here: peft may have put a copy in the place of the head that there was
        return self.model.get_output_embeddings()(hidden, response_labels, token_loss, per_token)


class LogOddsHead:
    """The forward of a linear `head`: its logits, or with labels log-odds and entropy, or with a token loss that, too."""

    def __init__(self, head: nn.Module, softcap: float | None, logit_scale: float) -> None:
        self.head, self.softcap, self.logit_scale = head, softcap, logit_scale

    def __call__(
        self,
        hidden: Tensor,
        response_labels: Tensor | None = None,
        token_loss: TokenLoss | None = None,
        per_token: Sequence[Tensor] = (),
    ) -> Any:
        if response_labels is None:
            return type(self.head).forward(self.head, hidden)
        weight: Any = self.head.weight
        if token_loss is None:
            return linear_log_odds(hidden, weight, response_labels, **self.options)
        return linear_token_loss(hidden, weight, response_labels, token_loss, *per_token, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What makes logits of hidden states and weight, for the functions of `bnf_core`."""
        return {"bias": getattr(self.head, "bias", None), "softcap": self.softcap, "logit_scale": self.logit_scale}


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
    with model.get_output_embeddings().register_forward_hook(_in_float32):
        expected, _ = token_log_odds(_evaluated(model, input_ids=ids[:, :-1]).logits, ids[:, 1:])
    positions = torch.arange(8, device=ids.device)
    log_odds, _ = _evaluated(model, input_ids=ids[:, :-1], response_positions=positions, response_labels=ids[0, 1:])
    error = (log_odds - expected[0]).abs().max().item()
    if not error < 1e-2:
        raise UsageError(
            f"{type(model).__name__}: the log-odds head is off by {error:.2g} nats from the model's own logits, "
            "so its head is of a kind that is not supported."
        )


def _in_float32(head: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor | None:
    """A forward hook: the head's logits in float32 where it is in bf16, which rounds them to 3 digits; we do not.

    Whatever the head and the model do to them (bias, scale, softcap) is then done in float32, by their own code.
    """
    if next(head.parameters()).dtype not in (torch.bfloat16, torch.float16):
        return None
    single = copy.deepcopy(head).float()
    return type(head).forward(single, inputs[0].float())


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
