"""A look at what is trained on."""

from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from bnf_train.data.rows import Row

LONGEST_SHOWN = 1200  # characters of a prompt or response


def show(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print rows as the model sees them: what the loss sees stands in ⟦ ⟧ and in colour, the prompt is dim.

    What does not count 1 is followed by what it counts, as in ⟦…⟧ times 0.5.
    """
    for row in rows:
        prompt_shown = False
        for response in row.responses:
            ids, start = response.input_ids, response.prompt_length
            label, colour = ("preferred", "green") if response.preferred else ("dispreferred", "red")
            text = Text()
            if not prompt_shown:
                title = f"Row {row.number}: {start} prompt tokens, which are not in the loss; the response in ⟦ ⟧ is"
                text.append(title + "\n", "bold").append(_printable(tokenizer, ids[:start]) + "\n", "dim")
                prompt_shown = True
            text.append(f"{label}, {response.tokens} tokens: ", "bold")
            weights = response.weights or [1.0] * (len(ids) - start)
            for weight, run in groupby(zip(ids[start:], weights, strict=True), key=lambda token: token[1]):
                part = _printable(tokenizer, [token for token, _ in run])
                times = "" if weight == 1 else f"×{weight:g}"  # noqa: RUF001
                text.append(f"⟦{part}⟧{times}" if weight else part, colour if weight else "dim")
            encoding = console.encoding  # a terminal that cannot show a character shows ?
            text.plain = text.plain if encoding == "utf-8" else text.plain.encode(encoding, "replace").decode(encoding)
            console.print(text)
        console.print()


def _printable(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = str(tokenizer.decode(ids))
    if len(text) > LONGEST_SHOWN:
        half = LONGEST_SHOWN // 2
        text = f"{text[:half]} … ({len(text) - 2 * half:,} characters) … {text[-half:]}"
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
