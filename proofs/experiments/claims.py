"""The paper's claims in the small worlds: tables, a sentence for each, and the figure, from results/*.json.

    python proofs/experiments/claims.py                    # prints proofs/experiments/RESULTS.md
    python proofs/experiments/claims.py --write            # writes it, and frontier.png beside it
    python proofs/experiments/claims.py --collect runs     # first takes results/*.json from the folders of bnf_train.compare

A share of right answers is that of sampled ones (temperature 1). Means are over seeds, each of which has a world of its own;
intervals are 95 % intervals of means by Student's t, of differences those of the differences seed by seed. "Others lost" is
what the other tasks fell by.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from measured import SEEDS, Mean, Results, Run, best, collect, difference, mean, near_best

HERE = Path(__file__).parent
RIGHT_ONLY = "log_likelihood dataset=right"
RIGHT_SIDES = "log_likelihood dataset=chosen"
SHOWN = {
    RIGHT_ONLY: "RFT (likelihood of right answers)",
    RIGHT_SIDES: "RFT (likelihood of the right sides)",
    "log_likelihood": "likelihood of both labels",
}


# --- tables ------------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def named(arm: str) -> str:
    return SHOWN.get(arm, f"`{arm}`")


def cell(runs: Sequence[Run]) -> str:
    """target / others in percent, with half the width of the target's interval."""
    if not runs:
        return ""
    target, others = mean([run.target for run in runs]), mean([run.others for run in runs])
    return f"{100 * target.value:.0f} ± {100 * (target.high - target.value):.0f} / {100 * others.value:.0f}"


def grid(results: Results, recipe: str) -> str:
    rates = results.rates(recipe)
    rows = [[named(arm), *(cell(results.of(recipe, arm, rate)) for rate in rates)] for arm in results.arms(recipe)]
    return table(["objective", *(f"lr {rate:g}" for rate in rates)], rows)


def bests(results: Results, recipes: Sequence[str]) -> str:
    """Every arm at its best learning rate, the highest score first."""
    found = [(recipe, best(results, recipe, arm)) for recipe in recipes for arm in results.arms(recipe)]
    found.sort(key=lambda pair: -fmean(map(results.score, pair[1])))
    rows = []
    for recipe, runs in found:
        values = (mean([run.target for run in runs]), mean([run.others for run in runs]), mean(list(map(results.score, runs))))
        smallest = min(run.rate or 0.0 for run in results.of(recipe, runs[0].arm))
        rate = f"{runs[0].rate:g}" + (", the smallest tried" if runs[0].rate == smallest else "")
        rows.append([named(runs[0].arm), recipe.replace("_", " "), rate, *map(str, values)])
    return table(["objective", "rows", "best lr", "target", "others", "won less lost"], rows)


# --- the claims --------------------------------------------------------------------------------------------------------------

HOLDS, PARTLY, FAILS, OPEN = "Holds", "Holds in part", "Does not hold", "Undecided"


@dataclass(frozen=True)
class Claim:
    letter: str
    title: str
    verdict: str
    sentence: str
    tables: Sequence[str]

    def __str__(self) -> str:
        return f"## ({self.letter}) {self.title}\n\n**{self.verdict}.** {self.sentence}\n\n" + "\n".join(self.tables)


def collapse(results: Results) -> Claim:
    """Both labels, AdamW: what is left of the other tasks under BNF and under the likelihood, at each learning rate."""
    rates = results.rates("singles")
    ahead = {
        rate: difference(results.of("singles", "bnf", rate), results.of("singles", "log_likelihood", rate), lambda r: r.others)
        for rate in rates
    }
    left = {rate: fmean(r.others for r in results.of("singles", "bnf", rate)) for rate in rates}
    kept = [rate for rate in rates if left[rate] > results.start("others").value - 0.1]
    gone = [rate for rate in rates if rate not in kept]
    better = [rate for rate in rates if ahead[rate].low > 0]
    verdict = HOLDS if kept and not gone else FAILS if not better else PARTLY
    sentence = (
        f"Under AdamW BNF keeps the other tasks within 10 points of where they were up to a learning rate of {max(kept):g}, "
        f"and keeps more of them than the likelihood of both labels at {listed(better)}"
        + (f"; at {listed(gone)} it loses them, too ({100 * left[gone[0]]:.0f} % right at {gone[0]:g})" if gone else "")
        + ". Under SGD (learning rate 0.1), where a step is as long as its gradient, target / others are "
        + ", ".join(
            f"{cell(results.of('collapse', f'{arm} {what}optim=sgd learning_rate=0.1'))} with {named(arm)}{where}"
            for what, where in (("dataset=preferences ", ""), ("", " on wrong samples alone"))
            for arm in ("bnf", "log_likelihood")
        )
        + "."
    )
    rows = [[f"`{arm}`", cell(results.of("collapse", arm))] for arm in results.arms("collapse")]
    return Claim("a", "BNF prevents collapse", verdict, sentence, [table(["arm", "target / others"], rows)])


