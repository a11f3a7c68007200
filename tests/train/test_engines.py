"""Losses for the engines that people run: called as the engine calls them, their gradients are the paper's.

Each runs twice: against the engine itself where it is installed (CPU is enough), and against a stand-in of its signature.
The signatures are those of verl 0.9.1 (trainer/ppo/core_algos.py), prime-rl 0.8 of 2026-08-21 (trainer/rl/loss.py), and
torchtitan 0.3.0 (components/loss.py, called as in experiments/rl/actors/trainer.py).
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnf_core import reference, token_log_odds

EXAMPLES = Path(__file__).parents[2] / "bnf_train" / "examples"
VERL = ["old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights"]
PRIME_RL = ["trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages", "loss_mask", "loss_weights"]
ADVANTAGES = [[1.0, -1.0, -1.0], [0.7, -2.5, -0.3]]  # labels; what rewards give


@pytest.fixture(params=["installed", "stand-in"])
def loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """(example, engine's module, stand-in) -> both modules, the example imported by its name as the engine does."""

    def load(name: str, module: str, stand_in: dict[str, Any]) -> tuple[Any, Any]:
        if request.param == "installed":
            engine: Any = pytest.importorskip(module, reason="the engine is no dependency", exc_type=ImportError)
        else:
            parts = module.split(".")
            for end in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
            engine = sys.modules[module]
            vars(engine).update(stand_in)
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.delitem(sys.modules, name, raising=False)
        example = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        return example, engine

    return load


class Case:
    """Three responses of 2, 5 and 3 tokens, in float64; the reference is another model, so that weights are below 1."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden, self.head, self.ref_logits = (
            torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, 5, 4), (11, 4), (3, 5, 11))
        )
        self.hidden.requires_grad_()
        self.head.requires_grad_()
        self.tokens = torch.randint(11, (3, 5), generator=generator)
        self.mask = torch.arange(5) < torch.tensor([[2], [5], [3]])
        self.lengths = self.mask.sum(1)
        self.labels = self.tokens.masked_fill(~self.mask, -100)

    @property
    def logp(self) -> Tensor:
        return (self.hidden @ self.head.T).log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]

    @property
    def ref_logp(self) -> Tensor:
        return self.ref_logits.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]

    def spread(self, advantages: Tensor) -> Tensor:
        """One for each token; of tokens that do not count it is of no account."""
        return advantages[:, None].expand(3, 5).masked_fill(~self.mask, 7.0)

    def exact(self, advantages: Tensor, share: Tensor) -> list[Tensor]:
        """Gradients (hidden, head) of sum_i share_i |A_i| L_i, L_i eq. 4's loss of response i on full logits."""
        logits = self.hidden @ self.head.T
        losses = [
            reference.bnf_loss(*(x[i : i + 1] for x in (logits, self.ref_logits, self.labels, advantages > 0)))
            for i in range(3)
        ]
        return self.gradients((share * advantages.abs() * torch.stack(losses)).sum())

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, (self.hidden, self.head)))

    @property
    def by_response(self) -> Tensor:
        """Shares of eq. 4: the mean over responses."""
        return torch.full((3,), 1 / 3, dtype=torch.float64)

    @property
    def by_token(self) -> Tensor:
        """Shares where every token of the step counts alike."""
        return self.lengths.double() / self.lengths.sum()


def assert_same(got: list[Tensor], exact: list[Tensor]) -> None:
    assert min(gradient.abs().max() for gradient in exact) > 0.01  # there is something to agree on
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_case_has_weights_of_both_kinds() -> None:
    case = Case()
    log_odds, _ = token_log_odds(case.hidden @ case.head.T, case.labels)
    ref_log_odds, _ = token_log_odds(case.ref_logits, case.labels)
    falls = (log_odds < ref_log_odds)[case.mask]
    assert 2 < falls.sum() < len(falls) - 2
    scores = torch.tensor(ADVANTAGES[0], dtype=torch.float64)
    whole = reference.bnf_loss(case.hidden @ case.head.T, case.ref_logits, case.labels, scores > 0)
    assert_same(case.exact(scores, case.by_response), case.gradients(whole))


# --- verl --------------------------------------------------------------------------------------------------------------


