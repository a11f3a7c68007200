"""Under DistributedDataParallel: two processes (gloo) with half of the tokens each end with one process's gradients."""

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bnf_core import TokenBatch, bnf, linear_bnf_loss, linear_log_odds

TOKENS, DIM, VOCAB = 12, 8, 50


class Model(nn.Module):
    def __init__(self, one_pass: bool) -> None:
        super().__init__()
        self.body, self.head, self.one_pass = nn.Linear(DIM, DIM), nn.Linear(DIM, VOCAB), one_pass

    def forward(self, x: Tensor, labels: Tensor, ref_log_odds: Tensor) -> Tensor:
        """Mean over two processes of what this returns is the mean over all tokens."""
        hidden, options = self.body(x), {"bias": self.head.bias, "implementation": "chunked", "chunk_size": 4}
        if self.one_pass:
            coefficient = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
            return linear_bnf_loss(hidden, self.head.weight, labels, ref_log_odds, coefficient, **options)[0]
        log_odds, entropy = linear_log_odds(hidden, self.head.weight, labels, **options)
        batch = TokenBatch(torch.zeros_like(labels), torch.tensor([True]), ref_log_odds=ref_log_odds, entropy=entropy)
        return bnf(log_odds, batch).mean()


def problem(one_pass: bool) -> tuple[Model, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Model(one_pass).double()
    return model, (torch.randn(TOKENS, DIM).double(), torch.randint(VOCAB, (TOKENS,)), torch.randn(TOKENS).double() - 3)


def worker(rank: int, port: int, one_pass: bool, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, inputs = problem(one_pass)
    half = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(*(x[half] for x in inputs)).backward()
    if rank == 0:
        results.update({name: p.grad.numpy() for name, p in model.named_parameters()})
    dist.destroy_process_group()


@pytest.mark.parametrize("one_pass", [True, False], ids=["linear_bnf_loss", "linear_log_odds"])
def test_two_processes_have_the_gradients_of_one(one_pass: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (port, one_pass, results), nprocs=2)
        model, inputs = problem(one_pass)
        model(*inputs).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(torch.from_numpy(results[name]), parameter.grad)
