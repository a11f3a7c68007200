"""The roofline counts what the code does: operations, bytes and memory of a recorded run, against arithmetic by hand."""

import pytest
import torch

from bnf_core import head_workspace

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
from bnf_core.roofline import DEVICES, SHAPES, Recorder, Step, estimate, table, timed

H100 = DEVICES["h100"]
MIB = 2**20


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_operations_and_bytes(name: str, recompute: bool) -> None:
    tokens, dim, vocab, softcap, bias = SHAPES[name]
    found, bare, _ = estimate(tokens, dim, vocab, H100, softcap=softcap, bias=bias, recompute=recompute)
    products = 4 if recompute else 3
    assert found.flops == bare.flops == products * 2 * tokens * dim * vocab
    assert found.counts["dhidden"] == found.counts["logits"] // (2 if recompute else 1)
    assert found.counts["fold"] == found.counts["logits"]
    # float32 logits are read once, their exponentials written in bf16; forward of linear_log_odds writes none
    elements = tokens * vocab
    expected = elements * (4 + 6) if recompute else elements * 6
    assert expected <= found.bytes["fold"] <= 1.02 * expected
    # one step of dweight where all exponentials are held; one a block where the logits are computed again
    if not recompute:
        chunks = 1 if tokens <= max(2 * dim, 2048) else -(-tokens // 2048)
        assert found.counts["dweight"] == chunks
        sums = 0 if chunks == 1 else (2 * chunks - 1) * 4 * vocab * dim  # written by the first, read and written by others
        operands = 2 * elements + 2 * chunks * (tokens // chunks) * dim
        assert found.bytes["dweight"] == pytest.approx(operands + (sums or 2 * vocab * dim), rel=0.01)


TARGETS = [("Llama-3-8B", False, 1.12), ("Gemma-2-9B", False, 1.25), ("Llama-3-8B", True, 1.15), ("Gemma-2-9B", True, 1.15)]


@pytest.mark.parametrize(("name", "recompute", "most"), TARGETS)
def test_estimated_time_over_bare_products(name: str, recompute: bool, most: float) -> None:
    """Every byte from the device's memory, nothing from its cache."""
    tokens, dim, vocab, softcap, bias = SHAPES[name]
    found, bare, _ = estimate(tokens, dim, vocab, H100, softcap=softcap, bias=bias, recompute=recompute)
    assert sum(found.seconds.values()) <= most * sum(bare.seconds.values())


@pytest.mark.parametrize(("name", "most"), [("Llama-3-8B", 640), ("Gemma-2-9B", 1170), ("SmolLM2-135M", 640)])
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_beyond_gradients(name: str, most: int, recompute: bool) -> None:
    """Exponentials of all tokens are held only where they take no more than the float32 sum that they save."""
    tokens, dim, vocab, softcap, bias = SHAPES[name]
    found, _, pieces = estimate(tokens, dim, vocab, H100, softcap=softcap, bias=bias, recompute=recompute)
    summed = pieces["float32 sum of dweight"]
    if not recompute and found.group == tokens:
        assert summed == 0
        summed = pieces["exponentials"]
        assert summed <= max(4 * vocab * dim, 640 * MIB)
    assert found.peak - summed <= most * MIB
    assert 0.8 * found.peak <= sum(pieces.values()) <= 1.01 * found.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [50_257, 128_256])
def test_a_head_says_what_it_will_hold(vocab: int, dtype: torch.dtype) -> None:
    """`head_workspace`, before the call, and what a recorded call holds at its peak: within vectors of length tokens."""
    tokens, dim = 3000, 512
    found, _, _ = estimate(tokens, dim, vocab, H100, dtype=dtype)
    said = head_workspace(tokens, dim, vocab, hidden_dtype=dtype, weight_dtype=dtype, gpu=True)
    assert sum(said.values()) <= found.peak <= sum(said.values()) + 16 * tokens * dim


def test_the_table_says_that_it_is_an_estimate() -> None:
    lines = table("SmolLM2-135M", "a100").splitlines()
    assert lines[1].endswith("bf16, on a100 (estimate)")
    assert [line.split()[0] for line in lines if line.startswith("ratio")] == ["ratio"]


def test_the_table_adds_up() -> None:
    """The ratio is the total over the bare products, with and without the second-level cache."""
    rows = {line[:28].strip(): line[28:].split() for line in table("SmolLM2-135M", "a100").splitlines()}
    (*_, total, quick), (*_, products) = rows["total"], rows["bare products"]
    ratios = [float(x) / float(products) for x in (total, quick)]
    assert list(map(float, rows["ratio"])) == pytest.approx(ratios, abs=2e-3)
    tokens, dim, vocab, softcap, bias = SHAPES["SmolLM2-135M"]
    found, _, _ = estimate(tokens, dim, vocab, DEVICES["a100"], softcap=softcap, bias=bias)
    # at each chunk's sums, for which there is a kernel, and at the labels
    assert int(rows["looks at a number"][0]) == found.counts["statistics"] + 1


def test_the_tables_figures_are_the_estimates() -> None:
    """Steps, GB and ms of every row, to the digits that are shown."""
    rows = {line[:28].strip(): line[28:].split() for line in table("Llama-3-8B", "h100").splitlines()}
    tokens, dim, vocab, softcap, bias = SHAPES["Llama-3-8B"]
    found, bare, _ = estimate(tokens, dim, vocab, H100, softcap=softcap, bias=bias)
    assert all(0.2 * seconds < found.with_l2[kind] <= seconds for kind, seconds in found.seconds.items())
    rest = set(found.counts) - set(rows)
    for row, kinds in [(kind, {kind}) for kind in set(found.counts) - rest] + [("everything else", rest)]:
        sums = (sum(times[kind] for kind in kinds) for times in (found.seconds, found.with_l2))
        expected = (
            sum(found.counts[k] for k in kinds),
            sum(found.bytes.get(k, 0) for k in kinds) / 1e9,
            *(1e3 * s for s in sums),
        )
        for shown, value, digits in zip(rows[row], expected, (0, 2, 3, 3), strict=True):
            assert float(shown) == pytest.approx(value, abs=0.51 * 10**-digits)
    assert float(rows["total"][1]) == pytest.approx(1e3 * sum(found.seconds.values()), abs=6e-4)
    assert float(rows["total"][2]) == pytest.approx(1e3 * sum(found.with_l2.values()), abs=6e-4)
    assert float(rows["bare products"][1]) == pytest.approx(1e3 * sum(bare.seconds.values()), abs=6e-4)


@pytest.mark.parametrize(("share", "cached"), [(0.45, True), (0.55, False)])
def test_what_the_step_before_has_written_is_read_from_the_cache_where_it_fits(share: float, cached: bool) -> None:
    """At most half of the second-level cache."""
    size = int(share * H100.l2_bytes)
    view = (1, 0, size)
    written = Step("write", 0, torch.bfloat16, reads=(), writes=((view, size),))
    read = Step("read", 0, torch.bfloat16, reads=((view, size),), writes=())
    found = timed([written, read], H100, 0)
    assert found.seconds["read"] == pytest.approx(size / H100.hbm)
    assert found.with_l2["read"] == pytest.approx(size / (H100.l2 if cached else H100.hbm))


def test_an_expanded_tensor_is_read_once() -> None:
    column = torch.empty(4, 1, device="meta")
    with Recorder() as recorded:
        column.expand(4, 1000) + 1
    (step,) = recorded.steps
    assert [size for _, size in step.reads] == [4 * 4]
    assert [size for _, size in step.writes] == [4 * 1000 * 4]
