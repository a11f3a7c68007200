"""Values by hand: one case a formula, so that a constant cannot hide behind a gradient."""

import math
from dataclasses import replace

import pytest
import torch

from bnf_core import OBJECTIVES, TokenBatch, bnf, reference, token_log_odds

# pi(y_w) = 0.5 * 0.8 over two tokens, pi(y_l) = 0.1 over one; the reference has 0.5 everywhere
LOG_ODDS = torch.logit(torch.tensor([0.5, 0.8, 0.1], dtype=torch.float64))
BATCH = TokenBatch(
    torch.tensor([0, 0, 1]),
    torch.tensor([True, False]),
    torch.tensor([0, 0]),
    ref_log_odds=torch.zeros(3, dtype=torch.float64),
    z0=torch.tensor(0.2, dtype=torch.float64),
)
LOGP_W, LOGP_L = math.log(0.4), math.log(0.1)
R_W, R_L = math.log(0.4 / 0.25), math.log(0.1 / 0.5)
M_W, M_L = LOGP_W / 2, LOGP_L
P_W, P_L = math.exp(M_W), math.exp(M_L)
Z0 = 0.2


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


EXPECTED: dict[str, tuple[dict[str, float], list[float]]] = {
    "log_likelihood": ({}, [-LOGP_W / 2, LOGP_L]),
    "nll_pll": ({}, [-LOGP_W + LOGP_L]),
    "slic_hf": ({"delta": 2.0, "lambda_": 0.3}, [2.0 - LOGP_W + LOGP_L - 0.3 * LOGP_W]),
    "dpo": ({"beta": 0.7}, [-math.log(sigmoid(0.7 * (R_W - R_L)))]),
    "ipo": ({"tau": 0.2}, [(R_W - R_L - 2.5) ** 2]),
    "simpo": ({"beta": 2.5, "gamma": 0.4}, [-math.log(sigmoid(2.5 * (M_W - M_L) - 0.4))]),
    "r_dpo": ({"beta": 0.7, "alpha": 0.2}, [-math.log(sigmoid(0.7 * (R_W - R_L) + 0.2 * (2 - 1)))]),
    "orpo": ({"lambda_": 0.6}, [-M_W - 0.6 * math.log(sigmoid(math.log(P_W / (1 - P_W)) - math.log(P_L / (1 - P_L))))]),
    "dpop": ({"beta": 0.7, "lambda_": 3.0}, [-math.log(sigmoid(0.7 * (R_W - R_L)))]),  # r_w > 0: no penalty
    "kto_fixed": (
        {"beta": 0.7, "lambda_d": 1.5, "lambda_u": 0.5, "z0": 0.2},
        [1.5 * (1 - sigmoid(0.7 * (R_W - 0.2))), 0.5 * (1 - sigmoid(0.7 * (0.2 - R_L)))],
    ),
    "kto": (
        {"beta": 0.7, "lambda_d": 1.5, "lambda_u": 0.5},
        [1.5 * (1 - sigmoid(0.7 * (R_W - Z0))), 0.5 * (1 - sigmoid(0.7 * (Z0 - R_L)))],
    ),
    "ipo_avg": ({"tau": 0.2}, [(R_W / 2 - R_L - 2.5) ** 2]),
    "rpo": ({"beta": 0.7, "alpha": 0.4}, [-math.log(sigmoid(0.7 * (R_W - R_L))) - 0.4 * LOGP_W / 2]),
    "bdpo": ({"beta": 0.7, "lambda_": 0.3}, [-math.log(sigmoid(0.7 * (R_W - math.log(0.3 * math.exp(R_L) + 0.7))))]),
    # a token of 0.1 under the policy and 0.5 under the reference: rho = 0.2
    "bnf_one_sided": ({}, [-LOGP_W / 2, (1 / 9) * LOGP_L]),
    "unlikelihood": ({}, [-LOGP_W / 2, -math.log(0.9)]),
    "wga": ({"beta": 2.0}, [-LOGP_W / 2, 0.1**2 * LOGP_L]),
    "satimp": ({"beta1": 2.0, "beta2": 0.5}, [-LOGP_W / 2, 0.1**2 * 0.9**0.5 * LOGP_L]),
    "tnpo": ({"beta": 0.5}, [-LOGP_W / 2, 4 * math.log(1 + 0.2**0.5)]),
    "w_reinforce": ({"lambda_": 0.25}, [-0.25 * LOGP_W / 2, LOGP_L]),
    "npo": ({"beta": 0.5}, [-LOGP_W, 4 * math.log(1 + 0.2**0.5)]),
    "sim_npo": ({"beta": 0.5, "gamma": 0.3}, [-LOGP_W / 2, -4 * math.log(sigmoid(-0.5 * LOGP_L - 0.3))]),
    "topr": ({}, [-LOGP_W, 0.2 * LOGP_L]),
    "ppo_clip": ({"epsilon": 0.3, "side": "dispreferred"}, [-LOGP_W / 2, 0.7]),
    "cispo": ({"epsilon_low": 0.3, "side": "dispreferred"}, [-LOGP_W / 2, 0.7 * LOGP_L]),
    "sapo": ({"tau_neg": 2.0, "side": "dispreferred"}, [-LOGP_W / 2, 2 * sigmoid(2 * (0.2 - 1))]),
    "dppo_tv": ({"delta": 0.5, "side": "dispreferred"}, [-LOGP_W / 2, 0.2 * LOGP_L]),
    # w = 1, 1 and odds 1/9 against 1; without batch.entropy its term is left out
    "bnf": ({}, [-LOGP_W / 2, (1 / 9) * LOGP_L]),
    # f_y = 1, 1 and 0.1 / 0.5
    "bnf_binary": ({}, [-LOGP_W / 2, 0.2 * math.log(0.1) + 0.8 * math.log(0.9)]),
    "bnf_contrastive": ({"beta": 0.7}, [sigmoid(0.7 * (R_L - R_W)) * (-LOGP_W / 2 + (1 / 9) * LOGP_L)]),
}


