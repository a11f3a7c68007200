"""Figures 3 and 4 of the paper for models of one's own: `python -m bnf_train.analyze`."""
