"""The curves of a run, drawn from its log history: one plot for each panel that a row of METRICS names."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bnf_train.training import metrics
from bnf_train.training.metrics import SIDES, Panel

GOOD, BAD = "tab:green", "tab:red"
COLORS = {"preferred": GOOD, "dispreferred": BAD, "chosen": GOOD, "rejected": BAD, "held out": "tab:orange"}


@dataclass(frozen=True)
class Plot:
    """A panel with what is drawn in it: a line for each key of the history, and a band between two keys."""

    panel: Panel
    axis: str
    lines: dict[str, str]
    bands: dict[str, list[str]]


def plots() -> list[Plot]:
    """The plots of report.html in their order; those of metrics.png come first."""
    found: dict[Panel, Plot] = {}
    for metric in metrics.METRICS:
        if (panel := metric.panel) is None:
            continue
        plot = found.setdefault(panel, Plot(panel, metric.unit if panel.axis is None else panel.axis, {}, {}))
        for label in metric.labels:
            name = SIDES[label] if "{side}" in metric.name else label or metric.line
            key = metric.key(label, held_out=not metric.training)
            if metric.band:
                plot.bands.setdefault(name, []).append(key)
            else:
                plot.lines[name] = key
    return sorted(found.values(), key=lambda plot: plot.panel.main or math.inf)


def draw(axis: Axes, plot: Plot, history: Sequence[Mapping[str, Any]]) -> None:
    """`plot` against optimizer steps; keys that the history does not have are left out."""
    for name, key in plot.lines.items():
        points = [(log["step"], log[key]) for log in history if key in log]
        if points:
            marker = "." if len(points) < 100 else ""
            axis.plot(*zip(*points, strict=True), marker=marker, label=name, color=COLORS.get(name, "tab:blue"))
    for name, (low, high) in plot.bands.items():
        edges = [(log["step"], log[low], log[high]) for log in history if low in log and high in log]
        if edges:
            steps, bottom, top = zip(*edges, strict=True)
            axis.fill_between(steps, bottom, top, color=COLORS.get(name, "tab:blue"), alpha=0.15, linewidth=0)
    if plot.panel.log and axis.lines:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(title=plot.panel.title, xlabel="optimizer step", ylabel=plot.axis)
    if len(plot.lines) > 1 and axis.lines:
        axis.legend()
    axis.grid(alpha=0.3)


def svgs(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """Title and SVG image of every plot that the history has anything for."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9}
    for plot in plots():
        if any(key in log for log in history for key in plot.lines.values()):
            with matplotlib.rc_context(style):
                figure = Figure(figsize=(4.6, 2.9), layout="constrained")
                draw(figure.subplots(), plot, history)
                file = BytesIO()
                figure.savefig(file, format="svg", metadata={"Date": None})
            yield plot.panel.title, file.getvalue()
