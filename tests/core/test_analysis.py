"""What training moved: against NumPy as one would write it down, and on cases whose answer is known."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import PairCase, Responses, pair_cases, responses
from tolerances import assert_close, scale
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnf_core import analysis, linear_log_odds, token_log_odds

ONE_ROW = torch.tensor([0, 0, 0, 0])


def flat(case: Responses) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log_odds, ref_log_odds, z_y, z_ref,y and response of the response tokens."""
    z, z_ref, y, response = case.flat()
    log_odds, ref_log_odds = (token_log_odds(x, y)[0] for x in (z, z_ref))
    return log_odds, ref_log_odds, *(x.gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (z, z_ref)), response


def log_softmax(z: Tensor) -> Any:
    a = z.numpy()
    top = a.max(-1, keepdims=True)
    return a - top - np.log(np.exp(a - top).sum(-1, keepdims=True))


# --- figure 3 a, b, d, e -----------------------------------------------------------------------------------------------


@given(case=responses())
def test_shifts_are_those_of_full_logits(case: Responses) -> None:
    log_odds, ref_log_odds, z_y, z_ref_y, response = flat(case)
    by_token = analysis.token_log_likelihood_shift(log_odds, ref_log_odds)
    sums = analysis.log_likelihood_shift(log_odds, ref_log_odds, response)
    means = analysis.log_likelihood_shift(log_odds, ref_log_odds, response, normalized=True)
    moved = analysis.logit_shift(z_y, z_ref_y, response)
    moved_means = analysis.logit_shift(z_y, z_ref_y, response, normalized=True)
    size = scale(case.logits, case.ref_logits)
    for row, (z, z_ref, labels) in enumerate(zip(case.logits, case.ref_logits, case.labels, strict=True)):
        kept = labels >= 0
        y = labels[kept].numpy()
        shift = log_softmax(z[kept])[range(len(y)), y] - log_softmax(z_ref[kept])[range(len(y)), y]
        distance = np.abs(z[kept].numpy()[range(len(y)), y] - z_ref[kept].numpy()[range(len(y)), y])
        assert_close(by_token[response == row], torch.from_numpy(shift), units=32, size=size, absolute=1)
        for ours, plain in (
            (sums[row], shift.sum()),
            (means[row], shift.mean()),
            (moved[row], distance.sum()),
            (moved_means[row], distance.mean()),
        ):
            assert_close(ours, torch.tensor(plain), units=64, size=size, absolute=1)


@given(case=responses())
def test_nothing_moved_where_policy_is_reference(case: Responses) -> None:
    log_odds, _, z_y, _, response = flat(case)
    nothing = torch.zeros(len(case.labels), dtype=log_odds.dtype)
    assert torch.equal(analysis.log_likelihood_shift(log_odds, log_odds, response), nothing)
    assert torch.equal(analysis.logit_shift(z_y, z_y, response), nothing)
    assert torch.equal(analysis.gini(analysis.token_logit_shift(z_y, z_y), response), nothing)


@given(case=pair_cases())
def test_normalized_is_the_sum_over_the_length(case: PairCase) -> None:
    batch = case.batch
    assert batch.ref_log_odds is not None
    total = analysis.log_likelihood_shift(case.log_odds, batch.ref_log_odds, batch.response)
    mean = analysis.log_likelihood_shift(case.log_odds, batch.ref_log_odds, batch.response, normalized=True)
    assert_close(mean * batch.lengths, total, units=4)
    assert torch.equal(analysis.log_likelihood_shift(batch.ref_log_odds, case.log_odds, batch.response), -total)


def test_the_uniform_increase_that_the_paper_describes() -> None:
    """All logits up by 3 at each position: the logit shift sees it, the likelihood does not (figure 3c, top left)."""
    z, y = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    response = torch.tensor([0, 0, 0, 1, 1])
    target = z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    log_odds, up = token_log_odds(z, y)[0], token_log_odds(z + 3, y)[0]
    assert analysis.logit_shift(target + 3, target, response).tolist() == pytest.approx([9, 6])
    assert analysis.logit_shift(target + 3, target, response, normalized=True).tolist() == pytest.approx([3, 3])
    assert analysis.gini(analysis.token_logit_shift(target + 3, target), response).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert analysis.log_likelihood_shift(up, log_odds, response).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_a_token_that_is_certain_moves_nothing() -> None:
    certain = torch.tensor([math.inf, 0.0])
    assert analysis.token_log_likelihood_shift(certain, certain).tolist() == [0, 0]
    assert analysis.token_log_likelihood_shift(certain, torch.zeros(2)).tolist() == pytest.approx([math.log(2), 0])