def frontier(results: Results) -> Claim:
    """Pairs: won less lost, each loss at its own best learning rate."""
    own = best(results, "pairs", "bnf")
    peers = {arm: best(results, "pairs", arm) for arm in ("dpo", "simpo", "ipo")}
    ahead = {arm: difference(own, runs, results.score) for arm, runs in peers.items()}
    lost = {arm: fmean(map(results.lost, runs)) for arm, runs in [("bnf", own), *peers.items()]}
    verdict = HOLDS if all(d.low > 0 for d in ahead.values()) else FAILS if all(d.high < 0 for d in ahead.values()) else OPEN
    sentence = (
        "On the same pairs, each at its own best learning rate, BNF's score (won on the target less lost on the others) less "
        + "; ".join(f"{arm}'s is {d.points}" for arm, d in ahead.items())
        + ". Lost on the others: "
        + ", ".join(f"{arm} {100 * value:.1f}" for arm, value in lost.items())
        + " points."
    )
    return Claim("b", "More gain for less tax than DPO, SimPO and IPO", verdict, sentence, [grid(results, "pairs")])


def supervised(results: Results) -> Claim:
    """What wrong answers add: BNF, both-sided and one-sided, beside the likelihood of right ones alone."""
    ahead = {
        (arm, recipe): difference(best(results, recipe, arm), best(results, recipe, right), results.score)
        for arm in ("bnf", "bnf_one_sided")
        for recipe, right in (("singles", RIGHT_ONLY), ("singles_3_epochs", RIGHT_ONLY), ("pairs", RIGHT_SIDES))
    }
    sentence = (
        "Each at its own best learning rate, the score less that of training on the right answers alone (RFT) is "
        + "; ".join(
            f"of {'BNF' if arm == 'bnf' else 'one-sided BNF'} {ahead[arm, 'singles'].points} after one epoch and "
            f"{ahead[arm, 'singles_3_epochs'].points} after three, on pairs (less their right sides alone) "
            f"{ahead[arm, 'pairs'].points}"
            for arm in ("bnf", "bnf_one_sided")
        )
        + "."
    )
    more = [d.verdict == "more" for d in ahead.values()]
    verdict = HOLDS if all(more) else PARTLY if any(more) else FAILS
    title = "Wrong answers add to right ones (the paper does not ask)"
    return Claim("b2", title, verdict, sentence, [grid(results, "singles")])


def sensitivity(results: Results) -> Claim:
    """The share of a method's grid (hyper-parameters and learning rates) that scores near its best cell, seed by seed."""
    rates = results.rates("hyperparameters")
    rows, shares = [], {}
    for method in ("bnf", "bnf_one_sided", "dpo", "simpo", "ipo", "kto"):
        arms = [("singles" if method == "kto" else "pairs", method), *of_hyperparameters(results, method)]
        cells = [results.of(recipe, arm, rate) for recipe, arm in arms for rate in rates]
        shares[method] = [
            near_best([results.score(run) for cell in cells for run in cell if run.seed == seed]) for seed in SEEDS
        ]
        top = max(cells, key=lambda cell: fmean(map(results.score, cell)))
        score, where = fmean(map(results.score, top)), f"`{top[0].arm}`, lr {top[0].rate:g}"
        rows.append([f"`{method}`", str(len(cells)), str(mean(shares[method])), f"{100 * score:+.1f}", where])
    ahead = {
        method: mean([x - y for x, y in zip(shares["bnf"], shares[method], strict=True)])
        for method in ("dpo", "simpo", "ipo", "kto")
    }
    sentence = (
        f"Over learning rates from {rates[0]:g} to {rates[-1]:g}, and for the others over hyper-parameters as well, the "
        "share of the other cells that score within 5 points of the best one: BNF's less "
        + "; ".join(f"{method}'s {d.points}" for method, d in ahead.items())
        + ". BNF has fewer cells to try; its learning rate matters as much as theirs."
    )
    head = ["method", "cells", "share of the others near the best", "best score (points)", "where"]
    return Claim("c", "No hyper-parameters to tune", verdict_of(ahead.values()), sentence, [table(head, rows)])


def of_hyperparameters(results: Results, objective: str) -> list[tuple[str, str]]:
    return [("hyperparameters", arm) for arm in results.arms("hyperparameters") if arm.split()[0] == objective]


