"""Every example in a docstring of bnf_core is run."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil

import pytest

import bnf_core

MODULES = ["bnf_core", *(m.name for m in pkgutil.walk_packages(bnf_core.__path__, "bnf_core."))]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    if name.endswith(".triton") and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton)")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_callable_has_an_example() -> None:
    public = [getattr(bnf_core, n) for n in bnf_core.__all__] + [
        getattr(bnf_core.reference, n) for n in bnf_core.reference.__all__
    ]
    for item in public:
        if inspect.isfunction(item) or inspect.isclass(item):
            assert ">>>" in (item.__doc__ or ""), item.__name__
