"""What the head would take on a GPU, counted from what its code does: `python -m bnf_core.benchmark --roofline h100`.

The loop runs as it stands, on meta tensors, which have shapes and no numbers. Every operation, product and kernel that it
makes is recorded with the bytes it reads and writes. A step takes the longest of three times:

    operations / (operations per second),     bytes / (bytes per second),     the shortest time of a kernel.

It is an estimate: an upper bound of what this code can reach, not a measurement. Left out are what a kernel computes between
reading and writing, the last wave of a product that does not fill the device, and how fast the host launches. "From HBM" has
every byte from the device's memory; "with L2" reads a tensor from the L2 cache where the step before wrote it and it fills
no more than half of that. Reading a number back (a check on each chunk) is a step of its own.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnf_core.fused import BNF_LOSS
from bnf_core.head.chunked import log_odds_backward, log_odds_forward, one_pass
from bnf_core.head.layout import layout
from bnf_core.head.transform import HeadOptions

__all__ = ["DEVICES", "Estimate", "estimate", "table"]


class Device(NamedTuple):
    """Datasheets, but for products, of which 80 % of the datasheet's dense peak are counted, and the L2 cache's speed."""

    hbm: float  # bytes per second
    l2: float  # bytes per second; measured by others, not published
    l2_bytes: float
    bf16: float  # operations per second
    tf32: float
    float32: float
    kernel: float = 2.5e-6  # seconds of the smallest kernel
    look: float = 10e-6  # seconds that the device waits while the host reads a number


DEVICES = {
    "a100": Device(2.04e12, 4.0e12, 40e6, 250e12, 125e12, 19.5e12),
    "h100": Device(3.35e12, 5.5e12, 50e6, 790e12, 395e12, 60e12),
    "h200": Device(4.8e12, 5.5e12, 50e6, 790e12, 395e12, 60e12),
    "b200": Device(8.0e12, 10e12, 126e6, 1800e12, 900e12, 70e12),
}
# heads whose figures are of interest: tokens, dim, vocab, softcap, bias
SHAPES: dict[str, tuple[int, int, int, float | None, bool]] = {
    "Llama-3-8B": (8192, 4096, 128256, None, False),
    "Gemma-2-9B": (8192, 3584, 256000, 30.0, False),
    "SmolLM2-135M": (2048, 576, 49152, None, False),
    "GPT-2": (2048, 768, 50257, None, False),
}
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias"}  # allocate or rename
OVERWRITES = {"copy_", "zero_", "fill_"}  # do not read what they write to
ROWS_ONLY = {"index_select", "index", "gather", "scatter_", "index_add_", "index_copy_", "index_put_"}  # touch some rows


class Step(NamedTuple):
    name: str
    flops: float
    dtype: torch.dtype  # of a product's operands
    reads: tuple[tuple[tuple[int, int, int], int], ...]  # (which view, bytes)
    writes: tuple[tuple[tuple[int, int, int], int], ...]


@dataclass
class Recorder(TorchDispatchMode):
    """Steps in their order, and the most bytes held at once by tensors made meanwhile."""

    inputs: list[Tensor] = field(default_factory=list)  # held anyway
    steps: list[Step] = field(default_factory=list)
    live: dict[int, list[int]] = field(default_factory=dict)  # storage -> bytes, tensors
    held: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ours = {x.untyped_storage()._cdata for x in self.inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]
        for output in outputs:
            self._track(output)
        name = func.overloadpacket.__name__
        if name not in FREE and not func.is_view:
            self.steps.append(self._step(func, name, args, kwargs, outputs))
        return result

    def _step(self, func: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> Step:
        reads, written = [], []
        values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            for x in _tensors(values.get(argument.name)):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.append(x)
                    if name in OVERWRITES or argument.kwarg_only:
                        continue
                reads.append(x)
        writes = written or outputs
        if name in ROWS_ONLY:  # as many rows of the large tensor as the small ones have
            small = min((x for x in [*reads[1:], *outputs] if x.is_floating_point()), key=_bytes, default=outputs[0])
            touched = (_view(small), _bytes(small))
            extra = (touched,) if "add" in name else ()
            return Step(name, 0, small.dtype, (touched, *extra), (touched,))
        flops = 0.0
        if name in ("mm", "addmm"):
            left, right = (values[key] for key in (("self", "mat2") if name == "mm" else ("mat1", "mat2")))
            flops = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
            name = "logits" if right.stride(0) == 1 else "dweight" if left.stride(0) == 1 else "dhidden"
            return Step(name, flops, left.dtype, _sizes(reads), _sizes(writes))
        return Step(name, flops, torch.float32, _sizes(reads), _sizes(writes))

    def launched(self, launch: Any) -> None:
        """Triton's kernels: every tensor that is handed to one is read or written once, sums both."""
        tensors = [x for x in launch.arguments if isinstance(x, Tensor)]
        if launch.kernel.__name__ != "fold_kernel":
            self.steps.append(Step("statistics", 0, torch.float32, _sizes(tensors), ()))
            return
        raw, others = launch.arguments[:2]
        reads = [x for x in tensors if x is not others]
        self.steps.append(Step("fold", 0, raw.dtype, _sizes(reads), _sizes([] if others is None else [others])))

    def _track(self, x: Tensor) -> None:
        key = x.untyped_storage()._cdata
        if key in self.ours:
            return
        if key not in self.live:
            self.live[key] = [x.untyped_storage().nbytes(), 0]
            self.held += self.live[key][0]
            self.peak = max(self.peak, self.held)
        self.live[key][1] += 1
        weakref.finalize(x, self._freed, key)

    def _freed(self, key: int) -> None:
        entry = self.live[key]
        entry[1] -= 1
        if not entry[1]:
            self.held -= entry[0]
            del self.live[key]


