"""Every metric of a run: one row of METRICS says how it is computed and where it is shown.

To add a metric, add a row. The trainer (training log, held-out evaluation), the report, the model card, the table in the
terminal and `bnf_train.compare` read the rows; none of them has a list of metrics of its own.

A metric is a numerator divided by a denominator. Both are sums over responses, so micro-batches and processes add up:

    micro-batch --quantity--> a number per response --over--> numerator, denominator --sum over processes--> value
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import EvalPrediction

from bnf_train.training.quantities import (
    ExpQuantile,
    Fraction,
    Over,
    Quantity,
    Responses,
    clipped,
    entropy,
    fallen,
    log_ratio,
    logp,
    logp_shift,
    loss,
    losses,
    paired,
    pairs_won,
    pairs_won_per_token,
    per_loss,
    per_pair,
    per_response,
    per_token,
    responses,
    tokens,
    total,
    weight,
)

LABELS = ("preferred", "dispreferred")
SIDES = {"preferred": "chosen", "dispreferred": "rejected"}  # the names that users of TRL know
EVAL = "eval_"  # transformers puts it before the name of a held-out metric


@dataclass(frozen=True)
class Panel:
    """A plot of report.html, against optimizer steps. Metrics with the same panel share it.

    Attributes:
      main: place from the left in metrics.png; 0: not in it.
      log: logarithmic axis.
      axis: its label; None: the unit of the panel's first metric.
    """

    title: str
    main: int = 0
    log: bool = False
    axis: str | None = None


@dataclass(frozen=True)
class Shown:
    """How a metric is written in a table. "{label}" in `name` makes one entry per label; without it, the preferred one's.

    Attributes:
      form: as for `format`.
      brief: where there is a short table beside the long one, in that, too.
    """

    name: str
    form: str
    brief: bool = False


@dataclass(frozen=True)
class Metric:
    """One row of METRICS.

    Attributes:
      name: key in the log; with "{label}" or "{side}", one key per label (preferred, or chosen as in TRL).
      quantity: what is summed; None: somebody else puts it into the log, and it is only shown from here.
      over: what it is averaged over.
      unit: of the value.
      times_beta: the value is multiplied by the objective's beta.
      training: logged while training.
      held_out: computed by evaluations, with "eval_" before its name.
      panel: the plot it is drawn in, from the training log if it is there, else from the evaluations.
      line: its name in a plot, where labels do not name its lines.
      band: it is no line but an edge of the band around its panel's lines; the lower edge is the first such row.
      terminal: column of the table in the terminal, and its entry in the model card's metadata.
      result: row of the result table of report.html and of the model card.
      tile: large number at the top of report.html; a metric of the training log is shown by its median.
      compare: column of `bnf_train.compare`; brief: in the terminal, too.
    """

    name: str
    quantity: Quantity | None = None
    over: Over | None = None
    unit: str = ""
    times_beta: bool = False
    training: bool = False
    held_out: bool = False
    panel: Panel | None = None
    line: str = "training"
    band: bool = False
    terminal: Shown | None = None
    result: Shown | None = None
    tile: Shown | None = None
    compare: Shown | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """One key for each of these."""
        return LABELS if "{" in self.name else ("",)

    def key(self, label: str = "", held_out: bool = False) -> str:
        """The key in the log; `held_out`: the key of an evaluation."""
        return EVAL * held_out + self.name.format(label=label, side=SIDES.get(label, ""))

    def fraction(self, of: Responses) -> Fraction:
        """Numerator and denominator."""
        assert self.quantity is not None
        assert self.over is not None
        return self.over(of, self.quantity)

    def entries(self, shown: Shown) -> Iterator[tuple[str, str]]:
        """(what it is called, key of the last evaluation, or of the log where evaluations have none) for a table."""
        for label in self.labels if "{label}" in shown.name else self.labels[:1]:
            yield shown.name.format(label=label), self.key(label, self.held_out)


LOSS = Panel("Loss (eq. 4)", main=1)
RATIO = Panel("Likelihood ratio π / π_ref", log=True, axis="median, 10 to 90 %")
REWARDS = Panel("Rewards")
SPEED = Panel("Speed")

# rows are shown in this order
METRICS: tuple[Metric, ...] = (
    Metric("loss", unit="nats", training=True, panel=LOSS),  # transformers logs it
    Metric("loss", loss, per_loss, unit="nats", held_out=True, panel=LOSS, line="held out"),
    Metric(
        "responses/{label}", responses, total, held_out=True,
        terminal=Shown("responses", ".0f"), result=Shown("responses", ",.0f"),
    ),
    Metric("tokens/{label}", tokens, total, held_out=True, result=Shown("tokens", ",.0f")),
    Metric(
        "logp_per_token/{label}", logp, per_token, unit="nats per token", held_out=True,
        result=Shown("nats per token, after", ".4f"),
    ),
    Metric(
        "logp_shift_per_token/{label}", logp_shift, per_token, unit="nats per token", held_out=True,
        panel=Panel("Held-out log-likelihood shift", main=3),
        terminal=Shown("log-likelihood shift per token (nats)", "+.4f"),
        result=Shown("shift, nats per token", "+.4f"),
        tile=Shown("held-out shift, {label}, nats per token", "+.3f"),
        compare=Shown("shift per token, {label} (nats)", "+.3f", brief=True),
    ),
    Metric(
        "logp_shift/{label}", logp_shift, per_response, unit="nats", held_out=True,
        compare=Shown("shift per response, {label} (nats)", "+.1f"),
    ),
    Metric(
        "bnf/weight_mean/{label}", weight, per_token, training=True, held_out=True,
        panel=Panel("Mean token weight w", main=2),
        terminal=Shown("mean token weight w", ".4f"), result=Shown("mean token weight w", ".4f"),
    ),
    Metric(
        "bnf/weight_clipped/{label}", clipped, per_token, training=True, held_out=True,
        panel=Panel("Share of tokens clipped"),
        terminal=Shown("tokens clipped", ".1%"), result=Shown("tokens clipped (above π_ref)", ".1%"),
    ),
    Metric(
        "displacement/{label}", fallen, per_token, held_out=True,
        panel=Panel("Held-out tokens whose likelihood fell", axis="share"),
        terminal=Shown("tokens fallen", ".1%"), result=Shown("tokens fallen (below π_ref)", ".1%"),
        compare=Shown("tokens fallen, {label}", ".1%"),
    ),
    Metric("bnf/ratio_q10/{label}", log_ratio, ExpQuantile(0.1), training=True, panel=RATIO, band=True),
    Metric("bnf/ratio_q50/{label}", log_ratio, ExpQuantile(0.5), training=True, panel=RATIO),
    Metric("bnf/ratio_q90/{label}", log_ratio, ExpQuantile(0.9), training=True, panel=RATIO, band=True),
    Metric(
        "rewards/{side}", logp_shift, per_response, unit="β · nats", times_beta=True, training=True, held_out=True,
        panel=REWARDS,
    ),
    Metric("logps/{side}", logp, per_response, unit="nats", training=True),
    Metric(
        "rewards/accuracies", logp_shift, pairs_won, training=True, held_out=True,
        panel=Panel("Reward accuracy"),
        tile=Shown("held-out reward accuracy", ".1%"),
        compare=Shown("pairs with a positive margin", ".3f", brief=True),
    ),
    Metric(
        "rewards/margins", logp_shift, per_pair, unit="β · nats", times_beta=True, training=True, held_out=True,
        panel=REWARDS, line="margin",
        compare=Shown("margin (nats, times beta)", ".2f"),
    ),
    Metric(
        "ranked_right", logp, pairs_won_per_token, held_out=True,
        compare=Shown("preferred more likely per token", ".3f"),
    ),
    Metric("probe_perplexity", compare=Shown("probe perplexity", ".4g", brief=True)),  # bnf_train.compare measures it
    Metric(
        "entropy/{label}", entropy, per_token, unit="nats per token", held_out=True,
        compare=Shown("entropy, preferred (nats)", ".3f"),
    ),
    # by transformers
    Metric("learning_rate", training=True, panel=Panel("Learning rate")),
    Metric("grad_norm", training=True, panel=Panel("Gradient norm")),
    # by the trainer: tokens of responses, each with its prompt, over all processes; mean |w - 1| before the first step; see
    # WeightsMoved
    Metric(
        "tokens_per_second", unit="tokens per second", training=True,
        panel=SPEED, line="tokens", tile=Shown("training tokens per second", ",.0f"),
    ),
    # a prompt that responses share is computed once
    Metric("positions_per_second", unit="tokens per second", training=True, panel=SPEED, line="positions computed"),
    # KTO's reference point in the last step, an estimate of KL(policy, reference), and what TRL calls it
    Metric("kl", unit="nats", training=True, panel=Panel("KL estimate z0")),
    Metric("bnf/start_weight_error", training=True),
    Metric("bnf/weights_moved", training=True),
)  # fmt: skip


def shown(place: str) -> Iterator[tuple[Metric, Shown]]:
    """The rows that are shown in `place` ("terminal", "result", "tile", "compare"), in their order."""
    for metric in METRICS:
        if (entry := getattr(metric, place)) is not None:
            yield metric, entry


# --- from a micro-batch to the log ---------------------------------------------------------------------------------------


def quantities() -> tuple[list[Quantity], list[Quantity]]:
    """Those that METRICS names: kept as a sum per response (with the denominators), and as a value per token."""
    named = [(m.quantity, isinstance(m.over, ExpQuantile)) for m in METRICS if m.quantity is not None]
    summed = [responses, tokens, losses, paired, *(quantity for quantity, of_tokens in named if not of_tokens)]
    return list(dict.fromkeys(summed)), list(dict.fromkeys(quantity for quantity, of_tokens in named if of_tokens))


def values(
    of: Responses, *, held_out: bool = False, beta: float = 1.0, reduce: Callable[[Tensor], Tensor] = lambda sums: sums
) -> dict[str, float]:
    """The metrics of these responses, by key; without those whose denominator is 0, as for a label without a response.

    Args:
      held_out: those of an evaluation; else those of the training log.
      beta: the objective's.
      reduce: adds a tensor up over processes.
    """
    by_label = {"": of} | {label: of.of(label == "preferred") for label in LABELS}
    rows = [m for m in METRICS if m.quantity is not None and (m.held_out if held_out else m.training)]
    named = [(metric, label) for metric in rows for label in metric.labels]
    fractions = torch.stack([torch.stack(metric.fraction(by_label[label])) for metric, label in named])
    result: dict[str, float] = {}
    for (metric, label), (numerator, denominator) in zip(named, reduce(fractions).tolist(), strict=True):
        if denominator and metric.over is total:
            result[metric.key(label)] = int(numerator)
        elif denominator:
            result[metric.key(label)] = (beta if metric.times_beta else 1) * numerator / denominator
    return result


# --- evaluations: what processes gather has one line per row of the data -------------------------------------------------


def by_row(of: Responses, row: Tensor) -> Tensor:
    """(rows, most responses of a row, 1 + sums): label and sums of each row's responses; 0 where it has fewer.

    Args:
      row: (responses,) index of each response's row, in order.
    """
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)  # in its row
    table = of.sums.new_zeros(int(row[-1]) + 1, int(place.max()) + 1, 1 + of.sums.shape[1])
    table[row, place] = torch.cat([of.preferred.to(of.sums.dtype).unsqueeze(1), of.sums], dim=1)
    return table


def held_out_values(prediction: EvalPrediction, beta: float = 1.0) -> dict[str, float]:
    """The metrics of an evaluation, from tables of `by_row` as its "predictions"."""
    summed, _ = quantities()
    table = torch.as_tensor(prediction.predictions).double()
    found = table[table[..., 1 + summed.index(responses)] > 0]  # tables of other batches fill it up with -100
    preferred, sums = found[:, 0] > 0, found[:, 1:]
    no_tokens = torch.empty(0, 0), torch.empty(0, dtype=torch.bool)  # only sums were gathered
    return values(Responses(summed, sums, preferred, (), *no_tokens), held_out=True, beta=beta)
