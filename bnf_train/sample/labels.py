"""How good answers are: by a check, or by a reward model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from bnf_train.checks import resolve
from bnf_train.data import Prompt
from bnf_train.errors import UsageError, one_line
from bnf_train.model.load import from_model, load_tokenizer
from bnf_train.sample.answers import Answers

FLAG = "--reward_model"
Label = Callable[[Prompt, Answers], Answers]


def by_check(name: str, prompts: Sequence[Prompt]) -> Label:
    """Answers with how right each is, 0 to 1.

    Raises:
      UsageError: no such check, or a row without what it needs.
    """
    check = resolve(name)
    for prompt in prompts:
        check.check_row(prompt.columns, prompt.where)
    for prompt in prompts[:1]:
        check(prompt.text, "", prompt.columns, prompt.where)  # what always fails does so before anything is drawn

    def label(prompt: Prompt, answers: Answers) -> Answers:
        return replace(answers, values=[check(prompt.text, text, prompt.columns, prompt.where) for text in answers.texts])

    return label


def by_reward(name: str, device: torch.device, trust_remote_code: bool = False) -> Label:
    """Answers with their rewards: a sequence-classification model's one logit of prompt and answer in its own chat template.

    Raises:
      UsageError: the model cannot be had, has no head of one label, or no chat template.
    """
    model = _load(name, trust_remote_code).to(device).eval()
    tokenizer = load_tokenizer(name, trust_remote_code, FLAG)
    if not tokenizer.chat_template:
        raise UsageError(f"{FLAG} {name}: its tokenizer has no chat template, in which it would read prompt and answer.")

    def label(prompt: Prompt, answers: Answers) -> Answers:
        return replace(answers, values=rewards(model, tokenizer, prompt, answers.texts, device))

    return label


@torch.no_grad()
def rewards(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, texts: Sequence[str], device: torch.device
) -> list[float]:
    """The reward of each answer to one prompt.

    Raises:
      UsageError: the chat template refuses the conversation, or a reward is not a finite number.
    """
    messages, tools = prompt.conversation
    try:
        ids = [
            tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": text}], tools=tools, tokenize=True, return_dict=False
            )
            for text in texts
        ]
    except Exception as error:  # templates raise what they like
        raise UsageError(f"{FLAG}: {prompt.where}: its chat template refuses the row ({one_line(error)}).") from error
    pad = model.config.get_text_config().pad_token_id
    # a model without a padding token reads the last token, whatever it is: of one row alone
    batches = [ids] if pad is not None else [[one] for one in ids]
    found = [value for batch in batches for value in _logits(model, batch, pad or 0, device)]
    if wrong := next((value for value in found if not math.isfinite(value)), None):
        raise UsageError(f"{FLAG}: {prompt.where}: expected finite rewards, got {wrong}.")
    return found


def _logits(model: Any, batch: Sequence[Sequence[int]], pad: int, device: torch.device) -> list[float]:
    longest = max(map(len, batch))
    ids = torch.tensor([list(one) + [pad] * (longest - len(one)) for one in batch], device=device)
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in batch], device=device)
    values: list[float] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
    return values


def _load(name: str, trust_remote_code: bool) -> Any:
    model, info = from_model(
        name,
        AutoModelForSequenceClassification.from_pretrained,
        FLAG,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise UsageError(
            f"{FLAG} {name}: its weights lack {missing[0]}, which would be random numbers; expected a sequence-classification "
            "model, as reward models are."
        )
    if model.config.num_labels != 1:
        raise UsageError(f"{FLAG} {name}: expected a model of one label, the reward, got {model.config.num_labels}.")
    return model
