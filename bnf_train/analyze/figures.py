"""What an analysis shows: its tables, the paper's figures 3 and 4 drawn from its numbers, and one of displacement."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich import box
from rich.markup import escape
from rich.table import Table

METRICS = {  # of a response, in the order of figure 3 without its scatter
    "log_likelihood_shift": "log-likelihood shift, nats",
    "logit_shift": "absolute logit shift",
    "log_likelihood_shift_per_token": "log-likelihood shift, nats per token",
    "logit_shift_per_token": "absolute logit shift per token",
    "gini": "Gini coefficient",
}
DISPLACEMENT = {  # of a response; masses are means over its tokens
    "displacement": "share of tokens whose likelihood fell",
    "ref_argmax_mass": "probability of the argmax token under the reference",
    "argmax_mass": "probability of the argmax token under the policy",
}
LABELS = {"preferred": True, "dispreferred": False}
BINS = 10


def _table(title: str, caption: str) -> Table:
    return Table(title=title, caption=caption, box=box.SIMPLE, pad_edge=False, collapse_padding=True)


def table(result: dict[str, Any]) -> Table:
    """Means, with medians in brackets below; narrow enough for 80 columns."""
    is_greedy = "reference_length" in result
    out = _table(_title(result), "mean, (median) over responses; log π in nats, Δz: logit of the target token")
    out.add_column("policy", overflow="fold")
    for heading in ("tokens", "Δ log π", "|Δz|", "Δ log π\nper token", "|Δz|\nper token", "Gini"):
        out.add_column(heading, justify="right")
    if is_greedy:
        lengths = result["reference_length"]
        out.add_row("reference", f"{lengths['mean']:.1f}\n({lengths['median']:.1f})")
    _add_rows(out, result, ("tokens", *METRICS))
    return out


def displacement_table(result: dict[str, Any]) -> Table:
    """As `table`: how many tokens fell, and whether the argmax token took their mass."""
    out = _table("Displacement", "mean, (median) over responses; argmax: mean probability of the most likely token")
    out.add_column("policy", overflow="fold")
    for heading in ("tokens whose\nlikelihood fell", "argmax,\nbefore", "argmax,\nafter"):
        out.add_column(heading, justify="right")
    _add_rows(out, result, tuple(DISPLACEMENT))
    return out


def _add_rows(out: Table, result: dict[str, Any], metrics: Sequence[str]) -> None:
    """A row per policy; one per label of it where the data has labels."""
    is_greedy = "reference_length" in result
    for name, policy in result["policies"].items():
        for group in [x for x in policy["summary"] if is_greedy or x != "all"]:
            of = policy["summary"][group]
            cells = [f"{of[m]['mean']:{form(m)}}\n({of[m]['median']:{form(m)}})" for m in metrics]
            out.add_row(f"{name}\n{of['responses']:,}{'' if is_greedy else f' {group}'}", *cells)


def right_table(right: dict[str, Any]) -> Table:
    """Right answers of every model, with intervals below; narrow enough for 80 columns."""
    out = _table("Right answers, greedy and sampled", "in brackets 95 % intervals over prompts")
    out.add_column("group", overflow="fold")
    out.add_column("model", overflow="fold")
    names = [n for n in next(iter(next(iter(right["models"].values())).values())) if n != "prompts" and "_" not in n]
    for name in (*names, "tokens"):
        out.add_column(name, justify="right")
    for group in next(iter(right["models"].values())):
        for model, groups in right["models"].items():
            of = groups[group]
            cells = [f"{of[n]['value']:.1%}\n({100 * of[n]['low']:.1f} … {100 * of[n]['high']:.1f})" for n in names]
            out.add_row(escape(f"{group} ({of['prompts']:,})"), escape(model), *cells, f"{of['greedy_tokens']['value']:.1f}")
    return out


def form(metric: str) -> str:
    """Digits that a metric is printed with."""
    if metric == "displacement":
        return ".1%"
    sign = "+" if metric.startswith("log_likelihood") else ""
    fine = metric.endswith(("per_token", "argmax_mass")) or metric == "gini"
    return sign + (".3f" if fine else ".1f" if metric == "tokens" else ".2f")


# Okabe and Ito's colours, which the colour-blind tell apart; markers repeat what the colour says
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANELS = {
    "log_likelihood_shift": ("Log-likelihood shift", r"$\Sigma\,(\log\pi-\log\pi_{ref})$, nats"),
    "logit_shift": ("Absolute logit shift", r"$\Sigma\,|z_y-z_{ref,y}|$, logit units"),
    "log_likelihood_shift_per_token": ("Log-likelihood shift, length-normalised", "nats per token"),
    "logit_shift_per_token": ("Absolute logit shift, length-normalised", "logit units per token"),
    "gini": ("Gini coefficient of token logit shifts", "0: all tokens alike,  1: a single token"),
    "displacement": ("Tokens whose likelihood fell", "share of a response's tokens"),
}


@dataclass(frozen=True)
class Series:
    """One policy's responses, of one label where the data has labels."""

    name: str
    color: str
    marker: str
    filled: bool
    values: dict[str, list[float]]


