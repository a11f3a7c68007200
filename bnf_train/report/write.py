"""What a run leaves behind: a table on the screen, metrics.json, metrics.png, report.html, and the model card README.md."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import bnf_core
from bnf_train import demo
from bnf_train.config import BNFConfig
from bnf_train.report.curves import MAIN_PANELS, draw
from bnf_train.report.examples import TokenExample
from bnf_train.report.html import page
from bnf_train.training.trainer import LABELS

COLUMNS = {
    "responses": "responses",
    "log-likelihood shift per token (nats)": "logp_shift_per_token",
    "mean token weight w": "bnf/weight_mean",
    "tokens clipped": "bnf/weight_clipped",
}
# what every run is described by; of the other flags, those that were changed
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
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")


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


def write(
    folder: Path,
    config: BNFConfig,
    history: list[dict[str, Any]],
    held_out: dict[str, float],
    examples: Sequence[TokenExample] = (),
) -> None:
    """metrics.json, metrics.png, report.html and README.md, from the trainer's log history and the held-out metrics."""
    flags = {k: v for k, v in config.to_dict().items() if isinstance(v, (str, int, float, bool, type(None)))}
    metrics = {"config": flags, "held_out": held_out, "log": history}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot(folder / "metrics.png", history)

    result, settings = _result(held_out), _settings(config, flags)
    versions = _versions(folder)
    html = page(
        title=f"{_name(config.model)}, aligned with {config.objective}",
        summary=f"One run on {_name(config.dataset)}: what it did to responses that it was not trained on.",
        tiles=_tiles(history, held_out),
        result=result,
        history=history,
        settings=settings | versions,
        every_setting={k: v for k, v in flags.items() if not k.endswith("_token")},
        examples=examples,
    )
    (folder / "report.html").write_text(html, encoding="utf-8", errors="backslashreplace")  # a path may be no UTF-8
    _write_card(folder, config, held_out, result, settings, versions, len(examples))


def plot(path: Path, history: list[dict[str, Any]]) -> None:
    """Loss, token weights, and held-out shifts against optimizer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(MAIN_PANELS)), MAIN_PANELS, strict=True):
        draw(axis, panel, history)
    figure.savefig(path, dpi=120)


def _write_card(
    folder: Path,
    config: BNFConfig,
    held_out: Mapping[str, float],
    result: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    examples: int,
) -> None:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

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
                metric_type=key,
                metric_name=f"{name}, {label}",
                metric_value=held_out[f"eval_{key}/{label}"],
            )
            for name, key in COLUMNS.items()
            for label in LABELS
            if f"eval_{key}/{label}" in held_out
        ]
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
    )
    card.save(folder / "README.md")


def _result(held_out: Mapping[str, float]) -> dict[str, list[str]]:
    """The held-out table with a column a label, which is what fits a phone; {} without held-out rows."""
    labels = [label for label in LABELS if held_out.get(f"eval_responses/{label}")]
    if not labels:
        return {}

    def row(key: str, form: str) -> list[str]:
        return [format(held_out[f"eval_{key}/{label}"], form) for label in labels]

    before = [held_out[f"eval_logp_per_token/{x}"] - held_out[f"eval_logp_shift_per_token/{x}"] for x in labels]
    return {
        "label": labels,
        "responses": row("responses", ",.0f"),
        "tokens": row("tokens", ",.0f"),
        "nats per token, before": [f"{x:.4f}" for x in before],
        "nats per token, after": row("logp_per_token", ".4f"),
        "shift, nats per token": row("logp_shift_per_token", "+.4f"),
        "mean token weight w": row("bnf/weight_mean", ".4f"),
        "tokens clipped (above π_ref)": row("bnf/weight_clipped", ".1%"),
    }


def _tiles(history: Sequence[Mapping[str, Any]], held_out: Mapping[str, float]) -> dict[str, str]:
    """The numbers that one looks for first, as far as the run has them."""
    last = {key: value for log in history for key, value in log.items()}
    tiles = {}
    for label in LABELS:
        if f"eval_logp_shift_per_token/{label}" in held_out:
            tiles[f"held-out shift, {label}, nats per token"] = f"{held_out[f'eval_logp_shift_per_token/{label}']:+.3f}"
    speeds = [log["tokens_per_second"] for log in history if "tokens_per_second" in log]
    shown = {
        "held-out reward accuracy": (held_out.get("eval_rewards/accuracies"), ".1%"),
        "optimizer steps": (last.get("step"), ",d"),
        "epochs": (last.get("epoch"), ".3g"),
        "training tokens per second": (sorted(speeds)[len(speeds) // 2] if speeds else None, ",.0f"),
        "minutes of training": (last["train_runtime"] / 60 if "train_runtime" in last else None, ",.1f"),
    }
    return tiles | {name: format(value, form) for name, (value, form) in shown.items() if value is not None}


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