# --- target logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 1.7}], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_target_logits_are_those_of_the_whole_vocabulary(dtype: torch.dtype, options: dict[str, float], has_bias: bool) -> None:
    hidden, weight, bias = (torch.randn(n, dtype=torch.float64).to(dtype) for n in ((9, 6), (11, 6), (11,)))
    labels = torch.randint(11, (9,), dtype=torch.int32)
    labels[[2, 8]] = -100
    z = analysis.target_logits(hidden, weight, labels, bias=bias if has_bias else None, **options)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    h, w, b = (x.double().numpy() for x in (hidden, weight, bias))
    full = options.get("logit_scale", 1.0) * (h @ w.T + (b if has_bias else 0))
    if cap := options.get("softcap"):
        full = cap * np.tanh(full / cap)
    exact = [0 if y == -100 else full[i, y] for i, y in enumerate(labels.tolist())]
    assert_close(z, torch.tensor(exact, dtype=torch.float64), units=16, size=1 + float(np.abs(full).max()), absolute=1)


def test_target_logits_and_log_odds_are_of_one_distribution() -> None:
    """Two tokens: l = z_y - z_other, under autocast too, where both round their operands."""
    hidden, weight = torch.randn(5, 4), torch.randn(2, 4)
    y = torch.tensor([0, 1, 1, 0, 1])
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            log_odds, _ = linear_log_odds(hidden, weight, y)
            target, other = analysis.target_logits(hidden, weight, y), analysis.target_logits(hidden, weight, 1 - y)
        torch.testing.assert_close(target - other, log_odds)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint64], ids=str)
def test_target_logits_take_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(300, 3)
    labels = torch.tensor([10, min(156, torch.iinfo(dtype).max), 0, 127])  # 156 is -100 in eight bits
    if dtype.is_signed:
        labels[2] = -100
    assert torch.equal(analysis.target_logits(hidden, weight, labels.to(dtype)), analysis.target_logits(hidden, weight, labels))


def test_target_logits_of_a_vocabulary_of_one() -> None:
    assert analysis.target_logits(torch.ones(2, 3), torch.ones(1, 3), torch.tensor([0, 0])).tolist() == [3, 3]


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float64, torch.float32)], ids=str)
def test_target_logits_in_float64_under_autocast(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """As torch's own operations: autocast leaves float64 alone."""
    hidden, weight = torch.randn(5, 4, dtype=dtypes[0]), torch.randn(2, 4, dtype=dtypes[1])
    y = torch.tensor([0, 1, 1, 0, 1])
    plain = analysis.target_logits(hidden, weight, y)
    with torch.autocast("cpu", torch.bfloat16):
        z = analysis.target_logits(hidden, weight, y)
    assert z.dtype == torch.float64
    assert torch.equal(z, plain)


def test_target_logits_under_a_cap_stay_infinite_or_nan() -> None:
    """A cap is no cure: tanh(inf) = 1 would make a finite logit of a broken state, and lift a masked token's -inf."""
    hidden, weight = torch.tensor([[1.0], [math.inf], [-math.inf], [math.nan]]), torch.tensor([[2.0], [3.0]])
    z = analysis.target_logits(hidden, weight, torch.zeros(4, dtype=torch.long), softcap=30.0)
    assert z[0].item() == pytest.approx(30 * math.tanh(2 / 30))
    assert z[1:3].tolist() == [math.inf, -math.inf]
    assert z[3].isnan()
    masked = torch.tensor([0.0, -math.inf])
    assert analysis.target_logits(hidden[:1], weight, torch.tensor([1]), bias=masked, softcap=30.0).item() == -math.inf


def test_what_stands_where_there_is_no_response_token_does_not_reach_the_gradient() -> None:
    hidden = torch.tensor([[1.0, 2.0], [math.nan, math.inf]])
    weight = torch.ones(2, 2, requires_grad=True)
    z = analysis.target_logits(hidden, weight, torch.tensor([1, -100]))
    z.sum().backward()
    assert z.tolist() == [3, 0]
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0, 0], [1, 2]]


