"""--objective: every one of bnf_core by name with its hyper-parameters as flags, and a user's own."""

import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_rows import PAIRS, SINGLES

from bnf_core import OBJECTIVES, PAIRWISE, TokenBatch
from bnf_train.__main__ import main
from bnf_train.config import BNFConfig
from bnf_train.errors import UsageError
from bnf_train.flags import parse
from bnf_train.objectives import Resolved, hyperparameters, is_per_token
from bnf_train.objectives import resolve as resolve_objective

DATA = ["--model", "some/model", "--dataset", "x.jsonl", "--output_dir", "unused"]


OWN = '''
import torch
import torch.nn.functional as F
from bnf_core import objective

def margin(log_odds, batch, *, target, power: int = 2, mean=True):
    """Per pair: how far the mean log-likelihoods are from `target` apart."""
    values = F.logsigmoid(log_odds)
    per_response = batch.mean(values) if mean else batch.sum(values)
    chosen, rejected = batch.pairs()
    return (per_response[chosen] - per_response[rejected] - target) ** power

margin.pairwise = True

def push(log_odds, batch, *, strength=0.5):
    return -strength * batch.sign * batch.mean(F.logsigmoid(log_odds))

def total(log_odds, batch):
    return log_odds.sum()

def constant(log_odds, batch):
    return batch.preferred.float()

def infinite(log_odds, batch):
    return batch.mean(log_odds) / 0

def crooked(log_odds, batch):
    return log_odds.no_such_thing

def one_argument(log_odds):
    return log_odds

def with_seed(log_odds, batch, *, seed=1.0):
    return batch.mean(log_odds)

def odd(log_odds, batch):
    return batch.mean(log_odds)

odd.pairwise = "yes"

@objective(per="token", reference=False)
def unlikelihood(log_odds, sign, *, strength=1.0):
    return torch.where(sign > 0, -F.logsigmoid(log_odds), -strength * F.logsigmoid(-log_odds))

@objective(per="token")
def not_per_token(log_odds, sign, ref_log_odds):
    return log_odds.sum()

@objective(per="pair")
def gap(log_odds, batch):
    chosen, rejected = batch.pairs()
    sums = batch.sum(F.logsigmoid(log_odds))
    return sums[rejected] - sums[chosen]
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def resolve(config: BNFConfig) -> Resolved:
    return resolve_objective(config.objective, config.hyperparameters)


def batch() -> tuple[torch.Tensor, TokenBatch]:
    """Two pairs of different lengths, away from the reference."""
    response = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    generator = torch.Generator().manual_seed(0)
    log_odds, ref_log_odds = torch.randn(2, len(response), generator=generator, dtype=torch.float64)
    pair = torch.tensor([0, 0, 1, 1])
    labels = torch.tensor([True, False, True, False])
    entropy, z0 = torch.ones_like(log_odds), torch.tensor(0.5, dtype=torch.float64)
    return log_odds, TokenBatch(response, labels, pair=pair, ref_log_odds=ref_log_odds, entropy=entropy, z0=z0)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_has_its_papers_defaults(name: str) -> None:
    objective, pairwise = resolve(parse([*DATA, "--objective", name]))
    assert torch.equal(objective(*batch()), OBJECTIVES[name](*batch()))
    assert pairwise == (name in PAIRWISE)


@pytest.mark.parametrize(
    ("name", "key", "default"),
    [(name, key, p.default) for name, f in sorted(OBJECTIVES.items()) for key, p in hyperparameters(f).items()],
)
def test_every_hyperparameter_is_a_flag(name: str, key: str, default: Any) -> None:
    assert default is not inspect.Parameter.empty
    value: Any = {"both": "dispreferred", "dispreferred": "both", 10.0: 0.5}.get(default)
    value = default + 0.25 if value is None else value
    objective, _ = resolve(parse([*DATA, "--objective", name, f"--{key.replace('_', '-')}", str(value)]))
    expected = OBJECTIVES[name](*batch(), **{key: value})
    assert torch.equal(objective(*batch()), expected)
    assert not torch.equal(expected, OBJECTIVES[name](*batch()))


def test_hyperparameters_are_kept_with_the_configuration() -> None:
    config = parse([*DATA, "--objective", "simpo", "--gamma", "1.5"])
    assert config.hyperparameters == {"gamma": 1.5, "beta": 2.0}  # defaults too: a reader of the report wants to see them
    assert config.hyperparameters.items() <= config.to_dict().items()


def test_a_side_is_a_word() -> None:
    config = parse([*DATA, "--objective", "bnf", "--side", "dispreferred"])
    assert config.hyperparameters == {"side": "dispreferred"}
    assert torch.equal(resolve(config).objective(*batch()), OBJECTIVES["bnf_one_sided"](*batch()))
    assert resolve(config).spec.per == "token"  # one pass through the head


def test_lambda_is_a_word_that_python_keeps_for_itself() -> None:
    assert parse([*DATA, "--objective", "orpo", "--lambda", "0.3"]).hyperparameters == {"lambda_": 0.3}
    assert parse([*DATA, "--objective", "orpo", "--lambda_", "0.3"]).hyperparameters == {"lambda_": 0.3}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--objective", "rdpo"],
            r"--objective rdpo: expected one of bdpo, bnf, .*path/to/file.py:function; the nearest is r_dpo\.",
        ),
        (["--objective", "dpo", "--gamma", "1"], "--gamma: --objective dpo has no such hyper-parameter; it has --beta"),
        (["--beta", "1"], "--beta: --objective bnf has no such hyper-parameter; it has --side"),
        (["--side", "left"], "--objective bnf: side: expected one of both, dispreferred, got 'left'"),
        (["--objective", "kto", "--z0", "0"], "--z0: --objective kto has no such hyper-parameter; it has --beta"),
        (["--objective", "log_likelihood", "--beta", "1"], "--objective log_likelihood has no such .*; it has none"),
        (["--objective", "dpo", "--beta", "-1"], "--objective dpo: beta: expected a positive number, got -1.0"),
        (["--objective", "dpo", "--beta", "nan"], "--beta: expected number, got 'nan'"),
        (["--objective", "ipo", "--tau", "small"], "--tau: expected number, got 'small'"),
        (["--objective", "no_such_module:f"], "no_such_module could not be imported .*No module named"),
        (["--objective", "json:loads"], "expected a function of .log_odds, batch., hyper-parameters keyword-only"),
        (["--objective", "nowhere.py:f"], "no such file nowhere.py"),
    ],
)
def test_what_is_not_an_objective_is_one_sentence(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse([*DATA, *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "flags", "message"),
    [
        ("margn", [], "has no function margn; it has margin, push, "),
        ("margin", [], "--target is missing: .* has no default for it"),
        ("margin", ["--target", "1", "--power", "1.5"], "--power: expected int, got '1.5'"),
        ("push", ["--beta", "1"], "--beta: .*push has no such hyper-parameter; it has --strength"),
        ("total", [], r"expected one loss per response, shape \(2,\) .*, got shape \(\); .*pairwise = True"),
        ("constant", [], "expected finite, differentiable losses .*, got one without a gradient"),
        ("infinite", [], "expected finite, differentiable losses .*, got .*(inf|nan)"),
        ("crooked", [], "AttributeError: .*no_such_thing"),
        ("one_argument", [], "expected a function of .log_odds, batch."),
        ("with_seed", [], "--seed is a flag already; rename that hyper-parameter"),
        ("not_per_token", [], r"not_per_token: expected one loss for each of 5 tokens, got torch.float32 of shape \(\)"),
        ("odd", [], "expected its attribute pairwise to be True or False, got 'yes'"),
    ],
)
def test_what_is_wrong_with_a_function_of_ones_own_is_said_before_anything_is_loaded(
    function: str, flags: list[str], message: str, own: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        parse([*DATA, "--objective", f"{own}:{function}", *flags])


@pytest.mark.parametrize(("text", "message"), [("x = (", "SyntaxError"), ("1 / 0", "ZeroDivision"), ("exit(3)", "SystemExit")])
def test_a_file_that_does_not_run_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UsageError, match=f"broken.py could not be imported .{message}"):
        parse([*DATA, "--objective", f"{tmp_path}/broken.py:f"])


def test_own_by_file_and_by_module_are_the_same(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--target", "2", "--mean", "false", "--power=4"]
    by_file, pairwise = resolve(parse([*DATA, "--objective", f"{own}:margin", *flags]))
    assert pairwise
    monkeypatch.syspath_prepend(own.parent)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    by_module, pairwise = resolve(parse([*DATA, "--objective", "own:margin", *flags]))
    assert pairwise
    losses = by_file(*batch())
    assert torch.equal(losses, by_module(*batch()))
    sums = batch()[1].sum(torch.nn.functional.logsigmoid(batch()[0]))
    torch.testing.assert_close(losses, (sums[0::2] - sums[1::2] - 2) ** 4)


def test_what_a_function_of_ones_own_says_it_is(own: Path) -> None:
    told = {
        name: resolve(parse([*DATA, "--objective", f"{own}:{name}", *flags])).spec
        for name, flags in {"push": [], "margin": ["--target=1"], "gap": [], "unlikelihood": ["--strength=0.5"]}.items()
    }
    assert {name: spec.per for name, spec in told.items()} == {
        "push": "response", "margin": "pair", "gap": "pair", "unlikelihood": "token"
    }  # fmt: skip
    assert {name for name, spec in told.items() if not spec.reference} == {"unlikelihood"}
    assert is_per_token(f"{own}:unlikelihood")
    assert not is_per_token("kto")
    objective, pairwise = resolve(parse([*DATA, "--objective", f"{own}:unlikelihood", "--strength=0.5"]))
    assert not pairwise
    assert objective(torch.zeros(10), batch()[1]).tolist() == pytest.approx([0.6931, 0.3466, 0.6931, 0.3466], abs=1e-4)


@pytest.mark.parametrize(
    ("function", "rows"), [("push", SINGLES[:4]), ("margin", PAIRS[:4]), ("gap", PAIRS[:4]), ("unlikelihood", SINGLES[:4])]
)
def test_own_objective_trains(
    function: str, rows: list[dict[str, object]], own: Path, model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    flags = ["--objective", f"{own}:{function}", *(["--target", "3"] if function == "margin" else [])]
    flags += ["--batch_size", "4", "--per_device_train_batch_size", "4", "--num_train_epochs", "5", "--learning_rate", "0.01"]
    flags += ["--eval_size", "0", "--save_strategy", "no", "--lr_scheduler_type", "constant"]
    out = tmp_path / "out"
    paths = ["--model", str(model_folder), "--dataset", str(write_rows(rows)), "--output_dir", str(out)]
    assert main([*paths, *flags, "--max_length", "100"]) == 0
    losses = [log["loss"] for log in json.loads((out / "metrics.json").read_text())["log"] if "loss" in log]
    assert len(losses) >= 4
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("rows", "flags", "logged"),
    [
        (SINGLES[:8], ("--objective", "kto"), "kl"),
        (SINGLES[:8], ("--objective", "tnpo", "--beta", "0.5"), "loss"),
        (SINGLES[:8], ("--objective", "npo"), "loss"),
        (SINGLES[:8], ("--objective", "bnf", "--side", "dispreferred"), "loss"),
        (PAIRS[:4], ("--objective", "bdpo"), "rewards/accuracies"),
    ],
    ids=lambda x: "-".join(x[1:]) if isinstance(x, tuple) else "",
)
def test_the_family_trains(
    rows: list[dict[str, object]], flags: tuple[str, ...], logged: str, model_folder: Path, write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    flags += ("--batch_size", "4", "--per_device_train_batch_size", "2", "--max_steps", "3", "--learning_rate", "0.01")
    flags += ("--eval_size", "0", "--eval_dataset", str(write_rows(rows, "held_out.jsonl")), "--save_strategy", "no")
    paths = ["--model", str(model_folder), "--dataset", str(write_rows(rows)), "--output_dir", str(out)]
    assert main([*paths, *flags, "--max_length", "100"]) == 0
    found = json.loads((out / "metrics.json").read_text())["log"]
    assert all(math.isfinite(value) for log in found for value in log.values())
    assert any(logged in log for log in found)
    assert "eval_loss" in found[-1] or "eval_loss" in found[-2]


def test_own_pairwise_objective_refuses_single_responses_before_the_model_is_loaded(
    own: Path, model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "model.safetensors").write_bytes(b"not opened")
    out = tmp_path / "out"
    paths = ["--model", str(model_folder), "--dataset", str(write_rows(SINGLES)), "--output_dir", str(out)]
    assert main([*paths, "--objective", f"{own}:margin", "--target", "1"]) == 2
    assert f"--objective {own}:margin compares the two sides of a pair" in capsys.readouterr().err
    assert not out.exists()
