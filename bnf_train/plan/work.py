"""How much there is to compute: tokens, micro-batches, floating-point operations."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnf_train.config import BNFConfig
from bnf_train.data import Collator, Response, Row, by_prompt, passes, spared
from bnf_train.objectives import is_per_token
from bnf_train.plan.size import ModelSize


@dataclass(frozen=True)
class Work:
    """What the work of one pass over some rows depends on."""

    tokens: int  # prompts and responses, as if each response had a prompt of its own
    response_tokens: int
    positions: int  # that are computed: a prompt that responses share is one
    squares: float  # of attention, causal: sum over responses of n^2, less p^2 where a prompt is not computed again

    @classmethod
    def of(cls, rows: Sequence[Row], batch_size: int = 0) -> "Work":
        """With prompts shared within `batch_size` rows, those to one prompt behind each other; 0: not at all."""
        responses = [r for row in rows for r in row.responses]
        lengths = [len(r.input_ids) for r in responses]
        saved = spared([rows[at] for group in by_prompt(rows) for at in group], batch_size) if batch_size else []
        squares = sum(n * n for n in lengths) - sum(p * p for p in saved)
        return cls(sum(lengths), sum(r.tokens for r in responses), sum(lengths) - sum(saved), float(squares))


@dataclass(frozen=True)
class Data:
    """What one epoch and the reference pass go through, and the largest micro-batch."""

    source: str  # "counted" or an estimate from flags
    rows: int
    responses: int
    epoch: Work
    reference: Work  # held-out rows, too
    batches: dict[str, dict[str, Tensor]]  # the largest micro-batch ("cuda"), and the largest pass of one process ("cpu")
    held_out: int | None = None  # prompts, where they are counted

    @property
    def positions(self) -> dict[str, int]:
        """Positions of each, padding included."""
        return {device: batch["input_ids"].numel() for device, batch in self.batches.items()}


def largest(batches: Iterable[dict[str, Tensor]], config: BNFConfig) -> dict[str, dict[str, Tensor]]:
    """Of micro-batches: the one with most positions, and the same of the passes that --tokens_per_pass makes of them."""

    def positions(batch: dict[str, Tensor]) -> int:
        return batch["input_ids"].numel()

    every, most = list(batches), config.tokens_per_pass or math.inf
    parts = [part for batch in every for part in passes(batch, most, whole_rows=not is_per_token(config.objective))]
    return {"cuda": max(every, key=positions), "cpu": max(parts, key=positions)}


def counted(rows: Sequence[Row], held_out: Sequence[Row], config: BNFConfig, collator: Collator) -> Data:
    """Real rows; the largest micro-batch is that of an epoch in a seeded order."""
    size = config.per_device_train_batch_size
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    if collator.share_prompts:
        groups = by_prompt(rows)
        order = [place for group in torch.randperm(len(groups), generator=generator).tolist() for place in groups[group]]
    batches = (collator([rows[i] for i in order[start : start + size]]) for start in range(0, len(order), size))
    work = Work.of(rows, size if collator.share_prompts else 0)
    return Data(
        source="counted",
        rows=len(rows),
        responses=sum(len(row.responses) for row in rows),
        epoch=work,
        reference=Work.of([*rows, *held_out], config.per_device_eval_batch_size if collator.share_prompts else 0),
        batches=largest(batches, config),
        held_out=len({row.prompt for row in held_out}),
    )


def estimated(rows: int, prompt: int, response: int, config: BNFConfig, collator: Collator) -> Data:
    """Pairs of two responses of one length; the largest micro-batch is of responses of --max_length tokens."""
    longest = config.max_length
    n = min(prompt + response, longest)
    begins = max(longest * prompt // (prompt + response), 1)
    pair = Row("", [Response([0] * begins + [side] * (longest - begins), begins, True) for side in (0, 1)])
    saved = min(prompt, n - 1) if collator.share_prompts else 0
    tokens = 2 * rows * n
    work = Work(tokens, 2 * rows * max(n - prompt, 1), tokens - rows * saved, rows * (2.0 * n * n - saved * saved))
    return Data(
        source=f"estimated: {rows:,} pairs, prompts of {prompt} tokens, responses of {response}",
        rows=rows,
        responses=2 * rows,
        epoch=work,
        reference=work,
        batches=largest([collator([pair] * config.per_device_train_batch_size)], config),
    )


def answers(config: BNFConfig, held_out: int | None, steps: int) -> dict[str, int] | None:
    """What --check asks for at most: every prompt, each answer as long as it may be."""
    if config.check is None:
        return None
    prompts = config.check_rows if config.check_dataset or held_out is None else min(config.check_rows, held_out)
    times = 2 + (max(steps - 1, 0) // config.check_steps if config.check_steps else 0)  # before, after, and in between
    each = prompts * (1 + config.check_samples)
    return {"times": times, "answers": each, "tokens": times * each * config.check_max_new_tokens}


# --- operations ---


def backbone_flops(size: ModelSize, work: Work, epochs: float, checkpointing: bool) -> float:
    """6 P N: 2 forward, 4 backward, for each weight of the backbone's products and token; 8 P N where it is recomputed."""
    return (8 if checkpointing else 6) * size.backbone_linear * work.positions * epochs


def attention_flops(size: ModelSize, work: Work, epochs: float, checkpointing: bool) -> float:
    """6 n^2 per layer and unit of width: 2 n^2 forward (two products, causal half), 4 n^2 backward; 8 n^2 recomputed."""
    return (8 if checkpointing else 6) * size.layers * size.attention_width * work.squares * epochs


def head_flops(size: ModelSize, work: Work, epochs: float, products: int) -> float:
    """2 V d per response token and product: three of a loss per token (logits, dhidden, dweight), else four."""
    return 2 * products * size.head * work.response_tokens * epochs


def reference_flops(size: ModelSize, work: Work) -> float:
    """2 P N + 2 n^2 + 2 V d, forward only, once."""
    attention = 2 * size.layers * size.attention_width * work.squares
    return 2 * size.backbone_linear * work.positions + attention + 2 * size.head * work.response_tokens


def gpu_hours(flops: float, peak_tflops: float, utilization: float) -> float:
    """flops / (peak * utilization), in hours of one GPU."""
    return flops / (peak_tflops * 1e12 * utilization) / 3600