def series_of(result: dict[str, Any]) -> list[Series]:
    """One per policy; one more, hollow, for dispreferred responses of the data."""
    found = []
    for number, (name, policy) in enumerate(result["policies"].items()):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        each = policy["responses"]
        for label, preferred in LABELS.items() if "preferred" in each else (("", True),):
            at = [i for i, x in enumerate(each.get("preferred", each["row"])) if not label or x is preferred]
            if at:
                title = f"{name}, {label}" if label else name
                values = {m: [each[m][i] for i in at] for m in (*METRICS, *DISPLACEMENT)}
                found.append(Series(title, color, marker, preferred, values))
    return found


def draw_figure3(result: dict[str, Any]) -> Figure:
    """Panels a to f: a box a series (quartiles; whiskers from 5 to 95 %) over its responses, and the scatter of a and b."""
    series = series_of(result)
    figure = Figure(figsize=(14, 5.4 + 0.36 * len(series)), layout="constrained")
    grid = figure.subplots(2, 3)
    kinds = ("log_likelihood_shift", "logit_shift", "", "log_likelihood_shift_per_token", "logit_shift_per_token", "gini")
    for letter, kind, axis in zip("abcdef", kinds, grid.flat, strict=True):
        if kind:
            _draw_boxes(axis, series, kind, named=letter in "ad")
            title, unit = PANELS[kind]
        else:
            title, unit = "Logit shift against log-likelihood shift", PANELS["log_likelihood_shift"][1]
            _scatter(axis, series, "log_likelihood_shift", "logit_shift")
            axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
            axis.set_ylabel(PANELS["logit_shift"][1])
        axis.set_title(f"({letter}) {title}", loc="left", fontsize=11)
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3, axis="both" if not kind else "x")
        axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, series, columns=min(len(result["policies"]), 6))
    figure.suptitle(_title(result), fontsize=13)
    return figure


def draw_displacement(result: dict[str, Any]) -> Figure:
    """a: a box a series of the share of tokens that fell; b: argmax mass after against before, above the diagonal where
    the distribution became sharper."""
    series = series_of(result)
    figure = Figure(figsize=(11, 4.4 + 0.3 * len(series)), layout="constrained")
    shares, masses = figure.subplots(1, 2)
    _draw_boxes(shares, series, "displacement", named=True)
    title, unit = PANELS["displacement"]
    shares.set_title(f"(a) {title}", loc="left", fontsize=11)
    shares.set_xlabel(unit)
    _scatter(masses, series, "ref_argmax_mass", "argmax_mass")
    least = min(x for one in series for kind in ("ref_argmax_mass", "argmax_mass") for x in one.values[kind])
    masses.plot([least, 1], [least, 1], color="0.6", linewidth=0.8, zorder=0)
    masses.set_title("(b) Mean probability of the argmax token", loc="left", fontsize=11)
    masses.set(xlabel="under the reference", ylabel="under the policy")
    for axis in (shares, masses):
        axis.grid(alpha=0.3, axis="x" if axis is shares else "both")
        axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, series, columns=min(len(result["policies"]), 6))
    figure.suptitle(_title(result), fontsize=13)
    return figure


