"""Rows of preference data that the tests train on: pairs and single responses."""

PAIRS = [
    {"prompt": f"What is {a} + {a}?", "chosen": f"It is {2 * a}.", "rejected": "I do not know" + "." * a} for a in range(1, 9)
]
SINGLES = [
    {"prompt": f"What is {a} + {a}?", "completion": f"It is {2 * a + a % 3}." + "!" * a, "label": a % 3 == 0}
    for a in range(1, 13)
]
