"""What a comparison leaves: report.html, compare.json, compare.md and figures; means over seeds, and spread."""

import base64
import datetime
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from bnf_train.checks import GREEDY, SAMPLED, student
from bnf_train.compare import figures
from bnf_train.training.metrics import shown

Result = Mapping[str, Any]


class Column(NamedTuple):
    """Where a column's value is, how it is written, and whether it is in the terminal's table, too.

    A share has an interval of one run, over its prompts, in place of which several runs have one over seeds.
    """

    value: Callable[[Result], float | None]
    form: str
    brief: bool = False
    interval: Callable[[Result], tuple[float, float]] | None = None


def _mean_length(result: Result) -> float | None:
    return fmean(answer["tokens"] for answer in result["after"]) if result["after"] else None


# what is measured of an arm beside its held-out metrics
OF_ARM = {
    "answer length (tokens)": Column(_mean_length, ".0f", brief=True),
    "seconds, evaluations included": Column(lambda result: result["train_seconds"], ".0f"),
    "tokens per second": Column(lambda result: result["tokens_per_second"], ".0f"),
    "peak memory (GiB)": Column(lambda result: result["peak_gib"], ".2f"),
}
START = "before training"


def columns(results: Iterable[Result] = ()) -> dict[str, Column]:
    """The columns by heading: metrics of the last evaluation, right answers where they were counted, then OF_ARM."""

    def last(key: str) -> Callable[[Result], float | None]:
        return lambda result: result["curve"][-1].get(key)

    of_evaluation = {
        heading: Column(last(key), entry.form, entry.brief)
        for metric, entry in shown("compare")
        for heading, key in metric.entries(entry)
    }
    return of_evaluation | _right_columns(results) | OF_ARM


def _right_columns(results: Iterable[Result]) -> dict[str, Column]:
    """Right answers after training: of each group greedy, sampled, and the best of most samples."""
    found: dict[str, Column] = {}
    for result in results:
        for group, of in result.get("right", {}).get("after", {}).items():
            best = [name for name in of if name.startswith("pass@") and name != "pass@1"][-1:]
            for name in (GREEDY, SAMPLED, *best):
                if name in of:
                    brief = name == (SAMPLED if SAMPLED in of else GREEDY)
                    found.setdefault(f"right, {group}, {name}", _right_column(group, name, brief))
    return dict(sorted(found.items()))


def _right_column(group: str, name: str, brief: bool) -> Column:
    def of(result: Result) -> Any:
        return result.get("right", {}).get("after", {}).get(group, {}).get(name, {})

    return Column(
        lambda result: of(result).get("value"), ".1%", brief,
        interval=lambda result: (of(result)["low"], of(result)["high"]),
    )  # fmt: skip


def summaries(results: Iterable[Result]) -> dict[str, dict[str, dict[str, float] | None]]:
    """{arm: {column: {"mean", "min", "max", "runs"}}} over seeds, in the order of the arms; the starting point first.

    Shares have "low" and "high", too: the 95 % interval over seeds, or of a single run over its prompts.
    """
    finished = [result for result in results if "failed" not in result]
    by_arm: dict[str, list[Result]] = {}
    for result in finished:
        if result["curve"][0]["step"] == 0:
            by_arm.setdefault(START, []).append(_start(result))
    for result in finished:
        by_arm.setdefault(result["name"], []).append(result)
    known = columns(finished)
    return {name: {heading: _over(column, arm) for heading, column in known.items()} for name, arm in by_arm.items()}


def _start(result: Result) -> Result:
    """The starting point as an arm of its own: the first evaluation."""
    unknown = dict.fromkeys(("train_seconds", "tokens_per_second", "peak_gib"))
    right = {"after": result.get("right", {}).get("before", {})}
    return {**result, **unknown, "curve": result["curve"][:1], "after": result["before"], "right": right}


