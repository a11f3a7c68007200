"""What the arms of the recipes measured: results/*.json, made from what bnf_train.compare left, and means of it."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bnf_train.checks import student

RESULTS = Path(__file__).parent / "results"
RECIPES = ("singles", "pairs", "singles_3_epochs", "pairs_3_epochs", "hyperparameters", "collapse", "pairing", "negatives")
SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Run:
    """An arm with a seed: shares of right answers after training."""

    recipe: str
    arm: str
    rate: float | None
    seed: int
    target: float
    others: float


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"

    @property
    def points(self) -> str:
        """Of a difference."""
        return f"{100 * self.value:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"

    @property
    def verdict(self) -> str:
        return "more" if self.low > 0 else "less" if self.high < 0 else "undecided"


def mean(values: Sequence[float]) -> Mean:
    low, high = student(values) if len(values) > 1 else (float("-inf"), float("inf"))
    return Mean(fmean(values), low, high)


def collect(runs: Path) -> None:
    """results/RECIPE.json from the compare.json of each recipe that has been run."""
    RESULTS.mkdir(exist_ok=True)
    for recipe in RECIPES:
        path = runs / recipe / "compare.json"
        if not path.exists():
            print(f"{path}: not there; {RESULTS / recipe}.json stays as it is.")
            continue
        rows, before = [], {}
        for run in json.loads(path.read_text())["runs"]:
            if "failed" in run:
                print(f"{recipe}, {run['name']}, seed {run['seed']}: failed, {run['failed']}")
                continue
            right = {
                when: {group: of["sampled"]["value"] for group, of in run["right"].get(when, {}).items()}
                for when in ("before", "after")
            }
            if right.get("before"):
                before[str(run["seed"])] = {group: round(value, 5) for group, value in right["before"].items()}
            arm, found, rate = run["name"].replace("runs/worlds/{seed}/", "").replace(".jsonl", "").rpartition(" lr=")
            rows.append(
                {"arm": arm if found else rate, "rate": float(rate) if found else None, "seed": run["seed"]}
                | {group: round(value, 5) for group, value in right["after"].items()}
            )  # fmt: skip
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        (RESULTS / f"{recipe}.json").write_text(f'{{"before": {json.dumps(before)},\n "runs": [\n  {lines}\n]}}\n')
        print(f"{RESULTS / recipe}.json: {len(rows)} runs")


class Results:
    """All runs, and what was right before."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.runs: list[Run] = []
        self.before: dict[tuple[str, int], dict[str, float]] = {}  # each recipe has measured it
        for recipe in RECIPES:
            content = json.loads((folder / f"{recipe}.json").read_text())
            for row in content["runs"]:
                self.runs.append(Run(recipe, **row))
            self.before |= {(recipe, int(seed)): of for seed, of in content["before"].items()}

    def of(self, recipe: str, arm: str | None = None, rate: float | None = None) -> list[Run]:
        return [
            run for run in self.runs
            if run.recipe == recipe and arm in (None, run.arm) and rate in (None, run.rate)
        ]  # fmt: skip

    def arms(self, recipe: str) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.of(recipe)))

    def rates(self, recipe: str) -> list[float]:
        return sorted({run.rate for run in self.of(recipe) if run.rate is not None})

    def start(self, group: str) -> Mean:
        return mean([of[group] for (recipe, _), of in self.before.items() if recipe == "singles"])

    def won(self, run: Run) -> float:
        """What the target rose by."""
        return run.target - self.before[run.recipe, run.seed]["target"]

    def lost(self, run: Run) -> float:
        """What the other tasks fell by."""
        return self.before[run.recipe, run.seed]["others"] - run.others

    def score(self, run: Run) -> float:
        """Won on the target less lost on the others."""
        return self.won(run) - max(0.0, self.lost(run))


def difference(a: Iterable[Run], b: Iterable[Run], value: Callable[[Run], float]) -> Mean:
    """Of a less b, seed by seed."""
    of_b = {run.seed: value(run) for run in b}
    return mean([value(run) - of_b[run.seed] for run in a if run.seed in of_b])


def best(results: Results, recipe: str, arm: str, rates: Sequence[float] = ()) -> list[Run]:
    """The runs of an arm at the learning rate, of `rates` or all, where its mean score is highest."""
    at = [results.of(recipe, arm, rate) for rate in rates or results.rates(recipe)]
    return max((runs for runs in at if runs), key=lambda runs: fmean(map(results.score, runs)))


def near_best(scores: Sequence[float], near: float = 0.05) -> float:
    """The share, among all cells but the best, of those within `near` of it.

    >>> near_best([0.3, 0.27, 0.1])
    0.5
    """
    return (sum(score > max(scores) - near for score in scores) - 1) / (len(scores) - 1)
