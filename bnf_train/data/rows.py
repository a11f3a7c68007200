"""A row of the data as it is trained on, and what becomes of rows that are not as they should be."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Response:
    """One response with its prompt, as token ids; `ref_log_odds` is filled in by the reference pass."""

    input_ids: list[int]
    prompt_length: int
    preferred: bool
    ref_log_odds: Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.input_ids) - self.prompt_length


@dataclass
class Row:
    """One row of the data: a pair of responses (preferred first), or a single one."""

    prompt: str
    responses: list[Response]
    number: int = 0  # in its source, from 1


@dataclass(frozen=True)
class Rules:
    """What becomes of rows that are not as they should be; flags have the same names and help."""

    too_long: str = "cut"  # cut the response's end (a prompt that leaves it no room drops the row), drop, error
    empty: str = "error"  # drop, error
    no_boundary: str = "drop"  # drop, error
    duplicates: str = "keep"  # keep, drop, error


@dataclass
class Counts:
    """How many rows there were, and the numbers of those that were not taken as they stand."""

    rows: int = 0
    cut: list[int] = field(default_factory=list)  # once for each response
    dropped: list[int] = field(default_factory=list)  # too long
    empty: list[int] = field(default_factory=list)
    no_boundary: list[int] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)
    same_sides: list[int] = field(default_factory=list)
    rewritten: list[int] = field(default_factory=list)

    def sentences(self, rules: Rules) -> list[str]:
        """One for each kind that there is, with its flag and row numbers."""
        explained = {
            "cut": "responses cut at the end (--too_long cut)",
            "dropped": "rows dropped as too long (--too_long)",
            "empty": "rows dropped because a response is empty (--empty drop)",
            "no_boundary": "rows dropped because their prompt is no prefix of prompt and response (--no_boundary drop)",
            "duplicates": f"exact duplicates of a row before (--duplicates {rules.duplicates})",
            "same_sides": "pairs with the same response on both sides, from which there is nothing to learn",
            "rewritten": "responses whose text the chat template changes",
        }
        return [f"{len(at):,} {text}: {_numbers(at)}" for name, text in explained.items() if (at := getattr(self, name))]


def _numbers(rows: list[int]) -> str:
    rows = sorted(set(rows))
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:5]))}{more}"
