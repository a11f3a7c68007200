"""The plan as it is printed."""

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from bnf_train.plan.estimate import PAPER_TFLOPS
from bnf_train.plan.memory import GIB


def tables(result: dict[str, Any]) -> Iterator[RenderableType]:
    """The plan as it is printed."""
    sizes, data, flops = result["parameters"], result["data"], result["flops"]
    summary = Table(title="Plan of a training run", show_header=False)
    summary.add_column(no_wrap=True)
    summary.add_column(overflow="fold")  # a long path is not cut
    hours = f"{result['gpu_hours']:.3g} at {result['utilization']:.0%} of {result['peak_tflops']:g} TFLOP/s"
    paper = f"{result['paper_gpu_hours']} A100-hours for {result['paper_model']}"
    if result["paper_utilization"] is not None:
        paper += f"; these FLOPs in that time are {result['paper_utilization']:.0%} of an A100's {PAPER_TFLOPS:g} TFLOP/s"
    asked = []
    if checked := result["checked"]:
        most = f"{checked['times']} times {checked['answers']:,}, at most {checked['tokens']:,} tokens"
        asked = [("answers checked", f"{most}; not in what follows")]
    for name, value in (
        ("model", result["model"]),
        ("parameters", f"{sizes['total']:,}, all trainable; LoRA {sizes['trainable']['lora']:,}"),
        ("embedding; head", f"{sizes['embedding']:,}; {sizes['head']:,}, {'tied' if sizes['tied'] else 'untied'}"),
        ("data", data["source"]),
        ("rows, responses", f"{data['rows']:,}, {data['responses']:,}"),
        ("tokens an epoch", f"{data['tokens']:,}, of them response {data['response_tokens']:,}"),
        ("largest micro-batch", f"{data['positions']['cuda']:,} positions; on a CPU {data['positions']['cpu']:,} at a time"),
        ("optimizer steps", f"{result['steps']:,} of {result['rows_per_step']} rows: {result['epochs']:.3g} epochs"),
        ("tokens in all", f"{result['tokens']:,}"),
        *asked,
        *((f"FLOPs, {name}", f"{value:.3e}") for name, value in flops.items()),
        ("GPU-hours", hours),
        ("the paper's", paper),
    ):
        summary.add_row(name, value)
    yield summary
    yield _memory_table(f"GiB on each of {result['gpus']} GPUs (formulas, not measured)", result["gpu_memory"])
    yield _memory_table("GiB of one CPU process", result["cpu_memory"])


def _memory_table(title: str, lines: list[dict[str, Any]]) -> RenderableType:
    """A column for each way of training, which 80 characters have room for; below what checkpointing changes."""
    terms = [name for name in lines[0] if name not in ("method", "strategy", "checkpointing")]
    plain, checkpointed = ([line for line in lines if line["checkpointing"] is on] for on in (False, True))
    table = Table("", title=title)
    for line in plain:
        table.add_column(f"{line['method']}\n{line['strategy']}", justify="right", no_wrap=True)

    def add(name: str, of: list[dict[str, Any]], last: bool) -> None:
        table.add_row(name, *(f"{line[name] / GIB:.2f}" for line in of), end_section=last)

    for name in terms:
        add(name, plain, last=name == terms[-1])
    changed = [name for name in terms if [line[name] for line in plain] != [line[name] for line in checkpointed]]
    table.add_row("checkpointing:")
    for name in changed:
        add(name, checkpointed, last=False)
    return table
