"""The figure scripts draw what they say, from expressions that agree with the library."""

import importlib.util
from pathlib import Path
from types import ModuleType

import sympy as sp

from bnf_core import reference

PROOFS = Path(__file__).parents[2] / "proofs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PROOFS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_feedback_curve(tmp_path: Path) -> None:
    script = load("plot_feedback_curve")
    assert script.draw(tmp_path / "figure.png") < 1e-12  # points against lines
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    nll, bnf, p, r = script.feedback_expressions()
    for likelihood in (0.0, 0.1, 0.3, 0.7, 1.0):
        assert abs(float(nll.subs(p, likelihood)) - reference.nll_feedback(likelihood).item()) < 1e-15
        at = {p: sp.Rational(str(likelihood)), r: sp.Rational("0.3")}
        assert abs(float(bnf.subs(at)) - reference.bnf_feedback(likelihood, 0.3).item()) < 1e-15