def pairing(results: Results) -> Claim:
    """Table 6 of the paper: fewer pairs, and as many responses in fewer pairs."""
    rate = max(
        results.rates("pairing"),
        key=lambda r: fmean(map(results.score, results.of("pairing", "bnf pairing_ratio=1", r))),
    )  # fmt: skip
    none, all_of, half = (
        results.of("pairing", f"bnf {what}", rate) for what in ("pairing_ratio=0", "pairing_ratio=1", "dataset=half_of_pairs")
    )
    gained = mean(list(map(results.won, none)))
    more = difference(all_of, none, lambda run: run.target)
    same_size = difference(half, none, lambda run: run.target)
    verdict = HOLDS if gained.low > 0 else FAILS if gained.high < 0 else OPEN
    sentence = (
        f"With no pair at all BNF wins {gained.points} on the target (lr {rate:g}). All pairs whole against one side of each: "
        f"{more.points}, with twice the responses; half of the pairs, whole, which is as many responses in half the steps: "
        f"{same_size.points}."
    )
    return Claim("d", "No pairs are needed", verdict, sentence, [grid(results, "pairing")])


def unpaired(results: Results) -> Claim:
    """Single responses: KTO with its estimated reference point, and with it fixed at 0."""
    ahead = {
        arm: difference(best(results, "singles", "bnf"), best(results, "singles", arm), results.score)
        for arm in ("kto", "kto_fixed")
    }
    sentence = (
        "On single responses, each at its own best learning rate, BNF's score less KTO's is "
        f"{ahead['kto'].points}, less that of KTO without its KL term {ahead['kto_fixed'].points}."
    )
    return Claim("e", "Better than KTO on unpaired data", verdict_of(ahead.values()), sentence, [])


def one_side(results: Results) -> Claim:
    """One-sided less both-sided at each learning rate, in every recipe that has both."""
    rows, ahead = [], []
    for recipe in ("singles", "singles_3_epochs", "pairs", "pairs_3_epochs"):
        for rate in results.rates(recipe) if "bnf_one_sided" in results.arms(recipe) else ():
            pair = results.of(recipe, "bnf_one_sided", rate), results.of(recipe, "bnf", rate)
            target, others = (difference(*pair, value) for value in (lambda run: run.target, lambda run: run.others))
            ahead.append(difference(*pair, results.score))
            rows.append([recipe.replace("_", " "), f"{rate:g}", target.points, others.points, ahead[-1].verdict])
    more, less = (sum(d.verdict == word for d in ahead) for word in ("more", "less"))
    verdict = FAILS if more and not less else HOLDS if less and not more else OPEN
    sentence = (
        f"In {len(ahead)} settings one-sided BNF (the weight on dispreferred tokens only) scores higher in {more}, lower in "
        f"{less}, and no different in {len(ahead) - more - less}."
    )
    head = ["rows", "lr", "target, one-sided less both", "others, one-sided less both", "score of one-sided"]
    return Claim("f", "Both labels need the weight", verdict, sentence, [table(head, rows)])


def granularity(results: Results) -> Claim:
    """A weight a token (one-sided BNF, TNPO) against one a response (TOPR, NPO)."""
    found = {arm: best(results, "singles", arm) for arm in ("bnf_one_sided", "tnpo", "topr", "npo")}
    ahead = {
        pair: difference(found[pair[0]], found[pair[1]], results.score) for pair in [("bnf_one_sided", "topr"), ("tnpo", "npo")]
    }
    sentence = (
        "Each at its own best learning rate, the score with a weight a token less that with one a response: one-sided BNF less "
        f"TOPR {ahead['bnf_one_sided', 'topr'].points}, TNPO less NPO {ahead['tnpo', 'npo'].points}."
    )
    return Claim("g", "A weight for each token, not for a response", verdict_of(ahead.values()), sentence, [])


def squeezing(results: Results) -> Claim:
    """Wrong answers that the model would not give: another model's, or of another prompt."""
    rates = results.rates("negatives")
    rows = []
    for objective in ("bnf", "bnf_one_sided", "unlikelihood", "log_likelihood"):
        for source, recipe, arm in (
            ("own", "singles", objective),
            ("another model's", "negatives", f"{objective} dataset=foreign"),
            ("of another prompt", "negatives", f"{objective} dataset=unrelated"),
        ):
            rows.append([named(objective), source, *(cell(results.of(recipe, arm, rate)) for rate in rates)])

    def found(objective: str, source: str) -> list[Run]:
        return best(results, "negatives", f"{objective} dataset={source}", rates)

    def beside_own(objective: str, source: str) -> Mean:
        return difference(found(objective, source), best(results, "singles", objective, rates), results.score)

    worse = {source: beside_own("bnf_one_sided", source) for source in ("foreign", "unrelated")}
    harmed = [d.verdict == "less" for d in worse.values()]
    verdict = FAILS if all(harmed) else PARTLY if any(harmed) else HOLDS
    behind = difference(found("unlikelihood", "unrelated"), found("bnf", "unrelated"), results.score)
    sentence = (
        "At the better of two rates, one-sided BNF's score with another model's wrong answers less with its own is "
        f"{worse['foreign'].points}; with answers to another prompt, which it would never give, {worse['unrelated'].points}: "
        "pushing down what is unlikely costs. Unlikelihood, whose w is near 0 there, scores "
        f"{beside_own('unlikelihood', 'unrelated').points} with them against its own, and still {behind.points} against BNF."
    )
    head = ["objective", "wrong answers", *(f"lr {rate:g}" for rate in rates)]
    return Claim("h", "Wrong answers may come from anywhere", verdict, sentence, [table(head, rows)])


