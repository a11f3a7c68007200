"""Attention where responses to one prompt stand behind it, and the prompt is computed once.

A response token attends to the prompt and to its own response. Per head, over a softmax's two sets of keys:

    attention over both = a_1 e^(s_1 - s) + a_2 e^(s_2 - s),   s = log(e^s_1 + e^s_2)

with a the attention over a set alone and s its log of the sum of exponentials (Dao et al. 2022, section 3.1). So every
segment, a prompt or a response, attends causally on its own, and all responses to a prompt, one behind the other, attend to
it in one product without a mask. The backward pass of either set needs only s and the whole output; no key is copied.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Span(NamedTuple):
    """A response in a pack: places of the prompt that it shares (none: empty) and of all that is its own."""

    prompt_start: int
    prompt_end: int
    start: int
    end: int


class SharedPrompts:
    """A pack's spans, and what attention makes of them, once for all layers."""

    def __init__(self, spans: Sequence[Sequence[int]]) -> None:
        self.spans = [Span(*span) for span in spans]
        self._made: dict[Any, Any] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
        """Attention (1, tokens, heads, dim) of query, key and value (1, heads, tokens, dim), as transformers takes it."""
        device, dim = query.device.type, value.shape[-1]
        if torch.is_autocast_enabled(device):  # as it does for PyTorch's own attention
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        if dim < query.shape[-1]:  # DeepSeek's; the kernels want one width
            value = F.pad(value, (0, query.shape[-1] - dim))
        if device == "cpu":
            own, shared = self._once((window, query.dtype), lambda: pieces(self.spans, window, query))
            output: Tensor = SharedPromptAttention.apply(query, key, value, own, shared, scale)
        else:
            mask = self._once(window, lambda: block_mask(self.spans, window, query.device))
            output = flex(query, key, value, mask, scale)
        return output[..., :dim].transpose(1, 2).contiguous()

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Piece(NamedTuple):
    """One call of attention: queries against keys, causal where they are the same; `mask` (queries, keys) is added."""

    queries: slice
    keys: slice
    mask: Tensor | None


def pieces(spans: Sequence[Span], window: int | None, like: Tensor) -> tuple[list[Piece], list[Piece]]:
    """Of a pack: every segment on its own, and responses against the prompt that they share.

    Args:
      window: how many positions a token sees, itself included; None: all.
      like: dtype and device of masks.
    """
    own, shared = [], []
    last: tuple[int, int] | None = None
    for span in spans:
        prompt = (span.prompt_start, span.prompt_end)
        length = span.prompt_end - span.prompt_start
        if length and prompt != last:
            own.append(_segment(*prompt, window, like))
        own.append(_segment(span.start, span.end, window, like))
        if length and window is not None and length + span.end - span.start > window:
            seeing = slice(span.start, min(span.end, span.start + window - 1))  # the others are too far behind it
            distance = length + torch.arange(seeing.stop - seeing.start).unsqueeze(1) - torch.arange(length)
            shared.append(Piece(seeing, slice(*prompt), _added(distance < window, like)))
        elif length and prompt == last and shared[-1].mask is None and shared[-1].queries.stop == span.start:
            shared[-1] = shared[-1]._replace(queries=slice(shared[-1].queries.start, span.end))
        elif length:
            shared.append(Piece(slice(span.start, span.end), slice(*prompt), None))
        last = prompt
    return own, [piece for piece in shared if piece.queries.stop > piece.queries.start]


def _segment(start: int, end: int, window: int | None, like: Tensor) -> Piece:
    mask = None
    if window is not None and end - start > window:
        distance = torch.arange(end - start).unsqueeze(1) - torch.arange(end - start)
        mask = _added((distance >= 0) & (distance < window), like)
    return Piece(slice(start, end), slice(start, end), mask)


def _added(seen: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, -torch.inf).to(like.device)


class SharedPromptAttention(torch.autograd.Function):
    """softmax(scale q k^T) v over what each token sees; q (1, heads, tokens, dim), k and v with as many heads or fewer."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, own: list[Piece], shared: list[Piece], scale: float | None
    ) -> Tensor:
        output = torch.empty_like(q)
        lse = torch.empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for at, keys, mask in own:
            options = {"is_causal": mask is None, "attn_mask": mask, "scale": scale}
            output[:, :, at], lse[:, :, at] = attend(q[:, :, at], k[:, :, keys], v[:, :, keys], **options)
        for at, keys, mask in shared:
            over_prompt, lse_prompt = attend(q[:, :, at], k[:, :, keys], v[:, :, keys], attn_mask=mask, scale=scale)
            both = torch.logaddexp(lse[:, :, at], lse_prompt)
            parts = [(output[:, :, at], lse[:, :, at]), (over_prompt, lse_prompt)]
            output[:, :, at] = sum(part * (s - both).exp().unsqueeze(-1) for part, s in parts).to(q.dtype)
            lse[:, :, at] = both
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.pieces, ctx.scale = (own, shared), scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for kind, found in enumerate(ctx.pieces):
            for at, keys, mask in found:
                causal = kind == 0 and mask is None
                inputs = (grad[:, :, at], q[:, :, at], k[:, :, keys], v[:, :, keys], output[:, :, at], lse[:, :, at])
                parts = differentiate(*inputs, 0.0, causal, attn_mask=mask, scale=ctx.scale)
                for total, part, where in zip(grads, parts, (at, keys, keys), strict=True):
                    total[:, :, where] += part
        return *grads, None, None, None


# --- GPUs ------------------------------------------------------------------------------------------------------------


def block_mask(spans: Sequence[Span], window: int | None, device: torch.device) -> BlockMask:
    """The same for flex attention, which computes only blocks of 128 x 128 in which something is seen."""
    total = max(span.end for span in spans)
    segment, prompt, position = (torch.full((total,), -1, device=device) for _ in range(3))
    for number, span in enumerate(spans):
        length = span.prompt_end - span.prompt_start
        segment[span.prompt_start : span.prompt_end] = len(spans) + span.prompt_start
        segment[span.start : span.end] = number
        prompt[span.start : span.end] = len(spans) + span.prompt_start if length else -2
        position[span.prompt_start : span.prompt_end] = torch.arange(length, device=device)
        position[span.start : span.end] = length + torch.arange(span.end - span.start, device=device)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position[query] - position[key]
        near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return near & ((segment[query] == segment[key]) | (prompt[query] == segment[key]))

    return create_block_mask(seen, None, None, total, total, device=device, _compile=device.type == "cuda")


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """As SharedPromptAttention, by flex attention: compiled on a GPU, elsewhere for tests of the mask."""
    run: Any = torch.compile(flex_attention, dynamic=True) if q.is_cuda else flex_attention
    output: Tensor = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return output
