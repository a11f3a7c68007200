"""What log-odds keep of their digits when they are made of log-probabilities: l = log pi - log(1 - pi).

Where pi rounds to 1, log(1 - pi) is lost. The error of l, in nats, is the relative error of the weight w = e^(l - l_ref).
Medians over random logits whose target has the wanted 1 - pi, against l in float64 from the same logits; prints the table.

    python proofs/plot_digits.py [digits.png]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from bnf_core import token_log_odds

MISSES = (0.5, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6)  # 1 - pi


def log_odds(log_probability: Tensor) -> Tensor:
    """l of log pi, (tokens,), in float64; a log pi that was rounded to above 0 is taken as 0, and l as infinite."""
    logp = log_probability.double().clamp(max=0)
    return logp - (-logp.expm1()).log()


def errors(miss: float, tokens: int, vocab: int) -> dict[str, float]:
    """The median error of l, in nats, of each way to it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocab, dtype=torch.float64, generator=generator) * 3 + 5
    target = torch.zeros(tokens, dtype=torch.long)
    logits[:, 0] = logits[:, 1:].logsumexp(1) + torch.tensor(1 / miss - 1, dtype=torch.float64).log()
    logits = logits.float()
    exact, _ = token_log_odds(logits.double(), target)
    of_rounded, _ = token_log_odds(logits.bfloat16().double(), target)
    logp = logits.double().log_softmax(1)[:, 0]
    ways = {
        "logits - logsumexp, float32": (log_odds(logits[:, 0] - logits.logsumexp(1)), exact),
        "log_softmax, float32": (log_odds(logits.log_softmax(1)[:, 0]), exact),
        "rounded to bf16": (log_odds(logp.bfloat16()), exact),
        "computed in bf16": (log_odds(logits.bfloat16().log_softmax(1)[:, 0]), of_rounded),
        "token_log_odds, float32": (token_log_odds(logits, target)[0].double(), exact),
    }
    return {name: float((found - wanted).abs().median()) for name, (found, wanted) in ways.items()}


def draw(path: Path, tokens: int = 200, vocab: int = 32_768) -> dict[float, dict[str, float]]:
    """Writes the figure; the median errors for each of MISSES. Infinite ones are left out of the lines."""
    found = {miss: errors(miss, tokens, vocab) for miss in MISSES}
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in found[MISSES[0]]:
        axes.plot(MISSES, [of[name] for of in found.values()], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="1 - pi", ylabel="median error of l (nats)")
    axes.legend(fontsize="small", loc=(0.05, 0.15))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("digits.png")
    table = draw(path)
    print(" | ".join(["1 - pi", *table[MISSES[0]]]))
    for miss, of in table.items():
        print(" | ".join([f"{miss:g}", *(f"{error:.0e}" for error in of.values())]))
    print(f"wrote {path}")
