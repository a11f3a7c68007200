"""Right answers: a model's greedy and sampled answers to prompts, each checked; on several processes each its share."""

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bnf_train.checks import ALL, Asked, Check, change, resolve, summary
from bnf_train.data import Options, Prompt, Row, Rules, prompts, read_prompts
from bnf_train.errors import UsageError
from bnf_train.model.generate import Generated, greedy_and_sampled

GROUP = "group"  # the column by whose values right answers are counted apart


@dataclass(frozen=True)
class Questions:
    """What is asked, and how: flags have the same names with check_ before them.

    Attributes:
      prompts: with their rows' columns.
      groups: of each prompt.
      batch_size: prompts at once.
    """

    check: Check
    prompts: list[Prompt]
    groups: list[str]
    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    batch_size: int = 8

    def settings(self) -> dict[str, Any]:
        """All that answers to the prompts depend on but the model; the rest of it as it is said in metrics.json."""
        asked = {name: getattr(self, name) for name in ("samples", "temperature", "max_new_tokens", "seed")}
        return {"check": self.check.name, "prompts": len(self.prompts)} | asked

    def values(self, asked: Sequence[Asked]) -> dict[str, dict[str, Any]]:
        """By group, with intervals: `checks.summary`."""
        return summary(self.groups, asked, self.seed)


@dataclass
class Measured:
    """Answers before and after training, as far as there are any, and in between at some optimizer steps."""

    questions: Questions
    before: list[Asked] | None = None
    after: list[Asked] | None = None
    during: dict[int, dict[str, Any]] = field(default_factory=dict)  # summaries by step

    def values(self) -> dict[str, dict[str, Any]]:
        """{"before": {group: …}, "after": …, "change": …}: as it stands under "right" in metrics.json."""
        stages = {"before": self.before, "after": self.after}
        found = {stage: self.questions.values(asked) for stage, asked in stages.items() if asked is not None}
        if self.before is not None and self.after is not None:
            found["change"] = change(self.questions.groups, self.before, self.after, self.questions.seed)
        return found

    def lines(self) -> list[dict[str, Any]]:
        """One for each prompt: what all the numbers are made of."""
        stages = {name: asked for name, asked in (("before", self.before), ("after", self.after)) if asked is not None}
        return [
            {"number": prompt.number, "source": prompt.source, "group": group, "prompt": prompt.text}
            | {name: counted(asked[i]) for name, asked in stages.items()}
            for i, (prompt, group) in enumerate(zip(self.questions.prompts, self.questions.groups, strict=True))
        ]


def counted(asked: Asked) -> dict[str, Any]:
    """Of one prompt: how right the greedy answer is, and how many of the samples are right; then all there is."""
    return {"greedy": asked.right[0], "sampled": sum(asked.right[1:]), "samples": len(asked.right) - 1} | asdict(asked)


def read_questions(
    check: str,
    source: str | None,
    held_out: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    rows: int = 200,
    context: int | None = None,
    trained_on: Collection[str] = (),
    rules: Rules | None = None,
    options: Options | None = None,
    **how: Any,
) -> Questions:
    """What is to be asked: the distinct prompts of `source`, or else of the held-out rows, with a line that says how many.

    Args:
      rows: at most so many prompts, by a seeded draw.
      context: tokens that the model was made for; prompts that leave no room for an answer in it are left out.
      trained_on: prompts of the training rows, of which `source` should have none.
      how: the other fields of `Questions`.

    Raises:
      UsageError: no such check, a row without what it needs, or nothing to ask.
    """
    questions = Questions(resolve(check), [], [], **how)
    found = _of_source(source, tokenizer, console, rules, options) if source else _of_rows(held_out, tokenizer, rules, options)
    for prompt in found:
        questions.check.check_row(prompt.columns, prompt.where)
    if not found:
        raise UsageError("--check: no rows are held out, so there is nothing to ask; pass --check_dataset FILE.")
    questions.check(found[0].text, "", found[0].columns, found[0].where)  # an empty answer is one
    name, several = source or "held-out rows", len(found)
    room = math.inf if context is None else context - questions.max_new_tokens
    fitting = [prompt for prompt in found if len(prompt.ids) <= room]
    if not fitting:
        shortest = min(len(prompt.ids) for prompt in found)
        raise UsageError(
            f"--check_max_new_tokens {questions.max_new_tokens}: the model was made for {context} tokens in all, and the "
            f"shortest prompt of {name} has {shortest}; lower it."
        )
    places = sorted(random.Random(questions.seed).sample(range(len(fitting)), min(rows, len(fitting))))
    chosen = [fitting[place] for place in places]
    groups = [_group(prompt) for prompt in chosen]
    left = f", {several - len(fitting):,} left out as too long for an answer" if len(fitting) < several else ""
    again = sum(prompt.key in trained_on for prompt in chosen) if source else 0
    seen = f"; {again:,} of them are trained on, too" if again else ""
    console.print(
        f"--check {check}: {len(chosen):,} of {_number(several, 'prompt')} of {name}{left}, in "
        f"{_number(len(set(groups)), 'group')}{seen}; to each a greedy answer and {_number(questions.samples, 'sample')} at "
        f"temperature {questions.temperature:g} (--seed {questions.seed}).",
        markup=False,  # a pattern may have brackets
    )
    return Questions(questions.check, chosen, groups, **how)


