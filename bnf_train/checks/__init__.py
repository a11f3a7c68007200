"""Is an answer right? A check says so of one answer; `summary` says how many are, with intervals."""

from bnf_train.checks.builtin import last_number
from bnf_train.checks.estimate import (
    ALL,
    GREEDY,
    SAMPLED,
    Asked,
    bootstrap,
    by_group,
    change,
    log_values,
    pass_at_k,
    student,
    summary,
)
from bnf_train.checks.find import Check, resolve

__all__ = [
    "ALL",
    "GREEDY",
    "SAMPLED",
    "Asked",
    "Check",
    "bootstrap",
    "by_group",
    "change",
    "last_number",
    "log_values",
    "pass_at_k",
    "resolve",
    "student",
    "summary",
]
