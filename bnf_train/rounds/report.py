"""What the rounds leave: a table on the screen, rounds.json, rounds.md, rounds.png and report.html, from the rounds' files."""

import base64
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from bnf_train.checks import GREEDY, SAMPLED
from bnf_train.rounds.files import Folder, read_lines, replace, write_json
from bnf_train.rounds.settings import BEGUN
from bnf_train.rounds.stages import seeds
from bnf_train.sample.rows import RIGHT
from bnf_train.training.metrics import LABELS

Result = Mapping[str, Any]  # of one round, or of the start


def collect(output: Path, rounds: int) -> list[dict[str, Any]]:
    """What the files of the start and of every complete round say; nothing in it depends on when they were written."""
    seed = json.loads((output / BEGUN).read_text())["flags"]["seed"]
    found = []
    for number in range(rounds + 1):
        folder = Folder(output, number)
        if not folder.right.exists():
            break
        result: dict[str, Any] = {"round": number, **json.loads(folder.right.read_text())}
        if number:
            trained = json.loads(folder.trained.read_text())
            weight = {label: trained["held_out"].get(f"eval_bnf/weight_mean/{label}") for label in LABELS}
            result |= {"seeds": seeds(seed, number), "samples": of_answers(folder.answers), "rows": of_rows(folder.rows)}
            result |= {"steps": trained["steps"], "weight": weight, "alarms": trained["alarms"], "notice": one_sided(folder)}
        found.append(result)
    return found


def of_answers(path: Path) -> dict[str, Any]:
    """Of all sampled answers: how many, the share that is right and that was cut, mean tokens, prompts without a contrast.

    `all_right` and `all_wrong` are shares of the prompts, those to which all answers are alike.
    """
    answers = read_lines(path)[1:]  # the first line says what was asked
    right = [[value >= RIGHT for value in one["values"]] for one in answers]
    each = [value for of in right for value in of]
    return {
        "prompts": len(answers),
        "answers": len(each),
        "right": fmean(each),
        "all_right": fmean(map(all, right)),
        "all_wrong": fmean(not any(of) for of in right),
        "tokens": sum(one["tokens"] for one in answers) / len(each),
        "cut": fmean(cut for one in answers for cut in one["cut"]),
    }


def of_rows(path: Path) -> dict[str, int]:
    """Responses of each label in the round's rows. Rows that training holds out count, too."""
    preferred = dispreferred = 0
    for row in read_lines(path):
        labels = row.get("labels", [row["label"]] if "label" in row else [True, False])
        preferred, dispreferred = preferred + sum(labels), dispreferred + len(labels) - sum(labels)
    return {"preferred": preferred, "dispreferred": dispreferred}


def one_sided(folder: Folder) -> str:
    """A sentence where all sampled answers have one label; else nothing."""
    rows = of_rows(folder.rows)
    if rows["preferred"] and rows["dispreferred"]:
        return ""
    label, word = ("preferred", "right") if rows["preferred"] else ("dispreferred", "wrong")
    does = (
        "makes them likelier, and nothing is pushed down"
        if rows["preferred"]
        else "makes them less likely, and nothing says what is right: easier prompts or more --samples would"
    )
    return (
        f"Round {folder.number}: all {rows[label]:,} answers are {word}, so it trains on {label} responses alone, which {does}."
    )


# --- tables ------------------------------------------------------------------------------------------------------------


def _interval(of: Mapping[str, float] | None) -> str:
    if of is None:
        return ""
    value, low, high = (format(of[key], ".1%") for key in ("value", "low", "high"))
    return f"{value} ({low.rstrip('%')} … {high.rstrip('%')})"


def _both(of: Mapping[str, Any] | None, names: Sequence[str], form: str) -> str:
    values = ["" if of is None or of[name] is None else format(of[name], form) for name in names]
    return " / ".join(values) if any(values) else ""


def _of_round(result: Result) -> dict[str, str]:
    return {
        "w, preferred / dispreferred": _both(result.get("weight"), LABELS, ".3f"),
        "prompts all right / all wrong": _both(result.get("samples"), ("all_right", "all_wrong"), ".0%"),
        "rows preferred / dispreferred": _both(result.get("rows"), LABELS, ",d"),
    }


def _of_group(result: Result, group: str) -> dict[str, str]:
    of = result["right"][group]
    last = SAMPLED if SAMPLED in of else GREEDY
    names = [GREEDY, SAMPLED, *[name for name in of if name.startswith("pass@") and name != "pass@1"][-1:]]
    cells = {f"right, {name}": _interval(of.get(name)) for name in names if name in of}
    cells["tokens"] = format(of[f"{last}_tokens"]["value"], ".1f")
    return cells | {"entropy": format(result["entropy"][group], ".3f") if group in result["entropy"] else ""}