def test_every_objective_is_here() -> None:
    assert set(EXPECTED) == set(OBJECTIVES)


@pytest.mark.parametrize("name", EXPECTED)
def test_value(name: str) -> None:
    hyper, expected = EXPECTED[name]
    assert OBJECTIVES[name](LOG_ODDS, BATCH, **hyper).tolist() == pytest.approx(expected, rel=1e-12)


def test_dpop_penalty() -> None:
    """Where the preferred side has lost likelihood: -log sigmoid(beta (r_w - r_l - lambda max(0, -r_w)))."""
    ref = BATCH.ref_log_odds
    assert ref is not None
    batch = TokenBatch(BATCH.response, BATCH.preferred, BATCH.pair, ref_log_odds=ref + math.log(9))  # 0.9 everywhere
    r_w, r_l = math.log(0.4 / 0.81), math.log(0.1 / 0.9)
    expected = -math.log(sigmoid(0.7 * (r_w - r_l + 3 * r_w)))
    assert OBJECTIVES["dpop"](LOG_ODDS, batch, beta=0.7, lambda_=3.0).item() == pytest.approx(expected, rel=1e-12)


def test_slic_inside_and_outside_its_margin() -> None:
    gap = LOGP_W - LOGP_L
    inside, outside = (OBJECTIVES["slic_hf"](LOG_ODDS, BATCH, delta=gap + d, lambda_=0.0).item() for d in (0.5, -0.5))
    assert (inside, outside) == pytest.approx((0.5, 0))


def test_constants_of_the_gradient_are_constants() -> None:
    """Nothing flows into the reference, nor into a target, whoever asks."""
    z = torch.randn(1, 2, 3, requires_grad=True)
    ref = torch.randn(1, 2, 3, requires_grad=True)
    labels, preferred = torch.tensor([[0, 2]]), torch.tensor([True])
    for target in (reference.dynamic_target(z, ref, labels), reference.mixture_target(z, ref, labels)):
        assert not target.requires_grad
    assert not reference.bnf_logit_gradient(z, ref, labels, preferred).requires_grad
    reference.bnf_loss(z, ref, labels, preferred).backward()
    assert ref.grad is None
    assert not any(
        x.requires_grad for x in reference.pair_logps(z.expand(2, 2, 3), ref.expand(2, 2, 3), labels.expand(2, 2))[2:4]
    )
    log_odds = torch.zeros(3, requires_grad=True)
    ref_log_odds = torch.zeros(3, requires_grad=True)
    entropy = torch.ones(3, requires_grad=True)
    batch = replace(BATCH, ref_log_odds=ref_log_odds, entropy=entropy)
    for name, objective in OBJECTIVES.items():
        objective(log_odds - 1, batch).sum().backward()
        assert ref_log_odds.grad is None, name
        assert entropy.grad is None, name
    assert bnf(log_odds, batch).requires_grad
    point = torch.tensor(0.3, requires_grad=True)
    for losses in (OBJECTIVES["kto_fixed"](log_odds, batch, z0=point), OBJECTIVES["kto"](log_odds, replace(batch, z0=point))):
        losses.sum().backward()
        assert point.grad is None


def test_the_only_token_of_a_vocabulary_is_certain() -> None:
    log_odds, entropy = token_log_odds(torch.zeros(2, 1), torch.tensor([0, 0]))
    assert log_odds.tolist() == [math.inf, math.inf]
    assert entropy.tolist() == [0, 0]
