"""What a model with the log-odds head says of responses: the one loop of forward passes outside training."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnf_core import analysis
from bnf_train.data import Collator, Response, Row, model_inputs


@dataclass(frozen=True)
class Scored:
    """Of one response, per token, (tokens,) float32 on the CPU."""

    log_odds: Tensor
    entropy: Tensor
    logits: Tensor | None = None  # of the response's own tokens
    argmax_mass: Tensor | None = None  # the probability of the most likely token


@torch.no_grad()
def score(
    model: Any,
    batches: Iterable[Sequence[Response]],
    collator: Collator,
    device: torch.device,
    autocast: torch.dtype | None = None,
    *,
    cache_weights: bool = True,
    logits: bool = False,
    done: Callable[[Sequence[Response]], object] | None = None,
) -> list[Scored]:
    """Log-odds and entropy of every response token, one entry a response, in the batches' order.

    In evaluation mode, without gradients; the model is left in the mode that it was in.

    Args:
      model: with the log-odds head, on `device`.
      batches: the responses of each forward pass.
      autocast: the dtype that matrix products are in; None leaves it to the weights.
      cache_weights: keep autocast's copies of the weights through a forward pass. FSDP2 frees weights behind each layer:
        False where the model may be sharded.
      logits: the target tokens' logits, and the mass of the argmax token, too, from the same hidden states; one more product
        with the vocabulary.
      done: called with each batch when it is scored, for a progress bar.
    """
    result: list[Scored] = []
    with evaluating(model), _of_logits(model if logits else None) as seen:
        for batch in batches:
            inputs = model_inputs(collator([Row("", [response]) for response in batch]))
            inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
            enabled = bool(autocast)
            with torch.autocast(device.type, autocast or torch.bfloat16, enabled=enabled, cache_enabled=cache_weights):
                log_odds, entropy = model(**inputs)
            tokens = [response.tokens for response in batch]
            columns = [x.float().cpu().split(tokens) for x in (log_odds, entropy, *seen)]
            seen.clear()
            result += [Scored(*parts) for parts in zip(*columns, strict=True)]
            if done is not None:
                done(batch)
    return result


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and afterwards the mode before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def longest_first(lengths: Sequence[int], batch_size: int, together: Sequence[Hashable] = ()) -> list[list[int]]:
    """Places in `lengths`, in batches of about one length; equal ones of `together` in the place of the longest of them.

    >>> longest_first([3, 9, 5, 4], 2), longest_first([3, 9, 5, 4], 2, "abba")
    ([[1, 2], [3, 0]], [[1, 2], [3, 0]])
    """
    keys = together or range(len(lengths))
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    longest = dict(sorted(zip(keys, lengths, strict=True), key=lambda x: x[1]))
    order = sorted(range(len(lengths)), key=lambda i: (-longest[keys[i]], first[keys[i]], -lengths[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@contextmanager
def _of_logits(model: Any) -> Iterator[list[Tensor]]:
    """A list to which every forward pass of the head adds target logits and argmax mass; of no model: an empty one."""
    seen: list[Tensor] = []

    def keep(head: Any, args: tuple[Any, ...]) -> None:
        hidden, labels = args[:2]
        seen.append(analysis.target_logits(hidden, head.weight, labels, **head.forward.options))
        seen.append(analysis.argmax_mass(hidden, head.weight, **head.forward.options))

    if model is None:
        yield seen
        return
    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
