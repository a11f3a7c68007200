"""python -m bnf_core.benchmark: who is in its table and why someone is not; nothing here looks at a time."""

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bnf_core import benchmark_peers
from bnf_core.benchmark import Problem, candidates, main, measure, table
from bnf_core.benchmark_peers import DEVICES, PEERS, Peer, check, peers, wrong

SHAPE = "24x8x40"
NAMES = [peer.name for peer in PEERS]


def stand_in(name: str, **contents: object) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    return module


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnf_core.benchmark.IMPLEMENTATIONS", ["naive", "chunked"])  # no compiler
    monkeypatch.setattr("bnf_core.benchmark.CHECKED_SHAPE", "64x16x128")


class Hidden:
    """A finder that finds none of the peers' packages."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in {peer.module.split(".")[0] for peer in PEERS} - {"torch"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    for peer in PEERS:
        if peer.package != "torch":
            for name in [name for name in sys.modules if name.split(".")[0] == peer.module.split(".")[0]]:
                monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_peers, "DEVICES", dict.fromkeys(DEVICES, lambda capability: True))


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels)


@pytest.mark.usefixtures("nothing_installed")
def test_one_command_has_a_line_for_every_peer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(
        [
            "--shape",
            SHAPE,
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--repeats",
            "1",
            "--output",
            str(tmp_path / "b"),
            "--check",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    for peer in PEERS:
        line = next(line for line in lines if line[:38].rstrip() == peer.name)
        if peer.package == "torch" and hasattr(F, "linear_cross_entropy"):
            assert "errors: loss " in line
        elif peer.needs:
            assert line.endswith(f"did not run: needs {peer.needs}")
        elif peer.package != "torch":
            assert line.endswith(f"did not run: not installed (pip install {peer.package})")


@pytest.mark.usefixtures("nothing_installed", "any_device")
def test_a_peer_that_is_not_installed_says_how_to_get_it() -> None:
    for peer, found in zip(PEERS, peers(Problem(SHAPE, "float32", "cpu")).values(), strict=True):
        if peer.package != "torch":
            assert found == f"not installed (pip install {peer.package})"


def test_entries_are_told_apart() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(len(name) < 38 for name in NAMES)  # the column
    assert {peer.needs for peer in PEERS} <= set(DEVICES)
    assert not set(NAMES) - set(candidates(Problem(SHAPE, "float32", "cpu")))


@pytest.mark.parametrize(
    ("needs", "none", "ampere", "hopper", "blackwell"),
    [
        ("", True, True, True, True),
        ("a CUDA GPU", False, True, True, True),
        ("a Hopper GPU", False, False, True, False),
        ("a Hopper GPU or newer", False, False, True, True),
        ("a Blackwell GPU of compute capability 10.0", False, False, False, True),
    ],
)
def test_devices(needs: str, none: bool, ampere: bool, hopper: bool, blackwell: bool) -> None:
    assert [DEVICES[needs](c) for c in ((0, 0), (8, 0), (9, 0), (10, 0))] == [none, ampere, hopper, blackwell]


@pytest.mark.usefixtures("nothing_installed", "any_device")
def test_a_peer_that_raises_is_a_line_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel for this shape\nand a long story")

    def silent(*_: object) -> Tensor:
        raise AssertionError

    install(monkeypatch, stand_in("quack.linear_cross_entropy", chunked_linear_cross_entropy=broken))
    install(monkeypatch, stand_in("fla.modules.fused_linear_cross_entropy", fused_linear_cross_entropy_loss=silent))
    install(monkeypatch, stand_in("trl.kernels"))  # of another version: nothing in it
    rows = {row["name"]: row for row in measure(SHAPE, "float32", "cpu", 1, "", checked=True)}
    assert rows["QuACK"]["failed"] == "RuntimeError: no kernel for this shape"
    assert rows["fla"]["failed"] == "AssertionError: "
    assert rows["TRL fused head"]["failed"].startswith("AttributeError: ")
    assert rows["linear_bnf_loss, chunked"]["ratio"] > 0
    assert "did not run: RuntimeError: no kernel" in table(list(rows.values()))


def test_a_package_that_does_not_import_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        benchmark_peers, "PEERS", [Peer(n, n, n, lambda m, p: p.hidden.sum(), "", "") for n in ("peer_a", "peer_b")]
    )
    (tmp_path / "peer_a.py").write_text("raise OSError('libcuda.so.1: cannot open')")
    (tmp_path / "peer_b.py").write_text("import not_a_package_either")
    monkeypatch.syspath_prepend(tmp_path)
    assert peers(Problem(SHAPE, "float32", "cpu")) == {
        "peer_a": "OSError: libcuda.so.1: cannot open",
        "peer_b": "no module not_a_package_either (pip install -U peer_b)",
    }


@pytest.mark.usefixtures("nothing_installed", "any_device")
def test_stand_ins_are_measured_as_the_packages_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry's own code, on a module with the signature that the package has."""
    seen = []

    class PerToken:
        @staticmethod
        def apply(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(hidden @ weight.T, labels, reduction="none")

    class LogProbs:
        @staticmethod
        def apply(hidden: Tensor, weight: Tensor, bias: None, labels: Tensor, t: float, *more: object) -> tuple[Tensor, None]:
            assert more == (32768, None, 1.0, ())
            return -PerToken.apply(hidden, weight, labels) / t, None

    class Liger:
        def __init__(self, accum_dtype: torch.dtype | None = None) -> None:
            seen.append(accum_dtype)

        def __call__(self, weight: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(hidden, weight, labels)

    class Blackwell:
        @staticmethod
        def apply(hidden: Tensor, weight: Tensor, labels: Tensor, *options: object) -> tuple[Tensor, None]:
            assert options == (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32)
            return cross_entropy(hidden, weight, labels), None

    def cce(e: Tensor, c: Tensor, targets: Tensor, filter_eps: float | None = 0.1, impl: str = "cce") -> Tensor:
        seen.append((filter_eps, impl))
        return cross_entropy(e, c, targets)

    def quack(x: Tensor, weight: Tensor, target: Tensor, use_scaled_exp: bool | None = None) -> Tensor:
        seen.append(use_scaled_exp)
        return cross_entropy(x, weight, target)

    cute = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy"
    for module in (
        stand_in("trl.kernels", ChunkedLogProbFunction=LogProbs),
        stand_in("liger_kernel.transformers", LigerFusedLinearCrossEntropyLoss=Liger),
        stand_in("liger_kernel.ops", LigerFusedLinearScaledCrossEntropyFunction=PerToken),
        stand_in(cute + "_sm90", liger_fused_linear_cross_entropy_sm90=cross_entropy),
        stand_in(cute, LigerFusedLinearCrossEntropyFunction=Blackwell),
        stand_in("cut_cross_entropy", linear_cross_entropy=cce, LinearCrossEntropyImpl=type("Impl", (), {})),
        stand_in("quack.linear_cross_entropy", chunked_linear_cross_entropy=quack),
        stand_in(
            "fla.modules.fused_linear_cross_entropy",
            fused_linear_cross_entropy_loss=lambda x, target, weight: cross_entropy(x, weight, target),
        ),
    ):
        install(monkeypatch, module)
    rows = {row["name"]: row for row in measure(SHAPE, "float32", "cpu", 1, "", checked=True)}
    for peer in PEERS:
        if peer.package != "torch":
            assert "failed" not in rows[peer.name], rows[peer.name]
            assert max(rows[peer.name]["errors"].values()) < 1e-5
            assert rows[peer.name]["dweight"] == peer.dweight
    assert set(seen) == {None, torch.float32, (0.1, "cce"), (None, "cce"), (0.1, "torch_compile"), False}


@pytest.mark.usefixtures("nothing_installed", "any_device")
def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:  # the value is right
        loss = cross_entropy(x, weight, target)
        return loss / 2 + loss.detach() / 2

    install(monkeypatch, stand_in("fla.modules.fused_linear_cross_entropy", fused_linear_cross_entropy_loss=half))
    row = next(row for row in measure(SHAPE, "float32", "cpu", 1, "fla", checked=True) if row["name"] == "fla")
    assert row["failed"] == "wrong: dhidden off by 50%, dweight off by 50%"


def test_what_is_wrong() -> None:
    assert wrong({"dhidden": 0.02}, torch.bfloat16) is None
    assert wrong({"dhidden": 0.02}, torch.float32) == "wrong: dhidden off by 2%"
    assert wrong({"dhidden": float("nan")}, torch.bfloat16) == "wrong: dhidden off by nan%"


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-5), ("bfloat16", 0.01), ("autocast", 0.01)])
def test_those_that_are_installed_are_cross_entropies(precision: str, limit: float) -> None:
    problem = Problem("256x32x512", precision, "cuda" if torch.cuda.is_available() else "cpu")
    errors = check(problem)
    if hasattr(F, "linear_cross_entropy") and precision != "autocast":
        assert "torch linear_cross_entropy" in errors
    for name, error in errors.items():
        assert wrong(error, problem.hidden.dtype) is None, name
        if not name.startswith("CCE") and name != "Liger":  # they leave out gradients, or round them in every chunk
            assert max(error.values()) < limit, (name, error)
