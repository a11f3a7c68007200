"""A model's own responses to prompts: the one loop of generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from bnf_train.model.score import evaluating, longest_first


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
    pad, ends, own = int(tokenizer.pad_token_id or 0), end_tokens(model, tokenizer), model.generation_config
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(ends) or None, pad_token_id=pad, **{"do_sample": False} | sampling
    )
    result: dict[int, Generated] = {}
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model.generation_config = config
        try:
            for batch in longest_first([len(prompt) for prompt in prompts], batch_size):
                ids = [list(prompts[i]) for i in batch]
                longest = len(ids[0])
                inputs = torch.tensor([[pad] * (longest - len(x)) + x for x in ids], device=device)
                mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in ids], device=device)
                with torch.autocast(device.type, autocast or torch.bfloat16, enabled=bool(autocast)):
                    output = model.generate(input_ids=inputs, attention_mask=mask)[:, longest:]
                for i, tokens in zip(batch, output.tolist(), strict=True):
                    end = next((k + 1 for k, token in enumerate(tokens) if token in ends), len(tokens))
                    result[i] = Generated(tokens[:end], tokens[end - 1] not in ends)
                if done is not None:
                    done(len(batch))
        finally:
            model.generation_config = own
    return [result[i] for i in range(len(prompts))]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends a turn: the tokenizer's EOS, and what the checkpoint says (gemma: <end_of_turn>)."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return {int(end) for end in (*several, tokenizer.eos_token_id) if end is not None}
