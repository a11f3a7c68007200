"""What a prompt that is computed once saves, by how long it is and how many responses share it."""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from bnf_core import bnf
from bnf_train.benchmark.task import this_device, wait
from bnf_train.data import Collator, Response, Row
from bnf_train.flags import parse
from bnf_train.model.attention import attend_varlen
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.load import load_model
from bnf_train.training.trainer import BNFTrainer

SIZES = (2, 4, 8)  # responses to a prompt
RATIOS = (0.25, 0.5, 1, 2, 4)  # length of the prompt over that of a response


def sweep(name: str, tokens: int, steps: int) -> list[dict[str, float]]:
    """A measured point for each size of group and ratio: medians of `steps` passes each way, in turns.

    A pass is forward and backward over groups of `tokens` tokens together, as if each response had a prompt of its own.
    """
    model = load_model(name).to(this_device())
    attend_varlen(model)
    attach_log_odds_head(model)
    with tempfile.TemporaryDirectory() as folder:
        config = parse([f"--model={name}", "--dataset=none", f"--output_dir={folder}/out", "--report_to=none"])
    trainer = BNFTrainer(model=model, args=config, objective=bnf, data_collator=Collator(0))
    points = []
    print(f"{'responses':>9}{'prompt':>8}{'response':>10}{'tokens/s apart':>16}{'shared':>9}{'times':>7}{'by positions':>14}")
    for size in SIZES:
        for ratio in RATIOS:
            prompt, response, rows = groups(size, ratio, tokens, model.config.get_text_config().vocab_size)
            batches = {share: _on(this_device(), Collator(0, True, share_prompts=share)(rows)) for share in (False, True)}
            times: dict[bool, list[float]] = {False: [], True: []}
            for step in range(steps + 1):
                for share, batch in batches.items():
                    start = time.perf_counter()
                    trainer.compute_loss(model.train(), batch).backward()
                    model.zero_grad()
                    wait(this_device())
                    times[share] += [time.perf_counter() - start] if step else []
            logical = len(rows) * size * (prompt + response)
            apart, shared = (logical / median(times[share]) for share in (False, True))
            limit = size * (prompt + response) / (prompt + size * response)
            points.append(
                {"responses": size, "prompt": prompt, "response": response, "apart": apart, "shared": shared, "limit": limit}
            )
            print(f"{size:9}{prompt:8}{response:10}{apart:16.0f}{shared:9.0f}{shared / apart:7.2f}{limit:14.2f}", flush=True)
    return points


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def groups(size: int, ratio: float, tokens: int, vocab: int) -> tuple[int, int, list[Row]]:
    """Lengths of prompt and response, and as many groups of random tokens as fill about `tokens`."""
    response = max(min(96, round(tokens / (size * (1 + ratio)))), 1)
    prompt = max(round(ratio * response), 1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(max(round(tokens / (size * (prompt + response))), 1)):
        asked, *answers = (torch.randint(vocab, (n,), generator=generator).tolist() for n in (prompt, *[response] * size))
        of = [Response(asked + answer, prompt, i % 2 == 0, torch.zeros(response)) for i, answer in enumerate(answers)]
        rows.append(Row("", of, group=True))
    return prompt, response, rows


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over the ratio, a colour for each size of group: measured (points) and by positions (lines)."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for colour, size in enumerate(sorted({point["responses"] for point in points})):
        of = [point for point in points if point["responses"] == size]
        ratios = [point["prompt"] / point["response"] for point in of]
        axes.plot(ratios, [point["limit"] for point in of], color=f"C{colour}", label=f"{size} responses, by positions")
        axes.plot(ratios, [p["shared"] / p["apart"] for p in of], "o", color=f"C{colour}", label=f"{size} responses, measured")
    axes.set(xscale="log", xlabel="prompt over response (tokens)", ylabel="times as many tokens a second")
    axes.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    axes.minorticks_off()
    axes.axhline(1, color="0.8", zorder=0)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
