"""Which rows are trained on and which are held out."""

import hashlib
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from bnf_train.data.card import card
from bnf_train.data.read import has_splits, other_splits, parse_share, read_rows
from bnf_train.data.rows import Row, Rules
from bnf_train.data.show import show
from bnf_train.data.template import Options
from bnf_train.data.tokens import tokenize
from bnf_train.errors import UsageError


class Choice(Protocol):
    """What `read_and_tokenize` reads of a config: the flags of the same names, and RULES."""

    datasets: list[str]
    eval_dataset: str | None
    eval_size: float
    max_length: int
    pairing_ratio: float
    score_center: str
    train_on: str
    show_examples: int
    seed: int
    check: str | None
    check_dataset: str | None

    def template_options(self) -> dict[str, Any]: ...


def read_and_tokenize(config: Choice, tokenizer: PreTrainedTokenizerBase, console: Console) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, tokenised; what was cut or dropped is printed."""
    rules = Rules.of(config)
    options = Options(**config.template_options())

    def tokenized(source: str, split: str) -> list[Row]:
        name, share = parse_share(source)
        raw = read_rows(name, split)
        if not raw:
            return []
        numbers = list(range(1, len(raw) + 1))
        if share < 1:
            numbers = sorted(random.Random(config.seed).sample(numbers, max(1, round(share * len(raw)))))
        rows, counts = tokenize(
            [raw[number - 1] for number in numbers], tokenizer, config.max_length, source, rules, options, config.train_on,
            numbers=numbers, keep_zero=config.score_center == "mean",
            checked=bool(config.check and not config.check_dataset),
        )  # fmt: skip
        if config.score_center == "mean":
            rows = center_scores(rows, source)
        for line in card(rows, counts, rules, source, split, config.max_length):
            console.print(line)
        return rows

    def both(source: str) -> tuple[list[Row], list[Row]]:
        """Training and held-out rows of one source."""
        train, held_out, name = tokenized(source, "train"), [], parse_share(source)[0]
        if not config.eval_dataset and has_splits(name):
            held_out = tokenized(source, "test")
        if unused := other_splits(name):
            console.print(f"{name}: splits that are not used: {', '.join(unused)} (--dataset {name}={unused[0]}).")
        return (train, held_out) if held_out or config.eval_dataset else split_by_prompt(train, config.eval_size, config.seed)

    train_rows: list[Row] = []
    held_out: list[Row] = []
    for source in config.datasets:
        train, test = both(source)
        train_rows, held_out = train_rows + train, held_out + test
    if config.eval_dataset and not (held_out := tokenized(config.eval_dataset, "test")):
        raise UsageError(f"--eval_dataset {config.eval_dataset}: expected a split named test, got none.")
    if len(config.datasets) > 1:
        known = {row.prompt for row in held_out}
        seen = sum(row.prompt in known for row in train_rows)
        train_rows = [row for row in train_rows if row.prompt not in known]
        left = f"; {seen:,} rows left out, whose prompts are held out" if seen else ""
        console.print(f"{len(config.datasets)} data sets: {len(train_rows):,} rows, shuffled (--seed {config.seed}){left}.")
    if config.pairing_ratio < 1:
        pairs = sum(row.pair for row in train_rows)
        train_rows = mask_pairs(train_rows, config.pairing_ratio, config.seed)
        whole = sum(row.pair for row in train_rows)
        console.print(
            f"--pairing_ratio {config.pairing_ratio:g}: of {pairs} training pairs {whole} stay whole, "
            f"{pairs - whole} lose one side at random (--seed {config.seed})."
        )
    for row in train_rows:
        row.columns = {}  # only held-out rows are asked about again
    show(train_rows[: config.show_examples], tokenizer, console)
    return train_rows, held_out


def digest(rows: Iterable[Row]) -> str:
    """Of all that training sees of them, in their order."""
    content = hashlib.blake2b(digest_size=16)
    for row in rows:
        seen = [(r.input_ids, r.prompt_length, r.score or r.preferred, *(r.weights or ())) for r in row.responses]
        content.update(repr(seen).encode())
    return content.hexdigest()


def center_scores(rows: list[Row], source: str) -> list[Row]:
    """Scores less the mean score of the responses to the same prompt; responses at the mean are left out.

    Raises:
      UsageError: no response has a score, or all are at the mean.

    Example:
      >>> from bnf_train.data import Response
      >>> row = Row("p", [Response([1, 2], 1, True, score=s) for s in (1.0, 2.0, 6.0)])
      >>> [(r.score, r.preferred) for r in center_scores([row], "x")[0].responses]
      [(-2.0, False), (-1.0, False), (3.0, True)]
    """
    by_prompt: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_prompt[row.prompt] += [response.score for response in row.responses if response.score is not None]
    if not any(by_prompt.values()):
        raise UsageError(f"--score_center mean: expected scores in {source}, got labels: leave it out, or add a score column.")
    centered = []
    for row in rows:
        mean = statistics.fmean(by_prompt[row.prompt] or [0.0])
        shifted = [r if r.score is None else replace(r, score=r.score - mean, preferred=r.score > mean) for r in row.responses]
        if left := [r for r in shifted if r.score is None or abs(r.score) > 1e-9]:
            centered.append(replace(row, responses=left))
    if not centered:
        raise UsageError(f"--score_center mean: in {source} every score is the mean of its prompt's: nothing is left.")
    return centered


def mask_pairs(rows: list[Row], pairing_ratio: float, seed: int) -> list[Row]:
    """Rows of which a share `pairing_ratio` of the pairs stays whole; of the others one side, drawn at random, is removed.

    Table 6 of the paper: the removed side is masked, so that the row is a single response.
    """
    pairs = [i for i, row in enumerate(rows) if row.pair]
    draw = random.Random(seed)
    masked = set(draw.sample(pairs, round((1 - pairing_ratio) * len(pairs))))
    return [replace(row, responses=[draw.choice(row.responses)]) if i in masked else row for i, row in enumerate(rows)]


def split_by_prompt(rows: list[Row], size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; all rows of a prompt go to the same side."""
    wanted = round(size * len(rows)) if size < 1 else int(size)
    by_prompt = Counter(row.prompt for row in rows)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    held_out: set[str] = set()
    taken = 0
    for prompt in prompts[:-1]:  # one prompt stays for training
        if taken >= wanted:
            break
        held_out.add(prompt)
        taken += by_prompt[prompt]
    return [r for r in rows if r.prompt not in held_out], [r for r in rows if r.prompt in held_out]


def check_ids(rows: Iterable[Row], embeddings: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model's embedding has a row for every token id.

    Raises:
      UsageError: it has not; one sentence that names row, token and what to do.
    """
    for row in rows:
        for response in row.responses:
            if (largest := max(response.input_ids)) >= embeddings:
                token = tokenizer.decode([largest])
                raise UsageError(
                    f"{row.source}, row {row.number}: the tokenizer makes token id {largest} ({token}), and the model's "
                    f"embedding has {embeddings:,} rows; use the tokenizer that belongs to the model, or give the model more "
                    "rows with resize_token_embeddings and train them."
                )