def _scatter(axis: Axes, series: Sequence[Series], kind_x: str, kind_y: str) -> None:
    for one in series:
        x, y, face = one.values[kind_x], one.values[kind_y], one.color if one.filled else "none"
        axis.scatter(x, y, s=16, marker=one.marker, facecolors=face, edgecolors=one.color, linewidths=0.8, alpha=0.6)


def _draw_boxes(axis: Axes, series: Sequence[Series], kind: str, named: bool) -> None:
    places = [-i for i in range(len(series))]  # the first on top
    boxes = axis.boxplot(
        [one.values[kind] for one in series],
        positions=places,
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        widths=0.6,
        manage_ticks=False,
        zorder=3,
    )
    for number, one in enumerate(series):
        boxes["boxes"][number].set(facecolor=one.color if one.filled else "none", edgecolor=one.color, alpha=0.55)
        boxes["medians"][number].set(color="black", linewidth=2)
        for part in boxes["whiskers"][2 * number : 2 * number + 2] + boxes["caps"][2 * number : 2 * number + 2]:
            part.set(color=one.color, linewidth=1.2)
        values = one.values[kind]
        # a sequence that fills an interval evenly, so that points do not hide one another and a picture is reproducible
        heights = [places[number] + 0.5 * ((i * 0.618034) % 1 - 0.5) for i in range(len(values))]
        axis.scatter(values, heights, s=5, color=one.color, alpha=0.3, linewidths=0, zorder=2)
    axis.set_yticks(places if named else [], [one.name for one in series] if named else [], fontsize=9)
    axis.set_ylim(places[-1] - 0.6, 0.6)
    if kind in ("gini", "displacement"):
        axis.set_xlim(-0.02, 1.02)
    elif kind.startswith("logit"):
        axis.set_xlim(left=0)
    else:
        axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)


def _title(result: dict[str, Any]) -> str:
    responses = len(next(iter(result["policies"].values()))["responses"]["row"])
    return f"Shifts from the reference: {responses:,} responses, {result['responses']}"


def _legend(figure: Figure, series: Sequence[Series], columns: int) -> None:
    handles = [
        Line2D([], [], linestyle="none", marker=one.marker, markersize=9, color=one.color, label=one.name,
               markerfacecolor=one.color if one.filled else "none")
        for one in series
    ]  # fmt: skip
    boxes = "box: quartiles; black: median; whiskers: 5 to 95 %; a dot: a response"
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, title=boxes)


def draw_figure4(result: dict[str, Any]) -> Figure:
    """Bars: share of each policy's token shifts in the deciles of one; that one's own are 10 % each, the dashed line."""
    figure4 = result["figure4"]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axis = figure.subplots()
    width = 0.84 / len(figure4["shares"])
    for number, (name, shares) in enumerate(figure4["shares"].items()):
        places = [k - 0.42 + (number + 0.5) * width for k in range(BINS)]
        axis.bar(
            places,
            [100 * share for share in shares],
            width * 0.92,
            color=COLORS[number % len(COLORS)],
            hatch=("", "//", "..", "xx", "\\\\", "++", "oo")[number % len(COLORS)],
            edgecolor="white",
            linewidth=0.5,
            label=name,
        )
    axis.axhline(100 / BINS, color="0.3", linewidth=1, linestyle="--", label=f"{figure4['bins_of']} by definition")
    borders = ["0 %", *(f"{10 * k} %\n{edge:+.2g}" for k, edge in enumerate(figure4["edges"], 1)), "100 %"]
    axis.set_xticks([k - 0.5 for k in range(BINS + 1)], borders)
    axis.set_xlim(-0.5, BINS - 0.5)
    axis.set_xlabel(f"percentile of {figure4['bins_of']}'s token log-likelihood shifts, and the shift there in nats")
    axis.set_ylabel("share of tokens, %")
    axis.set_title(r"Token log-likelihood shifts, $\log\pi-\log\pi_{ref}$", loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def write(folder: Path, result: dict[str, Any]) -> None:
    """analysis.json, figure3.png, figure4.png and displacement.png."""
    (folder / "analysis.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_figure3(result).savefig(folder / "figure3.png", dpi=120)
    draw_figure4(result).savefig(folder / "figure4.png", dpi=120)
    draw_displacement(result).savefig(folder / "displacement.png", dpi=120)
