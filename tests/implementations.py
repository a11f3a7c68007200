"""The implementations of the head that can run here, as test parameters; one that cannot is skipped with its reason."""

import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest


def available(names: Iterable[str]) -> list[Any]:
    """Without a GPU, Triton's kernels run under its interpreter (conftest.py asks for it) if the package is installed."""
    missing = importlib.util.find_spec("triton") is None
    reason = "triton is not installed (pip install triton)"
    return [pytest.param(n, marks=pytest.mark.skipif(missing, reason=reason)) if n == "triton" else n for n in names]