def verl_stand_in() -> dict[str, Any]:
    registry: dict[str, Any] = {}

    def register_policy_loss(name: str) -> Callable[[Any], Any]:
        return lambda function: registry.setdefault(name, function)

    def agg_loss(
        loss_mat: Tensor,
        loss_mask: Tensor,
        loss_agg_mode: str,
        dp_size: int = 1,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        loss_scale_factor: int | None = None,
    ) -> Tensor:
        if loss_agg_mode == "token-mean":
            return (loss_mat * loss_mask).sum() / (batch_num_tokens or loss_mask.sum()) * dp_size
        assert loss_agg_mode == "seq-mean-token-mean"
        means = (loss_mat * loss_mask).sum(-1) / loss_mask.sum(-1)
        return means.sum() / (global_batch_size or len(means)) * dp_size

    names = {"register_policy_loss": register_policy_loss, "agg_loss": agg_loss}
    return names | {"get_policy_loss_fn": registry.__getitem__}


@pytest.fixture
def verl(loaded: Callable[..., Any]) -> tuple[Any, Any]:
    """The registered loss, and verl's module."""
    example, engine = loaded("verl_policy_loss", "verl.trainer.ppo.core_algos", verl_stand_in())
    found = engine.get_policy_loss_fn("bnf")
    assert found is example.bnf_policy_loss
    return found, engine


def verl_loss(case: Case, function: Any, advantages: Tensor, mode: str, **more: Any) -> tuple[Tensor, dict[str, Any]]:
    """As `ppo_loss` of verl calls it, in a step of 4 responses and 20 tokens over 2 processes."""
    info = {"dp_size": 2, "batch_num_tokens": 20, "global_batch_size": 4, "loss_scale_factor": None}
    arguments = {"old_log_prob": case.ref_logp, "log_prob": case.logp, "advantages": case.spread(advantages)}
    arguments |= {"response_mask": case.mask, "loss_agg_mode": mode, "config": SimpleNamespace(global_batch_info=info)}
    loss, metrics = function(**arguments | {"rollout_is_weights": None} | more)
    return loss, metrics


def test_verl_signature(verl: tuple[Any, Any]) -> None:
    function, engine = verl
    assert list(inspect.signature(function).parameters) == VERL
    if hasattr(engine, "compute_policy_loss_vanilla"):
        assert list(inspect.signature(engine.compute_policy_loss_vanilla).parameters) == VERL


@pytest.mark.parametrize("values", ADVANTAGES, ids=["labels", "rewards"])
def test_verl_gradients(verl: tuple[Any, Any], values: list[float]) -> None:
    case, advantages = Case(), torch.tensor(values, dtype=torch.float64)
    loss, metrics = verl_loss(case, verl[0], advantages, "seq-mean-token-mean")
    assert loss.shape == ()
    assert_same(case.gradients(loss), case.exact(advantages, case.by_response * 3 / 4 * 2))
    loss, _ = verl_loss(case, verl[0], advantages, "token-mean")
    assert_same(case.gradients(loss), case.exact(advantages, case.by_token * 10 / 20 * 2))
    assert list(metrics) == ["actor/bnf_weight"]
    assert 0 < metrics["actor/bnf_weight"] < 1


def test_verl_weights_of_the_rollout(verl: tuple[Any, Any]) -> None:
    case, advantages = Case(), torch.tensor(ADVANTAGES[1], dtype=torch.float64)
    weights = torch.tensor([[0.5], [1.5], [0.0]], dtype=torch.float64).expand(3, 5)
    loss, _ = verl_loss(case, verl[0], advantages, "seq-mean-token-mean", rollout_is_weights=weights)
    assert_same(case.gradients(loss), case.exact(advantages, case.by_response * weights[:, 0] * 3 / 4 * 2))


def test_verl_log_probabilities_that_rounding_put_above_zero(verl: tuple[Any, Any]) -> None:
    logp = torch.tensor([[1e-7, 0.0, -1e-7]], requires_grad=True)
    ones = torch.ones(1, 3)
    loss, metrics = verl[0](logp.detach(), logp, -ones, ones, "seq-mean-token-mean")
    loss.backward()
    assert metrics == {"actor/bnf_weight": 1.0}
    torch.testing.assert_close(logp.grad, ones / 3)


# --- prime-rl ----------------------------------------------------------------------------------------------------------


def prime_rl_stand_in() -> dict[str, Any]:
    @dataclass
    class LossInputs:
        trainer_logprobs: Tensor
        inference_logprobs: Tensor
        ref_logprobs: Tensor | None
        advantages: Tensor
        loss_mask: Tensor
        loss_weights: Tensor | None = None

    @dataclass
    class LossOutputs:
        loss: Tensor
        metrics: dict[str, Tensor]

    return {"LossInputs": LossInputs, "LossOutputs": LossOutputs}


