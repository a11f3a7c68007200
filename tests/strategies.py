"""Hypothesis strategies: logits and responses that reach the corners on purpose."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bnf_core import TokenBatch

IGNORE = -100


@dataclass
class Responses:
    """A padded batch, as `bnf_core.reference.bnf_loss` takes it."""

    logits: Tensor  # (sequences, positions, vocab)
    ref_logits: Tensor
    labels: Tensor  # (sequences, positions)
    preferred: Tensor  # (sequences,)

    @property
    def mask(self) -> Tensor:
        return self.labels != IGNORE

    def flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logits, ref_logits and labels of the response tokens, and the response of each."""
        response = torch.arange(len(self.labels)).unsqueeze(1).expand_as(self.labels)
        return self.logits[self.mask], self.ref_logits[self.mask], self.labels[self.mask], response[self.mask]


# ordinary logits, ties, saturation on both sides
finite_logit = st.one_of(
    st.floats(-5, 5),
    st.integers(-2, 2).map(float),
    st.floats(-40, 40),
    st.sampled_from([-400.0, -100.0, 0.0, 100.0, 400.0]),
)
# tokens that the model rules out
any_logit = st.one_of(finite_logit, finite_logit, finite_logit, st.just(float("-inf")))


@st.composite
def logit_rows(draw: st.DrawFn, y: int, vocab: int) -> list[float]:
    """One position's logits: anything but the target may be ruled out."""
    row = draw(st.lists(any_logit, min_size=vocab, max_size=vocab))
    row[y] = draw(finite_logit)
    return row


@st.composite
def responses(
    draw: st.DrawFn,
    dtype: torch.dtype = torch.float64,
    max_sequences: int = 3,
    max_positions: int = 4,
    max_vocab: int = 6,
) -> Responses:
    """A padded batch of responses, each with at least one token; policy and reference near, far, or the same."""
    vocab = draw(st.integers(1, max_vocab), label="vocab")
    sequences = draw(st.integers(1, max_sequences), label="sequences")
    positions = draw(st.integers(1, max_positions), label="positions")
    labels = []
    for _ in range(sequences):
        ids = draw(st.lists(st.integers(0, vocab - 1) | st.just(IGNORE), min_size=positions, max_size=positions))
        if all(i == IGNORE for i in ids):
            ids[draw(st.integers(0, positions - 1))] = draw(st.integers(0, vocab - 1))
        labels.append(ids)
    relation = draw(st.sampled_from(["independent", "near", "same"]), label="reference")
    policy = [[draw(logit_rows(max(y, 0), vocab)) for y in ids] for ids in labels]
    if relation == "independent":
        reference = [[draw(logit_rows(max(y, 0), vocab)) for y in ids] for ids in labels]
    else:
        step = draw(st.floats(-1e-3, 1e-3)) if relation == "near" else 0.0
        reference = [[[z + step * (j % 2) for j, z in enumerate(row)] for row in rows] for rows in policy]
    preferred = draw(st.lists(st.booleans(), min_size=sequences, max_size=sequences), label="preferred")
    return Responses(
        torch.tensor(policy, dtype=torch.float64).to(dtype),
        torch.tensor(reference, dtype=torch.float64).to(dtype),
        torch.tensor(labels),
        torch.tensor(preferred),
    )


def probabilities(*, interior: bool = False) -> st.SearchStrategy[float]:
    """Likelihoods from 0 to 1, both ends and what is close to them included (not the ends themselves if `interior`)."""
    near = st.sampled_from([1e-300, 1e-12, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-12])
    inner = st.floats(1e-6, 1 - 1e-6) | near
    return inner if interior else inner | st.sampled_from([0.0, 1.0])


@dataclass
class PairCase:
    """Log-odds of a few pairs' tokens, with the reference's."""

    log_odds: Tensor
    batch: TokenBatch


