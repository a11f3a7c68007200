"""The rules of the house, from one list: who may import whom, how long a file is, and whose private names are used where."""

import ast
import functools
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).parent.parent
FILES = [p for folder in ("bnf_core", "bnf_train", "proofs") for p in sorted((ROOT / folder).rglob("*.py"))]
NAMES = [p.relative_to(ROOT).as_posix() for p in FILES]
MOST_LINES = 500
MOST_FLOORS = 8

# --- the list ----------------------------------------------------------------------------------------------------------

# Each room and the rooms that it may import. A room is a folder, or a file that stands beside folders; the longest name
# that fits is a file's room. A room sees itself and bnf_core's public names, too, unless CORE says otherwise.
ROOMS: dict[str, list[str]] = {
    "bnf_core": [],  # joins what its rooms hold
    "bnf_core/_checks": [],
    "bnf_core/batch": ["bnf_core/_checks"],
    "bnf_core/reference": ["bnf_core/_checks"],
    "bnf_core/head": ["bnf_core/_checks"],
    "bnf_core/objectives": ["bnf_core/_checks", "bnf_core/batch"],
    "bnf_core/analysis": ["bnf_core/_checks"],
    "bnf_train": [],
    "bnf_train/errors": [],
    "bnf_train/demo": [],
    "bnf_train/rules": [],
    "bnf_train/processes": [],
    "bnf_train/options": ["demo", "rules"],
    "bnf_train/hub": ["errors"],
    "bnf_train/inherited": ["errors"],
    "bnf_train/functions": ["errors"],
    "bnf_train/objectives": ["errors", "functions"],
    "bnf_train/checks": ["errors", "functions"],
    "bnf_train/cli": ["errors"],
    "bnf_train/config": ["demo", "errors", "inherited", "options"],
    "bnf_train/data": ["errors", "hub", "rules"],
    "bnf_train/data/__main__": ["cli", "data", "flags", "model"],
    "bnf_train/flags": ["checks", "cli", "config", "demo", "errors", "inherited", "objectives", "options"],
    "bnf_train/model": ["checks", "config", "data", "errors", "hub"],
    "bnf_train/training": ["checks", "config", "data", "errors", "hub", "model"],
    "bnf_train/report": ["checks", "config", "data", "demo", "model", "training"],
    "bnf_train/run": ["checks", "cli", "config", "data", "demo", "errors", "model", "objectives", "report", "training"],
    "bnf_train/__main__": ["cli", "flags", "options", "run"],
    "bnf_train/benchmark": ["cli", "config", "data", "errors", "flags", "model", "processes", "run", "training"],
    "bnf_train/compare": ["checks", "cli", "config", "data", "errors", "flags", "model", "processes", "run", "training"],
    "bnf_train/analyze": ["checks", "cli", "config", "data", "errors", "model", "options"],
    "bnf_train/sample": ["checks", "cli", "data", "errors", "model"],
    "bnf_train/rounds": [
        "checks",
        "cli",
        "config",
        "data",
        "demo",
        "errors",
        "flags",
        "model",
        "objectives",
        "processes",
        "run",
        "sample",
        "training",
    ],
    "bnf_train/plan": ["cli", "config", "data", "errors", "flags", "model", "objectives"],
    "bnf_train/examples": ["data", "demo", "flags", "run"],
    "proofs": [],
    "proofs/experiments": ["checks", "demo"],
    "proofs/experiments/tofu": ["cli", "config", "data", "errors", "flags", "model", "objectives", "processes", "run"],
}
COMMANDS = ("__main__", "bnf_train/benchmark", "bnf_core/benchmark")  # run, never imported
JOINS = ("__init__", "benchmark", "benchmark_peers", "roofline", "fused", "constraints")  # of bnf_core: they join its rooms
FIGURES = "plot_"  # the scripts in proofs/ that may draw bnf_core's values beside SymPy's
CORE_NEEDS = {"torch", "numpy", "jaxtyping", "bnf_core"}
OPTIONAL = (
    "triton",
    "bnf_core.head.triton",
    "deepspeed",
    "bitsandbytes",
    "math_verify",
    "rouge_score",
    "scipy",
    "trl",
)  # imported only where they are used
LAZY = ("bnf_train/cli.py", "__main__.py")  # files that may import inside functions, for their start-up time

