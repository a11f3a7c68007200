"""Rounds of sampling, checking and training: `python -m bnf_train.rounds`."""
