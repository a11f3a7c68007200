"""The curves of a run, drawn from its log history."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bnf_train.training.trainer import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOOD, BAD = "tab:green", "tab:red"
COLORS = {"preferred": GOOD, "dispreferred": BAD, "chosen": GOOD, "rejected": BAD, "held out": "tab:orange"}


@dataclass(frozen=True)
class Panel:
    """One plot: a line per key of the history, and a band between two keys."""

    title: str
    unit: str
    lines: Mapping[str, str]
    bands: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    log: bool = False


MAIN_PANELS = (
    Panel("Loss (eq. 4)", "nats", {"training": "loss", "held out": "eval_loss"}),
    Panel("Mean token weight w", "", {label: f"bnf/weight_mean/{label}" for label in LABELS}),
    Panel("Held-out log-likelihood shift", "nats per token", {label: f"eval_logp_shift_per_token/{label}" for label in LABELS}),
)
PANELS = (
    *MAIN_PANELS,
    Panel("Share of tokens clipped", "", {label: f"bnf/weight_clipped/{label}" for label in LABELS}),
    Panel(
        "Likelihood ratio π / π_ref",
        "median, 10 to 90 %",
        {label: f"bnf/ratio_q50/{label}" for label in LABELS},
        {label: (f"bnf/ratio_q10/{label}", f"bnf/ratio_q90/{label}") for label in LABELS},
        log=True,
    ),
    Panel("Rewards", "β · nats", {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins"}),
    Panel("Reward accuracy", "", {"training": "rewards/accuracies"}),
    Panel("Learning rate", "", {"training": "learning_rate"}),
    Panel("Gradient norm", "", {"training": "grad_norm"}),
    Panel("Speed", "tokens per second", {"training": "tokens_per_second"}),
)


def draw(axis: "Axes", panel: Panel, history: Sequence[Mapping[str, Any]]) -> None:
    """`panel` against optimizer steps; keys that the history does not have are left out."""
    for name, key in panel.lines.items():
        points = [(log["step"], log[key]) for log in history if key in log]
        if points:
            marker = "." if len(points) < 100 else ""
            axis.plot(*zip(*points, strict=True), marker=marker, label=name, color=COLORS.get(name, "tab:blue"))
    for name, (low, high) in panel.bands.items():
        edges = [(log["step"], log[low], log[high]) for log in history if low in log and high in log]
        if edges:
            steps, bottom, top = zip(*edges, strict=True)
            axis.fill_between(steps, bottom, top, color=COLORS.get(name, "tab:blue"), alpha=0.15, linewidth=0)
    if panel.log and axis.lines:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(title=panel.title, xlabel="optimizer step", ylabel=panel.unit)
    if len(panel.lines) > 1 and axis.lines:
        axis.legend()
    axis.grid(alpha=0.3)


def svgs(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """Title and SVG image of every panel that the history has anything for."""
    from io import BytesIO

    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9}
    for panel in PANELS:
        if any(key in log for log in history for key in panel.lines.values()):
            with matplotlib.rc_context(style):
                figure = Figure(figsize=(4.6, 2.9), layout="constrained")
                draw(figure.subplots(), panel, history)
                file = BytesIO()
                figure.savefig(file, format="svg", metadata={"Date": None})
            yield panel.title, file.getvalue()
