"""The figure scripts draw what they say, from expressions that agree with the library."""

from pathlib import Path

import plot_collapse  # type: ignore[import-not-found]
import plot_digits  # type: ignore[import-not-found]
import plot_epsilon  # type: ignore[import-not-found]
import plot_feedback_curve as script  # type: ignore[import-not-found]
import plot_math_pair  # type: ignore[import-not-found]
import pytest
import sympy as sp
import t3_family  # type: ignore[import-not-found]

from bnf_core import OBJECTIVES, objective_spec, reference


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_feedback_curve(tmp_path: Path) -> None:
    assert script.draw(tmp_path / "figure.png") < 1e-12  # points against lines
    assert is_png(tmp_path / "figure.png")
    nll, bnf, p, r = script.feedback_expressions()
    for likelihood in (0.0, 0.1, 0.3, 0.7, 1.0):
        assert abs(float(nll.subs(p, likelihood)) - reference.nll_feedback(likelihood).item()) < 1e-15
        at = {p: sp.Rational(str(likelihood)), r: sp.Rational("0.3")}
        assert abs(float(bnf.subs(at)) - reference.bnf_feedback(likelihood, 0.3).item()) < 1e-15


def test_feedback_of_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenwise = {name for name, f in OBJECTIVES.items() if objective_spec(f).per == "token"}
    the_same = {"bnf_binary", "bnf_one_sided", "w_reinforce"}  # on a dispreferred token as another
    assert script.FAMILY.keys() == tokenwise - the_same
    path = tmp_path / "figure.png"
    monkeypatch.setattr("sys.argv", ["plot_feedback_curve.py", "--family", str(path)])
    script.main()
    assert is_png(path)
    worst = capsys.readouterr().out.splitlines()[0].removeprefix("autograd through bnf_core differs by at most ")
    assert float(worst) < 1e-12


def test_math_pair(tmp_path: Path) -> None:
    """DPO's constraint stays near beta / 2 while BNF's weight goes to 0."""
    found = plot_math_pair.draw(tmp_path / "figure.png")
    assert is_png(tmp_path / "figure.png")
    assert found[0.05] == pytest.approx((1, 1))
    assert found[0.005][0] > 0.85
    assert found[0.005][1] < 0.1
    assert found[5e-6][0] > 0.5
    assert found[5e-6][1] < 1.1e-4


def test_collapse(tmp_path: Path) -> None:
    assert plot_collapse.draw(tmp_path / "figure.png", step=0.05) < 0.01
    assert is_png(tmp_path / "figure.png")
    fast, slow = plot_collapse.descend(False, 0.05), plot_collapse.descend(True, 0.05)
    assert fast[-1] < 1e-10 < 1e-3 < slow[-1]


def test_collapse_of_the_family(tmp_path: Path) -> None:
    """Descent in larger steps than the script's."""
    worst = plot_collapse.draw_family(tmp_path / "figure.png", step=0.04)
    assert is_png(tmp_path / "figure.png")
    assert 1e-6 < worst < 0.03
    assert plot_collapse.FAMILY.keys() == t3_family.FLOWS.keys() - {"bnf_one_sided", "w_reinforce"}


def test_epsilon(tmp_path: Path) -> None:
    """At 1e-6 the guarded gradient is off by half; at 1e-2 by about 1e-4."""
    worst = plot_epsilon.draw(tmp_path / "figure.png")
    assert is_png(tmp_path / "figure.png")
    assert all(0.9 < error <= 1.1 for error in worst.values())


def test_digits(tmp_path: Path) -> None:
    """From log-probabilities about 1e-6 / (1 - pi) nats are lost, all of them in bf16; from logits none."""
    found = plot_digits.draw(tmp_path / "figure.png", tokens=50, vocab=1000)
    assert is_png(tmp_path / "figure.png")
    for miss, of in found.items():
        assert of["token_log_odds, float32"] < 2e-6
        assert of["logits - logsumexp, float32"] > 3e-8 / miss
        assert (of["computed in bf16"] > 1e3) == (miss <= 1e-3)