@st.composite
def pair_cases(draw: st.DrawFn, max_pairs: int = 3, max_length: int = 5) -> PairCase:
    """Pairs in random order, one-token and longer responses, tokens from hopeless to certain (but never exactly 0 or 1)."""
    pairs = draw(st.integers(1, max_pairs), label="pairs")
    sides = draw(st.permutations([(pair, label) for pair in range(pairs) for label in (True, False)]))
    lengths = [draw(st.integers(1, max_length)) for _ in sides]
    value = st.floats(-8, 8) | st.floats(-30, 20)
    near = draw(st.booleans(), label="policy near reference")
    log_odds = [draw(value) for _ in range(sum(lengths))]
    ref = [x + draw(st.floats(-0.1, 0.1)) if near else draw(value) for x in log_odds]
    batch = TokenBatch(
        torch.arange(len(sides)).repeat_interleave(torch.tensor(lengths)),
        torch.tensor([label for _, label in sides]),
        torch.tensor([pair for pair, _ in sides]),
        ref_log_odds=torch.tensor(ref, dtype=torch.float64),
        z0=torch.tensor(draw(st.floats(-3, 10)), dtype=torch.float64),
    )
    return PairCase(torch.tensor(log_odds, dtype=torch.float64), batch)


SIDE = {"side": st.sampled_from(["both", "dispreferred"])}
KTO = {"beta": st.floats(0.01, 5), "lambda_d": st.floats(0, 2), "lambda_u": st.floats(0, 2)}
# hyper-parameters of every objective
HYPER: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "bdpo": {"beta": st.floats(0.01, 5), "lambda_": st.floats(0.01, 1)},
    "bnf": SIDE,
    "bnf_binary": {},
    "bnf_one_sided": {},
    "cispo": {"epsilon_low": st.floats(0, 2), "epsilon_high": st.floats(0, 5)} | SIDE,
    "dppo_tv": {"delta": st.floats(0.01, 1), "most": st.floats(0.1, 20)} | SIDE,
    "npo": {"beta": st.floats(0.01, 5)},
    "ppo_clip": {"epsilon": st.floats(0.01, 0.9)} | SIDE,
    "sapo": {"tau_pos": st.floats(0.1, 5), "tau_neg": st.floats(0.1, 5)} | SIDE,
    "satimp": {"beta1": st.floats(0, 6), "beta2": st.floats(0, 6)} | SIDE,
    "sim_npo": {"beta": st.floats(0.1, 10), "gamma": st.floats(-2, 5)},
    "tnpo": {"beta": st.floats(0.01, 5)} | SIDE,
    "topr": {},
    "unlikelihood": SIDE,
    "w_reinforce": {"lambda_": st.floats(0, 3)},
    "wga": {"beta": st.floats(0.01, 5)} | SIDE,
    "bnf_contrastive": {"beta": st.floats(0.01, 5)},
    "dpo": {"beta": st.floats(0.01, 5)},
    "dpop": {"beta": st.floats(0.01, 1), "lambda_": st.floats(0, 60)},
    "ipo": {"tau": st.floats(0.01, 5)},
    "ipo_avg": {"tau": st.floats(0.01, 5)},
    "kto": KTO,
    "kto_fixed": KTO | {"z0": st.floats(-3, 10)},
    "log_likelihood": {},
    "nll_pll": {},
    "orpo": {"lambda_": st.floats(0, 3)},
    "r_dpo": {"beta": st.floats(0.01, 5), "alpha": st.floats(-1, 1)},
    "rpo": {"beta": st.floats(0.01, 5), "alpha": st.floats(0, 2)},
    "simpo": {"beta": st.floats(0.1, 10), "gamma": st.floats(-2, 5)},
    "slic_hf": {"delta": st.floats(-5, 20), "lambda_": st.floats(0, 3)},
}


@st.composite
def long_responses(draw: st.DrawFn, tokens: int = 1500) -> Responses:
    """One very long response beside a one-token one, over a small vocabulary; policy and reference unrelated."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32), label="seed"))
    logits, ref_logits = 5 * torch.randn(2, 2, tokens, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(4, (2, tokens), generator=generator)
    labels[1, 1:] = IGNORE
    return Responses(logits, ref_logits, labels, torch.tensor([draw(st.booleans()), draw(st.booleans())]))