def verdict_of(differences: Iterable[Mean]) -> str:
    words = {d.verdict for d in differences}
    return HOLDS if words == {"more"} else FAILS if words == {"less"} else OPEN


def listed(rates: Sequence[float]) -> str:
    *others, last = (f"{rate:g}" for rate in rates) if rates else ("none",)
    return f"{', '.join(others)} and {last}" if others else last


CLAIMS = (collapse, frontier, supervised, sensitivity, pairing, unpaired, one_side, granularity, squeezing)


def page(results: Results) -> str:
    """All of it: contradictions of the paper first."""
    order = {FAILS: 0, OPEN: 1, PARTLY: 1, HOLDS: 2}
    claims = sorted((claim(results) for claim in CLAIMS), key=lambda claim: order[claim.verdict])
    start = {group: results.start(group) for group in ("target", "others")}
    head = (
        "# The claims in the small worlds\n\nWritten by `python proofs/experiments/claims.py --write` from `results/`; the "
        "recipes are the YAML files beside it.\n"
        + (__doc__ or "").split("\n\n", 2)[2].replace("\n", " ").strip()
        + " Cells of grids: "
        "target, with half the width of its interval, / others, in percent.\n\n"
        f"Before training: target {start['target']}, others {start['others']}; {len(SEEDS)} worlds, "
        f"{len(results.runs):,} runs.\n\n"
    )
    summary = table(["claim", "verdict"], [[f"({c.letter}) {c.title}", f"**{c.verdict}.** {c.sentence}"] for c in claims])
    all_best = bests(results, ("singles", "pairs", "singles_3_epochs", "pairs_3_epochs"))
    more = [f"## Every loss at its best learning rate\n\n{all_best}", f"## Three epochs\n\n{grid(results, 'singles_3_epochs')}",
            grid(results, "pairs_3_epochs")]  # fmt: skip
    return head + summary.replace(" ---: |", " --- |") + "\n" + "\n".join(map(str, [*claims, *more]))


# --- the figure --------------------------------------------------------------------------------------------------------------

LINES: dict[tuple[str, str], tuple[str, str]] = {  # recipe, arm: colour, line
    ("singles", "bnf"): ("#c1272d", "-"),
    ("singles", "bnf_one_sided"): ("#c1272d", "--"),
    ("singles", RIGHT_ONLY): ("0.35", "-"),
    ("singles", "topr"): ("#7b3294", "-"),
    ("singles", "kto"): ("#008837", "-"),
    ("singles", "log_likelihood"): ("0.35", ":"),
    ("pairs", "dpo"): ("#0571b0", "-"),
    ("pairs", "ipo"): ("#0571b0", "--"),
    ("pairs", "simpo"): ("#e08214", "-"),
}


def figure(results: Results) -> Figure:
    """Right answers against the learning rate, of the target and of the other tasks."""
    drawn = Figure(figsize=(10.5, 4.4), layout="constrained")
    for axis, group in zip(drawn.subplots(1, 2, sharey=True), ("target", "others"), strict=True):
        for (recipe, arm), (color, style) in LINES.items():
            rates = results.rates(recipe)
            means = [mean([getattr(run, group) for run in results.of(recipe, arm, rate)]) for rate in rates]
            label = SHOWN.get(arm, arm) + (", pairs" if recipe == "pairs" else "")
            axis.plot(rates, [m.value for m in means], style, marker=".", color=color, lw=1.6, label=label)
            axis.fill_between(rates, [m.low for m in means], [m.high for m in means], color=color, alpha=0.1, lw=0)
        axis.axhline(results.start(group).value, color="0.6", lw=1, ls=(0, (1, 3)))
        axis.set(xscale="log", xlabel="learning rate", ylim=(0, 1), title=f"Right answers: {TITLES[group]}")
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.grid(alpha=0.3)
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    return drawn


TITLES = {"target": "the tasks that the rows are about (gain)", "others": "all other tasks (tax)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="RESULTS.md and frontier.png, beside this file")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="first take the results from FOLDER/RECIPE/compare.json")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect)
    results = Results()
    if args.write:
        (HERE / "RESULTS.md").write_text(page(results), encoding="utf-8")
        figure(results).savefig(HERE / "frontier.png", dpi=110)
    else:
        print(page(results), end="")


if __name__ == "__main__":
    main()
