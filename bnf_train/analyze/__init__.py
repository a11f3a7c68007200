"""Figures 3 and 4 of the paper, and displacement, for models of one's own: `python -m bnf_train.analyze`."""
