"""Attention over packed responses, each on its own: the squares along the mask's diagonal, and nothing between them.

Over a packed sequence of n tokens, scaled_dot_product_attention with a mask is work of order n^2, most of it masked.
Cut at the places that see nothing before them it is what the responses cost alone, and computed as they would be alone.
"""

import inspect
import itertools
import math
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_response"


def attend_by_response(model: PreTrainedModel) -> None:
    """Let a model that attends by "sdpa" attend within each packed response; other implementations are left alone.

    So are models whose own code puts what it attends to into the mask for "sdpa" by that name, and leaves it out of the
    mask for others, as sparse attention does (DeepSeek-V3.2): under another name they would be other models.
    """
    if model.config._attn_implementation == "sdpa" and not _knows_sdpa_by_name(model):
        model.set_attn_implementation(NAME)


def attention_width(model: PreTrainedModel) -> float:
    """The length at which attention over the whole of a sequence is as much work as the rest of a layer.

    A layer of width d multiplies about 12 d^2 weights a token, and attention 2 d numbers a token and position: 6 d.
    Infinite for implementations that skip what a packed response does not see.
    """
    skips = str(model.config._attn_implementation).startswith(("flash", "flex", "sdpa_by"))
    return math.inf if skips else 6.0 * float(getattr(model.config.get_text_config(), "hidden_size", math.inf))


def _knows_sdpa_by_name(model: PreTrainedModel) -> bool:
    """Looked for in the source, as transformers looks for whether an implementation can be set at all."""
    names = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    return any(re.search(r"_attn_implementation in [(\[{][^)\]}]*[\"']sdpa[\"']", _source(name)) for name in names)


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # transformers sets no implementation there, either
        return ""


@torch.compiler.disable  # how many responses there are is another number in every batch
def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' own for "sdpa", which it calls for each response."""
    lengths, masks = _responses(attention_mask)
    if len(lengths) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # split, not slices: the backward pass puts the parts together once, where slices would each be a tensor of zeros
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), masks, strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, mask, **options)[0] for q, k, v, mask in parts]
    return torch.cat(outputs, dim=1), None


def _responses(mask: Tensor | None) -> tuple[list[int], list[Tensor | None]]:
    """How long each response is, and its part of the mask, None where that is the causal one; none where not packed.

    Kept with the mask, which all layers share.
    """
    if mask is None or mask.dtype != torch.bool or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return [], []
    if not hasattr(mask, "_responses"):
        square = mask[0, 0]
        first = [0, *(1 + (~square.diagonal(-1)).nonzero().flatten()).tolist(), len(square)]
        lengths = [end - start for start, end in itertools.pairwise(first)]
        masks: list[Tensor | None] = []
        for start, end in itertools.pairwise(first):
            if square[start:end, :start].any():  # it does see something before it
                lengths, masks = [], []
                break
            own = square[start:end, start:end]
            masks.append(None if own.equal(torch.ones_like(own).tril()) else own[None, None])
        mask._responses = lengths, masks  # type: ignore[attr-defined]
    return mask._responses  # type: ignore[attr-defined]


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
