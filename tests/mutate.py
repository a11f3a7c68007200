"""Do the tests notice? Breaks bnf_core in one place at a time and runs tests/core on each broken copy. By hand, not in CI:

    python tests/mutate.py [how many, at random; default all] [seed]

Every file but the benchmarks: Triton's kernels under its interpreter, the compiled fold as plain Python. Mutants: + and -
swapped, * and / swapped, a minus dropped, a comparison negated, min and max swapped, mean for sum, a detach dropped,
exp() + 1e-6, a constant moved by one. Prints the survivors and the share killed.
"""

import ast
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile hands back what it was given
import torch  # noqa: F401  (imported once, before every child is forked)

ROOT = Path(__file__).parent.parent
ASIDE = ["__init__.py", "benchmark.py", "benchmark_peers.py"]  # names; what measures, and is looked at by eye
FILES = sorted(str(p.relative_to(ROOT / "bnf_core")) for p in (ROOT / "bnf_core").rglob("*.py"))
FILES = [name for name in FILES if name not in ASIDE and name != "objectives/__init__.py"]
TESTS = [
    "values",
    "objectives",
    "token_loss",
    "head_sizes",
    "head_faults",
    "head",
    "reference_errors",
    "reference",
    "pairwise",
    "roofline",
]
TESTS += ["layout", "analysis", "properties", "every_objective", "weights"]
FIRST = {"reference.py": "reference", "batch.py": "pairwise", "analysis.py": "analysis"}
FIRST |= {"roofline.py": "roofline", "head/layout.py": "layout", "_checks.py": "reference_errors"}  # who is likely to notice
SWAP = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
NEGATE = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
RENAME = {"min": "max", "max": "min", "amax": "amin", "expm1": "exp", "log1p": "log", "mean": "sum", "relu": "sigmoid"}
SIZES = ("MIB", "BUDGETS", "WIDEST", "BLOCK", "TILE", "WARPS", "DEVICES")  # assignments where any value gives the same numbers


def mutations(node: ast.AST) -> Iterator[ast.AST]:
    """Broken versions of one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAP:
        yield ast.BinOp(node.left, SWAP[type(node.op)](), node.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    if isinstance(node, ast.Compare) and type(node.ops[0]) in NEGATE:
        yield ast.Compare(node.left, [NEGATE[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
    if isinstance(node, ast.keyword) and node.arg in ("min", "max"):
        yield ast.keyword(RENAME[node.arg], node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "detach":
            yield node.func.value
        if node.func.attr in ("exp", "exp_", "exp2_"):
            yield ast.BinOp(node, ast.Add(), ast.Constant(1e-6))
        if node.func.attr in RENAME:
            yield ast.Call(ast.Attribute(node.func.value, RENAME[node.func.attr], ast.Load()), node.args, node.keywords)


class Rewrite(ast.NodeTransformer):
    """Applies the n-th mutation outside checks, messages, annotations, defaults, axes and sizes; None only counts them."""

    def __init__(self, wanted: int | None = None) -> None:
        self.wanted, self.seen, self.what = wanted, 0, ""

    def visit(self, node: ast.AST) -> ast.AST:
        checks = isinstance(node, ast.FunctionDef) and node.name.startswith(("check", "_check", "__post_init__"))
        aside = isinstance(node, (ast.Raise, ast.Assert, ast.AnnAssign, ast.arguments, ast.Subscript))
        size = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in SIZES
        if checks or aside or size or ast.unparse(node) == "-1":
            return node
        for broken in mutations(node):
            self.seen += 1
            if self.seen - 1 == self.wanted:
                self.what = f"line {getattr(node, 'lineno', '?')}: {ast.unparse(node)}  ->  {ast.unparse(broken)}"
                return broken
        return self.generic_visit(node)


def killed(path: str, number: int) -> tuple[bool, str]:
    rewrite = Rewrite(number)
    source = ast.unparse(ast.fix_missing_locations(rewrite.visit(ast.parse((ROOT / "bnf_core" / path).read_text()))))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "bnf_core", Path(folder) / "bnf_core", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "bnf_core" / path).write_text(source)
        if (child := os.fork()) == 0:
            signal.alarm(1200)  # a mutant may loop for ever
            os.chdir(folder)
            sys.path.insert(0, folder)
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            ours = "triton" if "triton" in path else "not triton"  # the other implementations are quicker, and tell the rest
            options = [
                "-x",
                "-q",
                "-m",
                "not child",
                "-k",
                f"({ours}) and not large_head and not tracers",
                "-n0",
                "-p",
                "no:cacheprovider",
                "--rootdir",
                str(ROOT),
                "-c",
                str(ROOT / "pyproject.toml"),
            ]
            with contextlib.suppress(BaseException):
                names = sorted(TESTS, key=lambda name: name != FIRST.get(path))
                os._exit(pytest.main([*options, *(f"{ROOT}/tests/core/test_{name}.py" for name in names)]))
            os._exit(1)
        return os.waitpid(child, 0)[1] != 0, f"{path}, {rewrite.what}"


if __name__ == "__main__":
    os.environ["HYPOTHESIS_PROFILE"], places = "quick", []
    for path in FILES:
        (count := Rewrite()).visit(ast.parse((ROOT / "bnf_core" / path).read_text()))
        places += [(path, number) for number in range(count.seen)]
    random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0).shuffle(places)
    places = places[: int(sys.argv[1]) if len(sys.argv) > 1 else None]
    survivors = []
    for count, (dead, what) in enumerate((killed(*place) for place in places), 1):
        survivors += [] if dead else [what]
        print(f"{count} of {len(places)}: {'killed' if dead else 'SURVIVED'}: {what}", flush=True)
    print(f"{len(places) - len(survivors)} of {len(places)} mutants killed ({1 - len(survivors) / len(places):.1%})")
