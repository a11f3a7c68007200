"""What the experiment leaves: results.json, results.md and unlearning.png."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tofu_metrics import metrics
from tofu_stages import MEMORISED, NEVER_SAW, Arm, Experiment

COLUMNS = {  # of the table: metric and form
    "forget quality": ("forget_quality", ".2g"),
    "model utility": ("model_utility", ".3f"),
    "forget: probability": ("forget_probability", ".3f"),
    "forget: ROUGE-L": ("forget_rouge", ".3f"),
    "forget: truth ratio": ("forget_truth_ratio", ".3f"),
    "retain: probability": ("retain_probability", ".3f"),
    "retain: ROUGE-L": ("retain_rouge", ".3f"),
    "real authors: ROUGE-L": ("real_authors_rouge", ".3f"),
    "world facts: ROUGE-L": ("world_facts_rouge", ".3f"),
}
LEAST = 1e-12  # p-values below it are drawn there


def report(experiment: Experiment, arms: Sequence[Arm]) -> str:
    """Writes all three from the stages that have finished; the table. Nothing where the first two models are missing."""
    never_saw, memorised = experiment.found(NEVER_SAW), experiment.found(MEMORISED)
    if never_saw is None or memorised is None:
        return ""

    def measured(result: Mapping[str, Any]) -> dict[str, float]:
        return metrics(result["scores"], never_saw["scores"])

    found = {arm: experiment.found(arm.name) for arm in arms}
    runs: list[dict[str, Any]] = [
        {"method": arm.method, "learning_rate": arm.learning_rate, "seed": arm.seed}
        | ({"failed": result["failed"]} if "failed" in result else {"steps": result["steps"], "metrics": measured(result)})
        for arm, result in found.items()
        if result is not None
    ]
    models = {MEMORISED: measured(memorised), NEVER_SAW: measured(never_saw)}
    results = {
        "settings": json.loads(json.dumps(vars(experiment.settings))),
        "device": experiment.config.device.type,
        "bf16": bool(experiment.config.bf16),
        "models": models,
        "runs": runs,
        "means": means(runs),
    }
    table = markdown(models, results["means"])
    (experiment.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (experiment.output / "results.md").write_text(table, encoding="utf-8")
    draw(experiment.output / "unlearning.png", models, results["means"])
    return table


def means(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each method at each learning rate, over the seeds that have finished.

    >>> runs = [{"method": "bnf", "learning_rate": 1.0, "seed": s, "metrics": {"x": x}} for s, x in ((0, 1.0), (1, 2.0))]
    >>> means(runs + [{"method": "npo", "learning_rate": 1.0, "seed": 0, "failed": "no memory"}])
    [{'method': 'bnf', 'learning_rate': 1.0, 'seeds': 2, 'metrics': {'x': 1.5}}]
    """
    groups: dict[tuple[str, float], list[Mapping[str, float]]] = {}
    for run in runs:
        if "metrics" in run:
            groups.setdefault((run["method"], run["learning_rate"]), []).append(run["metrics"])
    return [
        {"method": method, "learning_rate": rate, "seeds": len(of)}
        | {"metrics": {key: fmean(one[key] for one in of) for key in of[0]}}
        for (method, rate), of in groups.items()
    ]


def markdown(models: Mapping[str, Mapping[str, float]], rows: Sequence[Mapping[str, Any]]) -> str:
    """The table: the two models that learned, then the methods."""
    head = ["method", "learning rate", "seeds", *COLUMNS]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[name.replace("_", " "), "", "", *_cells(of)] for name, of in models.items()]
    lines += [
        [row["method"].replace("_", " "), f"{row['learning_rate']:g}", str(row["seeds"]), *_cells(row["metrics"])]
        for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(of: Mapping[str, float]) -> list[str]:
    return [format(of[key], form) for key, form in COLUMNS.values()]


def draw(path: Path, models: Mapping[str, Mapping[str, float]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Forget quality, and probability of the forgotten answers, against model utility: one point a method and learning rate."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _points(left, "forget_quality", models, rows)
    left.set(xlabel="model utility", ylabel="forget quality (p-value)", yscale="log", ylim=(LEAST / 3, 3))
    left.axhline(0.05, color="0.8", linewidth=1, zorder=0)
    _points(right, "forget_probability", models, rows)
    right.set(xlabel="model utility", ylabel="probability of the forgotten answers", ylim=(-0.03, 1.03))
    rates = ", ".join(f"{rate:g}" for rate in sorted({row["learning_rate"] for row in rows}))
    figure.suptitle(f"larger points: larger learning rates ({rates})", fontsize=9)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _points(axes: Axes, metric: str, models: Mapping[str, Mapping[str, float]], rows: Sequence[Mapping[str, Any]]) -> None:
    rates = sorted({row["learning_rate"] for row in rows})
    for name, values in models.items():
        marker = "*" if name == NEVER_SAW else "X"
        at = values["model_utility"], max(values[metric], LEAST)
        axes.scatter(*at, s=160, c="black", marker=marker, label=name.replace("_", " "))
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: float(row["learning_rate"]))
        x = [float(row["metrics"]["model_utility"]) for row in own]
        y = [max(float(row["metrics"][metric]), LEAST) for row in own]
        color = colormaps["tab10"](number % 10)
        sizes = [30 + 60 * rates.index(row["learning_rate"]) for row in own]
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.6)
        axes.scatter(x, y, s=sizes, color=color, label=method.replace("_", " "))
