"""The figures of a comparison."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bnf_train.checks import GREEDY, SAMPLED, student
from bnf_train.training.metrics import LABELS

Result = Mapping[str, Any]

ALT = {
    "curves": "Held-out shifts and probe perplexity against optimizer steps",
    "tradeoff": "Margin against probe perplexity",
    "rates": "Right answers of each group against the learning rate",
}


def drawn(results: Sequence[Result]) -> dict[str, Figure]:
    """By name, those that there is something for."""
    figures = {"curves": _curves(results)}
    if any("probe_perplexity" in point for result in results for point in result.get("curve", ())):
        figures["tradeoff"] = _tradeoff(results)
    if len({rate for _, rate in map(spec_and_rate, results) if rate is not None}) > 1 and any(map(_groups, results)):
        figures["rates"] = _rates(results)
    return figures


def spec_and_rate(result: Result) -> tuple[str, float | None]:
    """The arm as --arms has it, and the learning rate where --learning_rates gave it.

    >>> spec_and_rate({"name": "dpo beta=1 lr=3e-05"}), spec_and_rate({"name": "bnf"})
    (('dpo beta=1', 3e-05), ('bnf', None))
    """
    spec, found, rate = str(result["name"]).rpartition(" lr=")
    return (spec, float(rate)) if found else (str(result["name"]), None)


def right(result: Result, group: str, when: str = "after") -> float | None:
    """The share of right answers in `group`: of sampled ones where there are any, else of greedy ones."""
    of = result.get("right", {}).get(when, {}).get(group, {})
    found = of.get(SAMPLED, of.get(GREEDY, {})).get("value")
    return None if found is None else float(found)


def _groups(result: Result) -> Iterable[str]:
    return result.get("right", {}).get("after", {})


def _from_start(result: Result, results: Sequence[Result]) -> list[Mapping[str, Any]]:
    """The evaluations of a run, from the starting point on, which one run for each seed has measured."""
    curve = list(result.get("curve", ()))
    starts = [r["curve"][0] for r in results if r["seed"] == result["seed"] and r.get("curve") and r["curve"][0]["step"] == 0]
    counted = [key for key in starts[0] if key.startswith(("eval_tokens", "eval_responses"))] if starts else []
    if curve and curve[0]["step"] and starts and all(starts[0][key] == curve[0].get(key) for key in counted):
        curve.insert(0, starts[0])
    return curve


def _styles(results: Sequence[Result]) -> dict[str, Any]:
    """A colour for each arm, whatever its learning rate."""
    return _colors(list(dict.fromkeys(spec_and_rate(result)[0] for result in results)))


def _colors(names: Sequence[str]) -> dict[str, Any]:
    palette = colormaps["tab10" if len(names) <= 10 else "turbo"]
    return {name: palette(i if len(names) <= 10 else i / max(len(names) - 1, 1)) for i, name in enumerate(names)}


def _curves(results: Sequence[Result]) -> Figure:
    """Against optimizer steps: held-out shifts a token, and perplexity on the probe; a thin line a seed."""
    figure, colors = Figure(figsize=(14, 4.4), layout="constrained"), _styles(results)
    axes: Sequence[Axes] = figure.subplots(1, 3)
    keys = [f"eval_logp_shift_per_token/{label}" for label in LABELS] + ["probe_perplexity"]
    titles = [f"Held-out shift, {label}" for label in LABELS] + ["Perplexity on text outside the preference data"]
    for axis, key, title in zip(axes, keys, titles, strict=True):
        named = set()
        for result in results:
            points = [(point["step"], point[key]) for point in _from_start(result, results) if key in point]
            if points:
                spec, _ = spec_and_rate(result)
                label = None if spec in named else spec
                named.add(spec)
                axis.plot(*zip(*points, strict=True), marker=".", lw=1.2, alpha=0.8, color=colors[spec], label=label)
        axis.set(title=title, xlabel="optimizer step", ylabel="" if key == "probe_perplexity" else "nats per token")
        axis.grid(alpha=0.3)
    axes[2].set_yscale("log")
    axes[2].yaxis.set_major_formatter("{x:g}")
    axes[2].yaxis.set_minor_formatter("{x:g}")
    if axes[0].lines:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _tradeoff(results: Sequence[Result]) -> Figure:
    """What was won against what it cost: the held-out margin a token against perplexity on the probe; a point a run."""
    figure, colors = Figure(figsize=(7, 4.8), layout="constrained"), _styles(results)
    axis: Axes = figure.subplots()
    named = set()
    for result in results:
        last = result["curve"][-1] if result.get("curve") else {}
        keys = [f"eval_logp_shift_per_token/{label}" for label in LABELS]
        if all(key in last for key in keys):
            spec, _ = spec_and_rate(result)
            label = None if spec in named else spec
            named.add(spec)
            won = last[keys[0]] - last[keys[1]]
            axis.plot(won, last["probe_perplexity"], "o", color=colors[spec], label=label)
    axis.set(
        title="Won and paid", xlabel="held-out shift of preferred minus dispreferred, nats per token",
        ylabel="perplexity on text outside the preference data", yscale="log",
    )  # fmt: skip
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize="small")
    return figure


def _rates(results: Sequence[Result]) -> Figure:
    """Right answers against the learning rate: an axis a group, a line an arm, its 95 % interval over seeds; dashed: before."""
    groups = list(dict.fromkeys(group for result in results for group in _groups(result)))
    figure = Figure(figsize=(5.2 * len(groups), 4.6), layout="constrained")
    colors = _colors(list(dict.fromkeys(spec_and_rate(result)[0] for result in results)))
    for axis, group in zip(figure.subplots(1, len(groups), squeeze=False, sharey=True)[0], groups, strict=True):
        for spec, color in colors.items():
            at: dict[float, list[float]] = {}
            for result in results:
                value, (name, rate) = right(result, group), spec_and_rate(result)
                if name == spec and rate is not None and value is not None:
                    at.setdefault(rate, []).append(value)
            rates = sorted(at)
            axis.plot(rates, [fmean(at[rate]) for rate in rates], marker=".", lw=1.4, color=color, label=spec)
            if all(len(at[rate]) > 1 for rate in rates):
                low, high = zip(*(student(at[rate]) for rate in rates), strict=True) if rates else ((), ())
                axis.fill_between(rates, low, high, color=color, alpha=0.15, lw=0)
        before = [value for result in results if (value := right(result, group, "before")) is not None]
        if before:
            axis.axhline(fmean(before), color="0.5", lw=1, ls="--")
        axis.set(title=f"Right answers: {group}", xlabel="learning rate", xscale="log", ylim=(0, 1))
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    return figure
