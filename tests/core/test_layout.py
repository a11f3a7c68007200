"""Sizes of the head's pieces follow from arithmetic: bound by it where they can be, and within a stated budget."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnf_core import head_workspace
from bnf_core.head.layout import BUDGETS, MIB, Layout, layout
from bnf_core.head.transform import HeadOptions

MODELS = {"Llama-3-8B": (4096, 128256), "Gemma-2-9B": (3584, 256000), "SmolLM2-135M": (576, 49152), "GPT-2": (768, 50257)}


def sizes(tokens: int, dim: int, vocab: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Layout:
    given: dict[str, Any] = {"hidden_dtype": dtype, "weight_dtype": dtype, "on_gpu": True, "wanted": (True, True, False)}
    return layout(tokens, dim, vocab, HeadOptions(None, 1.0, dtype), **given | options)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [2048, 8192, 32768])
def test_a_gpus_chunks_are_bound_by_arithmetic(model: str, tokens: int) -> None:
    """943 tokens and more on an H100: below that a chunk's product waits for the float32 sum of dweight."""
    dim, vocab = MODELS[model]
    found = sizes(tokens, dim, vocab)
    assert 943 <= found.chunk <= 2048
    assert found.block >= 943  # the same for dhidden, which is read and written once a block
    assert found.held[0] * found.held[1] * 2 <= max(BUDGETS["gpu"].exponentials, 4 * vocab * dim)
    again = sizes(tokens, dim, vocab, recompute=True)
    assert 943 <= again.chunk <= 2048
    assert again.block >= 943
    assert again.held == (tokens, again.block)


@pytest.mark.parametrize(("tokens", "whole"), [(8192, True), (8193, False), (2048, True)])
def test_all_exponentials_are_held_where_they_are_no_more_than_the_sum_they_save(tokens: int, whole: bool) -> None:
    found = sizes(tokens, 4096, 128256)
    assert (found.group == tokens) == whole
    assert found.sums_weight != whole
    # a float32 weight's gradient is its own sum: nothing to save
    under_autocast = sizes(tokens, 4096, 128256, weight_dtype=torch.float32)
    assert under_autocast.group == under_autocast.chunk <= 2048
    assert not under_autocast.sums_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_holds_at_most_64_mib(dtype: torch.dtype) -> None:
    """Beside float32 weights, as in training; a bf16 weight's float32 sum is counted apart."""
    for tokens, (dim, vocab) in ((2048, (576, 49152)), (1024, (2048, 128256))):
        held = head_workspace(tokens, dim, vocab, hidden_dtype=dtype, weight_dtype=torch.float32, compute=dtype)
        assert sum(held.values()) <= 64 * MIB
        assert held["exponentials"] <= 56 * MIB


@given(
    tokens=st.integers(0, 5000),
    dim=st.integers(1, 5000),
    vocab=st.integers(1, 300_000),
    on_gpu=st.booleans(),
    recompute=st.booleans(),
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    chunk_size=st.none() | st.integers(1, 6000),
)
def test_pieces_cover_the_whole_and_are_never_empty(
    tokens: int, dim: int, vocab: int, on_gpu: bool, recompute: bool, wanted: Any, dtype: torch.dtype, chunk_size: int | None
) -> None:
    options = HeadOptions(None, 1.0, dtype, chunk_size)
    given: dict[str, Any] = {"hidden_dtype": dtype, "weight_dtype": dtype, "on_gpu": on_gpu, "wanted": wanted}
    found = layout(tokens, dim, vocab, options, **given, recompute=recompute)
    assert 1 <= found.chunk <= max(tokens, 1)
    assert found.chunk <= found.group <= max(tokens, 1)
    assert found.group == max(tokens, 1) or found.group == found.chunk
    assert 1 <= found.block <= vocab
    if chunk_size is not None:
        assert found.chunk == min(chunk_size, max(tokens, 1))
    assert all(size >= 0 for size in found.workspace(scratch=True).values())
    assert torch.float16 not in found.grad_dtypes
    assert found.held == (0, 0) or found.held[1] >= (found.block if recompute else vocab)


@pytest.mark.parametrize("recompute", [False, True])
def test_copies_of_the_weight_are_of_a_block_at_a_time(recompute: bool) -> None:
    """Under autocast a float32 weight is multiplied in bf16: 2 bytes for each number of a block."""
    found = sizes(8192, 4096, 128256, weight_dtype=torch.float32, recompute=recompute)
    assert found.copies == (torch.bfloat16,)
    assert found.workspace(scratch=False)["copies of the weight"] == 2 * found.block * 4096


def test_of_a_frozen_head_one_tile_of_exponentials_is_held() -> None:
    """In bf16, for dhidden alone; the tile of logits is in float32."""
    found = sizes(8192, 4096, 128256, wanted=(True, False, False))
    held = found.workspace(scratch=False)
    assert (held["exponentials"], held["logits of a tile"]) == (2 * found.chunk * found.block, 4 * found.chunk * found.block)
    assert sizes(8192, 4096, 128256, wanted=(False, False, False)).workspace(scratch=False)["exponentials"] == 0


def test_logits_that_become_their_exponentials_in_place_take_no_room() -> None:
    """In float32 on a CPU, where all exponentials are held: one buffer serves both, and the eager fold needs no other."""
    held = sizes(64, 64, 1000, torch.float32, on_gpu=False).workspace(scratch=True)
    assert held["logits of a tile"] == held["scratch of the eager fold"] == 0
    assert held["exponentials"] == 64 * 1000 * 4
