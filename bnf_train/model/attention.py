"""Varlen attention for "sdpa": in a packed sequence each response attends on its own, and nothing between them is computed.

Over a packed sequence of n tokens, scaled_dot_product_attention with a mask is work of order n^2, most of it masked. Cut by
the batch's cu_seq_lens, which transformers hands on to the attention, it is what the responses cost alone, and computed as
they would be alone. Of a mask that says more than "causal" (sliding windows, chunks) a response has its own block.
"""

import inspect
import itertools
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bnf_train.model.shared_prompts import SharedPrompts

NAME = "sdpa_varlen"


def attend_varlen(model: PreTrainedModel) -> None:
    """Let a model that attends by "sdpa" attend within each packed response; other implementations are left alone.

    So are models that do not hand cu_seq_lens on to their attention, found by trying it, and models whose own code puts
    what it attends to into the mask for "sdpa" by that name, and leaves it out of the mask for others, as sparse attention
    does (DeepSeek-V3.2): under another name they would be other models.
    """
    if attention_of(model) != "sdpa" or _knows_sdpa_by_name(model):
        return
    model.set_attn_implementation(NAME)
    if _hands_lengths_on(model):
        model.base_model.register_forward_pre_hook(_with_lengths_on_the_host, with_kwargs=True)
    else:
        model.set_attn_implementation("sdpa")


def attention_of(model: PreTrainedModel) -> str:
    """The name of the implementation of attention that the model uses, as transformers registers it."""
    return str(model.config._attn_implementation)


def attention_width(model: PreTrainedModel) -> float:
    """The length at which attention over the whole of a sequence is as much work as the rest of a layer.

    A layer of width d multiplies about 12 d^2 weights a token, and attention 2 d numbers a token and position: 6 d.
    Infinite for implementations that skip what a packed response does not see.
    """
    skips = attention_of(model).startswith(("flash", "flex", NAME))
    return math.inf if skips else 6.0 * float(getattr(model.config.get_text_config(), "hidden_size", math.inf))


class PackedResponses:
    """The lengths of a packed batch's responses on the host, and their blocks of each mask, for one forward pass.

    It stands beside cu_seq_lens among the arguments, so that layers, which share their masks, copy and cut them once.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.reached = False  # an attention layer
        self._blocks: dict[int, tuple[Tensor, list[Tensor | None]]] = {}  # with the mask, so that its id is no other's

    def blocks(self, mask: Tensor | None) -> list[Tensor | None]:
        """Each response's block of a (..., tokens, tokens) mask; None where that is the causal one."""
        if mask is None:
            return [None] * len(self.lengths)
        if id(mask) not in self._blocks:
            places = itertools.pairwise(itertools.accumulate(self.lengths, initial=0))
            blocks: list[Tensor | None] = [mask[..., start:end, start:end] for start, end in places]
            if mask.dtype == torch.bool:
                causal = torch.stack([(b == torch.ones_like(b).tril()).all() for b in blocks if b is not None]).tolist()
                blocks = [None if c else block for c, block in zip(causal, blocks, strict=True)]
            self._blocks[id(mask)] = mask, blocks
        return self._blocks[id(mask)][1]


def _with_lengths_on_the_host(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One copy from the device for all layers."""
    if (spans := kwargs.pop("packed_spans", None)) is not None:
        kwargs["packed_responses"] = SharedPrompts(spans.tolist())
    if kwargs.get("cu_seq_lens_q") is not None and "packed_responses" not in kwargs:
        kwargs["packed_responses"] = PackedResponses(kwargs["cu_seq_lens_q"].diff().tolist())
    return args, kwargs


@torch.compiler.disable  # how many responses there are is another number in every batch
def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_responses: PackedResponses | SharedPrompts | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' own for "sdpa", which it calls for each response; behind a shared prompt: `SharedPrompts`."""
    if isinstance(packed_responses, SharedPrompts):
        return packed_responses.attend(query, key, value, options.get("sliding_window"), options.get("scaling")), None
    if packed_responses is None and options.get("cu_seq_lens_q") is not None:
        packed_responses = PackedResponses(options["cu_seq_lens_q"].diff().tolist())
    if packed_responses is not None:
        packed_responses.reached = True
    if packed_responses is None or len(packed_responses.lengths) < 2 or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths = packed_responses.lengths
    # split, not slices: the backward pass puts the parts together once, where slices would each be a tensor of zeros
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), packed_responses.blocks(attention_mask), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, mask, **options)[0] for q, k, v, mask in parts]
    return torch.cat(outputs, dim=1), None


@torch.no_grad()
def _hands_lengths_on(model: PreTrainedModel) -> bool:
    """Whether arguments that the model's forward does not know come to its attention."""
    packed = PackedResponses([2])
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    training = model.training
    try:
        model.eval().base_model(input_ids=ids, use_cache=False, packed_responses=packed)
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(training)
    return packed.reached


def _knows_sdpa_by_name(model: PreTrainedModel) -> bool:
    """Looked for in the source, as transformers looks for whether an implementation can be set at all."""
    names = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    return any(re.search(r"_attn_implementation in [(\[{][^)\]}]*[\"']sdpa[\"']", _source(name)) for name in names)


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # transformers sets no implementation there, either
        return ""


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
