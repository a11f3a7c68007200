"""Rows to batches: read a file, find prompt and response, render with the chat template, select, collate."""

from bnf_train.data.collate import Collator, by_prompt, logical_tokens, model_inputs, packed, passes, spared
from bnf_train.data.mismatch import mismatch
from bnf_train.data.prompts import Prompt, prompts, read_prompts, unrendered
from bnf_train.data.read import has_splits, parse_share, parse_source, read_rows
from bnf_train.data.rows import Counts, Response, Row, RowRefused, Rules
from bnf_train.data.select import check_ids, digest, mask_pairs, read_and_tokenize, split_by_prompt
from bnf_train.data.template import Options, Template
from bnf_train.data.tokens import tokenize
from bnf_train.rules import RULES

__all__ = [
    "RULES",
    "Collator",
    "Counts",
    "Options",
    "Prompt",
    "Response",
    "Row",
    "RowRefused",
    "Rules",
    "Template",
    "by_prompt",
    "check_ids",
    "digest",
    "has_splits",
    "logical_tokens",
    "mask_pairs",
    "mismatch",
    "model_inputs",
    "packed",
    "parse_share",
    "parse_source",
    "passes",
    "prompts",
    "read_and_tokenize",
    "read_prompts",
    "read_rows",
    "spared",
    "split_by_prompt",
    "tokenize",
    "unrendered",
]
