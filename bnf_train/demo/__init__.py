"""The embedded default: a tiny chat model, its own answers to short tasks, questions to measure it on (see README.md here)."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
PREFERENCES = Path(__file__).parent / "preferences.jsonl"  # prompt, completion, label
CHECK = Path(__file__).parent / "check.jsonl"  # prompt, answer, group: never trained on
PROMPTS = Path(__file__).parent / "prompts.jsonl"  # prompt, answer: what the rows of PREFERENCES answer
