"""A model's own responses to prompts: the one loop of generation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from bnf_train.model.score import evaluating, longest_first

ROWS_AT_ONCE = 64  # of greedy and sampled responses, at least


@dataclass(frozen=True)
class Generated:
    """One response: token ids, the end-of-turn token among them, and whether it was cut before one came."""

    tokens: list[int]
    cut: bool


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    autocast: torch.dtype | None = None,
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    done: Callable[[int], object] | None = None,
) -> list[Generated]:
    """A response to each prompt, up to the first end-of-turn token or `max_new_tokens`; greedy unless told otherwise.

    In evaluation mode. The model's mode, its GenerationConfig (which may sample or penalise repetition) and, where a seed
    is given, the state of the random numbers are afterwards what they were.

    Args:
      prompts: token ids; batches are of prompts of about one length, padded on the left.
      temperature: 0 takes the most likely token; above, tokens are drawn from softmax(logits / temperature).
      top_p: draw from the fewest tokens that have this probability together.
      seed: of the draws.
      done: called with the size of each batch when it is there, for a progress bar.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    result: dict[int, Generated] = {}
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with (
        _generating(model, tokenizer, max_new_tokens, sampling) as run,
        torch.random.fork_rng(devices, enabled=seed is not None),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        for batch in longest_first([len(prompt) for prompt in prompts], batch_size):
            result |= zip(batch, run([prompts[i] for i in batch], device, autocast), strict=True)
            if done is not None:
                done(len(batch))
    return [result[i] for i in range(len(prompts))]


@torch.no_grad()
def greedy_and_sampled(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    autocast: torch.dtype | None = None,
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    places: Sequence[int] | None = None,
    batch_size: int = 8,
    cache_weights: bool = True,
    sharded: bool = False,
    done: Callable[[int], object] | None = None,
) -> list[list[Generated]]:
    """To each prompt the greedy response, then so many drawn from softmax(logits / temperature), in the same batches.

    A token is drawn by a uniform number of its own (inverse transform sampling), which depends on seed, prompt, sample and
    position alone: other batches, or other processes, draw the same, up to the rounding of logits. The model and the state
    of the random numbers are afterwards what they were.

    Args:
      places: of the prompts among all that are asked, which seed their draws; None: 0, 1, 2, ...
      batch_size: prompts at once; more where all their responses are fewer than ROWS_AT_ONCE.
      cache_weights: keep autocast's copies of the weights; False where the model may be sharded (see `score`).
      sharded: several processes hold the model together: each must call this with as many prompts.
      done: called with the number of prompts of each batch when it is there, for a progress bar.
    """
    places = range(len(prompts)) if places is None else places
    each = 1 + samples
    result: dict[int, list[Generated]] = {}
    with _generating(model, tokenizer, max_new_tokens, {}) as run:
        for batch in longest_first([len(prompt) for prompt in prompts], max(batch_size, ROWS_AT_ONCE // each)):
            draws = [
                None if sample == 0 else np.random.default_rng([seed, places[i], sample]).random(max_new_tokens)
                for i in batch
                for sample in range(each)
            ]
            drawn = _Drawn(draws, temperature, device)
            found = run([prompts[i] for i in batch for _ in range(each)], device, autocast, cache_weights, drawn, sharded)
            result |= {i: found[at * each : (at + 1) * each] for at, i in enumerate(batch)}
            if done is not None:
                done(len(batch))
    return [result[i] for i in range(len(prompts))]


class _Drawn(LogitsProcessor):
    """Leaves of the logits of each row the token that its uniform number draws; greedy rows stay as they are.

    Args:
      uniform: of each row, a number from [0, 1) for each new token; None: a greedy row.
    """

    def __init__(self, uniform: Sequence[Any], temperature: float, device: torch.device) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        drawn = [row for row, numbers in enumerate(uniform) if numbers is not None]
        self.rows = torch.tensor(drawn, dtype=torch.long, device=device)
        self.uniform = torch.tensor(np.array([uniform[row] for row in drawn]), dtype=self.dtype, device=device)
        self.temperature, self.step = temperature, 0

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows alone."""
        place = {int(row): at for at, row in enumerate(self.rows)}
        self.uniform = self.uniform[[place[row] for row in rows if row in place]]
        drawn = [at for at, row in enumerate(rows) if row in place]
        self.rows = torch.tensor(drawn, dtype=torch.long, device=self.rows.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not len(self.rows):
            return scores
        cumulated = (scores[self.rows].to(self.dtype) / self.temperature).softmax(-1).cumsum(-1)
        # of the last sum, which rounding leaves beside 1; a token of probability 0 adds nothing, so that none is drawn
        wanted = self.uniform[:, self.step % self.uniform.shape[1], None] * cumulated[:, -1:]
        tokens = torch.searchsorted(cumulated, wanted, right=True).clamp(max=scores.shape[-1] - 1)
        self.step += 1  # a sharded model goes on until all processes have finished
        only = torch.full_like(scores[self.rows], -torch.inf).scatter_(1, tokens, 0.0)
        return scores.index_copy(0, self.rows, only)


class _HalfHaveEnded(StoppingCriteria):
    """Stops all rows once half of them have ended."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends
        self.ended: Any = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ended = self.ended | torch.isin(input_ids[:, -1], self.ends)
        return (self.ended.float().mean() >= 0.5).expand(len(input_ids))


class _Batches:
    """Prompts of a batch to responses, by `model.generate`."""

    def __init__(self, model: Any, pad: int, ends: set[int], max_new_tokens: int) -> None:
        self.model, self.pad, self.ends, self.max_new_tokens = model, pad, ends, max_new_tokens
        self.drops = False  # rows that have ended: whether the model's cache can do without them, the first batch shows

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        device: torch.device,
        autocast: torch.dtype | None,
        cache_weights: bool = True,
        drawn: _Drawn | None = None,
        sharded: bool = False,
    ) -> list[Generated]:
        """A response to each prompt; the longest prompt is the first.

        With `drawn`, rows that have ended are not computed any more, where that is possible.
        """
        longest = len(prompts[0])
        ids = torch.tensor([[self.pad] * (longest - len(x)) + list(x) for x in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts], device=device)
        more: dict[str, Any] = {} if drawn is None else {"logits_processor": LogitsProcessorList([drawn])}
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=bool(autocast), cache_enabled=cache_weights):
            if drawn is None or sharded:
                found = self.model.generate(input_ids=ids, attention_mask=mask, synced_gpus=sharded, **more)[
                    :, longest:
                ].tolist()
            else:
                found = self._dropping(ids, mask, drawn, more)
        result = []
        for tokens in found:
            end = next((k + 1 for k, token in enumerate(tokens) if token in self.ends), len(tokens))
            result.append(Generated(tokens[:end], tokens[end - 1] not in self.ends))
        return result

    def _dropping(self, ids: Tensor, mask: Tensor, drawn: _Drawn, more: dict[str, Any]) -> list[list[int]]:
        """New tokens of each row; whenever half of the rows have ended, the others go on alone."""
        longest, ends = ids.shape[1], torch.tensor(sorted(self.ends), dtype=torch.long, device=ids.device)
        rows = list(range(len(ids)))
        found: list[list[int]] = [[] for _ in rows]
        while True:
            left = self.max_new_tokens - (ids.shape[1] - longest)
            stop = {"stopping_criteria": StoppingCriteriaList([_HalfHaveEnded(ends)])} if self.drops else {}
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=left, return_dict_in_generate=True, **more, **stop
            )
            new = output.sequences[:, longest:]
            for row, tokens in zip(rows, new.tolist(), strict=True):
                found[row] = tokens
            going = (~torch.isin(new, ends).any(dim=1)).nonzero().flatten().tolist()
            cache: Any = getattr(output, "past_key_values", None)
            if not self.drops or not going or new.shape[1] == self.max_new_tokens:
                self.drops = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
                return found
            drawn.keep(going)
            cache.batch_select_indices(torch.tensor(going, device=ids.device))
            more["past_key_values"] = cache
            ids, rows = output.sequences[going], [rows[at] for at in going]
            mask = torch.cat([mask[going], mask.new_ones(len(going), ids.shape[1] - mask.shape[1])], dim=1)


@contextmanager
def _generating(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, sampling: dict[str, Any]
) -> Iterator[_Batches]:
    """Within: evaluation mode, and a GenerationConfig that says this and no more."""
    pad, ends, own = int(tokenizer.pad_token_id or 0), end_tokens(model, tokenizer), model.generation_config
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(ends) or None, pad_token_id=pad, **{"do_sample": False} | sampling
    )
    with evaluating(model), torch.compiler.set_stance("force_eager"):  # layers would be compiled anew as the cache grows
        model.generation_config = config
        try:
            yield _Batches(model, pad, ends, max_new_tokens)
        finally:
            model.generation_config = own


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends a turn: the tokenizer's EOS, and what the checkpoint says (gemma: <end_of_turn>)."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return {int(end) for end in (*several, tokenizer.eos_token_id) if end is not None}
