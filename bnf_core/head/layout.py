"""How large the pieces are that the head works in: chosen from shapes and dtypes alone, before anything is allocated."""

import math
from dataclasses import dataclass

import torch

from bnf_core.head.products import multiplies
from bnf_core.head.transform import HeadOptions

__all__ = ["Layout", "layout"]

MIB = 2**20


@dataclass(frozen=True)
class Budget:
    """Bytes for the pieces whose size is free, and the most tokens in a chunk."""

    exponentials: int  # of a chunk of tokens, over the whole vocabulary
    tile: int  # logits at a time
    copies: int  # rows of the weight in another dtype
    tokens: int | None = None


# A CPU's tile stays in its cache. A GPU's takes its products longer than the host takes to launch what a tile needs, about
# 40 us for each of three operations: with tiles of 16 MiB, which an L2 cache holds, an H100 took 1.9 times the bare products at
# Llama-3's shape and 12 times at SmolLM2's, most likely waiting for the host (not profiled).
# A GPU's chunk keeps dweight's product bound by arithmetic: a float32 sum of dweight is read and written once a chunk, 8 bytes
# for 2 C operations an entry, so C >= 4 * (operations per second) / (bytes per second), 943 tokens on an H100. 2,048 do it
# anywhere.
BUDGETS = {"cpu": Budget(56 * MIB, 4 * MIB, 8 * MIB), "gpu": Budget(1024 * MIB, 64 * MIB, 64 * MIB, tokens=2048)}
WIDEST = 2**15  # entries of the vocabulary in a GPU's tile of a few tokens


