"""What a run leaves behind: a table on the screen, metrics.json, metrics.png."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from bnf_train.config import BNFConfig
from bnf_train.trainer import LABELS

COLUMNS = {
    "responses": "responses",
    "log-likelihood shift per token (nats)": "logp_shift_per_token",
    "mean token weight w": "bnf/weight_mean",
    "tokens clipped": "bnf/weight_clipped",
}


def table(held_out: dict[str, float]) -> Table | str:
    """The held-out result, a line a label."""
    if not held_out:
        return "No rows were held out, so there is no held-out result (see --eval_size)."
    result = Table(title="Held-out responses, after against before")
    for name in ("", *COLUMNS):
        result.add_column(name, justify="right" if name else "left")
    for label in LABELS:
        values = [held_out.get(f"eval_{key}/{label}") for key in COLUMNS.values()]
        if values[0]:
            count, shift, weight, clipped = values
            result.add_row(label, f"{count:.0f}", f"{shift:+.4f}", f"{weight:.4f}", f"{clipped:.1%}")
    return result


def write(folder: Path, config: BNFConfig, history: list[dict[str, Any]], held_out: dict[str, float]) -> None:
    """metrics.json (configuration, every log, the held-out result) and metrics.png (their curves)."""
    metrics = {
        "config": {k: v for k, v in config.to_dict().items() if isinstance(v, (str, int, float, bool, type(None)))},
        "held_out": held_out,
        "log": history,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot(folder / "metrics.png", history)


def plot(path: Path, history: list[dict[str, Any]]) -> None:
    """Loss, token weights, and held-out shifts against optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    panels = [
        ("Training loss (eq. 4)", "nats", {"all responses": "loss"}),
        ("Mean token weight w", "", {label: f"bnf/weight_mean/{label}" for label in LABELS}),
        (
            "Held-out log-likelihood shift",
            "nats per token",
            {label: f"eval_logp_shift_per_token/{label}" for label in LABELS},
        ),
    ]
    for axis, (title, unit, series) in zip(axes, panels, strict=True):
        for name, key in series.items():
            points = [(log["step"], log[key]) for log in history if key in log]
            if points:
                color = {"preferred": "tab:green", "dispreferred": "tab:red"}.get(name, "tab:blue")
                axis.plot(*zip(*points, strict=True), marker=".", label=name, color=color)
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        if len(series) > 1 and axis.lines:
            axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
