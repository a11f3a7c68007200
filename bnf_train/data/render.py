"""Conversations to token ids with the model's chat template, and a look at what is trained on."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from bnf_train.data.conversations import Message
from bnf_train.data.rows import Row
from bnf_train.errors import UsageError, one_line


class Rendered(NamedTuple):
    """Prompt and one response as token ids; `prompt_length` is None where the prompt is no token prefix of the whole."""

    input_ids: list[int]
    prompt_length: int | None
    rewritten: bool  # the template wrote something else than the response's text


class Renderer:
    """Conversations to token ids, a batch at a time.

    The template alone says which special tokens there are, so a BOS that it writes is not doubled. A response ends with
    its end-of-turn token, which is added where the template has none.

    Raises:
      UsageError: the tokenizer has no chat template or no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise UsageError(f"{name}: the tokenizer has no chat template; use an instruction-tuned model.")
        if tokenizer.eos_token_id is None:
            raise UsageError(f"{name}: the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json.")
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)
        self._blank: dict[int, bool] = {}

    def text(self, messages: list[Message], where: str, generate: bool = False) -> str:
        """The conversation as one text, special tokens included."""
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # templates raise errors of their own, and Jinja's
            raise UsageError(f"{where}: the model's chat template refuses this conversation ({one_line(error)}).") from error
        return text

    def __call__(self, conversations: Sequence[tuple[list[Message], list[Message], str]]) -> list[list[Rendered]]:
        """For each (prompt, responses, where), its responses."""
        if not conversations:
            return []  # the tokenizer takes no empty batch
        prompts = [self.text(prompt, where, generate=True) for prompt, _, where in conversations]
        wholes = [[self.text([*prompt, side], where) for side in sides] for prompt, sides, where in conversations]
        ids = iter(self._ids([*prompts, *(text for texts in wholes for text in texts)]))
        starts = [next(ids) for _ in prompts]
        return [
            [self._response(start, next(ids), side["content"], text) for side, text in zip(sides, texts, strict=True)]
            for start, texts, (_, sides, _) in zip(starts, wholes, conversations, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return [self._one_bos(ids) for ids in encoded["input_ids"]]

    def _one_bos(self, ids: list[int]) -> list[int]:
        """Data that were rendered before begin with a BOS of their own, behind the template's."""
        bos = self.tokenizer.bos_token_id
        doubled = 0
        while bos is not None and ids[doubled : doubled + 2] == [bos, bos]:
            doubled += 1
        return ids[doubled:]

    def _response(self, start: list[int], whole: list[int], content: str, text: str) -> Rendered:
        if not start or whole[: len(start)] != start:
            return Rendered(whole, None, False)
        _, found, after = text.rpartition(content.strip())
        end = self._end_of_turn(whole, len(start), closed=not found or bool(after.strip()))
        ids = [*whole, self.eos] if end is None else whole[:end]
        return Rendered(ids, len(start), not found)

    def _end_of_turn(self, ids: list[int], start: int, closed: bool) -> int | None:
        """One past the token that ends the response; behind it stand special tokens and white space at most.

        That is the EOS (the first, where the data bring one of their own), else what the template closes the turn with:
        gemma's <end_of_turn> is not its EOS. None where there is neither.
        """
        first_eos = last_special = None
        for i in range(len(ids) - 1, start - 1, -1):
            if ids[i] == self.eos:
                first_eos = i + 1
            elif ids[i] not in self.special and not self._is_blank(ids[i]):
                break
            if closed and last_special is None and ids[i] in self.special:
                last_special = i + 1
        return last_special if first_eos is None else first_eos

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self.tokenizer.decode([token])).strip()
        return self._blank[token]


# --- a look at it ----------------------------------------------------------------------------------------------------

LONGEST_SHOWN = 1200  # characters of a prompt or response


def show(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print rows as the model sees them: what the loss sees stands in ⟦ ⟧ and in colour, the prompt is dim."""
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
            text.append(f"⟦{_printable(tokenizer, ids[start:])}⟧", colour)
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
