"""Other people's fused linear cross-entropies, for the table of `python -m bnf_core.benchmark`.

One entry a peer. `peers` gives each as a loss to run, or says why it cannot: the wrong device, or not installed. All give
the mean cross-entropy over the tokens, and gradients in hidden states and weight. Nothing is imported before it is asked
for. Versions in the comments are those whose source, and where a CPU can run them whose values, an entry was checked with.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[], Tensor]


@runtime_checkable
class Head(Protocol):
    """What a peer is given, and how its gradients are taken: `bnf_core.benchmark.Problem`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    def backward(self, loss: Loss) -> None: ...


@dataclass(frozen=True)
class Peer:
    name: str
    package: str  # what pip installs
    module: str  # what is imported
    loss: Callable[[Any, Head], Tensor]  # of that module and the problem
    needs: str  # a key of DEVICES
    dweight: str  # how the weight's gradient is summed over the tokens


# by compute capability; (0, 0) is no CUDA GPU
DEVICES: dict[str, Callable[[tuple[int, int]], bool]] = {
    "": lambda capability: True,
    "a CUDA GPU": lambda capability: capability > (0, 0),
    "a Hopper GPU": lambda capability: capability == (9, 0),
    "a Hopper GPU or newer": lambda capability: capability >= (9, 0),
    "a Blackwell GPU of compute capability 10.0": lambda capability: capability == (10, 0),
}


def _torch(functional: Any, p: Head, **options: Any) -> Tensor:
    options = {"options": torch.nn.LinearCrossEntropyOptions(**options)}
    return functional.linear_cross_entropy(p.hidden, p.weight, p.labels, **options)  # type: ignore[no-any-return]


def _trl(kernels: Any, p: Head) -> Tensor:
    # temperature, TRL's own width of a chunk, no soft cap, scale; () leaves out the entropy and what else it can add
    outputs = kernels.ChunkedLogProbFunction.apply(p.hidden, p.weight, None, p.labels, 1.0, 32768, None, 1.0, ())
    return -outputs[0].mean()  # type: ignore[no-any-return]


def _liger(transformers: Any, p: Head, **options: Any) -> Tensor:
    return transformers.LigerFusedLinearCrossEntropyLoss(**options)(p.weight, p.hidden, p.labels)  # type: ignore[no-any-return]


def _liger_per_token(ops: Any, p: Head) -> Tensor:
    return ops.LigerFusedLinearScaledCrossEntropyFunction.apply(p.hidden, p.weight, p.labels).mean()  # type: ignore[no-any-return]


def _liger_hopper(module: Any, p: Head) -> Tensor:
    return module.liger_fused_linear_cross_entropy_sm90(p.hidden, p.weight, p.labels)  # type: ignore[no-any-return]


def _liger_blackwell(module: Any, p: Head) -> Tensor:  # what LIGER_KERNEL_IMPL=cutedsl puts behind the usual class
    options = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32)  # the last: accum_dtype
    return module.LigerFusedLinearCrossEntropyFunction.apply(p.hidden, p.weight, p.labels, *options)[0]  # type: ignore[no-any-return]


def _cce(cce: Any, p: Head, **options: Any) -> Tensor:
    return cce.linear_cross_entropy(p.hidden, p.weight, p.labels, **options)  # type: ignore[no-any-return]


def _cce_exact(cce: Any, p: Head) -> Tensor:
    # the release on PyPI has no such preset, but the option; its repository has both, and sums in float32 with the preset
    exact = hasattr(cce.LinearCrossEntropyImpl, "CCE_EXACT")
    return _cce(cce, p, filter_eps=None, impl="cce_exact" if exact else "cce")


def _quack(module: Any, p: Head, **options: Any) -> Tensor:
    return module.chunked_linear_cross_entropy(p.hidden, p.weight, p.labels, **options)  # type: ignore[no-any-return]


def _fla(module: Any, p: Head) -> Tensor:
    return module.fused_linear_cross_entropy_loss(p.hidden, p.labels, p.weight)  # type: ignore[no-any-return]


_accurate = functools.partial(_torch, acc_policy="accurate", acc_dtype=torch.float32)
_liger_float32 = functools.partial(_liger, accum_dtype=torch.float32)
_quack_base = functools.partial(_quack, use_scaled_exp=False)
_cce_compiled = functools.partial(_cce, impl="torch_compile")
_CUTE = "'liger-kernel[cutedsl]'"
_CUTE_OPS = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy"

