"""The experiments: what stands in RESULTS.md follows from results/*.json, and every recipe is one that can be run."""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from bnf_train import demo
from bnf_train.compare import run as compare_run
from bnf_train.compare.__main__ import read_options
from bnf_train.flags import parse

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "proofs" / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import claims  # type: ignore[import-not-found]  # noqa: E402
import make_gsm8k  # type: ignore[import-not-found]  # noqa: E402
import measured  # type: ignore[import-not-found]  # noqa: E402

RECIPES = sorted(EXPERIMENTS.glob("*.yaml"))
T_OF_FIVE = 2.7764  # 97.5 % point of Student's t with 4 degrees of freedom


@pytest.fixture(scope="module")
def results() -> Any:
    return measured.Results()


def test_the_page_is_what_the_results_say(results: Any) -> None:
    assert (EXPERIMENTS / "RESULTS.md").read_text(encoding="utf-8") == claims.page(results)


def test_every_arm_has_a_world_of_its_own_for_each_of_five_seeds(results: Any) -> None:
    assert {seed for _, seed in results.before} == {1, 2, 3, 4, 5}
    assert len({tuple(of.values()) for (recipe, _), of in results.before.items() if recipe == "singles"}) == 5
    cells: dict[tuple[str, str, float | None], list[int]] = {}
    for run in results.runs:
        cells.setdefault((run.recipe, run.arm, run.rate), []).append(run.seed)
    assert all(sorted(seeds) == [1, 2, 3, 4, 5] for seeds in cells.values())
    assert {recipe for recipe, _, _ in cells} == set(measured.RECIPES)


def test_intervals_are_students(results: Any) -> None:
    values = [run.target for run in results.of("singles", "bnf", 1e-4)]
    half = T_OF_FIVE * statistics.stdev(values) / math.sqrt(5)
    found = measured.mean(values)
    assert found.value == pytest.approx(statistics.fmean(values))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-3)
    a, b = results.of("singles", "bnf_one_sided", 3e-4), results.of("singles", "bnf", 3e-4)
    apart = [x.target - y.target for x in a for y in b if x.seed == y.seed]
    assert measured.difference(a, b, lambda run: run.target).value == pytest.approx(statistics.fmean(apart))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([0.1, 0.11, 0.12], "more"), ([-0.1, -0.11, -0.12], "less"), ([0.1, -0.1, 0.0], "undecided"), ([0.1], "undecided")],
)
def test_a_difference_is_decided_where_its_interval_leaves_out_zero(values: list[float], verdict: str) -> None:
    assert measured.mean(values).verdict == verdict


def test_results_are_taken_from_what_compare_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def right(target: float) -> dict[str, Any]:
        return {"target": {"sampled": {"value": target}}, "others": {"sampled": {"value": 0.9}}}

    runs = [
        {"name": "bnf lr=0.0001", "seed": 1, "right": {"before": right(0.4), "after": right(0.7)}},
        {"name": "dpo dataset=runs/worlds/{seed}/pairs.jsonl", "seed": 1, "right": {"before": {}, "after": right(0.6)}},
        {"name": "ipo lr=1", "seed": 1, "failed": "no memory"},
    ]
    (tmp_path / "runs" / "singles").mkdir(parents=True)
    (tmp_path / "runs" / "singles" / "compare.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(measured, "RESULTS", tmp_path / "results")
    measured.collect(tmp_path / "runs")
    assert json.loads((tmp_path / "results" / "singles.json").read_text()) == {
        "before": {"1": {"target": 0.4, "others": 0.9}},
        "runs": [
            {"arm": "bnf", "rate": 1e-4, "seed": 1, "target": 0.7, "others": 0.9},
            {"arm": "dpo dataset=pairs", "rate": None, "seed": 1, "target": 0.6, "others": 0.9},
        ],
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_arm_of_a_recipe_is_flags_that_a_run_takes(recipe: Path, tmp_path: Path) -> None:
    options, common = read_options([f"--config={recipe}", f"--model={demo.MODEL}", f"--output_dir={tmp_path}"])
    assert set(options["seeds"]) >= {1, 2, 3, 4, 5} or recipe.stem in ("gsm8k", "math_pairs")
    arms = list(compare_run.arms(options | {"seeds": [1]}, common, tmp_path))
    assert len(arms) == len(options["arms"]) * max(1, len(options["learning_rates"]))
    for arm in arms:
        config = parse(arm.arguments)
        assert "{seed}" not in str(vars(config))
        assert config.seed == 1


def test_solutions_to_hold_out_are_of_other_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*flags: str) -> dict[str, list[dict[str, Any]]]:
        monkeypatch.setattr(sys, "argv", ["make_gsm8k.py", "--output_dir", str(tmp_path), *flags])
        make_gsm8k.main()
        return {path.stem: [json.loads(line) for line in path.open(encoding="utf-8")] for path in tmp_path.iterdir()}

    rows = made("--questions", "1000", "--held_out", "59")
    asked = [json.loads(line) for line in (EXPERIMENTS / "data" / "gsm8k_check.jsonl").open(encoding="utf-8")]
    questions = {name: {row["prompt"] for row in of} for name, of in rows.items()} | {"asked": {row["prompt"] for row in asked}}
    assert {name: len(of) for name, of in questions.items() if name != "right"} == {"train": 1000, "held_out": 59, "asked": 200}
    assert not questions["train"] & questions["held_out"]
    assert not questions["asked"] & (questions["train"] | questions["held_out"])
    assert len(rows["train"]) == 4000
    assert rows["right"] == [row for row in rows["train"] if row["label"]]
    with pytest.raises(SystemExit):
        made("--questions", "1000", "--held_out", "60")