# --- displacement: the share that fell, the mass of the argmax token ---------------------------------------------------


@given(case=responses())
def test_displacement_is_the_share_of_tokens_whose_likelihood_fell(case: Responses) -> None:
    log_odds, ref_log_odds, _, _, response = flat(case)
    shares = analysis.displacement(log_odds, ref_log_odds, response)
    assert shares.dtype == log_odds.dtype
    pairs = list(zip(log_odds.tolist(), ref_log_odds.tolist(), response.tolist(), strict=True))
    for row, share in enumerate(shares.tolist()):
        fell = [new < old for new, old, of in pairs if of == row]
        assert share == pytest.approx(sum(fell) / len(fell), rel=1e-6)
    moved = analysis.token_log_likelihood_shift(log_odds.double(), ref_log_odds.double())
    if (moved.abs() > 1e-9).all():  # no tie, nor one that rounding makes
        assert_close(analysis.displacement(ref_log_odds, log_odds, response) + shares, torch.ones_like(shares), units=4)
    assert analysis.displacement(log_odds, log_odds, response).tolist() == [0] * len(shares)


def test_displacement_known() -> None:
    inf = math.inf
    log_odds, ref_log_odds = torch.tensor([inf, 0.0, inf, 120.0, -1.0]), torch.tensor([inf, inf, 0.0, 130.0, -1.0])
    # a tie, a fall, a rise; a fall that log sigmoid rounds to 0 on both sides; a tie
    assert analysis.displacement(log_odds, ref_log_odds, torch.arange(5)).tolist() == [0, 1, 0, 1, 0]
    assert analysis.displacement(log_odds, ref_log_odds, torch.zeros(5, dtype=torch.int32)).tolist() == pytest.approx([0.4])
    mixed = analysis.displacement(log_odds.bfloat16(), ref_log_odds.double(), torch.arange(5))
    assert (mixed.dtype, mixed.tolist()) == (torch.float64, [0, 1, 0, 1, 0])


HEAD_OPTIONS = [{}, {"softcap": 3.0}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 1.7}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("block", "chunk_size"), [(4, 2), (11, None), (3, 9), (10, 1)], ids=str)
def test_argmax_mass_is_that_of_the_whole_vocabulary(
    dtype: torch.dtype,
    options: dict[str, float],
    has_bias: bool,
    block: int,
    chunk_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In tiles that end where tokens or vocabulary do not, against NumPy in float64 from the same operands."""
    monkeypatch.setattr(analysis, "BLOCK", block)
    hidden, weight, bias = (torch.randn(n, dtype=torch.float64).to(dtype) for n in ((9, 6), (11, 6), (11,)))
    mass = analysis.argmax_mass(hidden, weight, bias=bias if has_bias else None, chunk_size=chunk_size, **options)
    assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    h, w, b = (x.double().numpy() for x in (hidden, weight, bias))
    full = options.get("logit_scale", 1.0) * (h @ w.T + (b if has_bias else 0))
    if cap := options.get("softcap"):
        full = cap * np.tanh(full / cap)
    exact = torch.from_numpy(np.exp(log_softmax(torch.from_numpy(full))).max(-1))
    assert_close(mass, exact, units=16, size=1 + float(np.abs(full).max()))


logit = st.floats(-1e3, 1e3) | st.sampled_from([-math.inf, 0.0, 700.0, -1e300])


@given(rows=st.lists(st.lists(logit, min_size=7, max_size=7), min_size=1, max_size=4), block=st.integers(1, 8), data=st.data())
def test_argmax_mass_in_any_tiles(rows: list[list[float]], block: int, data: st.DataObject) -> None:
    """Any logits, as biases of a head without weights: far apart, equal, ruled out, in any order of the blocks."""
    hidden, weight = torch.zeros(len(rows), 1, dtype=torch.float64), torch.zeros(7, 1, dtype=torch.float64)
    for row in rows:
        z = torch.tensor(row, dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(analysis, "BLOCK", block)
            size = data.draw(st.integers(1, 5))
            mass = analysis.argmax_mass(hidden, weight, bias=z, chunk_size=size)
        if max(row) == -math.inf:
            assert mass.isnan().all()
            continue
        assert mass.tolist() == pytest.approx([z.softmax(0).max().item()] * len(rows), rel=1e-12)
        assert ((mass > 0) & (mass <= 1)).all()


def test_argmax_mass_of_ties_of_certainty_and_of_one_token() -> None:
    def mass(*z: float) -> float:
        return float(analysis.argmax_mass(torch.ones(1, 1), torch.tensor(z).unsqueeze(1)))

    assert mass(2.0, 2.0, -math.inf) == 0.5  # two that tie: one of them
    assert mass(1.0, 1.0, 1.0, 1.0) == 0.25
    assert mass(0.0, 3e4) == 1
    assert mass(-3e4, -math.inf) == 1
    assert mass(5.0) == 1
    assert analysis.argmax_mass(torch.zeros(0, 3), torch.zeros(4, 3)).tolist() == []


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["", "softcap"])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_argmax_mass_of_broken_logits_is_nan(softcap: float | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in the vocabulary they stand; other tokens keep theirs."""
    monkeypatch.setattr(analysis, "BLOCK", block)
    for z in itertools.product((math.nan, math.inf, -math.inf, 1.0), repeat=3):
        mass = analysis.argmax_mass(torch.ones(1, 1), torch.tensor(z).unsqueeze(1), softcap=softcap)
        sound = 1.0 in z and not {math.nan, math.inf} & set(z)
        assert mass.isnan().item() is not sound, z
        assert not sound or mass.item() == pytest.approx(1 / z.count(1.0)), z
    one_broken = analysis.argmax_mass(torch.tensor([[1.0], [math.nan]]), torch.zeros(3, 1), softcap=softcap)
    assert one_broken[0].item() == pytest.approx(1 / 3)
    assert one_broken[1].isnan()


def test_argmax_mass_holds_a_tile_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "BLOCK", 50)
    monkeypatch.setattr(analysis, "TILE", 500)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] > 3:  # not hidden states or weights
                largest = max(largest, result.numel())
            return result

    hidden, weight = torch.randn(40, 3), torch.randn(120, 3, requires_grad=True)
    with Watch():
        mass = analysis.argmax_mass(hidden, weight)
    assert largest == 500
    assert not mass.requires_grad
    torch.testing.assert_close(mass, (hidden @ weight.T).softmax(-1).amax(-1).detach())


