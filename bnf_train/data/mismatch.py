"""Each prompt with another prompt's response: what KTO estimates its reference point from (`TokenBatch.z0`)."""

from collections.abc import Sequence

from bnf_train.data.rows import Response, Row
from bnf_train.errors import UsageError


def mismatch(rows: Sequence[Row], max_length: int, before: Sequence[Row] = ()) -> list[Row]:
    """Gives every response a `mismatched` one, and returns those, as rows of one response.

    It is that of the last response before it (before the first stands the last) to another prompt: always the same, so that
    the reference's log-odds of it are computed once. It is cut at `max_length` tokens. Rows `before` only lend theirs.

    Raises:
      UsageError: all rows have one prompt.

    Example:
      >>> rows = [Row("", [Response([5, 6, 7], 2, True)]), Row("", [Response([8, 9, 9], 1, False)])]
      >>> [response.input_ids for row in mismatch(rows, 8) for response in row.responses]
      [[5, 6, 9, 9], [8, 7]]
    """
    found: list[Row] = []
    lent, every = ([(row, r, r.input_ids[: r.prompt_length]) for row in part for r in row.responses] for part in (before, rows))
    first, every = len(lent), lent + every
    other = -1
    for place, (row, response, prompt) in enumerate(every[first:], start=first):
        if place and every[place - 1][2] != prompt:
            other = place - 1
        while every[other][2] == prompt:
            other -= 1
            if other < -len(every):
                raise UsageError(
                    "KTO estimates its reference point from prompts with another prompt's response, and all rows have one "
                    "prompt; use --objective kto_fixed, whose reference point is a constant."
                )
        ids = prompt + every[other][1].input_ids[every[other][1].prompt_length :]
        ids = ids[: max(max_length, len(prompt) + 1)]
        response.mismatched = Response(ids, len(prompt), response.preferred)
        found.append(Row(row.prompt, [response.mismatched], row.number, row.source))
    return found