def _tensors(value: Any) -> Iterable[Tensor]:
    return [x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Tensor)]


def _bytes(x: Tensor) -> int:
    """A dimension that is expanded is read once."""
    entries = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        entries *= size if stride else 1
    return entries * x.element_size()


def _view(x: Tensor) -> tuple[int, int, int]:
    return x.untyped_storage()._cdata, int(x.storage_offset()), x.numel()


def _sizes(tensors: Iterable[Tensor]) -> tuple[tuple[tuple[int, int, int], int], ...]:
    return tuple((_view(x), _bytes(x)) for x in tensors)


class Estimate(NamedTuple):
    """Seconds by kind of step, from HBM and with L2, and what was counted."""

    seconds: dict[str, float]
    with_l2: dict[str, float]
    counts: dict[str, int]
    bytes: dict[str, float]
    flops: float
    peak: int  # bytes beyond inputs and gradients
    group: int = 0  # tokens whose exponentials are held at once


def timed(steps: list[Step], device: Device, peak: int) -> Estimate:
    seconds: dict[str, float] = {}
    with_l2: dict[str, float] = {}
    counts: dict[str, int] = {}
    moved: dict[str, float] = {}
    recent: set[tuple[int, int, int]] = set()  # written by the step before
    for step in steps:
        rate = {torch.bfloat16: device.bf16, torch.float16: device.bf16}.get(step.dtype, device.float32)
        read, written = (sum(size for _, size in views) for views in (step.reads, step.writes))
        from_l2 = sum(size for view, size in step.reads if view in recent and size <= device.l2_bytes / 2)
        least = max(device.kernel, step.flops / rate)
        seconds[step.name] = seconds.get(step.name, 0) + max(least, (read + written) / device.hbm)
        cached = max((read + written - from_l2) / device.hbm, (read + written) / device.l2)
        with_l2[step.name] = with_l2.get(step.name, 0) + max(least, cached)
        counts[step.name] = counts.get(step.name, 0) + 1
        moved[step.name] = moved.get(step.name, 0) + read + written
        recent = {view for view, _ in step.writes}
    return Estimate(seconds, with_l2, counts, moved, sum(step.flops for step in steps), peak)


