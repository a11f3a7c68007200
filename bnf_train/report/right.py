"""Right answers before and after, as a table and as bars: a line for each group and way of answering."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from bnf_train.checks import GREEDY, SAMPLED

STAGES = ("before", "after")
COLORS = {"before": "#9aa3ad", "after": "#1d7a3d"}
TITLE = "Right answers, after against before, with 95 % intervals over prompts"
Right = Mapping[str, Mapping[str, Any]]  # {stage: {group: summary}}


class Line(NamedTuple):
    """Of the table: what is counted, before, after, and how far it moved; "" where it was not measured."""

    group: str
    what: str
    before: str
    after: str
    change: str


def lines(right: Right) -> list[Line]:
    """For each group: greedy answers, samples, the best of most samples; of the samples, lengths and how many were cut."""
    measured = [right[stage] for stage in STAGES if stage in right]
    found = []
    for group, of in (measured[0] if measured else {}).items():
        for name, what in _named(of).items():
            percent = not name.endswith("_tokens")
            cells = [_cell(right, stage, group, name, percent) for stage in (*STAGES, "change")]
            found.append(Line(f"{group} ({of['prompts']:,} prompt{'s' * (of['prompts'] != 1)})", what, *cells))
    return found


def _named(of: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of a summary, and what it is called."""
    best = [name for name in of if name.startswith("pass@") and name != "pass@1"][-1:]
    last = SAMPLED if SAMPLED in of else GREEDY
    named = {GREEDY: "greedy", SAMPLED: "sampled"} | dict.fromkeys(best, best[0] if best else "")
    named |= {f"{last}_tokens": "tokens", f"{last}_cut": "cut"}
    return {name: what for name, what in named.items() if name in of}


def _cell(right: Right, stage: str, group: str, name: str, percent: bool) -> str:
    of = right.get(stage, {}).get(group, {}).get(name)
    if of is None:
        return ""
    form = ("+" if stage == "change" else "") + (".1%" if percent else ".1f")
    value, low, high = (format(of[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low.rstrip('%')} … {high.rstrip('%')})"


def right_table(right: Right) -> Table:
    """For a terminal."""
    result = Table(title=TITLE, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    result.add_column("group", overflow="fold")
    result.add_column("answers")
    for name in (*STAGES, "change"):
        result.add_column(name, justify="right")
    shown = ""
    for line in lines(right):
        cells = (cell.replace(" (", "\n(") for cell in line[2:])  # fits 80 columns
        result.add_row(escape(line.group).replace(" (", "\n(") if line.group != shown else "", line.what, *cells)
        shown = line.group
    return result


def svg(right: Right) -> bytes:
    """Bars with intervals: a panel for greedy and one for sampled answers, before and after beside each other."""
    stages = [stage for stage in STAGES if stage in right]
    groups = list(right[stages[0]])
    names = [name for name in (GREEDY, SAMPLED) if name in right[stages[0]][groups[0]]]
    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6 * len(names), 2.9), layout="constrained")
        axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for axis, name in zip(axes, names, strict=True):
            for place, stage in enumerate(stages):
                _bars(axis, [right[stage][group][name] for group in groups], place, stage)
            axis.set_xticks([i + 0.2 * (len(stages) - 1) for i in range(len(groups))], groups)
            axis.set(title=f"Right answers, {name}", ylim=(0, 1.02), ylabel="share" if axis is axes[0] else "")
            axis.yaxis.set_major_formatter("{x:.0%}")
            axis.grid(alpha=0.3, axis="y")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        file = BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _bars(axis: Any, values: Sequence[Mapping[str, float]], place: int, stage: str) -> None:
    heights = [of["value"] for of in values]
    # rounding may put an edge on the other side of the mean by a hair
    reach = [[max(0.0, of["value"] - of["low"]) for of in values], [max(0.0, of["high"] - of["value"]) for of in values]]
    where = [i + 0.4 * place for i in range(len(values))]
    axis.bar(where, heights, 0.38, yerr=reach, capsize=3, label=stage, color=COLORS[stage], error_kw={"lw": 1})
