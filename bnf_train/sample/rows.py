"""Answers as rows of training data, in one of three forms, and what is counted of them."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from bnf_train.data import Prompt
from bnf_train.data.conversations import COLUMNS, MOST_SCORE
from bnf_train.sample.answers import Answers

RIGHT = 0.5  # from this share on an answer counts as right


def rows(prompt: Prompt, answers: Answers, form: str, scored: bool) -> list[dict[str, Any]]:
    """The rows of one prompt. Empty answers are left out; singles and groups keep the other columns of the prompt's row.

    Args:
      form: "singles": prompt, completion, label (or score); "groups": prompt, completions, labels (or scores), one row;
        "pairs": prompt, chosen, rejected: the first of the best and the first of the worst, none where all are alike.
      scored: values are scores; else labels are made of them.

    Example:
      >>> from bnf_train.data import unrendered
      >>> prompt = unrendered([{"prompt": "2 + 2?", "answer": 4}], "prompts.jsonl")[0]
      >>> answers = Answers(["5", "4"], [False, False], 4, [0.0, 1.0])
      >>> rows(prompt, answers, "groups", scored=False)
      [{'prompt': '2 + 2?', 'completions': ['5', '4'], 'labels': [False, True], 'answer': 4}]
      >>> rows(prompt, answers, "pairs", scored=False)
      [{'prompt': '2 + 2?', 'chosen': '4', 'rejected': '5'}]
    """
    places = not_empty(answers)
    texts = [answers.texts[i] for i in places]
    values = None if answers.values is None else [answers.values[i] for i in places]
    labels: list[Any] | None = values if scored or values is None else [value >= RIGHT for value in values]
    asked = _asked(prompt)
    if not texts:
        return []
    if form == "pairs":
        assert values is not None
        best, worst = values.index(max(values)), values.index(min(values))
        return [] if values[best] == values[worst] else [asked | {"chosen": texts[best], "rejected": texts[worst]}]
    name = "score" if scored else "label"
    kept = {column: value for column, value in prompt.columns.items() if column not in COLUMNS}
    if form == "groups":
        return [asked | {"completions": texts} | ({} if labels is None else {f"{name}s": labels}) | kept]
    of_each = [{}] * len(texts) if labels is None else [{name: label} for label in labels]
    return [asked | {"completion": text} | of | kept for text, of in zip(texts, of_each, strict=True)]


def not_empty(answers: Answers) -> list[int]:
    """Places of the answers that say something."""
    return [i for i, text in enumerate(answers.texts) if text.strip()]


def _asked(prompt: Prompt) -> dict[str, Any]:
    """The columns that hold the prompt: text where it is a text in the data, else messages, system and tools with them."""
    messages, tools = prompt.conversation
    plain = len(messages) == 1 and messages[0] == {"role": "user", "content": prompt.text}
    given: Any = prompt.text if plain and not isinstance(prompt.columns.get("prompt"), list) else messages
    return {"prompt": given} | ({"tools": tools} if tools else {})


def sentences(found: Sequence[Answers], written: int, form: str, scored: bool, max_new_tokens: int) -> list[str]:
    """What there is to say of all answers, a sentence a line."""
    texts = sum(len(answers.texts) for answers in found)
    cut, empty = sum(sum(a.cut) for a in found), sum(len(a.texts) - len(not_empty(a)) for a in found)
    tokens = [answers.tokens for answers in found if answers.tokens is not None]
    mean = f", {sum(tokens) / texts:.1f} tokens on average" if len(tokens) == len(found) else ""
    lines = [f"{len(found):,} prompts, {texts:,} answers{mean}; {cut:,} cut at --max_new_tokens {max_new_tokens}."]
    if cut:
        lines.append(
            "Trained on, an answer that was cut ends with an end of turn that the model did not say: raise it if many."
        )
    if empty:
        lines.append(f"{empty:,} empty answers left out.")
    values = [value for answers in found for value in answers.values or ()]
    if values and scored:
        lines.append(
            f"Scores from {min(values):.3g} to {max(values):.3g}, {fmean(values):.3g} on average; above 0 is preferred."
        )
        if min(values) >= 0 or max(values) <= 0:
            lines.append("All scores have one sign: --score_center mean counts them from the mean of their prompt in training.")
        if max(map(abs, values)) > MOST_SCORE and form != "pairs":
            lines.append(f"Scores beyond {MOST_SCORE} cannot be trained on: scale them down, or sample with --form pairs.")
    elif values:
        right = sum(value >= RIGHT for value in values)
        of_prompt = [[value >= RIGHT for value in answers.values or ()] for answers in found]
        lines.append(
            f"{right:,} right ({right / len(values):.1%}); of {sum(map(all, of_prompt)):,} prompts all answers are right, of "
            f"{sum(not any(of) for of in of_prompt):,} none."
        )
    elif form != "pairs":
        lines.append("No labels: the rows cannot be trained on as they are; add label or score, or sample with --check NAME.")
    if form == "pairs" and written < len(found):
        lines.append(f"{len(found) - written:,} prompts whose answers are all alike left out.")
    return lines
