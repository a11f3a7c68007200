"""Settings of every test: shapes checked as written, Hypothesis reproducible in CI, slow tests off by default."""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["children"]  # what compiles or forks runs in a process of its own
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels on the CPU, before anything imports them
os.environ["HF_HUB_OFFLINE"] = "1"  # a test never waits for a network
# one thread, in children too: sums in one order, and where others use the cores none waits in vain for another's share
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# annotations like Float[Tensor, "tokens dim"] are checked on every call
jaxtyping.install_import_hook("bnf_core", "beartype.beartype")


def _import_unchecked(name: str) -> None:
    """A module with Triton kernels as it stands: triton.jit reads a function's source, not a wrapper's."""
    found = importlib.util.find_spec(name)  # a copy of the library, where it is one that is tested
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location(name, found.origin)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if importlib.util.find_spec("triton") is not None:
    _import_unchecked("bnf_core.head.triton")

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("dev", max_examples=100, **common)
settings.register_profile("ci", max_examples=40, derandomize=True, print_blob=True, **common)
settings.register_profile("quick", max_examples=25, derandomize=True, **common)  # for mutate.py
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage, of which every run makes some, looks at it again."""
    gc.collect()
    gc.freeze()


# files of few and long tests: begun first, so that no worker waits for them at the end
LONG = (
    "gpu_kernels",
    "plan",
    "distributed",
    "compare",
    "rounds",
    "trainer",
    "resume",
    "head_sizes",
    "examples",
    "children",
    "every_objective",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(LONG)))  # stable: files stay whole
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where there is a GPU, what tests an implementation for GPUs makes its tensors there."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    on_gpu = parameters.get("implementation") == "triton" and torch.cuda.is_available()
    torch.set_default_device("cuda" if on_gpu else None)
    yield
    torch.set_default_device(None)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """For bad input: the library's own checks answer, as they do for a user, not the annotations' at test time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
