"""A causal language model whose forward ends in the log-odds head instead of full logits."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bnf_core import linear_log_odds, linear_token_loss, token_log_odds
from bnf_train.errors import UsageError

TokenLoss = Callable[..., Tensor]
LARGE = 1e30  # beyond every softcap


def attach_log_odds_head(model: PreTrainedModel) -> None:
    """Let `model(input_ids, ..., response_positions=, response_labels=)` return (log_odds, entropy).

    response_positions (tokens,) are flat places in (sequences * length) whose hidden state predicts the token
    response_labels (tokens,). Only those hidden states reach the head. With token_loss and its tensors per_token it
    returns (loss, log_odds, entropy) of `linear_token_loss`, which saves a matrix product. With router_loss=True the load
    balancing loss of a mixture of experts, a scalar, comes behind them. Called without response_positions, the model is
    what it was.
    It is the forward of the model and of its head that changes, on these instances, so that whatever wraps or shards
    them (autocast, DDP, FSDP, ZeRO, peft) sees the head's weight used inside the module that owns it, where its hooks
    have gathered it; saving is not affected. A copy of either, or what pickle makes of it, computes with its own weight.

    Raises:
      UsageError: no linear head, one of an unknown kind (its log-odds differ from those of the model's own logits), or a
        model that is not causal.
    """
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise UsageError(f"{type(model).__name__}: no linear language-model head found; this architecture is not supported.")
    _keep_weights_in_evaluation(model)
    give_log_odds(head, model)
    model.forward = ResponseForward(model)
    _verify(model)


def give_log_odds(head: nn.Module, model: PreTrainedModel) -> None:
    """Let `head(hidden, response_labels, ...)` return log-odds of `model` in place of logits."""
    head.forward = LogOddsHead(head, *_softcap_and_scale(model))


class ResponseForward:
    """The forward of `model`: as it was, or with log-odds of response tokens in place of logits.

    The model's own code runs from end to end, so that what stands before the head has no name to be known. Only the head's
    input and output are changed on their way, by hooks that last for the call.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.original = model, model.forward

    def __call__(
        self,
        *args: Any,
        response_positions: Tensor | None = None,
        response_labels: Tensor | None = None,
        token_loss: TokenLoss | None = None,
        per_token: Sequence[Tensor] = (),
        router_loss: bool = False,
        **kwargs: Any,
    ) -> Any:
        if response_positions is None or response_labels is None:
            return self.original(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # peft's wrapper fills in None
        # looked up here: peft may have put a copy in the place of the head that there was
        head = self.model.get_output_embeddings()
        with _on_responses(head, response_positions, (response_labels, token_loss, per_token)) as found:
            output = self.original(*args, use_cache=False, **kwargs)
        if len(found) != 1:
            raise UsageError(
                f"{type(self.model).__name__}: its forward pass calls its language-model head {len(found)} times, not once; "
                "this architecture is not supported."
            )
        return (*found[0], _router_loss(self.model, output)) if router_loss else found[0]


@contextmanager
def _on_responses(head: nn.Module, positions: Tensor, arguments: tuple[Any, ...]) -> Iterator[list[Any]]:
    """Within, `head` takes the hidden states at `positions` and `arguments`; what it returns is added to the list.

    The model gets zeros in place of logits, for one position: whatever it does to them (scale, softcap) costs nothing.
    """
    found: list[Any] = []

    def select(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        sequences.append(len(args[0]))
        return args[0].flatten(0, -2).index_select(0, positions), *arguments

    def keep(head: Any, args: tuple[Any, ...], output: Any) -> Tensor:
        found.append(output)
        return output[-1].new_zeros(sequences.pop(), 1, 1).expand(-1, -1, len(head.weight))

    sequences: list[int] = []
    # before the hooks of whoever scores or shards the head, and behind them: they see response tokens and log-odds
    hooks = head.register_forward_pre_hook(select, prepend=True), head.register_forward_hook(keep)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


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


def router_loss_coefficient(model: PreTrainedModel) -> float:
    """What transformers multiplies a mixture's load balancing loss by, where output_router_logits asks for one; else 0."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None) or 0)


def _router_loss(model: PreTrainedModel, output: Any) -> Tensor:
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        raise UsageError(
            f"{type(model).__name__}: its configuration asks for a router loss, and its forward pass computes none; set "
            "output_router_logits to false in config.json."
        )
    return loss


def _keep_weights_in_evaluation(model: PreTrainedModel) -> None:
    """RWKV divides weights in place while it evaluates, against overflow in fp16: they would be saved so. Not any more.

    Its inner model gets a configuration of its own: the one that is saved stays.
    """
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled"):
            config: Any = copy.deepcopy(module.config)
            config.rescale_every = 0
            module.config = config


def _softcap_and_scale(model: PreTrainedModel) -> tuple[float | None, float]:
    """What the model makes of its head's products, logits = softcap(scale * product), read off those of 1 and of 1e30.

    Gemma caps, Cohere and Falcon-H1 multiply, Granite divides; configurations have a name of their own for each.
    """

    def two(head: nn.Module, inputs: tuple[Tensor, ...], products: Tensor) -> Tensor:
        known = torch.ones_like(products, dtype=torch.float32)
        known[..., 1] = LARGE
        return known

    with model.get_output_embeddings().register_forward_hook(two):
        one, large = _evaluated(model, input_ids=_some_ids(model, 2), use_cache=False).logits[0, -1, :2].double().tolist()
    if abs(large) > math.sqrt(LARGE):  # not capped
        return None, one
    scale = large * math.atanh(one / large)
    return large, 1.0 if abs(scale - 1) < 1e-6 else scale


def _verify(model: PreTrainedModel) -> None:
    """The head computes what the model's own logits say, on a few tokens: nothing is silently another model."""
    ids = _some_ids(model, 9)
    with model.get_output_embeddings().register_forward_hook(_in_float32):
        expected, _ = token_log_odds(_evaluated(model, input_ids=ids[:, :-1], use_cache=False).logits, ids[:, 1:])
    log_odds, part = (_first_log_odds(model, ids, tokens) for tokens in (8, 5))
    error = (log_odds - expected[0]).abs().max().item()
    if not error < 1e-2:
        raise UsageError(
            f"{type(model).__name__}: the log-odds head is off by {error:.2g} nats from the model's own logits, "
            "so its head is of a kind that is not supported."
        )
    if (part - log_odds[:5]).abs().mean() > (1e-2 if model.dtype.itemsize >= 4 else 0.1):
        raise UsageError(
            f"{type(model).__name__}: the log-odds of a token depend on the tokens behind it; expected a causal language model."
        )


def _first_log_odds(model: PreTrainedModel, ids: Tensor, tokens: int) -> Tensor:
    places = torch.arange(tokens, device=ids.device)
    inputs = {"input_ids": ids[:, :tokens], "response_positions": places, "response_labels": ids[0, 1 : tokens + 1]}
    return _evaluated(model, **inputs)[0]


def _in_float32(head: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor | None:
    """A forward hook: the head's logits in float32 where it is in bf16, which rounds them to 3 digits; we do not.

    Whatever the head and the model do to them (bias, scale, softcap) is then done in float32, by their own code.
    """
    if next(head.parameters()).dtype not in (torch.bfloat16, torch.float16):
        return None
    single = copy.deepcopy(head).float()
    return type(head).forward(single, inputs[0].float())


@torch.no_grad()
def _evaluated(model: PreTrainedModel, **inputs: Any) -> Any:
    training = model.training
    output = model.eval()(**inputs)
    model.train(training)
    return output


def _some_ids(model: PreTrainedModel, length: int) -> Tensor:
    vocab, device = model.get_output_embeddings().weight.shape[0], next(model.parameters()).device
    return torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
