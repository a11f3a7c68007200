"""What the proofs share: how a claim is stated and checked, and how a small vocabulary is written in SymPy."""

from collections.abc import Callable

import sympy as sp


def prove(claim: str, how: str, *differences: sp.Expr) -> None:
    """Print the claim and how it was proved; every difference of its two sides must simplify to 0.

    Raises:
      AssertionError: SymPy does not find 0. Nothing here is confirmed by numbers.
    """
    for difference in differences:
        rest = sp.simplify(difference)
        assert rest == 0, f"not proved: {claim}: {rest} is left"
    print(f"proved: {claim}\n        {how}")


def vocabulary(size: int) -> tuple[list[sp.Symbol], list[sp.Expr]]:
    """Logits z_0, ..., z_{size-1} as real symbols, and their softmax. The target is token 0."""
    z = list(sp.symbols(f"z0:{size}", real=True))
    total = sum(sp.exp(x) for x in z)
    return z, [sp.exp(x) / total for x in z]


def for_each_size(check: Callable[[int], None], sizes: range = range(2, 7)) -> None:
    for size in sizes:
        check(size)


def sigmoid(x: sp.Expr) -> sp.Expr:
    return 1 / (1 + sp.exp(-x))
