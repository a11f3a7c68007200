"""report.html: a run on one page that needs nothing else, no network and no script."""

import base64
import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import jinja2

from bnf_train.report.curves import svgs
from bnf_train.report.examples import TokenExample
from bnf_train.report.right import Right, lines, svg

RGB = tuple[int, int, int]
# light enough for black text; blue and orange stay apart for the colour-blind
MUTED, FULL = (158, 125, 226), (241, 238, 249)  # w = 0, w = 1
FELL, SAME, ROSE = (243, 146, 102), (246, 246, 244), (112, 172, 240)
UNKNOWN = "#cccccc"


def page(
    title: str,
    summary: str,
    tiles: Mapping[str, str],
    notices: Sequence[str],
    result: Mapping[str, Sequence[str]],
    history: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    every_setting: Mapping[str, Any],
    examples: Sequence[TokenExample],
    right: Right | None = None,
) -> str:
    """The whole document; jinja2 escapes every text that comes from data."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    limit = shift_limit(examples)
    return environment.get_template("report.html.jinja").render(
        title=title,
        summary=summary,
        tiles=tiles,
        notices=notices,
        result=result,
        curves=[(name, base64.b64encode(image).decode()) for name, image in svgs(history)],
        right=lines(right) if right else [],
        right_bars=base64.b64encode(svg(right)).decode() if right else "",
        settings=settings,
        every_setting=every_setting,
        examples=[_example(example, limit) for example in examples],
        limit=f"{limit:g}",
        scales={
            "weight": [weight_color(0), weight_color(1)],
            "shift": [shift_color(-limit, limit), shift_color(0, limit), shift_color(limit, limit)],
        },
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def weight_color(weight: float) -> str:
    """Violet where w = 0 (the token is let go), almost white where w = 1 (its full gradient)."""
    return _mix(MUTED, FULL, weight) if math.isfinite(weight) else UNKNOWN


def shift_color(shift: float, limit: float) -> str:
    """Orange where the likelihood fell, blue where it rose; full colour at `limit` nats and beyond."""
    return _mix(SAME, ROSE if shift > 0 else FELL, abs(shift) / limit) if not math.isnan(shift) else UNKNOWN


def shift_limit(examples: Sequence[TokenExample]) -> float:
    """Nats at which the colour is full: 19 of 20 tokens lie below, so that one outlier does not pale the rest."""
    shifts = sorted(abs(shift) for example in examples for shift in example.shift if math.isfinite(shift))
    largest = shifts[math.ceil(0.95 * len(shifts)) - 1] if shifts else 0.0
    return float(f"{largest:.1g}") or 1.0


def _mix(start: RGB, end: RGB, share: float) -> str:
    share = min(max(share, 0.0), 1.0)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(start, end, strict=True))


def _example(example: TokenExample, limit: float) -> dict[str, Any]:
    count = len(example.tokens)
    tokens = [
        {
            "text": _visible(text),
            "weight": weight_color(weight),
            "shift": shift_color(shift, limit),
            "numbers": f"{number}/{count}  {text.strip() or repr(text)}  w {weight:.3f}  shift {shift:+.3f} nats",
        }
        for number, (text, weight, shift) in enumerate(zip(example.tokens, example.weight, example.shift, strict=True), start=1)
    ]
    return {
        "prompt": example.prompt,
        "label": "preferred" if example.preferred else "dispreferred",
        "facts": f"{count} tokens · mean w {mean(example.weight):.3f} · shift {mean(example.shift):+.3f} per token",
        "tokens": tokens,
    }


def _visible(text: str) -> str:
    """Line breaks get a mark, and so does a token that is only a part of a character."""
    return text.replace("\n", "↵\n") or "·"