# Names with an underscore that are not ours, and the files that may use them.
PRIVATE: dict[str, list[str]] = {
    "_make": ["bnf_core/batch.py"],  # of named tuples
    "_asdict": ["bnf_core/batch.py"],
    "_exit": ["bnf_train/compare/process.py", "bnf_train/processes.py", "bnf_train/training/resume.py"],  # of os
    "_current_level": ["bnf_core/head/__init__.py"],  # torch: inside forward mode, inside a tracer
    "_dynamo": ["bnf_core/head/__init__.py"],
    "_is_amx_tile_supported": ["bnf_core/head/products.py"],
    "_is_avx512_bf16_supported": ["bnf_core/head/products.py"],
    "_python_dispatch": ["bnf_core/roofline.py", "bnf_train/plan/trace.py"],  # torch: what a call does, counted
    "_pytree": ["bnf_train/plan/trace.py"],
    "_schema": ["bnf_core/roofline.py"],
    "_cdata": ["bnf_core/roofline.py"],
    "_subclasses": ["bnf_train/plan/size.py"],  # torch: tensors without memory
    "_option_string_actions": ["bnf_train/cli.py", "bnf_train/flags.py"],  # argparse has no other way to list flags
    "_actions": ["bnf_train/cli.py", "bnf_train/flags.py"],
    "_scaled_dot_product_flash_attention_for_cpu": ["bnf_train/model/shared_prompts.py"],  # torch: attention with its logsumexp
    "_scaled_dot_product_flash_attention_for_cpu_backward": ["bnf_train/model/shared_prompts.py"],
    "_attn_implementation": ["bnf_train/model/attention.py"],  # transformers
    "_no_split_modules": ["bnf_train/training/distributed.py"],
    "_compiled_call_impl": ["bnf_train/training/reference_cache.py"],
    "_prepare_inputs": ["bnf_train/training/trainer.py"],
}
TRAINERS = ["bnf_train/training/resume.py", "bnf_train/training/trainer.py"]  # underscore names of transformers.Trainer


# --- what the code does ------------------------------------------------------------------------------------------------


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text())


@functools.cache
def imported(name: str) -> list[str]:
    """All that a file imports."""
    return list(imports(tree(name)))


