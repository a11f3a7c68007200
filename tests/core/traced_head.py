"""The head under torch.compile and torch.export, each function a check. Run by test_head_faults.py in a process of its own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bnf_core import linear_bnf_loss, linear_log_odds, linear_token_loss
from bnf_core.head.autograd import log_odds_op, token_loss_op

TOKENS, DIM, VOCAB = 7, 5, 11


def nll(log_odds: Tensor) -> Tensor:
    return -F.logsigmoid(log_odds)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(TOKENS, DIM), torch.randn(VOCAB, DIM), torch.randn(VOCAB)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), torch.randint(VOCAB, (TOKENS,))


def _takes(implementation: str) -> None:
    """fullgraph=True: value and gradients as without, through BNF in one pass and through linear_log_odds."""
    *leaves, labels = inputs()
    ref = torch.zeros(TOKENS)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        arguments = hidden * 2, weight, labels
        loss, _, _ = linear_bnf_loss(*arguments, ref, ref + 0.1, bias=bias, implementation=implementation)
        return loss + nll(linear_log_odds(*arguments, bias=bias, implementation=implementation)[0]).sum()

    expected = step(*leaves)
    gradients = torch.autograd.grad(expected, leaves)
    assert all(gradient.any() for gradient in gradients)
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(traced, expected)
    for ours, theirs in zip(torch.autograd.grad(traced, leaves), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def compiled() -> None:
    _takes("auto")


def compiled_naive() -> None:
    _takes("naive")


def exported() -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(VOCAB, DIM))

        def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
            return linear_log_odds(hidden, self.weight, labels)[0]

    hidden, *_, labels = inputs()
    head = Head()
    program = torch.export.export(head, (hidden, labels))
    torch.testing.assert_close(program.module()(hidden, labels), head(hidden, labels))


def broken_at_a_closure() -> None:
    hidden, weight, _, labels = inputs()

    def step(hidden: Tensor) -> Tensor:
        return linear_token_loss(hidden, weight, labels, nll)[0]

    torch.testing.assert_close(torch.compile(step, backend="eager")(hidden), step(hidden))
    torch.compiler.reset()
    message = ""
    try:
        torch.compile(step, backend="eager", fullgraph=True)(hidden)
    except Exception as error:
        message = str(error)
    assert "calls a function of yours" in message, message


def library_rules() -> None:
    hidden, weight, bias, labels = inputs()
    options = None, 1.0, torch.float32, None, True, "chunked"
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(log_odds_op, (hidden, weight, labels, bias, *options), test_utils=tests)
    more = [torch.zeros(TOKENS), torch.ones(TOKENS)], "bnf", *options, [True, True, True]
    torch.library.opcheck(token_loss_op, (hidden, weight, labels, bias, *more), test_utils=("test_schema", "test_faketensor"))


if __name__ == "__main__":
    checks: list[Callable[[], None]] = [compiled, compiled_naive, exported, broken_at_a_closure, library_rules]
    for check in checks:
        check()
        print(check.__name__, flush=True)
