"""Time and peak memory of the log-odds head, forward and backward, against the bare matrix products of its shape.

    python -m bnf_core.benchmark                                   # SmolLM2's head on a CPU, Llama-3's and Gemma-2's on a GPU
    python -m bnf_core.benchmark --shape 2048x576x49152 --dtype autocast --repeats 7
    python -m bnf_core.benchmark --roofline h100                   # needs no GPU: an estimate from what the code does

--dtype autocast is mixed precision as in training: a float32 weight under bf16 autocast. With a bf16 weight dweight is
bf16 too, but summed in float32, which the column of extra memory shows.

Every candidate runs in the same process, in turn (A B C A B C ...), so that a machine that changes its speed changes it
for all; the table has medians with their spread. Memory is what a call holds at its peak beyond its inputs, dhidden and
dweight. The heads of others (bnf_core/benchmark_peers.py) are measured where they are installed and the device can, and
have a line that says why where not; --check compares their gradients with full logits first.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnf_core.batch import TokenBatch
from bnf_core.benchmark_peers import about, check, peers, reason, wrong
from bnf_core.fused import linear_bnf_loss
from bnf_core.head import IMPLEMENTATIONS, linear_log_odds, triton_runs_on
from bnf_core.objectives import bnf
from bnf_core.roofline import DEVICES, SHAPES
from bnf_core.roofline import table as roofline

CPU_SHAPES = ["2048x576x49152", "1024x2048x128256"]
GPU_SHAPES = ["8192x4096x128256", "8192x3584x256000", "32768x4096x128256"]
CHECKED_SHAPE = "8192x128x1024"  # more tokens than anyone's chunk
Step = Callable[[], object]


class Problem:
    """Hidden states, weight and what else a head is given, with gradients wanted."""

    def __init__(self, shape: str, precision: str, device: str) -> None:
        self.autocast = precision == "autocast"
        dtype = torch.bfloat16 if self.autocast else getattr(torch, precision)
        self.tokens, self.dim, self.vocab = (int(n) for n in shape.split("x"))
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"device": device, "generator": generator}
        self.hidden = torch.randn(self.tokens, self.dim, **options).to(dtype).requires_grad_()
        self.weight = torch.randn(self.vocab, self.dim, **options).mul_(self.dim**-0.5)
        self.weight = self.weight.to(torch.float32 if self.autocast else dtype).requires_grad_()
        self.labels = torch.randint(self.vocab, (self.tokens,), **options)
        self.ref_log_odds = torch.randn(self.tokens, **options) - 10
        self.coefficient = torch.full((self.tokens,), 1 / self.tokens, device=device)

    def backward(self, loss: Callable[[], Tensor]) -> None:
        self.hidden.grad = self.weight.grad = None
        with torch.autocast(self.hidden.device.type, torch.bfloat16, enabled=self.autocast):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]


def candidates(p: Problem) -> dict[str, Step | str]:
    """What can run here, by name, and why a peer cannot. All but the first give a loss and its gradients in hidden, weight."""
    found: dict[str, Step | str] = {"bare products": _bare(p)}

    def add(name: str, loss: Callable[[], Tensor]) -> None:
        found[name] = lambda: p.backward(loss)

    add("cross-entropy on full logits", lambda: F.cross_entropy(F.linear(p.hidden, p.weight).float(), p.labels))
    for name in IMPLEMENTATIONS:
        if name == "triton" and not triton_runs_on(p.hidden.device):
            continue
        add(f"linear_bnf_loss, {name}", functools.partial(_one_pass, p, name))
        if name in ("chunked", "compiled") and p.hidden.dtype == torch.bfloat16 and not p.hidden.is_cuda:
            add(f"linear_bnf_loss, {name}, rounded", functools.partial(_one_pass, p, name, exact=False))
        if name != "naive":
            add(f"linear_log_odds, {name}", functools.partial(_two_steps, p, name))
    for name, loss in peers(p).items():
        if isinstance(loss, str):
            found[name] = loss
        else:
            add(name, loss)
    return found


def _one_pass(p: Problem, implementation: str, exact: bool = True) -> Tensor:
    options: dict[str, Any] = {"implementation": implementation, "exact": exact}
    return linear_bnf_loss(p.hidden, p.weight, p.labels, p.ref_log_odds, p.coefficient, **options)[0]


def _bare(p: Problem) -> Step:
    hidden, weight = p.hidden.detach(), p.weight.detach().to(p.hidden.dtype)
    logits = torch.empty(p.tokens, p.vocab, dtype=hidden.dtype, device=hidden.device)

    def products() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)

    return products


def _two_steps(p: Problem, implementation: str) -> Tensor:
    """As a sequence-level objective does it: log-odds first, the loss later."""
    log_odds, entropy = linear_log_odds(p.hidden, p.weight, p.labels, implementation=implementation)
    one = torch.zeros_like(p.labels)
    batch = TokenBatch(one, one[:1] == 0, ref_log_odds=p.ref_log_odds, entropy=entropy)
    return bnf(log_odds, batch).mean()


def timed(step: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    else:
        _trim()  # nobody inherits pages, or a fragmented heap, from the one before
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(step: Step, p: Problem) -> float:
    """Bytes held at the peak of a call beyond its inputs, dhidden and dweight."""
    p.hidden.grad = p.weight.grad = None
    gc.collect()
    if p.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        _trim()
        with _resident() as sample:
            step()
        peak = sample["peak"] - sample["before"]
    gradients = sum(x.numel() * x.element_size() for x in (p.hidden, p.weight))
    return float(max(peak - gradients, 0))


def _trim() -> None:
    """Freed memory goes back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def _resident() -> Iterator[dict[str, int]]:
    """Largest resident memory of this process meanwhile, sampled every millisecond (Linux)."""
    page = 4096
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield {"before": 0, "peak": 0}
        return

    def read() -> int:
        return int(statm.read_text().split()[1]) * page

    sample = {"before": read(), "peak": 0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            sample["peak"] = max(sample["peak"], read())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sample
    finally:
        stop.set()
        thread.join()


def measure(shape: str, precision: str, device: str, repeats: int, only: str, checked: bool = False) -> list[dict[str, Any]]:
    """One row per candidate: median seconds, spread, ratio to the bare products, extra memory; or why it did not run."""
    p = Problem(shape, precision, device)
    found = {name: step for name, step in candidates(p).items() if only in name or name == "bare products"}
    steps = {name: step for name, step in found.items() if not isinstance(step, str)}
    failed = {name: why for name, why in found.items() if isinstance(why, str)}
    errors = check(Problem(CHECKED_SHAPE, precision, device)) if checked else {}
    failed |= {name: why for name in steps if name in errors and (why := wrong(errors[name], p.hidden.dtype))}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            if name not in failed:
                try:
                    seconds = timed(step, device)
                except Exception as error:  # a candidate that cannot is a row that says so
                    failed[name] = reason(error)
                else:
                    times[name] += [seconds] if turn else []  # the first turn warms up
    rows = []
    bare = statistics.median(times["bare products"])
    for name in found:
        row: dict[str, Any] = {"shape": shape, "dtype": precision, "device": device, "name": name}
        if name in failed:
            row["failed"] = failed[name]
        else:
            median = statistics.median(times[name])
            row |= {"seconds": median, "fastest": min(times[name]), "slowest": max(times[name]), "ratio": median / bare}
            row["extra_mib"] = None if name == "bare products" else peak_memory(steps[name], p) / 2**20
            row |= about(name) | ({"errors": errors[name]} if name in errors else {})
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in rows):
        lines.append(f"\ntokens x dim x vocab = {shape}, {dtype}")
        lines.append(f"{'':38}{'seconds':>9}{'(spread)':>18}{'ratio':>8}{'extra MiB':>11}")
        for row in rows:
            if (row["shape"], row["dtype"]) == (shape, dtype):
                if "failed" in row:
                    lines.append(f"{row['name']:38} did not run: {row['failed']}")
                    continue
                spread = f"({row['fastest']:.3f}-{row['slowest']:.3f})"
                extra = "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
                errors = ", ".join(f"{key} {error:.0e}" for key, error in row.get("errors", {}).items())
                line = f"{row['name']:38}{row['seconds']:9.3f}{spread:>18}{row['ratio']:8.2f}{extra:>11}"
                lines.append(line + (f"   errors: {errors}" if errors else ""))
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratio to the bare products, a bar per candidate. Needs matplotlib (the `train` extra)."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    shown = [row for row in rows if "ratio" in row and row["name"] != "bare products"]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(shown) + 1.2), layout="constrained")
    names = [f"{row['name']}\n{row['shape']} {row['dtype']}" for row in shown]
    axis.barh(range(len(shown)), [row["ratio"] for row in shown])
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(shown)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="time, bare matrix products = 1")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bnf_core.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shape", action="append", help="TOKENSxDIMxVOCAB, repeatable; default: by device")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16", "autocast"], help="repeatable")
    parser.add_argument("--device", default=device, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each, after one to warm up")
    parser.add_argument("--only", default="", help="only candidates whose name contains this")
    parser.add_argument("--check", action="store_true", help="errors of the peers' gradients, on a small shape, beforehand")
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="writes OUTPUT.json and OUTPUT.png")
    parser.add_argument(
        "--roofline", choices=DEVICES, help="no run: what the heads of SHAPES would take there (bnf_core/roofline.py)"
    )
    options = parser.parse_args(arguments)
    if options.roofline:
        for name, recompute in itertools.product(SHAPES, (False, True)):
            print(roofline(name, options.roofline, recompute=recompute))
        return
    rows = []
    processor = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {processor}, {torch.get_num_threads()} threads")
    for shape in options.shape or (GPU_SHAPES if options.device == "cuda" else CPU_SHAPES):
        for name in options.dtype or (["bfloat16"] if options.device == "cuda" else ["float32", "bfloat16"]):
            measured = measure(shape, name, options.device, options.repeats, options.only, options.check)
            print(table(measured), flush=True)
            rows += measured
    options.output.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    try:
        plot(rows, options.output.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")
    else:
        print(f"\nwrote {options.output.with_suffix('.json')} and {options.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