def _name(result: Result) -> str:
    return f"round {result['round']}" if result["round"] else "start"


def rows(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of all columns: a line for each group of prompts in each round."""
    lines = []
    for result in results:
        for group in result["right"]:
            cells = {"": _name(result), "group": group} | _of_group(result, group) | _of_round(result)
            lines.append(cells)
    return list(lines[0]), [list(line.values()) for line in lines]


def table(results: Sequence[Result]) -> Table:
    """The main columns, for a terminal of 80 columns; + stands for preferred, - for dispreferred responses."""
    title = "Right answers to held-out prompts (95 % interval), and what each round trained on"
    result = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    way = f"right, {SAMPLED}" if f"right, {SAMPLED}" in rows(results)[0] else f"right, {GREEDY}"
    of_round = list(_of_round(results[0]))
    brief = (way.replace(", ", ",\n"), "tokens", "entropy", "w,\n+\n-", "prompts\nall right\nall wrong", "rows,\n+\n-")
    for heading in ("", "group", *brief):
        result.add_column(heading, justify="right" if heading in brief else "left")
    for one in results:
        for place, group in enumerate(one["right"]):
            cells = _of_group(one, group)
            shown = [cells[way].replace(" (", "\n("), cells["tokens"], cells["entropy"]]
            shared = [cell.replace(" / ", "\n") for cell in _of_round(one).values()] if place == 0 else [""] * len(of_round)
            result.add_row(_name(one) if place == 0 else "", escape(group), *shown, *shared)
    return result


def markdown(results: Sequence[Result]) -> str:
    """All columns, as a Markdown table."""
    headings, lines = rows(results)
    text = ["| " + " | ".join(headings) + " |", "| --- | --- |" + " ---: |" * (len(headings) - 2)]
    return "\n".join(text + ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]) + "\n"


# --- files -------------------------------------------------------------------------------------------------------------


def write(output: Path, rounds: int, again: int) -> list[dict[str, Any]]:
    """All files, each whole or not at all; what they are made of.

    Args:
      again: prompts that are trained on and asked.
    """
    found, begun = collect(output, rounds), json.loads((output / BEGUN).read_text())
    write_json(output / "rounds.json", {"flags": begun["flags"], "rounds": found})
    replace(output / "rounds.md", markdown(found).encode())
    image = _png(_curves(found))
    replace(output / "rounds.png", image)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    headings, lines = rows(found)
    page = environment.get_template("rounds.html.jinja").render(
        headings=headings,
        rows=lines,
        image=base64.b64encode(image).decode(),
        notices=[text for one in found for text in ([one["notice"]] if one.get("notice") else []) + one.get("alarms", [])],
        rounds=found[1:],
        again=again,
        settings=found[0]["settings"],
        flags=begun["flags"],
    )
    replace(output / "report.html", page.encode("utf-8", errors="backslashreplace"))
    return found


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _curves(results: Sequence[Result]) -> Figure:
    """Against rounds: right answers with intervals, entropy, mean token weight, and prompts whose answers are all alike."""
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    right, entropy, weight, alike = figure.subplots(1, 4)
    numbers = [one["round"] for one in results]
    for group, of in results[0]["right"].items():
        name = SAMPLED if SAMPLED in of else GREEDY
        values, low, high = ([one["right"][group][name][key] for one in results] for key in ("value", "low", "high"))
        (line,) = right.plot(numbers, values, marker="o", label=group)
        right.fill_between(numbers, low, high, alpha=0.15, color=line.get_color())
        entropy.plot(numbers, [one["entropy"].get(group) for one in results], marker="o", label=group)
    for label, color in zip(LABELS, ("tab:green", "tab:red"), strict=True):
        points = [(one["round"], one["weight"][label]) for one in results[1:] if one["weight"][label] is not None]
        if points:
            weight.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
    for key, color in (("all_right", "tab:green"), ("all_wrong", "tab:red")):
        alike.plot(
            numbers[1:], [one["samples"][key] for one in results[1:]], marker="o", color=color, label=key.replace("_", " ")
        )
    titles = ("Right answers, sampled", "Entropy of sampled answers, nats a token", "Mean token weight w", "Prompts all alike")
    axes: Sequence[Axes] = (right, entropy, weight, alike)
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="round", xticks=numbers)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    for axis in (right, alike):
        axis.set_ylim(0, 1.02)
        axis.yaxis.set_major_formatter("{x:.0%}")
    return figure
