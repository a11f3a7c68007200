"""Held-out responses token by token: what each weighs in the loss, and how far its log-likelihood moved."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bnf_core import bnf_weight
from bnf_train.data import Collator, Response, Row
from bnf_train.model.score import score


@dataclass
class TokenExample:
    """One response: the text of its tokens that count, and per token the weight w and the log-likelihood shift in nats."""

    prompt: str
    tokens: list[str]
    weight: list[float]
    shift: list[float]
    preferred: bool


def examples(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collator: Collator,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    bf16: bool,
    count: int = 8,
) -> list[TokenExample]:
    """`count` responses under `model`: w = exp(min(0, l - l_ref)) and shift = log sigmoid(l) - log sigmoid(l_ref) per token.

    As many preferred as dispreferred ones as far as there are, spread over the rows; the rows hold reference log-odds,
    the model is on `device`. Every process of a run calls this: the forward of a sharded model needs all of them.
    """
    chosen = _choose(rows, count)
    batches = [[response] for response in chosen]  # one at a time: no padding, and memory for one
    scored = score(model, batches, collator, device, torch.bfloat16 if bf16 else None, cache_weights=False)
    result = []
    for response, of in zip(chosen, scored, strict=True):
        assert response.ref_log_odds is not None
        log_odds, ref_log_odds = of.log_odds, response.ref_log_odds
        texts = token_texts(tokenizer, response.input_ids[response.prompt_length :])
        result.append(
            TokenExample(
                prompt=tokenizer.decode(response.input_ids[: response.prompt_length], skip_special_tokens=True).strip(),
                tokens=[texts[at - response.prompt_length] for at in response.counted],
                weight=bnf_weight(log_odds, ref_log_odds).tolist(),
                shift=(F.logsigmoid(log_odds) - F.logsigmoid(ref_log_odds)).tolist(),
                preferred=response.preferred,
            )
        )
    return result


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character spelt by several tokens stands with the last of them."""

    def decode(start: int, end: int) -> str:
        return str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))

    texts: list[str] = []
    start = read = 0  # decoded from the token before, since some tokenizers drop the space in front of the first one
    for end in range(1, len(ids) + 1):
        before, now = decode(start, read), decode(start, end)
        unfinished = now.endswith("\ufffd") and end < len(ids)
        texts.append("" if unfinished else now[len(before) :])
        if not unfinished:
            start, read = read, end
    return texts


def _choose(rows: Sequence[Row], count: int) -> list[Response]:
    """Evenly spaced over the rows, so that the two sides of a pair come together."""
    responses = [response for row in rows for response in row.responses]
    sides = [[i for i, r in enumerate(responses) if r.preferred is label] for label in (True, False)]
    dispreferred = min(len(sides[1]), count // 2)
    preferred = min(len(sides[0]), count - dispreferred)
    counts = (preferred, min(len(sides[1]), count - preferred))
    chosen = [side[k * len(side) // n] for side, n in zip(sides, counts, strict=True) for k in range(n)]
    return [responses[i] for i in sorted(chosen)]