def test_argmax_mass_and_log_odds_are_of_one_distribution() -> None:
    """The likelihood of the argmax token, under autocast too, where both round their operands."""
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = torch.stack([analysis.target_logits(hidden, weight, torch.full((5,), j)) for j in range(9)], 1)
            log_odds, _ = linear_log_odds(hidden, weight, z.argmax(1))
            torch.testing.assert_close(analysis.argmax_mass(hidden, weight), log_odds.sigmoid())
    wide = torch.randn(5, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = analysis.argmax_mass(wide, weight)
    assert torch.equal(found, analysis.argmax_mass(wide, weight))


# --- Gini (figure 3f) --------------------------------------------------------------------------------------------------

shift_values = st.lists(st.floats(0, 1e3) | st.sampled_from([0.0, 1.0, 1e-300, 1e300]), min_size=1, max_size=12)


@given(rows=st.lists(shift_values, min_size=1, max_size=4), data=st.data())
def test_gini_is_the_mean_difference_over_twice_the_mean(rows: list[list[float]], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(sum(map(len, rows)))))
    response = torch.tensor([i for i, row in enumerate(rows) for _ in row])[order]
    values = torch.tensor([x for row in rows for x in row], dtype=torch.float64)[order]
    g = analysis.gini(values, response)
    assert ((g >= 0) & (g < 1)).all()
    for ours, row in zip(g.tolist(), rows, strict=True):
        x = np.array(row) / (max(row) or 1)
        plain = np.abs(np.subtract.outer(x, x)).mean() / (2 * x.mean()) if x.any() else 0
        assert ours == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.1, 0.1, 0.1], 0),  # equal
        ([0, 0, 3, 0], 3 / 4),  # one-hot: (n - 1) / n
        ([0, 0, 0, 0], 0),  # nothing moved
        ([1, 2, 3, 4], 1 / 4),
        ([1e-45, 1e-45, 1e-45, 1e-45], 0),  # smallest float32
        ([3e38, 3e38, 3e38, 3e38], 0),  # their sum is infinite in float32
    ],
)
def test_gini_known(values: list[float], expected: float) -> None:
    assert analysis.gini(torch.tensor(values, dtype=torch.float32), ONE_ROW).tolist() == pytest.approx([expected], abs=1e-7)


