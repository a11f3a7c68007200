"""One forward and backward pass on tensors without memory: every allocation and release is counted."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from bnf_train.model.attention import NAME, PackedResponses, attention_of
from bnf_train.model.shared_prompts import SharedPrompts
from bnf_train.plan.memory import head_bytes


@dataclass(frozen=True)
class Traced:
    """Bytes of one micro-batch beyond weights, optimizer and gradients that were there before it."""

    after_forward: int  # what backward will need, bf16 copies of weights included, when the head begins
    most: int  # at any time, the head's own included


def trace(model: PreTrainedModel, batch: dict[str, Any], bf16: bool, checkpointing: bool, accumulates: bool = True) -> Traced:
    """One forward and backward pass over `batch` without memory: every allocation and release is counted.

    Exact for whatever the architecture saves; what kernels use inside is not seen. Of the head it has what
    `linear_bnf_loss` allocates. With `accumulates` gradients of an earlier micro-batch are there already, not counted.
    """
    switch = "enable" if checkpointing else "disable"
    # named anew in transformers 5.23, where the old name warns
    switches = (f"{name}_checkpointing_{switch}" for name in ("activation", "gradient"))
    getattr(model, next(name for name in switches if hasattr(model, name)))()
    model.train()
    weight: Any = model.get_output_embeddings().weight
    names, own = ["input_ids", "attention_mask", "position_ids"], dict[str, Any]()
    if "attention_mask" in batch and batch["attention_mask"].all():
        names.remove("attention_mask")  # as transformers does, which reads it
    if "cu_seq_lens" in batch and attention_of(model) == NAME:
        names.remove("position_ids")  # from which transformers would make a mask
        own = {"packed_responses": _Causal(batch["cu_seq_lens"].diff().tolist())}
    if "spans" in batch:
        own = {"packed_responses": SharedPrompts(batch["spans"].tolist())}
    with weight.fake_mode, (live := Live()):
        if "spans" in batch:
            own["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        inputs = own | {k: torch.empty(batch[k].shape, dtype=batch[k].dtype) for k in names if k in batch}
        places = torch.empty(batch["response_positions"].shape, dtype=torch.long)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if accumulates else None
        live.now = live.most = 0
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
            after_forward = live.now
            hidden = hidden.flatten(0, 1).index_select(0, places)
            chunk = head_bytes(len(weight), weight.shape[1], len(places), "cpu", bf16, weight.element_size())
            loss = _Head.apply(hidden, weight, chunk)
        del hidden
        loss.backward()
    model.zero_grad()
    return Traced(after_forward, live.most)


class _Causal(PackedResponses):
    """A mask without memory has no values to read: none says more than "causal"."""

    def blocks(self, mask: Tensor | None) -> list[Tensor | None]:
        return [None] * len(self.lengths)


class _Head(torch.autograd.Function):
    """What `linear_bnf_loss` holds: a chunk, and from forward to backward the gradients of hidden states and weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk: int) -> Tensor:
        held = torch.empty(chunk, dtype=torch.uint8)
        ctx.gradients = torch.empty_like(hidden), torch.empty_like(weight)
        del held
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients, None


class Live(TorchDispatchMode):
    """Counts the bytes of storages made under it and still alive: `now`, and at `most`."""

    now = most = 0

    def __init__(self) -> None:
        super().__init__()
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mine = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), mine)
        self.most = max(self.most, self.now)
        return out

    def _add(self, storage: Any, of_arguments: set[int]) -> None:
        if storage not in self.known and id(storage) not in of_arguments:  # a view or an in-place result is no new memory
            self.known.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size