@pytest.fixture
def prime_rl(loaded: Callable[..., Any]) -> tuple[Any, Any]:
    example, engine = loaded("prime_rl_loss", "prime_rl.trainer.rl.loss", prime_rl_stand_in())
    assert [field.name for field in fields(engine.LossInputs)] == PRIME_RL
    return example.bnf_loss, engine


def prime_rl_step(case: Case, prime_rl: tuple[Any, Any], advantages: Tensor, kwargs: dict[str, Any], **more: Any) -> Tensor:
    """As `compute_loss` of prime-rl: one sequence at a time, the sum over the tokens of the step."""
    function, engine = prime_rl
    total = case.logp.sum() * 0
    for i in range(3):
        streams = {"trainer_logprobs": case.logp, "inference_logprobs": case.ref_logp, "advantages": case.spread(advantages)}
        streams |= {"loss_mask": case.mask} | more
        inputs = engine.LossInputs(**{"ref_logprobs": None} | {name: stream[i] for name, stream in streams.items()})
        outputs = function(inputs, **kwargs)
        assert isinstance(outputs, engine.LossOutputs)
        assert 0 < outputs.metrics["bnf_weight"] <= 1
        total = total + outputs.loss
    return total / case.lengths.sum()


@pytest.mark.parametrize("values", ADVANTAGES, ids=["labels", "rewards"])
def test_prime_rl_gradients(prime_rl: tuple[Any, Any], values: list[float]) -> None:
    case, advantages = Case(), torch.tensor(values, dtype=torch.float64)
    assert_same(case.gradients(prime_rl_step(case, prime_rl, advantages, {})), case.exact(advantages, case.by_token))
    loss = prime_rl_step(case, prime_rl, advantages, {"mean_length": 10 / 3})
    assert_same(case.gradients(loss), case.exact(advantages, case.by_response))


def test_prime_rl_weights_and_reference(prime_rl: tuple[Any, Any]) -> None:
    case, advantages = Case(), torch.tensor(ADVANTAGES[1], dtype=torch.float64)
    weights = torch.tensor([[0.5], [1.5], [0.25]], dtype=torch.float64).expand(3, 5)
    streams = {"inference_logprobs": case.logp.detach(), "ref_logprobs": case.ref_logp, "loss_weights": weights}
    loss = prime_rl_step(case, prime_rl, advantages, {"reference": "ref_logprobs"}, **streams)
    assert_same(case.gradients(loss), case.exact(advantages, case.by_token * weights[:, 0]))
    with pytest.raises(ValueError, match=r"^ref_logprobs: .* no reference model; use reference = "):
        prime_rl_step(case, prime_rl, advantages, {"reference": "ref_logprobs"})


@pytest.mark.parametrize("kwargs", [{}, {"mean_length": 4.0}])
def test_prime_rl_sequence_without_a_token_that_counts(prime_rl: tuple[Any, Any], kwargs: dict[str, Any]) -> None:
    function, engine = prime_rl
    logp = torch.full((3,), -1.0, requires_grad=True)
    nothing = torch.zeros(3, dtype=torch.bool)
    outputs = function(engine.LossInputs(logp, logp.detach(), None, torch.ones(3), nothing), **kwargs)
    outputs.loss.backward()
    assert outputs.loss == 0
    assert outputs.metrics["bnf_weight"] == 0
    assert torch.equal(logp.grad, torch.zeros(3))


# --- torchtitan --------------------------------------------------------------------------------------------------------


def torchtitan_stand_in() -> dict[str, Any]:
    class ChunkedLossWrapper:
        lm_head: nn.Module | None

        @dataclass(kw_only=True, slots=True)
        class Config:
            num_chunks: int = 8

        def __init_subclass__(cls) -> None:
            config: Any = vars(cls)["Config"]
            config.build = lambda config: cls(config)

        def __init__(self, config: Any) -> None:
            self.lm_head = None

        def set_lm_head(self, lm_head: nn.Module) -> None:
            self.lm_head = lm_head

    return {"ChunkedLossWrapper": ChunkedLossWrapper}


@pytest.fixture
def torchtitan(loaded: Callable[..., Any]) -> tuple[Case, Any]:
    """A case, and the loss with its head, as the trainer makes it."""
    example, engine = loaded("torchtitan_loss", "torchtitan.components.loss", torchtitan_stand_in())
    case, loss = Case(), example.BNFLoss.Config().build()
    assert isinstance(loss, engine.ChunkedLossWrapper)
    lm_head = nn.Linear(4, 11, bias=False)
    lm_head.weight = nn.Parameter(case.head.detach())
    case.head = lm_head.weight
    loss.set_lm_head(lm_head)
    return case, loss