def test_gini_does_not_depend_on_the_unit() -> None:
    values, response = torch.tensor([0.0, 1.0, 3.0]), torch.zeros(3, dtype=torch.long)
    for unit in (1e-3, 0.1, 1.0, 1e3):
        torch.testing.assert_close(analysis.gini(values * unit, response), torch.tensor([0.5]))


@pytest.mark.parametrize("n", [1, 2, 3, 1000])
def test_gini_of_one_hot_and_of_equal_values(n: int) -> None:
    one_hot = torch.eye(n, dtype=torch.float64)[n // 2]
    response = torch.zeros(n, dtype=torch.int32)
    assert analysis.gini(one_hot, response).tolist() == pytest.approx([(n - 1) / n])
    assert analysis.gini(torch.full((n,), 0.3), response).tolist() == [0]


# --- percentile bins (figure 4) ----------------------------------------------------------------------------------------

values_list = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60)


@given(values=values_list, bins=st.integers(1, 12))
def test_edges_are_numpys_quantiles(values: list[float], bins: int) -> None:
    edges = analysis.percentile_edges(torch.tensor(values, dtype=torch.float64), bins)
    plain = np.quantile(values, [k / bins for k in range(1, bins)])
    assert edges.tolist() == pytest.approx(plain.tolist(), rel=1e-9, abs=1e-9)
    assert (edges.diff() >= 0).all()


@given(values=values_list, others=values_list)
def test_shares_count_what_lies_between_the_edges(values: list[float], others: list[float]) -> None:
    edges = analysis.percentile_edges(torch.tensor(others, dtype=torch.float64))
    shares = analysis.bin_shares(torch.tensor(values, dtype=torch.float64), edges)
    assert shares.sum().item() == pytest.approx(1)
    borders = [-math.inf, *edges.tolist(), math.inf]
    expected = np.zeros(10)
    for x in values:
        meets = [k for k, (low, high) in enumerate(itertools.pairwise(borders)) if low <= x <= high]
        expected[meets] += 1 / len(meets) / len(values)
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_the_edges_came_from_fills_every_bin_alike(dtype: torch.dtype) -> None:
    shifts = torch.randn(2000, dtype=dtype)
    shares = analysis.bin_shares(shifts, analysis.percentile_edges(shifts))
    assert shares.dtype == dtype
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=1e-6)
    nothing = torch.zeros(7, dtype=dtype)  # a policy that is the reference
    assert analysis.bin_shares(nothing, analysis.percentile_edges(nothing)).tolist() == pytest.approx([0.1] * 10)


def test_bins_tell_a_centred_from_a_polarised_method() -> None:
    shifts = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    edges = analysis.percentile_edges(shifts)
    centred, polarised = (analysis.bin_shares(shifts * factor, edges) for factor in (0.1, 10))
    assert centred.tolist() == pytest.approx([0, 0, 0, 0, 0.5, 0.5, 0, 0, 0, 0], abs=1e-3)
    assert polarised.tolist() == pytest.approx([0.46, *[0.01] * 8, 0.46], abs=1e-3)


# --- bad input ---------------------------------------------------------------------------------------------------------

