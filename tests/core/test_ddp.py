"""Under DistributedDataParallel: two processes (gloo) with half of the tokens each end with one process's gradients.

`python test_ddp.py RANK FOLDER` is one of the two.
"""

import sys
from datetime import timedelta
from pathlib import Path

import children
import pytest
import torch
import torch.distributed as dist
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


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)  # a file: no port that another program could take first
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=10))
    half = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    for one_pass in (True, False):
        model, inputs = problem(one_pass)
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(*(x[half] for x in inputs)).backward()
        if rank == 0:
            torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"{one_pass}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both problems' gradients: the processes take longer to start than to compute."""
    folder = tmp_path_factory.mktemp("ddp")
    children.together([(__file__, str(rank), str(folder)) for rank in range(2)])
    return folder


@pytest.mark.parametrize("one_pass", [True, False], ids=["linear_bnf_loss", "linear_log_odds"])
def test_two_processes_have_the_gradients_of_one(one_pass: bool, gradients_of_two: Path) -> None:
    model, inputs = problem(one_pass)
    model(*inputs).backward()
    found = torch.load(gradients_of_two / f"{one_pass}.pt")
    assert len(found) == 4
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