def estimate(
    tokens: int,
    dim: int,
    vocab: int,
    device: Device,
    *,
    softcap: float | None = None,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = False,
) -> tuple[Estimate, Estimate, dict[str, int]]:
    """The head, the bare products of its shape, and the head's workspace by name (bytes)."""
    from bnf_core.head.triton import TRITON, record_launches

    options: dict[str, Any] = {"device": "meta", "dtype": dtype}
    hidden, weight = torch.empty(tokens, dim, **options), torch.empty(vocab, dim, **options)
    offset = torch.empty(vocab, **options) if bias else None
    labels = torch.empty(tokens, dtype=torch.long, device="meta")
    values = torch.empty(tokens, device="meta"), torch.empty(tokens, device="meta")
    head, wanted = HeadOptions(softcap, 1.0, dtype), (True, True, bias)
    inputs = [hidden, weight, labels, *values, *([] if offset is None else [offset])]
    with Recorder(inputs) as recorder, record_launches(recorder.launched):
        if recompute:
            _, _, lse = log_odds_forward(hidden, weight, offset, labels, head, TRITON)
            gradients = log_odds_backward(values[0], lse, hidden, weight, offset, labels, head, TRITON, wanted)
        else:
            *_, gradients = one_pass(hidden, weight, offset, labels, head, TRITON, wanted, BNF_LOSS, values)
    returned = sum(g.untyped_storage().nbytes() for g in gradients if g is not None)
    sizes = layout(
        tokens, dim, vocab, head, hidden_dtype=dtype, weight_dtype=dtype, on_gpu=True, wanted=wanted, recompute=recompute
    )  # fmt: skip
    with Recorder() as products:
        for _ in range(2 if recompute else 1):
            logits = torch.mm(hidden, weight.T)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)
    found = timed(recorder.steps, device, recorder.peak - returned)._replace(group=sizes.group)
    looks = -(-tokens // sizes.chunk) + 1  # at each chunk's sums, and at the labels
    for times in (found.seconds, found.with_l2):
        times["looks at a number"] = looks * device.look
    found.counts["looks at a number"] = looks
    return found, timed(products.steps, device, 0), sizes.workspace(scratch=False)


KINDS = ("logits", "dhidden", "dweight", "fold", "looks at a number")


def table(name: str, device_name: str, **options: Any) -> str:
    """One head on one device, in words and figures."""
    tokens, dim, vocab, softcap, bias = SHAPES[name]
    found, bare, pieces = estimate(tokens, dim, vocab, DEVICES[device_name], softcap=softcap, bias=bias, **options)
    what = "linear_log_odds" if options.get("recompute") else "linear_bnf_loss"
    lines = [f"\n{what}, {name}: tokens x dim x vocab = {tokens}x{dim}x{vocab}, bf16, on {device_name} (estimate)"]
    lines.append(f"{'':28}{'steps':>7}{'GB':>9}{'ms from HBM':>14}{'with L2':>10}")
    others = [kind for kind in found.counts if kind not in KINDS]
    rows: list[tuple[str, list[str]]] = [(kind, [kind]) for kind in KINDS if kind in found.counts]
    rows.append(("everything else", others))
    for label, kinds in rows:
        count, moved = sum(found.counts[k] for k in kinds), sum(found.bytes.get(k, 0) for k in kinds)
        slow, quick = (sum(times[k] for k in kinds) for times in (found.seconds, found.with_l2))
        lines.append(f"{label:28}{count:7}{moved / 1e9:9.2f}{slow * 1e3:14.3f}{quick * 1e3:10.3f}")
    total, quick, products = (sum(x.values()) for x in (found.seconds, found.with_l2, bare.seconds))
    lines.append(f"{'total':28}{sum(found.counts.values()):7}{'':9}{total * 1e3:14.3f}{quick * 1e3:10.3f}")
    lines.append(f"{'bare products':28}{len(bare.counts):7}{'':9}{products * 1e3:14.3f}")
    lines.append(f"{'ratio':28}{'':16}{total / products:14.3f}{quick / products:10.3f}")
    summed, what = pieces["float32 sum of dweight"], "a float32 sum of dweight"
    if not summed and not options.get("recompute") and found.group == tokens:
        summed, what = pieces["exponentials"], "exponentials of all tokens, in place of a float32 sum of dweight"
    apart = f", and {summed / 2**20:.0f} MiB {what}" if summed else ""
    lines.append(f"memory beyond the gradients: {(found.peak - summed) / 2**20:.0f} MiB{apart}")
    lines += [f"  {size / 2**20:7.0f} MiB {piece}" for piece, size in pieces.items() if size]
    return "\n".join(lines)