TWO, ROWS = torch.zeros(2), torch.tensor([0, 1])
NAN, INFINITE = torch.tensor([0.0, math.nan]), torch.tensor([0.0, math.inf])
HIDDEN, WEIGHT = torch.zeros(2, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: analysis.token_log_likelihood_shift(ROWS, TWO), "log_odds: expected a floating-point tensor"),
        (lambda: analysis.token_log_likelihood_shift(HIDDEN, HIDDEN), r"log_odds: expected shape \(tokens,\)"),
        (lambda: analysis.token_log_likelihood_shift(TWO, torch.zeros(3)), r"ref_log_odds: expected shape \(2,\)"),
        (lambda: analysis.token_log_likelihood_shift(TWO, NAN), r"ref_log_odds: .* got nan at position \[1\]"),
        (lambda: analysis.token_log_likelihood_shift(-INFINITE, TWO), r"log_odds: .* got -inf at position \[1\]"),
        (lambda: analysis.token_logit_shift(TWO, INFINITE), r"ref_logits: .* got inf at position \[1\]"),
        (lambda: analysis.logit_shift(TWO, TWO, torch.tensor([0, 2])), "response: .* got none in row 1"),
        (lambda: analysis.logit_shift(TWO, TWO, torch.tensor([0, -1])), r"indices from 0, got -1 at position \[1\]"),
        (lambda: analysis.logit_shift(TWO, TWO, TWO), "response: expected an int32 or int64 tensor"),
        (lambda: analysis.logit_shift(TWO, TWO, ONE_ROW), r"response: expected shape \(2,\), one per token"),
        (lambda: analysis.gini(-INFINITE, ROWS), r"values: .* at least 0, got -inf at position \[1\]"),
        (lambda: analysis.gini(torch.tensor([0.0, -1.0]), ROWS), r"values: .* got -1.0 at position \[1\]"),
        (lambda: analysis.gini(NAN, ROWS), r"values: .* got nan"),
        (lambda: analysis.gini(INFINITE, ROWS), r"values: .* got inf"),
        (lambda: analysis.percentile_edges(torch.zeros(0)), "values: .* at least one token"),
        (lambda: analysis.percentile_edges(NAN), r"values: .* got nan at position \[1\]"),
        (lambda: analysis.percentile_edges(TWO, 0), "bins: expected a whole number of at least 1, got 0"),
        (lambda: analysis.bin_shares(INFINITE, TWO), r"values: .* got inf at position \[1\]"),
        (
            lambda: analysis.bin_shares(TWO, torch.tensor([1.0, 0.0])),
            r"edges: expected .* ascending, got 0.0 after 1.0 at position \[1\]",
        ),
        (lambda: analysis.bin_shares(TWO, NAN), r"edges: expected .* got nan at position \[1\]"),
        (lambda: analysis.bin_shares(TWO, torch.zeros(2, 2)), r"edges: expected shape \(edges,\)"),
        (lambda: analysis.percentile_edges(TWO, 2.5), "bins: expected a whole number of at least 1, got 2.5"),
        (lambda: analysis.percentile_edges(TWO, True), "bins: expected a whole number of at least 1, got True"),
        (lambda: analysis.logit_shift(TWO, TWO, torch.tensor([0, 10**14])), "response: .* got none in row 1"),
        (lambda: analysis.gini(HIDDEN, ROWS), r"values: expected shape \(tokens,\)"),
        (lambda: analysis.target_logits(HIDDEN, WEIGHT.T, ROWS), r"hidden and weight: expected shapes"),
        (lambda: analysis.target_logits(HIDDEN, WEIGHT, ROWS + 3), "labels: expected token ids from 0 to 3"),
        (lambda: analysis.target_logits(HIDDEN, WEIGHT, ROWS, bias=TWO), r"bias: expected shape \(4,\)"),
        (lambda: analysis.target_logits(HIDDEN, WEIGHT, ROWS, softcap=0.0), "softcap: expected a positive number"),
        (lambda: analysis.target_logits(HIDDEN, WEIGHT, ROWS, logit_scale=-1.0), "logit_scale: expected a positive number"),
        (lambda: analysis.argmax_mass(HIDDEN, WEIGHT.T), r"hidden and weight: expected shapes"),
        (lambda: analysis.argmax_mass(ROWS, WEIGHT), "hidden: expected a floating-point tensor"),
        (lambda: analysis.argmax_mass(HIDDEN, WEIGHT, bias=TWO), r"bias: expected shape \(4,\)"),
        (lambda: analysis.argmax_mass(HIDDEN, WEIGHT, softcap=-1.0), "softcap: expected a positive number"),
        (lambda: analysis.argmax_mass(HIDDEN, WEIGHT, logit_scale=0.0), "logit_scale: expected a positive number"),
        (lambda: analysis.argmax_mass(HIDDEN, WEIGHT, chunk_size=0), "chunk_size: expected at least 1 token, got 0"),
        (lambda: analysis.displacement(TWO, NAN, ROWS), r"ref_log_odds: .* got nan at position \[1\]"),
        (lambda: analysis.displacement(-INFINITE, TWO, ROWS), r"log_odds: .* got -inf at position \[1\]"),
        (lambda: analysis.displacement(TWO, TWO, torch.tensor([0, 2])), "response: .* got none in row 1"),
    ],
)
def test_bad_input_is_named(call: Any, words: str, unchecked_shapes: None) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_every_public_function_has_an_example() -> None:
    for name in analysis.__all__:
        assert ">>>" in (getattr(analysis, name).__doc__ or ""), name
