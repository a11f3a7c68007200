"""How far a policy moved from its reference on some responses: figures 3 and 4, and displacement, as numbers."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bnf_core import analysis
from bnf_train.analyze.figures import BINS, DISPLACEMENT, LABELS, METRICS
from bnf_train.data import Collator, Response
from bnf_train.errors import UsageError
from bnf_train.model.score import longest_first, score


@dataclass
class Sample:
    """Responses with the rows of the data that they answer; `cut`: generation stopped at --max_new_tokens."""

    responses: list[Response]
    rows: list[int]
    cut: list[bool] | None = None  # None: the data's own responses
    texts: list[str] = field(default_factory=list)


@dataclass
class Scores:
    """Of each response token under one model, flat over the responses in their order; float32."""

    log_odds: Tensor
    logits: Tensor
    argmax_mass: Tensor  # probability of the most likely token in its place


def scores(
    model: Any, sample: Sample, collator: Collator, device: torch.device, autocast: torch.dtype | None, batch_size: int
) -> Scores:
    """Log-odds, target logits and argmax mass of every response token, from the same hidden states.

    `model` has the log-odds head. Batches are those of the responses alone, so that two models are run alike, and equal
    ones give equal numbers.

    Raises:
      UsageError: NaN or infinite log-odds.
    """
    prompts = [tuple(r.input_ids[: r.prompt_length]) for r in sample.responses] if collator.share_prompts else ()
    places = longest_first([len(r.input_ids) for r in sample.responses], batch_size, prompts)
    batches = [[sample.responses[i] for i in batch] for batch in places]
    with tqdm(total=len(sample.responses), desc="log-odds", leave=False, disable=None) as bar:
        scored = score(model, batches, collator, device, autocast, logits=True, done=lambda batch: bar.update(len(batch)))
    values = dict(zip(itertools.chain.from_iterable(places), scored, strict=True))
    log_odds = [values[i].log_odds for i in range(len(values))]
    logits = [z for i in range(len(values)) if (z := values[i].logits) is not None]
    for row, one, other in zip(sample.rows, log_odds, logits, strict=True):
        if not (one.isfinite().all() and other.isfinite().all()):
            raise UsageError(
                f"row {row}: a response has NaN or infinite log-odds under {model.name_or_path}; look for "
                "damaged weights, or leave out --bf16."
            )
    mass = [x for i in range(len(values)) if (x := values[i].argmax_mass) is not None]
    return Scores(torch.cat(log_odds), torch.cat(logits), torch.cat(mass))


def shifts(sample: Sample, policy: Scores, reference: Scores) -> tuple[dict[str, list[float]], Tensor]:
    """Each metric of each response (figure 3, displacement), and the log-likelihood shift of each token (figure 4)."""
    lengths = torch.tensor([r.tokens for r in sample.responses])
    response = torch.arange(len(lengths)).repeat_interleave(lengths)
    odds, logits = (policy.log_odds, reference.log_odds), (policy.logits, reference.logits)
    values = {
        "log_likelihood_shift": analysis.log_likelihood_shift(*odds, response),
        "logit_shift": analysis.logit_shift(*logits, response),
        "log_likelihood_shift_per_token": analysis.log_likelihood_shift(*odds, response, normalized=True),
        "logit_shift_per_token": analysis.logit_shift(*logits, response, normalized=True),
        "gini": analysis.gini(analysis.token_logit_shift(*logits), response),
        "displacement": analysis.displacement(*odds, response),
        "ref_argmax_mass": _mean(reference.argmax_mass, lengths),
        "argmax_mass": _mean(policy.argmax_mass, lengths),
    }
    return {name: x.tolist() for name, x in values.items()}, analysis.token_log_likelihood_shift(*odds)


def _mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Of each response's tokens."""
    return torch.stack([part.mean() for part in values.split(lengths.tolist())])


def report_of(sample: Sample, values: dict[str, list[float]]) -> dict[str, Any]:
    """One policy's entry in analysis.json: a list per metric over the responses, and means and medians."""
    each: dict[str, list[Any]] = {"row": sample.rows, "tokens": [r.tokens for r in sample.responses], **values}
    if sample.cut is None:
        each["preferred"] = [r.preferred for r in sample.responses]
    else:
        each |= {"cut": sample.cut, "text": sample.texts}
    groups = {"all": list(range(len(sample.rows)))}
    if sample.cut is None:
        sides = {name: [i for i, r in enumerate(sample.responses) if r.preferred is label] for name, label in LABELS.items()}
        groups |= {name: side for name, side in sides.items() if side}
    return {"summary": {name: _summary(each, at) for name, at in groups.items()}, "responses": each}


def _summary(each: dict[str, list[Any]], at: Sequence[int]) -> dict[str, Any]:
    def both(name: str) -> dict[str, float]:
        values = [each[name][i] for i in at]
        return {"mean": statistics.fmean(values), "median": statistics.median(values)}

    return {"responses": len(at)} | {name: both(name) for name in ("tokens", *METRICS, *DISPLACEMENT)}


def bins(token_shifts: dict[str, Tensor], bins_of: str) -> dict[str, Any]:
    """Figure 4: deciles of one policy's token shifts, and the share of every policy's tokens between them."""
    edges = analysis.percentile_edges(token_shifts[bins_of].double(), BINS)
    shares = {name: analysis.bin_shares(x.double(), edges).tolist() for name, x in token_shifts.items()}
    return {"bins_of": bins_of, "edges": edges.tolist(), "shares": shares}