def _over(column: Column, arm: Sequence[Result]) -> dict[str, float] | None:
    known = [value for value in map(column.value, arm) if value is not None]
    if any(math.isnan(value) for value in known):  # one seed's failure is the arm's, and min() would lose it
        known = [math.nan]
    if not known:
        return None
    summary = {"mean": fmean(known), "min": min(known), "max": max(known), "runs": len(known)}
    if column.interval is not None:
        ends = student(known) if len(known) > 1 else next(column.interval(of) for of in arm if column.value(of) is not None)
        summary |= {"low": max(0.0, ends[0]), "high": min(1.0, ends[1])}
    return summary


def _cell(summary: Mapping[str, float] | None, form: str) -> str:
    """The mean; in brackets the smallest and the largest where they differ, or the interval where there is one."""
    if summary is None:
        return ""
    mean = format(summary["mean"], form)
    low, high = (format(summary[key], form) for key in (("low", "high") if "low" in summary else ("min", "max")))
    return mean if low == high else f"{mean} ({low.rstrip('%')} … {high.rstrip('%')})"


def _cells(
    arms: Mapping[str, Any], known: Mapping[str, Column], brief: bool = False
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Headings and, for each arm, its cells: the columns that have values; all those of the short table if `brief`."""
    names = {
        name: column.form
        for name, column in known.items()
        if (column.brief if brief else any(arm[name] for arm in arms.values()))
    }
    return list(names), [(arm, [_cell(of[name], form) for name, form in names.items()]) for arm, of in arms.items()]


def table(results: Sequence[Result]) -> Table:
    """The main columns, for a terminal."""
    headings, rows = _cells(summaries(results), columns(results), brief=True)
    result = Table(
        title="Held-out responses after training: mean over seeds (smallest … largest; of right answers 95 % interval)"
    )
    result.add_column("arm", overflow="fold")
    for heading in headings:
        result.add_column(escape(heading), justify="right")
    for arm, cells in rows:
        result.add_row(escape(arm), *cells)
    return result


def markdown(results: Sequence[Result]) -> str:
    """All columns that have values, as a Markdown table."""
    headings, rows = _cells(summaries(results), columns(results))
    lines = ["| arm | " + " | ".join(headings) + " |", "| --- |" + " ---: |" * len(headings)]
    lines += [f"| {_in_table(arm)} | " + " | ".join(cells) + " |" for arm, cells in rows]
    lines += [
        f"| {_in_table(r['name'])}, seed {r['seed']}: failed | {_in_table(r['failed'])} |" for r in results if "failed" in r
    ]
    return "\n".join(lines) + "\n"


def _in_table(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write(folder: Path, results: Sequence[Result]) -> None:
    """All files, each whole or not at all."""
    arms = summaries(results)
    _replace(folder / "compare.json", (json.dumps(_json({"arms": arms, "runs": list(results)}), indent=1) + "\n").encode())
    _replace(folder / "compare.md", markdown(results).encode())
    images = {}
    for name, figure in figures.drawn(results).items():
        images[name] = _png(figure)
        _replace(folder / f"{name}.png", images[name])
    _replace(folder / "report.html", _page(results, arms, images).encode())


def _json(value: Any) -> Any:
    """NaN and infinity as text: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list) else value


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(content)
    partial.replace(path)


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _page(results: Sequence[Result], arms: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    headings, rows = _cells(arms, columns(results))
    finished = [result for result in results if "failed" not in result]
    return environment.get_template("compare.html.jinja").render(
        names=headings,
        rows=rows,
        failed=[result for result in results if "failed" in result],
        images=[(figures.ALT[name], base64.b64encode(image).decode()) for name, image in images.items()],
        answers=[(f"{r['name']}, seed {r['seed']}", r["after"]) for r in finished if r["after"]],
        before=next((r["before"] for r in finished if r["before"]), []),
        seeds=len({result["seed"] for result in results}),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        arguments=[(f"{r['name']}, seed {r['seed']}", " ".join(r["arguments"])) for r in results],
    )
