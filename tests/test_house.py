"""The rules of the house: who may import whom, and how little the library imports."""

import ast
import sys
from pathlib import Path

import children
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


def test_core_imports_nothing_but_itself_and_what_is_light() -> None:
    """On top of torch and numpy: its own modules, jaxtyping with what that needs of numpy, and Python's."""
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import bnf_core\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    assert set(children.run("-c", code).out.split()) <= {"bnf_core", "jaxtyping", "wadler_lindig", "numpy"}
