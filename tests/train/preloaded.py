"""What processes are forked from: an interpreter of its own, started by multiprocessing, that has imported everything.

It computes nothing: a library's threads are not forked with it, and who waits for one waits forever.
"""

import os

os.environ["TQDM_DISABLE"] = "1"

import matplotlib.pyplot  # noqa: F401
from matplotlib.figure import Figure

import bnf_train.training.trainer  # noqa: F401

Figure.savefig = lambda *_, **__: None  # type: ignore[method-assign]  # rendering takes longer than a run
