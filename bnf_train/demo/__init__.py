"""The embedded default: a tiny pretrained chat model and 400 rows of preference data (see README.md here)."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
PREFERENCES = Path(__file__).parent / "preferences.jsonl"
PROBE = Path(__file__).parent / "probe.txt"