@dataclass(frozen=True)
class Layout:
    """Sizes and dtypes of one call.

    One pass takes `group` tokens at a time, for which all exponentials are held, in chunks; a chunk goes over the vocabulary
    in blocks. Recomputing takes one block of the vocabulary at a time, for which the exponentials of all tokens are held.
    """

    tokens: int
    dim: int
    vocab: int
    options: HeadOptions
    on_gpu: bool
    recompute: bool  # logsumexp is known: linear_log_odds in backward
    wanted: tuple[bool, bool, bool]  # gradients of hidden, weight, bias
    grad_dtypes: tuple[torch.dtype, torch.dtype]  # of hidden and weight
    operand: torch.dtype  # what the gradients' products take
    for_logits: torch.dtype  # what the logits' product takes
    raw: torch.dtype  # logits of a tile
    copies: tuple[torch.dtype, ...]  # dtypes in which rows of the weight are copied
    chunk: int
    group: int
    block: int

    @property
    def acc_dtype(self) -> torch.dtype:
        return self.options.accumulate

    @property
    def held(self) -> tuple[int, int]:
        """(tokens, vocab) of the exponentials that are held, (0, 0) where none are. A GPU's rows are aligned to 128 bytes."""
        if not (self.wanted[1] or self.wanted[2]):
            return 0, 0
        if self.recompute:
            return self.tokens, self.block
        return self.group, -(-self.vocab // 64) * 64 if self.on_gpu else self.vocab

    @property
    def sums_weight(self) -> bool:
        """Whether dweight is summed apart from the tensor that is returned."""
        return self.wanted[1] and not self.recompute and self.group < self.tokens and self.grad_dtypes[1] != self.acc_dtype

    @property
    def sums_hidden(self) -> bool:
        """Whether dhidden is."""
        return self.wanted[0] and self.grad_dtypes[0] != self.acc_dtype

    def workspace(self, scratch: bool) -> dict[str, int]:
        """Bytes held beyond the gradients, by name; `scratch`: the fold is eager and needs places of its own."""
        acc_dtype, narrow = self.acc_dtype.itemsize, self.operand.itemsize
        tile, held = self.chunk * self.block, self.held[0] * self.held[1]
        in_place = held and self.raw == self.operand and self.options.softcap is None
        scaled = self.tokens if self.recompute else self.group
        return {
            "logits of a tile": 0 if in_place and not self.on_gpu else tile * self.raw.itemsize,
            "exponentials": held * narrow if held else (tile * narrow if self.wanted[0] else 0),
            "scratch of the eager fold": 2 * tile * acc_dtype if scratch and not (in_place and self.wanted[0]) else 0,
            "copies of the weight": self.block * self.dim * sum(dtype.itemsize for dtype in self.copies),
            "hidden states, scaled": scaled * self.dim * narrow if self.wanted[1] else 0,
            "float32 sum of dhidden": (self.tokens if self.recompute else self.chunk) * self.dim * acc_dtype * self.sums_hidden,
            "float32 sum of dweight": self.vocab * self.dim * acc_dtype * self.sums_weight,
        }


def layout(
    tokens: int,
    dim: int,
    vocab: int,
    options: HeadOptions,
    *,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    on_gpu: bool,
    wanted: tuple[bool, bool, bool],
    recompute: bool = False,
) -> Layout:
    """Chunks as large as the budget and as even as can be."""
    acc_dtype, compute = options.accumulate, options.compute
    # exponentials far from 1 have no place in fp16
    operand = compute if compute != torch.float16 and multiplies(compute, "cuda" if on_gpu else "cpu") else acc_dtype
    rounds = not on_gpu and operand != acc_dtype and not options.exact
    for_logits = compute if on_gpu else operand if rounds else acc_dtype
    # fp16 has no room for a gradient before the loss scale is applied: float32 until backward has multiplied
    grad_dtypes = [acc_dtype if dtype == torch.float16 else dtype for dtype in (hidden_dtype, weight_dtype)]
    rounded = {compute} - {weight_dtype}  # rows of the weight are rounded first
    copies = tuple(sorted(rounded | ({operand, for_logits} - {compute}), key=str))

    budget = BUDGETS["gpu" if on_gpu else "cpu"]
    tile = budget.tile // acc_dtype.itemsize
    holds = (wanted[1] or wanted[2]) and not recompute
    room = budget.exponentials
    if not on_gpu and operand != acc_dtype:  # tiles in both dtypes
        # beside the float32 sum of a bf16 weight's gradient tiles are small; beside a float32 weight they count
        room -= (5 if weight_dtype == acc_dtype else 2) * budget.tile
    if not on_gpu and copies and not rounds:
        room -= budget.copies
    most = math.isqrt(tile) if budget.tokens is None else budget.tokens
    if holds:
        fits = max(room // (vocab * operand.itemsize), 1)
        most = fits if budget.tokens is None else min(most, fits)
    chunk = options.chunk_size or _even(tokens, most)
    chunk = max(min(chunk, tokens), 1)
    group = chunk
    # exponentials of all tokens, where they take no more than the float32 sum of dweight that they save
    saves_sum = wanted[1] and grad_dtypes[1] != acc_dtype and tokens * operand.itemsize <= dim * acc_dtype.itemsize
    if holds and options.chunk_size is None and saves_sum:
        group = max(tokens, 1)
        if not on_gpu:
            chunk = max(min(_even(tokens, math.isqrt(tile)), tokens), 1)

    block = min(max(tile // chunk, 1), vocab)
    if recompute and (wanted[1] or wanted[2]):
        block = min(block, max(room // (max(tokens, 1) * operand.itemsize), 64), vocab)
        if options.chunk_size:  # as many logits as that many tokens have
            block = min(block, max(chunk * vocab // max(tokens, 1), 1))
    if copies:
        block = min(block, max(budget.copies // (dim * acc_dtype.itemsize), 1))
    if on_gpu and block < vocab:
        block = min(2 ** (block.bit_length() - 1), WIDEST)  # a kernel for each width: few widths
    elif block > 64:
        block -= block % 64
    return Layout(
        tokens=tokens,
        dim=dim,
        vocab=vocab,
        options=options,
        on_gpu=on_gpu,
        recompute=recompute,
        wanted=wanted,
        grad_dtypes=(grad_dtypes[0], grad_dtypes[1]),
        operand=operand,
        for_logits=for_logits,
        raw=operand if rounds else acc_dtype,
        copies=copies,
        chunk=chunk,
        group=group,
        block=block,
    )


def _even(tokens: int, most: int) -> int:
    """Size of chunks as even as can be, at most `most` tokens, in multiples of 16: products of odd sizes are slower."""
    most -= most % 16 if most > 16 else 0
    chunks = max(-(-tokens // most), 1)
    return min(-(-tokens // chunks // 16) * 16 or most, most)
