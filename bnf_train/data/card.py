"""What would be trained on, in a few lines: counts, lengths, labels, groups, what is left out and why."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from bnf_train.data.rows import Counts, Row, Rules


def card(rows: Sequence[Row], counts: Counts, rules: Rules, source: str, split: str, max_length: int) -> Iterator[str]:
    """Lines about the rows of one source, as they are printed at the start of a run."""
    responses = [response for row in rows for response in row.responses]
    yield (
        f"{source}, {split}: {counts.rows} rows, {sum(r.tokens for r in responses):,} response tokens; at --max_length "
        f"{max_length}, {len(counts.cut)} responses cut, {len(counts.left_out.get('too_long', ()))} rows dropped."
    )
    preferred = sum(response.preferred for response in responses)
    by_prompt = Counter(row.prompt for row in rows for _ in row.responses)
    yield (
        f"  {_number(len(responses), 'response')} to {_number(len(by_prompt), 'prompt')}: {preferred:,} preferred, "
        f"{len(responses) - preferred:,} dispreferred; {_groups(by_prompt.values())}."
    )
    prompts, answers = _spread(row.responses[0].prompt_length for row in rows), _spread(r.tokens for r in responses)
    yield f"  Tokens of a prompt: {prompts}; of a response: {answers}."
    for sentence in counts.sentences(rules):
        yield f"  {sentence}"


def _groups(sizes: Iterable[int]) -> str:
    """How many responses prompts have.

    >>> _groups([2, 2, 2, 4])
    '2 to a prompt (3 prompts), 4 (1)'
    """
    found = sorted(Counter(sizes).items(), key=lambda item: -item[1])
    (size, prompts), *others = found
    first = f"{size} to a prompt ({_number(prompts, 'prompt')})"
    shown = [first, *(f"{size} ({prompts:,})" for size, prompts in others[:4])]
    return ", ".join(shown) + (", …" if len(others) > 4 else "")


def _number(count: int, of: str) -> str:
    return f"{count:,} {of}{'' if count == 1 else 's'}"


def _spread(values: Iterable[int]) -> str:
    """
    >>> _spread([3, 1, 2])
    '1 to 3, median 2'
    """
    found = list(values)
    return f"{min(found):,} to {max(found):,}, median {statistics.median(found):,.0f}"
