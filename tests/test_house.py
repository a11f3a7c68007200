"""The rules of the house: who may import whom, and how quickly the library imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [p for folder in ("bnf_core", "bnf_train", "proofs") for p in sorted((ROOT / folder).rglob("*.py"))]

# what a folder or file (longest prefix) may not import of ours
FORBIDDEN = {
    "bnf_core": ["bnf_train", "proofs"],
    "bnf_core/reference.py": [
        "bnf_train",
        "bnf_core.head",
        "bnf_core.objectives",
        "bnf_core.batch",
        "bnf_core.analysis",
    ],
    "bnf_core/head": ["bnf_train", "bnf_core.objectives", "bnf_core.analysis", "bnf_core.batch", "bnf_core.reference"],
    "bnf_core/objectives": ["bnf_train", "bnf_core.head", "bnf_core.analysis", "bnf_core.reference"],
    "bnf_core/analysis.py": ["bnf_train", "bnf_core.head", "bnf_core.objectives", "bnf_core.reference"],
    "bnf_train": [],
    "proofs": ["bnf_train", "bnf_core"],
}
FIGURES = "plot_"  # the scripts in proofs/ that may draw bnf_core's values beside SymPy's
CORE_NEEDS = {"torch", "numpy", "jaxtyping", "bnf_core"}
OPTIONAL = {"bnf_core/head/triton.py": {"triton"}}  # imported only where it is used


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rules(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    rules = FORBIDDEN[max((prefix for prefix in FORBIDDEN if name.startswith(prefix)), key=len)]
    if path.name.startswith(FIGURES):
        rules = ["bnf_train"]
    for module in imports(path):
        assert not any(module == rule or module.startswith(rule + ".") for rule in rules), f"{name} imports {module}"
        if name.startswith("bnf_core"):
            top = module.split(".")[0]
            assert top in CORE_NEEDS | OPTIONAL.get(name, set()) or top in sys.stdlib_module_names, f"{name} imports {module}"
        if name.startswith("bnf_train") and module.startswith("bnf_core"):
            assert "._" not in module, f"{name} imports the private {module}"
            assert module.count(".") <= 1, f"{name} imports {module}: take it from bnf_core"


def test_core_imports_little_and_quickly() -> None:
    code = (
        "import time, torch, numpy; start = time.perf_counter(); import bnf_core; took = time.perf_counter() - start\n"
        "import sys; heavy = {'transformers', 'accelerate', 'datasets', 'sympy', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "print(took, *sorted(heavy))"
    )
    before = "import sys, torch, numpy; print(*sorted({'sympy', 'triton'} & set(sys.modules)))"  # torch's own
    mine = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    torchs = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, check=True).stdout.split()
    assert set(mine[1:]) <= set(torchs)
    assert float(mine[0]) < 0.2, f"import bnf_core took {mine[0]} s on top of torch"