def imports(node: ast.AST) -> Iterator[str]:
    """Modules, or names in modules, that are imported anywhere below."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from (alias.name for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, "relative import"
            yield from (f"{part.module}.{alias.name}" for alias in part.names)


@functools.cache
def file_of(module: str) -> str | None:
    """The file of ours that holds a module, or a name in one."""
    for path in (module, module.rpartition(".")[0]):
        for candidate in (f"{path.replace('.', '/')}.py", f"{path.replace('.', '/')}/__init__.py"):
            if candidate in NAMES:
                return candidate
    return None


@functools.cache
def room(name: str) -> str:
    return max((r for r in ROOMS if name.startswith((f"{r}/", f"{r}.py"))), key=len)


@functools.cache
def arrows(name: str) -> set[str]:
    found = {file_of(module) for module in imported(name)}
    return {other for other in found if other is not None and other != name}


# --- the rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_what_its_room_may(name: str) -> None:
    assert room(name)
    if name in [f"bnf_core/{join}.py" for join in JOINS] or Path(name).name.startswith(FIGURES):
        may = [r for r in ROOMS if r.startswith("bnf_core")]
    else:
        may = [r if "/" in r or r == "proofs" else f"bnf_train/{r}" for r in ROOMS[room(name)]] + [room(name)]
    for other in arrows(name):
        assert not other.removesuffix(".py").endswith(COMMANDS), f"{name} imports the command {other}"
        if name.startswith("bnf_train") and other.startswith("bnf_core"):
            continue  # below
        assert room(other) in may, f"{name} imports {other}"
    for module in imported(name):
        top = module.split(".")[0]
        if name.startswith("bnf_core"):
            assert top in CORE_NEEDS or top in OPTIONAL or top in sys.stdlib_module_names, f"{name} imports {module}"
        if name.startswith("bnf_train") and top == "bnf_core":
            assert "._" not in module, f"{name} imports the private {module}"
            assert module.count(".") <= 1, f"{name} imports {module}: take it from bnf_core"


def test_no_circle_and_few_floors() -> None:
    graph = {name: arrows(name) for name in NAMES}
    for name, others in graph.items():  # a package's own file names its parts, and they may say its name
        graph[name] = {o for o in others if not (o.endswith("__init__.py") and name.startswith(o.removesuffix("__init__.py")))}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    floors: dict[str, int] = {}
    for package in ("bnf_core", "bnf_train"):
        between = {
            r: {room(o) for n in NAMES if room(n) == r for o in arrows(n) if o.startswith(package)} - {r}
            for r in ROOMS
            if r.startswith(package)
        }
        for r in graphlib.TopologicalSorter(between).static_order():
            floors[r] = 1 + max((floors[below] for below in between.get(r, ())), default=0)
    assert max(floors.values()) <= MOST_FLOORS, floors


def test_every_room_is_there_and_uses_what_it_may() -> None:
    """The list says no more than the code does."""
    for r, may in ROOMS.items():
        members = [n for n in NAMES if room(n) == r]
        assert members, f"{r} is in the list, and not in the tree"
        used = {room(o) for n in members for o in arrows(n)}
        unused = [m for m in may if (m if "/" in m else f"bnf_train/{m}") not in used]
        assert not unused, f"{r} may import {', '.join(unused)} and does not"


@pytest.mark.parametrize("name", NAMES)
def test_no_file_is_long(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", NAMES)
def test_imports_stand_at_the_top(name: str) -> None:
    if name.endswith(LAZY):
        return
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            late = {module for module in imports(node) if not f"{module}.".startswith(tuple(f"{o}." for o in OPTIONAL))}
            assert not late, f"{name}, {node.name}: imports {', '.join(sorted(late))} inside a function"


def ours() -> set[str]:
    """Names with an underscore that this code defines, or keeps on its own objects."""
    found = set()
    for name in NAMES:
        for node in ast.walk(tree(name)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) in ("self", "cls")
            ):
                found.add(node.attr)
            if isinstance(node, ast.alias):
                found.add(node.name.rpartition(".")[2])
    return found


def private(name: str) -> set[str]:
    """Attributes and modules with a leading underscore that the file uses."""
    text = tree(name)
    used = {node.attr for node in ast.walk(text) if isinstance(node, ast.Attribute)}
    used |= {part for module in imports(text) if not module.startswith("bnf_") for part in module.split(".")}
    for node in ast.walk(text):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            used |= {str(part.value) for part in node.args[1:2] if isinstance(part, ast.Constant)}
    return {u for u in used if re.match(r"_[a-zA-Z]", u)}


def test_private_names_of_others_stand_where_the_list_says() -> None:
    own = ours()
    found: dict[str, set[str]] = {}
    for name in NAMES:
        for used in private(name) - own:
            found.setdefault(used, set()).add(name)
    for used, where in found.items():
        assert where <= set(PRIVATE.get(used, [])), f"{used}: {', '.join(sorted(where - set(PRIVATE.get(used, []))))}"
    assert found.keys() == PRIVATE.keys(), "in the list, and used nowhere"


@pytest.mark.child  # imports transformers
def test_private_methods_of_trainer() -> None:
    from transformers import Trainer

    methods = {m for m in dir(Trainer) if re.match(r"_[a-z]", m)}
    for name in NAMES:
        used = {n.attr for n in ast.walk(tree(name)) if isinstance(n, ast.Attribute)}
        used |= {n.name for n in ast.walk(tree(name)) if isinstance(n, ast.FunctionDef)}
        if name.startswith("bnf_train") and name not in TRAINERS:
            assert not used & (methods - set(PRIVATE)), name


def test_core_imports_nothing_but_itself_and_what_is_light() -> None:
    """On top of torch and numpy: its own modules, jaxtyping with what that needs of numpy, and Python's."""
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import bnf_core\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    assert set(children.run("-c", code).out.split()) <= {"bnf_core", "jaxtyping", "wadler_lindig", "numpy"}
