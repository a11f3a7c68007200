"""Rows from a model's own answers: `python -m bnf_train.sample`."""
