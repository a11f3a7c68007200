"""What a run leaves behind: a table on the screen, metrics.json, metrics.png, report.html, and the model card README.md."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from rich.table import Table

import bnf_core
from bnf_train import demo
from bnf_train.checks import GREEDY, SAMPLED
from bnf_train.config import BNFConfig
from bnf_train.model.answers import Measured
from bnf_train.report.curves import draw, plots
from bnf_train.report.examples import TokenExample
from bnf_train.report.html import page
from bnf_train.report.right import Right, lines
from bnf_train.training.displacement import alarms, starts
from bnf_train.training.metrics import LABELS, Metric, shown

# every run is described by these flags, and by the others that were changed
MAIN_FLAGS = (
    "model",
    "dataset",
    "objective",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "batch_size",
    "num_train_epochs",
    "max_length",
    "optim",
    "weight_decay",
    "bf16",
    "seed",
)
RUN_TILES = {"step": ("optimizer steps", ",d"), "epoch": ("epochs", ".3g")}
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")


def table(held_out: dict[str, float]) -> Table | str:
    """The held-out result, a line per label."""
    if not held_out:
        return "No rows were held out, so there is no held-out result (see --eval_size)."
    rows = list(shown("terminal"))
    result = Table(title="Held-out responses, after against before")
    result.add_column("")
    for _, column in rows:
        result.add_column(column.name, justify="right")
    for label in _labels(held_out):
        result.add_row(label, *(_cell(held_out, metric, label, column.form) for metric, column in rows))
    return result


def _labels(held_out: Mapping[str, float]) -> list[str]:
    """The labels that held-out responses have."""
    return [label for label in LABELS if held_out.get(f"eval_responses/{label}")]


def _cell(held_out: Mapping[str, float], metric: Metric, label: str, form: str) -> str:
    value = held_out.get(metric.key(label, held_out=True))
    return "" if value is None else format(value, form)


def write(
    folder: Path,
    config: BNFConfig,
    history: list[dict[str, Any]],
    held_out: dict[str, float],
    examples: Sequence[TokenExample] = (),
    by_source: Mapping[str, dict[str, float]] | None = None,
    measured: Measured | None = None,
    pages: bool = True,
) -> None:
    """metrics.json, metrics.png, report.html and README.md, from the trainer's log history and the held-out metrics.

    Args:
      by_source: the held-out metrics of each data set, where there are several.
      measured: right answers, which make checks.jsonl, too.
      pages: False leaves metrics.json, checks.jsonl alone.
    """
    flags = {k: v for k, v in config.to_dict().items() if isinstance(v, (str, int, float, bool, type(None)))}
    metrics = {"config": flags, "held_out": held_out, "log": history}
    notices = [alarm.sentence(config.objective) for alarm in alarms(history, starts(config))]
    if notices:
        metrics["alarms"] = notices
    if by_source:
        metrics["held_out_by_dataset"] = by_source
    right = {} if measured is None else measured.values()
    if measured is not None:
        metrics["right"] = {"settings": measured.questions.settings(), **right, "during": measured.during}
        answered = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in measured.lines())
        (folder / "checks.jsonl").write_text(answered, encoding="utf-8", errors="backslashreplace")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    if not pages:
        return
    draw_main(folder / "metrics.png", history)

    result, settings = _result(held_out), _settings(config, flags)
    versions = _versions(folder)
    html = page(
        title=f"{_name(config.model)}, aligned with {config.objective}",
        summary=f"One run on {_name(config.dataset)}: what it did to responses that it was not trained on.",
        tiles=_tiles(history, held_out),
        notices=notices,
        result=result,
        history=history,
        settings=settings | versions,
        every_setting={k: v for k, v in flags.items() if not k.endswith("_token")},
        examples=examples,
        right=right,
    )
    (folder / "report.html").write_text(html, encoding="utf-8", errors="backslashreplace")  # a path may be no UTF-8
    _write_card(folder, config, held_out, result, settings, versions, len(examples), right)


def draw_main(path: Path, history: list[dict[str, Any]]) -> None:
    """Loss, token weights, and held-out shifts against optimizer steps."""
    main = [plot for plot in plots() if plot.panel.main]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axis, plot in zip(figure.subplots(1, len(main)), main, strict=True):
        draw(axis, plot, history)
    figure.savefig(path, dpi=120)


def _write_card(
    folder: Path,
    config: BNFConfig,
    held_out: Mapping[str, float],
    result: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    examples: int,
    right: Right,
) -> None:
    # the hub links base model and data by name, so that a local path would be a broken link
    on_hub = {name: None if name is None or Path(name).exists() else name for name in (config.model, config.dataset)}
    hub_dataset = on_hub[config.dataset]
    data = ModelCardData(
        base_model=on_hub[config.model],
        datasets=[hub_dataset] if hub_dataset else None,
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        pipeline_tag="text-generation",
        tags=["alignment", "preference-optimization", config.objective.split(":")[-1]],
        model_name=folder.resolve().name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=hub_dataset or "local",
                dataset_name=_name(config.dataset),
                metric_type=metric.name.removesuffix("/{label}"),
                metric_name=f"{column.name}, {label}" if label else column.name,
                metric_value=held_out[metric.key(label, held_out=True)],
            )
            for metric, column in shown("terminal")
            for label in metric.labels
            if metric.key(label, held_out=True) in held_out
        ]
        + _right_results(right, hub_dataset or "local", _name(config.check_dataset or config.dataset))
        or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        name=folder.resolve().name,
        base_model=_name(config.model),
        dataset=_name(config.dataset),
        objective=config.objective,
        result=result,
        settings=settings,
        versions=versions,
        examples=examples,
        right=lines(right),
    )
    card.save(folder / "README.md")


def _right_results(right: Right, kind: str, name: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation", dataset_type=kind, dataset_name=name, metric_type="right answers",
            metric_name=f"right answers, {way}, {group}", metric_value=of[way]["value"],
        )
        for group, of in right.get("after", {}).items()
        for way in (GREEDY, SAMPLED)
        if way in of
    ]  # fmt: skip


def _result(held_out: Mapping[str, float]) -> dict[str, list[str]]:
    """The held-out table with a column per label, which is what fits a phone; {} without held-out rows."""
    labels = _labels(held_out)
    if not labels:
        return {}
    result = {"label": labels}
    for metric, row in shown("result"):
        if metric.name == "logp_per_token/{label}":  # before = after - shift
            after, shift = (
                [held_out[f"eval_{name}/{x}"] for x in labels] for name in ("logp_per_token", "logp_shift_per_token")
            )
            result["nats per token, before"] = [f"{x - y:.4f}" for x, y in zip(after, shift, strict=True)]
        result[row.name] = [_cell(held_out, metric, label, row.form) for label in labels]
    return result


def _tiles(history: Sequence[Mapping[str, Any]], held_out: Mapping[str, float]) -> dict[str, str]:
    """The numbers that one looks for first, as far as the run has them."""
    last = {key: value for log in history for key, value in log.items()}
    of_evaluation, of_training = {}, {}
    for metric, tile in shown("tile"):
        for name, key in metric.entries(tile):
            logged = [log[key] for log in history if key in log]
            if metric.held_out and key in held_out:
                of_evaluation[name] = format(held_out[key], tile.form)
            elif not metric.held_out and logged:
                of_training[name] = format(median_high(logged), tile.form)
    steps = {name: format(last[key], form) for key, (name, form) in RUN_TILES.items() if key in last}
    minutes = {"minutes of training": format(last["train_runtime"] / 60, ",.1f")} if "train_runtime" in last else {}
    return of_evaluation | steps | of_training | minutes


def _settings(config: BNFConfig, flags: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    changed = [k for k, v in flags.items() if v and not k.endswith("_token") and v != defaults.get(k, v)]
    changed += [k for k, v in flags.items() if not v and defaults.get(k) and isinstance(defaults[k], (str, int, float))]
    settings = {k: _name(flags[k]) for k in (*MAIN_FLAGS, *sorted(set(changed) - set(MAIN_FLAGS))) if k in flags}
    return settings | {"device": config.device.type, "processes": config.world_size}


def _versions(folder: Path) -> dict[str, str]:
    libraries = (*LIBRARIES, "peft") if (folder / "adapter_config.json").exists() else LIBRARIES
    return {"bnf-align": bnf_core.__version__} | {name: importlib.metadata.version(name) for name in libraries}


def _name(value: Any) -> Any:
    """A local file or folder by its own name: where it lay is nobody's business but the runner's."""
    if value == str(demo.MODEL):
        return "bnf_train's demo model"
    if not value or not isinstance(value, str):
        return value
    path = Path(value)
    return path.resolve().name if path.is_absolute() or path.exists() else value