@pytest.mark.parametrize("flat", [False, True], ids=["sequences", "packed"])
@pytest.mark.parametrize("values", ADVANTAGES, ids=["labels", "rewards"])
def test_torchtitan_gradients(torchtitan: tuple[Case, Any], values: list[float], flat: bool) -> None:
    """Hidden states (batch, sequence, dim), as in 0.3.0, and (tokens, dim), as later; the trainer's call."""
    case, loss_fn = torchtitan
    advantages = torch.tensor(values, dtype=torch.float64)
    streams = {"generator_logprobs": case.ref_logp, "advantages": case.spread(advantages), "loss_mask": case.mask}
    pred, labels = (x.flatten(0, 1) if flat else x for x in (case.hidden, case.tokens))
    loss, metrics = loss_fn(pred, labels, 10, **{name: x.flatten() if flat else x for name, x in streams.items()})
    assert_same(case.gradients(loss), case.exact(advantages, case.by_token))
    assert set(metrics) == {"bnf/weight/mean", "trainer/entropy/mean"}
    assert 0 < metrics["bnf/weight/mean"] < 1
    entropy = -(case.hidden @ case.head.T).softmax(-1).xlogy((case.hidden @ case.head.T).softmax(-1)).sum(-1)
    torch.testing.assert_close(metrics["trainer/entropy/mean"], entropy[case.mask].mean().detach())
    logits = loss_fn.lm_head(case.hidden.detach())  # the head is what it was
    torch.testing.assert_close(logits, case.hidden @ case.head.T)


def test_torchtitan_leaves_out_tokens_without_a_log_probability(torchtitan: tuple[Case, Any]) -> None:
    case, loss_fn = torchtitan
    generator_logprobs = case.ref_logp.clone()
    generator_logprobs[1, 0] = torch.nan
    case.labels[1, 0] = -100
    advantages = torch.tensor(ADVANTAGES[1], dtype=torch.float64)
    streams = {"generator_logprobs": generator_logprobs, "advantages": case.spread(advantages), "loss_mask": case.mask}
    loss, _ = loss_fn(case.hidden, case.tokens, 9, **streams)
    lengths = torch.tensor([2, 4, 3], dtype=torch.float64)
    assert_same(case.gradients(loss), case.exact(advantages, lengths / 9))


def test_torchtitan_refuses_a_part_of_the_head(torchtitan: tuple[Case, Any]) -> None:
    case, loss_fn = torchtitan
    loss_fn.lm_head.out_features = 22  # of which this process holds half
    streams = {"generator_logprobs": case.ref_logp, "advantages": case.ref_logp, "loss_mask": case.mask}
    with pytest.raises(ValueError, match=r"use parallelism\.tensor_parallel_degree=1"):
        loss_fn(case.hidden, case.tokens, 10, **streams)


# --- digits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", ["stand-in"], indirect=True)
def test_digits_of_log_odds(loaded: Callable[..., Any]) -> None:
    """What the examples say: of log-odds from log-probabilities about 1e-6 / (1 - pi) nats are wrong, of the head's 1e-6."""
    example, _ = loaded("verl_policy_loss", "verl.trainer.ppo.core_algos", verl_stand_in())
    generator = torch.Generator().manual_seed(0)
    for miss in (0.5, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6):
        z = torch.randn(100, 4096, dtype=torch.float64, generator=generator) * 3 + 5
        others = z[:, 1:].logsumexp(1)
        z[:, 0] = others + torch.tensor(1 / miss - 1, dtype=torch.float64).log()
        z = z.float()
        exact, _ = token_log_odds(z.double(), torch.zeros(100, dtype=torch.int64))
        head, _ = token_log_odds(z, torch.zeros(100, dtype=torch.int64))
        assert (head - exact).abs().max() < 3e-6
        error = (example.log_odds(z[:, 0] - z.logsumexp(1)) - exact).abs()
        if miss == 1e-6:
            assert (error > 0.5).all()  # most of them are infinite
        else:
            assert 1e-7 / miss < error.max() < 3e-6 / miss
        if miss <= 1e-3:
            assert example.log_odds(z.bfloat16().log_softmax(1)[:, 0]).isinf().all()
