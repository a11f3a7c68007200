"""Answers of a model on this machine."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bnf_train.data import Prompt
from bnf_train.model.generate import generate
from bnf_train.sample.answers import Answers

Found = Iterator[tuple[int, Answers]]


def numbered_seed(seed: int, number: int) -> int:
    """A seed of its own for each number, of 31 bits.

    >>> numbered_seed(0, 1) == numbered_seed(0, 1), numbered_seed(0, 1) == numbered_seed(1, 0)
    (True, False)
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


def from_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    there: Collection[int],
    device: torch.device,
    autocast: torch.dtype | None = None,
    *,
    samples: int,
    batch_size: int,
    seed: int,
    **how: Any,
) -> Found:
    """Answers to every prompt whose place is not among `there`, as they come.

    Batches are the same whatever is there, and each has a seed of its own. A batch of which a part is there is drawn again, and
    the rest of it kept.

    Args:
      batch_size: answers at once, at least those to one prompt.
      how: temperature, top_p and max_new_tokens of `model.generate`.
    """
    longest_first = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].ids))
    each = max(1, batch_size // samples)
    for number, first in enumerate(range(0, len(prompts), each)):
        places = longest_first[first : first + each]
        if all(place in there for place in places):
            continue
        ids = [prompts[place].ids for place in places for _ in range(samples)]
        found = generate(
            model, tokenizer, ids, device, autocast, batch_size=len(ids), seed=numbered_seed(seed, number), **how
        )  # fmt: skip
        for at, place in enumerate(places):
            if place not in there:
                yield place, _answers(found[at * samples : (at + 1) * samples], tokenizer.decode)


def _answers(found: Sequence[Any], decode: Callable[..., Any]) -> Answers:
    texts = [str(decode(answer.tokens, skip_special_tokens=True)) for answer in found]
    return Answers(texts, [answer.cut for answer in found], sum(len(answer.tokens) for answer in found))
