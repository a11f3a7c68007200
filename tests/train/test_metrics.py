"""Metrics against sums in plain Python, the one row that a new metric takes, and the beta that rewards are logged with."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import ModelCard
from preference_rows import PAIRS, SINGLES
from rich.console import Console
from torch import Tensor
from transformers import EvalPrediction

from bnf_core import OBJECTIVES, TokenBatch, bnf
from bnf_train import report
from bnf_train.__main__ import main
from bnf_train.compare import report as compare_report
from bnf_train.flags import parse
from bnf_train.report.curves import plots
from bnf_train.training import metrics
from bnf_train.training.metrics import METRICS, Metric, Panel, Shown
from bnf_train.training.quantities import Responses, Scored, joined, measure, per_token
from bnf_train.training.trainer import beta_of

LABELS = ("preferred", "dispreferred")
SIDES = {"preferred": "chosen", "dispreferred": "rejected"}
BETA = 0.3
dpo, simpo = OBJECTIVES["dpo"], OBJECTIVES["simpo"]


class One(NamedTuple):
    """A response of a data row, as lists of numbers."""

    row: int
    preferred: bool
    paired: bool
    log_odds: list[float]
    ref_log_odds: list[float]
    entropy: list[float]

    @property
    def logp(self) -> float:
        return sum(map(log_sigmoid, self.log_odds))

    @property
    def shift(self) -> float:
        return self.logp - sum(map(log_sigmoid, self.ref_log_odds))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def some_rows(only_pairs: bool) -> list[One]:
    """Pairs, and single responses of either label among them, of 1 to 6 tokens."""
    draw = torch.Generator().manual_seed(3)
    sides = [(True, False), (True, False), (False,), (True, False), (True,), (False,), (True, False)]
    found = []
    for row, labels in enumerate(s for s in sides if len(s) == 2 or not only_pairs):
        for label in labels:
            tokens = int(torch.randint(1, 7, (), generator=draw))
            numbers = torch.randn(3, tokens, generator=draw, dtype=torch.float64)
            found.append(One(row, label, len(labels) == 2, *numbers[:2].tolist(), numbers[2].abs().tolist()))
    return found


def scored(ones: list[One], pairwise: bool = False) -> Scored:
    def flat(name: str) -> Tensor:
        return torch.tensor([x for one in ones for x in getattr(one, name)], dtype=torch.float64)

    batch = TokenBatch(
        torch.arange(len(ones)).repeat_interleave(torch.tensor([len(one.log_odds) for one in ones])),
        torch.tensor([one.preferred for one in ones]),
        pair=torch.tensor([one.row if one.paired else -1 for one in ones]),
        ref_log_odds=flat("ref_log_odds"),
        entropy=flat("entropy"),
    )
    losses = torch.arange(1.0, 1 + len(ones) // (2 if pairwise else 1), dtype=torch.float64)
    return Scored(flat("log_odds"), batch, losses, torch.tensor([one.paired for one in ones]), pairwise)


def measured(ones: list[One], pairwise: bool = False) -> Responses:
    return measure(scored(ones, pairwise), *metrics.quantities())


def expected(ones: list[One]) -> dict[str, float]:
    """The metrics by their definitions, training and held-out together."""
    found: dict[str, float] = {}
    for label in LABELS:
        these = [one for one in ones if one.preferred == (label == "preferred")]
        pairs = [pair for one in these for pair in zip(one.log_odds, one.ref_log_odds, strict=True)]
        ratios = torch.tensor([log_sigmoid(x) - log_sigmoid(ref) for x, ref in pairs], dtype=torch.float64)
        found |= {
            f"responses/{label}": len(these),
            f"tokens/{label}": len(pairs),
            f"logp_per_token/{label}": sum(one.logp for one in these) / len(pairs),
            f"logp_shift_per_token/{label}": sum(one.shift for one in these) / len(pairs),
            f"logp_shift/{label}": fmean(one.shift for one in these),
            f"entropy/{label}": fmean(x for one in these for x in one.entropy),
            f"bnf/weight_mean/{label}": fmean(min(1, math.exp(x - ref)) for x, ref in pairs),
            f"bnf/weight_clipped/{label}": fmean(x > ref for x, ref in pairs),
            f"displacement/{label}": fmean(x < ref for x, ref in pairs),
            f"rewards/{SIDES[label]}": BETA * fmean(one.shift for one in these),
            f"logps/{SIDES[label]}": fmean(one.logp for one in these),
        }
        found |= {f"bnf/ratio_q{q}/{label}": ratios.quantile(q / 100).exp().item() for q in (10, 50, 90)}
    sides = [(a, b) for a in ones for b in ones if a.row == b.row and a.preferred and not b.preferred]
    return found | {
        "rewards/margins": BETA * fmean(a.shift - b.shift for a, b in sides),
        "rewards/accuracies": fmean(a.shift > b.shift for a, b in sides),
        "ranked_right": fmean(a.logp / len(a.log_odds) > b.logp / len(b.log_odds) for a, b in sides),
    }


def held_out(ones: list[One], pairwise: bool = False) -> dict[str, float]:
    table = metrics.by_row(measured(ones, pairwise), torch.tensor([one.row for one in ones]))
    return metrics.held_out_values(EvalPrediction(predictions=table.numpy(), label_ids=None), BETA)


@pytest.mark.parametrize("pairwise", [False, True], ids=["loss-per-response", "loss-per-pair"])
def test_metrics_are_what_they_are_called(pairwise: bool) -> None:
    ones = some_rows(only_pairs=pairwise)
    by_definition = expected(ones) | {"loss": fmean(range(1, 1 + len(ones) // (2 if pairwise else 1)))}
    found = held_out(ones, pairwise)
    of_evaluation = {m.key(label) for m in METRICS if m.held_out for label in m.labels}
    assert found == pytest.approx({key: by_definition[key] for key in of_evaluation}, rel=1e-12)
    assert all(type(found[f"{name}/{label}"]) is int for name in ("responses", "tokens") for label in LABELS)
    # a pair may be cut by passes: what is logged is of the responses together
    parts = [ones[:1], ones[1:4], ones[4:]]
    logged = metrics.values(joined([measured(part) for part in parts]), beta=BETA)
    of_log = {m.key(label) for m in METRICS if m.training and m.quantity for label in m.labels}
    assert logged == pytest.approx({key: by_definition[key] for key in of_log}, rel=1e-12)


def test_processes_add_up() -> None:
    ones = some_rows(only_pairs=False)
    parts = [joined([measured(part)]) for part in (ones[:4], ones[4:])]
    sums: list[Tensor] = []

    def reduce(fractions: Tensor) -> Tensor:
        sums.append(fractions)
        return torch.stack(sums).sum(0)

    metrics.values(parts[0], beta=BETA, reduce=reduce)
    both = metrics.values(parts[1], beta=BETA, reduce=reduce)
    whole = metrics.values(joined(parts), beta=BETA)
    assert both.keys() == whole.keys()
    for key, value in both.items():
        if "ratio_q" not in key:  # quantiles are averaged over processes
            assert value == pytest.approx(whole[key]), key


def test_what_there_is_nothing_of_is_left_out() -> None:
    ones = [one for one in some_rows(only_pairs=False) if not one.paired and one.preferred]
    for found in (metrics.values(measured(ones)), held_out([one._replace(row=i) for i, one in enumerate(ones)])):
        assert "bnf/weight_mean/preferred" in found
        assert not [key for key in found if "dispreferred" in key or "rejected" in key or "margins" in key]


def test_a_metric_is_one_row(monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path) -> None:
    """It is logged, evaluated, drawn, and in every table, and no other file knows of it."""
    new = Metric(
        "surprise/{label}",
        lambda scored: scored.batch.sum(scored.log_odds.square()),
        per_token,
        training=True,
        held_out=True,
        panel=Panel("Surprise", main=4),
        terminal=Shown("surprise of all", ".2f"),
        result=Shown("surprise", ".3f"),
        tile=Shown("surprise, {label}", ".1f"),
        compare=Shown("surprise ({label})", ".4f", brief=True),
    )
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, new))
    ones = some_rows(only_pairs=False)
    by_definition = {
        f"surprise/{label}": fmean(x * x for one in ones if one.preferred == (label == "preferred") for x in one.log_odds)
        for label in LABELS
    }
    evaluated = {f"eval_{key}": value for key, value in held_out(ones).items()}
    logged = metrics.values(measured(ones))
    for key, value in by_definition.items():
        assert evaluated[f"eval_{key}"] == pytest.approx(value)
        assert logged[key] == pytest.approx(value)

    assert plots()[3].lines == {label: f"surprise/{label}" for label in LABELS}
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.table(evaluated))
    assert "surprise of all" in capture.get()
    config = parse(["--model", str(model_folder), "--dataset", "some/data", "--output_dir", str(tmp_path / "out")])
    report.write(tmp_path, config, [{"step": 1, **logged}], evaluated)
    page = (tmp_path / "report.html").read_text()
    shown = by_definition["surprise/preferred"]
    for text in ("Surprise", "surprise, preferred", f"<b>{shown:.1f}</b>", f"<td>{shown:.3f}</td>"):
        assert text in page, text
    card = ModelCard.load(tmp_path / "README.md")
    assert ("surprise", "surprise of all, preferred") in [(r.metric_type, r.metric_name) for r in card.data.eval_results]

    run = {"name": "bnf", "seed": 0, "arguments": [], "before": None, "after": [], "train_seconds": 1.0}
    run |= {"tokens_per_second": 1.0, "peak_gib": 1.0, "curve": [{"step": 4, **evaluated}]}
    assert f"| {shown:.4f} |" in compare_report.markdown([run])
    assert "surprise (dispreferred)" in [column.header for column in compare_report.table([run]).columns]


@pytest.mark.parametrize("rows", [PAIRS, SINGLES], ids=["pairs", "singles"])
def test_a_run_logs_nothing_else(
    rows: list[dict[str, Any]], model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    data = ["--model", str(model_folder), "--dataset", str(write_rows(rows)), "--eval_size", "3", "--max_length", "100"]
    flags = [
        "--batch_size",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--max_steps",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*data, *flags]) == 0
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    known = {m.key(label) for m in METRICS if m.training for label in m.labels}
    evaluated = {m.key(label, held_out=True) for m in METRICS if m.held_out for label in m.labels}
    not_here = {"rewards/margins", "rewards/accuracies"} if rows is SINGLES else set()
    not_here |= {"kl"}  # KTO's
    assert written["log"][0].keys() | written["log"][1].keys() == known - not_here | {"epoch", "step"}
    if rows is PAIRS:
        of_transformers = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch", "step"}
        assert written["held_out"].keys() - of_transformers == evaluated


def with_positional_beta(log_odds: Tensor, batch: TokenBatch, beta: float = 0.7) -> Tensor:
    return log_odds


def with_any_keyword(log_odds: Tensor, batch: TokenBatch, **options: float) -> Tensor:
    return log_odds


@pytest.mark.parametrize(
    ("objective", "beta"),
    [
        (dpo, 0.1),
        (simpo, 2.0),
        (functools.partial(dpo, beta=0.5), 0.5),
        (functools.partial(functools.partial(dpo, beta=0.5), beta=0.2), 0.2),
        (functools.partial(simpo, gamma=0.5), 2.0),
        (functools.partial(with_any_keyword, beta=3), 3.0),
        (with_any_keyword, 1.0),
        (with_positional_beta, 1.0),  # no hyper-parameter: those are keyword-only
        (bnf, 1.0),
        (lambda log_odds, batch, *, beta: log_odds, 1.0),
    ],
)
def test_rewards_are_logged_with_the_objectives_own_beta(objective: Any, beta: float) -> None:
    assert beta_of(objective) == beta
