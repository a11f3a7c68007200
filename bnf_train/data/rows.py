"""A row of the data as it is trained on, and what was counted on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bnf_train.errors import UsageError
from bnf_train.rules import RULES


@dataclass
class Response:
    """One response with its prompt, as token ids; `ref_log_odds` is filled in by the reference pass.

    `score` is what it counts in the loss in place of +1 or -1, with the sign of its label; None: +1 or -1. `weights` says what
    each token from `prompt_length` on counts; None: 1. The loss does not see tokens of weight 0, nor does the reference.
    `mismatched` is its prompt with another prompt's response, where the objective needs one (`mismatch`).

    >>> response = Response([5, 6, 7, 8], 1, True, weights=[1, 0, 0.5])
    >>> list(response.counted), response.tokens, response.counted_weights
    ([1, 3], 2, [1, 0.5])
    """

    input_ids: list[int]
    prompt_length: int
    preferred: bool
    ref_log_odds: Tensor | None = None
    score: float | None = None
    weights: list[float] | None = None
    mismatched: "Response | None" = None

    @property
    def counted(self) -> Sequence[int]:
        """Places of the tokens that count."""
        places = range(self.prompt_length, len(self.input_ids))
        return places if self.weights is None else [at for at, weight in zip(places, self.weights, strict=True) if weight]

    @property
    def counted_weights(self) -> list[float]:
        return [1.0] * self.tokens if self.weights is None else [weight for weight in self.weights if weight]

    @property
    def tokens(self) -> int:
        """The number of tokens that count."""
        return len(self.counted)


@dataclass
class Row:
    """One row of the data: a pair of responses (preferred first), a single one, or any number to one prompt."""

    prompt: str
    responses: list[Response]
    number: int = 0  # in its source, from 1
    source: str = ""  # as --dataset names it
    group: bool = False  # any number of responses, of which no two are a pair
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # as they stand in the data

    @property
    def pair(self) -> bool:
        return len(self.responses) == 2 and not self.group


class RowRefused(UsageError):
    """A row that the rule of this name may leave out."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule

    def with_way_out(self) -> UsageError:
        """For a rule that says `error`: the sentence, and how to go on without such rows."""
        return UsageError(f"{str(self).rstrip('.')}; fix it, or pass --{self.rule} drop.")


class Rules(dict[str, str]):
    """What each rule does; flags have the same names.

    >>> Rules(empty="drop")["empty"], Rules()["too_long"]
    ('drop', 'cut')
    """

    def __init__(self, **chosen: str) -> None:
        super().__init__({name: rule.choices[0] for name, rule in RULES.items()})
        for name, choice in chosen.items():
            if choice not in RULES[name].choices:
                raise UsageError(f"--{name}: expected one of {', '.join(RULES[name].choices)}, got {choice}.")
        self.update(chosen)

    @classmethod
    def of(cls, flags: Any) -> "Rules":
        """As the flags say, which are attributes of a config or a namespace."""
        return cls(**{name: getattr(flags, name) for name in RULES})


@dataclass
class Counts:
    """How many rows there were, and the numbers of those that were not taken as they stand."""

    rows: int = 0
    left_out: dict[str, list[int]] = field(default_factory=dict)  # by rule
    cut: list[int] = field(default_factory=list)  # once for each response
    same_sides: list[int] = field(default_factory=list)
    zero: list[int] = field(default_factory=list)  # once for each response
    uncounted: list[int] = field(default_factory=list)  # once for each response
    turns: list[int] = field(default_factory=list)  # once for each earlier turn that counts
    rewritten: list[int] = field(default_factory=list)  # once for each response
    added: list[int] = field(default_factory=list)  # once for each response
    blocks: list[int] = field(default_factory=list)  # once for each response
    block: str = ""  # the first of their tags
    added_text: str = ""  # the first text that the template added
    unused: list[str] = field(default_factory=list)  # sentences about columns and keys

    def leave_out(self, rule: str, number: int) -> None:
        self.left_out.setdefault(rule, []).append(number)

    def sentences(self, rules: Rules) -> list[str]:
        """One for each kind that there is, with its flag and row numbers."""
        said = {f"responses cut at the end (--too_long {rules['too_long']})": self.cut}
        said |= {f"{RULES[rule].drops} (--{rule} {rules[rule]})": numbers for rule, numbers in self.left_out.items()}
        said["pairs with the same response on both sides, from which there is nothing to learn"] = self.same_sides
        said["responses left out because their score or weight is 0"] = self.zero
        said["responses left out because no token of them counts"] = self.uncounted
        said["earlier assistant turns that count, too (--train_on all_assistant)"] = self.turns
        said["responses whose text the chat template would change; the text itself is trained on"] = self.rewritten
        said[
            f"responses to which the chat template adds text, {self.added_text!r} first, which is trained on, too "
            "(--chat_template_kwargs and --chat_template steer it)"
        ] = self.added
        said[
            f"responses that leave a {self.block} block of the prompt open, or open it again behind the prompt's own: no model "
            "would go on so (--chat_template_kwargs may change the prompt)"
        ] = self.blocks
        return [f"{len(at):,} {text}: {_numbers(at)}" for text, at in said.items() if at] + self.unused


def _numbers(rows: list[int]) -> str:
    rows = sorted(set(rows))
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:5]))}{more}"
