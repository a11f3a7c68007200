"""A model's log-probabilities of TOFU's answers, right and wrong, and its own greedy ones: all that the metrics are made of."""

import gc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tofu_data import Row
from tofu_metrics import rouge_recall
from transformers import PreTrainedTokenizerBase

from bnf_train import data
from bnf_train.errors import UsageError
from bnf_train.model.attention import attend_varlen, attention_width
from bnf_train.model.generate import greedy_and_sampled
from bnf_train.model.head import attach_log_odds_head
from bnf_train.model.load import load_model
from bnf_train.model.probe import can_pack, can_share_prompts
from bnf_train.model.score import longest_first, score

Set = list[dict[str, Any]]  # the scores of each row, as `tofu_metrics` reads them


class Evaluation:
    """Questions rendered once, asked of any number of models of one architecture.

    Args:
      sets: rows to ask, by name.
      tokenizer: with the chat template.
      most: tokens of the longest sequence.
      max_new_tokens: where a greedy answer is cut.
      questions: in a forward pass, with all their answers.

    Raises:
      UsageError: a row cannot be rendered, or is too long.
    """

    def __init__(
        self, sets: Mapping[str, Sequence[Row]], tokenizer: PreTrainedTokenizerBase, device: torch.device,
        autocast: torch.dtype | None, *, most: int = 512, max_new_tokens: int = 80, questions: int = 8,
    ) -> None:  # fmt: skip
        self.sets = {name: list(rows) for name, rows in sets.items()}
        self.rows = [row for rows in self.sets.values() for row in rows]
        self.tokenizer, self.device, self.autocast = tokenizer, device, autocast
        self.max_new_tokens, self.questions = max_new_tokens, questions
        rules = data.Rules(too_long="error", no_boundary="error", duplicates="keep")
        self.asked, _ = data.tokenize([_with_all_answers(row) for row in self.rows], tokenizer, most, "TOFU", rules)
        self._collator: data.Collator | None = None

    def of_folder(self, folder: str) -> dict[str, Set]:
        """The same of a model on disk, whose memory is free again afterwards."""
        model: Any = load_model(folder)
        attend_varlen(model)
        attach_log_odds_head(model)
        found = self(model.to(self.device))
        del model
        free(self.device)
        return found

    def __call__(self, model: Any) -> dict[str, Set]:
        """By set, of each row {"answer", "paraphrase", "perturbed", "rouge", "said"}.

        Args:
          model: with the log-odds head, on the device.

        Raises:
          UsageError: a log-probability is NaN: training has destroyed the model.
        """
        logps = self._logps(model)
        if not all(math.isfinite(value) for of in logps for value in of):
            raise UsageError("log-probabilities are NaN or infinite: training has destroyed the model.")
        said = self._said(model)
        rouge = rouge_recall([row["answer"] for row in self.rows], said)
        scored = [
            _named(row, of) | {"rouge": share, "said": text}
            for row, of, share, text in zip(self.rows, logps, rouge, said, strict=True)
        ]
        found, at = {}, 0
        for name, rows in self.sets.items():
            found[name] = scored[at : at + len(rows)]
            at += len(rows)
        return found

    def _logps(self, model: Any) -> list[list[float]]:
        """log p of each answer of each row, in the order of `_with_all_answers`."""
        lengths = [sum(len(r.input_ids) for r in row.responses) for row in self.asked]
        places = longest_first(lengths, self.questions)
        batches = [[r for i in batch for r in self.asked[i].responses] for batch in places]
        scored = iter(score(model, batches, self._collate(model), self.device, self.autocast))
        found: dict[int, list[float]] = {}
        for i in (i for batch in places for i in batch):
            found[i] = [float(F.logsigmoid(next(scored).log_odds.double()).mean()) for _ in self.asked[i].responses]
        return [found[i] for i in range(len(self.asked))]

    def _said(self, model: Any) -> list[str]:
        prompts = [row.responses[0].input_ids[: row.responses[0].prompt_length] for row in self.asked]
        found = greedy_and_sampled(
            model, self.tokenizer, prompts, self.device, self.autocast, samples=0, temperature=1.0,
            max_new_tokens=self.max_new_tokens, seed=0, batch_size=512 if self.device.type == "cuda" else 64,
        )  # fmt: skip
        return [str(self.tokenizer.decode(answers[0].tokens, skip_special_tokens=True)) for answers in found]

    def _collate(self, model: Any) -> data.Collator:
        """On a CPU a question is computed once for all its answers, where the architecture can; tried on the first model."""
        if self._collator is None:
            pad = int(self.tokenizer.pad_token_id or 0)
            packed = self.device.type == "cpu" and can_pack(model, self.asked, 1, True, self.device)
            shared = packed and can_share_prompts(model, self.asked, self.device)
            pad = pad if pad < len(model.get_input_embeddings().weight) else 0  # which token pads plays no part
            self._collator = data.Collator(pad, packed, attention_width(model), shared)
        return self._collator


def free(device: torch.device) -> None:
    """Models refer to themselves: their memory comes back by collection alone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _with_all_answers(row: Row) -> Row:
    """A row of bnf_train: the answer, its paraphrase where there is one, then the wrong answers."""
    right = [row["answer"], *([row["paraphrased_answer"]] if row.get("paraphrased_answer") else [])]
    wrong = list(row["perturbed_answer"])
    return {
        "prompt": row["question"],
        "completions": right + wrong,
        "labels": [True] * len(right) + [False] * len(wrong),
    }


def _named(row: Row, logps: Sequence[float]) -> dict[str, Any]:
    right = 2 if row.get("paraphrased_answer") else 1
    paraphrase = {"paraphrase": logps[1]} if right == 2 else {}
    return {"answer": logps[0]} | paraphrase | {"perturbed": list(logps[right:])}