def _of_source(
    source: str, tokenizer: PreTrainedTokenizerBase, console: Console, rules: Rules | None, options: Options | None
) -> list[Prompt]:
    found, counts = prompts(read_prompts(source), tokenizer, source, rules, options)
    counts.unused = []
    for sentence in counts.sentences(rules or Rules()):
        console.print(f"  {sentence}", markup=False)
    return found


def _of_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, rules: Rules | None, options: Options | None
) -> list[Prompt]:
    found: dict[str, Prompt] = {}
    for source in dict.fromkeys(row.source for row in rows):
        some = [row for row in rows if row.source == source]
        numbers = [row.number for row in some]
        of_source, _ = prompts([dict(row.columns) for row in some], tokenizer, source, rules, options, numbers=numbers)
        found = {prompt.key: prompt for prompt in of_source} | found
    return list(found.values())


def _group(prompt: Prompt) -> str:
    value = prompt.columns.get(GROUP)
    return ALL if value is None or not str(value).strip() else str(value).strip()


def _number(count: int, of: str) -> str:
    return f"{count:,} {of}{'' if count == 1 else 's'}"


def ask(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    device: torch.device,
    autocast: torch.dtype | None = None,
    *,
    process: int = 0,
    processes: int = 1,
    sharded: bool = False,
    progress: str | None = None,
    generated: list[list[Generated]] | None = None,
) -> list[Asked]:
    """The checked answers to every prompt. With several processes each must call this, and gets all of them.

    Args:
      sharded: the processes hold the model together.
      progress: what a progress bar says; None: no bar.
      generated: takes the token ids of this process's answers, of which texts need not make the same again.

    Raises:
      UsageError: what the check raises.
    """
    share = -(-len(questions.prompts) // processes)  # as many for each: of the last ones some are asked twice
    mine = [min(process + i * processes, len(questions.prompts) - 1) for i in range(share)]
    quiet = True if progress is None or process else None  # None: on a terminal only
    with tqdm(total=share, desc=progress, leave=False, disable=quiet) as bar:
        found = greedy_and_sampled(
            model, tokenizer, [questions.prompts[i].ids for i in mine], device, autocast,
            samples=questions.samples, temperature=questions.temperature, max_new_tokens=questions.max_new_tokens,
            seed=questions.seed, places=mine, batch_size=questions.batch_size, cache_weights=processes == 1,
            sharded=sharded and processes > 1, done=bar.update,
        )  # fmt: skip
    if generated is not None:
        generated += found
    texts = [[str(tokenizer.decode(answer.tokens, skip_special_tokens=True)) for answer in answers] for answers in found]
    checked = [
        (i, _checked(questions.check, questions.prompts[i], answers, of))
        for i, answers, of in zip(mine, found, texts, strict=True)
    ]
    by_place = dict(gather_object(checked) if processes > 1 else checked)
    if wrong := next((of for of in by_place.values() if isinstance(of, str)), None):
        raise UsageError(wrong)
    return [by_place[i] for i in range(len(questions.prompts))]


def _checked(check: Check, prompt: Prompt, answers: Sequence[Generated], texts: list[str]) -> Asked | str:
    """The answers to one prompt; where the check fails what it says, which stops all processes."""
    try:
        right = [check(prompt.text, text, prompt.columns, prompt.where) for text in texts]
    except UsageError as error:
        return str(error)
    return Asked(right, [len(answer.tokens) for answer in answers], [answer.cut for answer in answers], texts)