PEERS = [
    # torch 2.13.0: run on a CPU
    Peer("torch linear_cross_entropy", "torch", "torch.nn.functional", _torch, "", "as torch chooses: float32 for bf16"),
    Peer("torch linear_cross_entropy, accurate", "torch", "torch.nn.functional", _accurate, "", "float32"),
    # trl 1.16.0: run on a CPU
    Peer("TRL fused head", "trl", "trl.kernels", _trl, "", "float32; logits are computed twice"),
    # liger-kernel 0.8.5: "per token" run on a CPU, the others read. On Hopper "per token" is a CuTe kernel too
    Peer("Liger", "liger-kernel", "liger_kernel.transformers", _liger, "a CUDA GPU", "weight's dtype, rounded every chunk"),
    Peer("Liger, float32 sums", "liger-kernel", "liger_kernel.transformers", _liger_float32, "a CUDA GPU", "float32"),
    Peer("Liger, per token", _CUTE, "liger_kernel.ops", _liger_per_token, "", "weight's dtype, rounded every 1024 tokens"),
    Peer(
        "Liger CuTe, Hopper",
        _CUTE,
        _CUTE_OPS + "_sm90",
        _liger_hopper,
        "a Hopper GPU",
        "float32, one product; keeps all logits",
    ),
    Peer("Liger CuTe, Blackwell", _CUTE, _CUTE_OPS, _liger_blackwell, "a Blackwell GPU of compute capability 10.0", "float32"),
    # cut-cross-entropy 25.1.1: compiled run on a CPU, the others read, also at commit d42911f of its repository
    Peer("CCE", "cut-cross-entropy", "cut_cross_entropy", _cce, "a CUDA GPU", "hidden's dtype; small gradients left out"),
    Peer("CCE, exact", "cut-cross-entropy", "cut_cross_entropy", _cce_exact, "a CUDA GPU", "hidden's dtype, or float32 if new"),
    Peer("CCE, torch.compile", "cut-cross-entropy", "cut_cross_entropy", _cce_compiled, "", "one product of full logits"),
    # quack-kernels 0.6.5: read. On Hopper "QuACK" takes its newer way, which never forms the logits' gradient
    Peer("QuACK", "quack-kernels", "quack.linear_cross_entropy", _quack, "a Hopper GPU or newer", "float32"),
    Peer("QuACK, base", "quack-kernels", "quack.linear_cross_entropy", _quack_base, "a Hopper GPU or newer", "float32"),
    # fla-core 0.6.0: run on a CPU through Triton's interpreter
    Peer("fla", "fla-core", "fla.modules.fused_linear_cross_entropy", _fla, "a CUDA GPU", "float32, by a float32 product"),
]


def peers(p: Head) -> dict[str, Loss | str]:
    """Every peer by name: its loss, or why it does not run here."""
    return {peer.name: _loss_or_reason(peer, p) for peer in PEERS}


def _loss_or_reason(peer: Peer, p: Head) -> Loss | str:
    device = p.hidden.device
    if not DEVICES[peer.needs](torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)):
        return f"needs {peer.needs}"
    try:
        return functools.partial(peer.loss, importlib.import_module(peer.module), p)
    except ModuleNotFoundError as error:
        if error.name == peer.module.split(".")[0]:
            return f"not installed (pip install {peer.package})"
        return f"no module {error.name} (pip install -U {peer.package})"
    except Exception as error:  # a package that does not import is no reason to measure nothing
        return reason(error)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


def about(name: str) -> dict[str, str]:
    """For the record of a measured peer: the installed version, and how it sums."""
    for peer in PEERS:
        if peer.name == name:
            package = peer.package.strip("'").split("[")[0]
            try:
                version = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:  # a nightly build of another name
                version = "of unknown version"
            return {"package": f"{package} {version}", "dweight": peer.dweight}
    return {}


def check(p: Head) -> dict[str, dict[str, float]]:
    """Relative errors of each peer that runs here, against full logits in float64: its loss, dhidden and dweight."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    exact = F.cross_entropy(F.linear(hidden, weight), p.labels)
    exact.backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, loss in peers(p).items():
        if isinstance(loss, str):
            continue
        values: list[Tensor] = []
        try:
            p.backward(functools.partial(_kept, loss, values))
        except Exception:  # the table will say why, from the shape that is measured
            continue
        pairs = {"loss": (values[0], exact), "dhidden": (p.hidden.grad, hidden.grad), "dweight": (p.weight.grad, weight.grad)}
        found[name] = {key: _relative(theirs, full) for key, (theirs, full) in pairs.items()}
    return found


def _kept(loss: Loss, values: list[Tensor]) -> Tensor:
    values.append(loss())
    return values[0]


def _relative(found: Tensor | None, exact: Tensor | None) -> float:
    if found is None or exact is None:
        return float("inf")
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


def wrong(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """What is wrong with a peer, if its errors are beyond rounding in `dtype` (and CCE's left-out gradients)."""
    limit = 0.01 if dtype == torch.float32 else 0.1
    off = [f"{key} off by {error:.0%}" for key, error in errors.items() if not error <= limit]  # NaN is wrong
    return "wrong: " + ", ".join(off) if off else None
