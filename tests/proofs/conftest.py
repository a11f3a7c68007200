"""The proofs are scripts: their folder is put on the path, as running one does."""

import sys
from pathlib import Path

PROOFS = Path(__file__).parents[2] / "proofs"
sys.path.insert(0, str(PROOFS))
