"""Each prompt with another prompt's response."""

import pytest

from bnf_train.data import Collator, Response, Row, mismatch
from bnf_train.errors import UsageError


def row(prompt: list[int], *responses: list[int]) -> Row:
    return Row("", [Response(prompt + ids, len(prompt), True) for ids in responses], 7)


def pairs(rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    found = [response for row in rows for response in row.responses]
    return [(r.input_ids[: r.prompt_length], r.input_ids[r.prompt_length :]) for r in found]


def test_it_is_the_last_response_to_another_prompt() -> None:
    rows = [row([1], [10], [11]), row([1], [12]), row([2, 2], [20, 21]), row([3], [30])]
    found = mismatch(rows, 100)
    assert pairs(found) == [([1], [30]), ([1], [30]), ([1], [30]), ([2, 2], [12]), ([3], [20, 21])]
    assert [r.mismatched for row in rows for r in row.responses] == [row.responses[0] for row in found]
    assert {row.number for row in found} == {7}


def test_a_group_is_its_responses() -> None:
    group = mismatch([row([1], [10], [11]), row([2], [20])], 100)
    apart = mismatch([row([1], [10]), row([1], [11]), row([2], [20])], 100)
    assert pairs(group) == pairs(apart)


def test_the_last_rows_may_have_the_first_ones_prompt() -> None:
    assert pairs(mismatch([row([1], [10]), row([2], [20]), row([1], [11])], 100)) == [([1], [20]), ([2], [10]), ([1], [20])]


def test_it_is_cut_at_the_end() -> None:
    rows = [row([1, 1, 1], [10]), row([2], [20, 21, 22])]
    assert pairs(mismatch(rows, 4)) == [([1, 1, 1], [20]), ([2], [10])]
    assert pairs(mismatch(rows, 2)) == [([1, 1, 1], [20]), ([2], [10])]  # never without a response


def test_one_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="all rows have one prompt; use --objective kto_fixed"):
        mismatch([row([1], [10]), row([1], [11])], 100)
    assert mismatch([], 100) == []


def test_a_batch_carries_them() -> None:
    rows = [row([1], [10]), row([2], [20])]
    for one in (*rows, *mismatch(rows, 100)):
        for response in one.responses:
            response.ref_log_odds = None
    batch = Collator(0, packed=True)([*rows, Row("", [])])
    assert batch["mismatched"]["input_ids"].flatten().tolist() == [1, 20, 2, 10]
    assert "mismatched" not in Collator(0)([Row("", [])])


def test_rows_of_one_prompt_may_borrow() -> None:
    """Held-out rows do from the training rows, which do not borrow from them."""
    train, held_out = [row([1], [10]), row([2], [20])], [row([3], [30], [31])]
    assert pairs(mismatch(train, 100)) == [([1], [20]), ([2], [10])]
    assert pairs(mismatch(held_out, 100, before=train)) == [([3], [20]), ([3], [20])]
    assert [r.mismatched.input_ids for one in train for r in one.responses if r.mismatched] == [[1, 20], [2, 10]]
