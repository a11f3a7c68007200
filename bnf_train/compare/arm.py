"""One arm of a comparison: a run of bnf_train, and what is measured beside its held-out metrics."""

import json
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from bnf_train.config import BNFConfig
from bnf_train.data import Collator, Response, Row
from bnf_train.errors import UsageError
from bnf_train.flags import parse
from bnf_train.model.generate import generate
from bnf_train.model.score import score
from bnf_train.run import run

GIB = 2**30


@dataclass(frozen=True)
class Measures:
    """What every arm of a comparison measures.

    Attributes:
      probe: a text file, paragraphs between blank lines: the text outside the preference data; None: there is none.
      responses: how many held-out prompts are answered, greedily.
      max_new_tokens: where an answer is cut.
      keep_model: whether the arm's weights stay on disk.
      pages: whether each arm has a report of its own.
    """

    probe: Path | None
    responses: int = 8
    max_new_tokens: int = 256
    keep_model: bool = False
    pages: bool = True


def train_arm(arguments: Sequence[str], measures: Measures, before: bool) -> dict[str, Any]:
    """Trains with the flags of `python -m bnf_train` and returns what came out, ready for JSON.

    Args:
      before: measure the starting point, too: it is that of all arms with this seed.
    """
    config = parse(arguments)
    config.eval_on_start = before
    texts = paragraphs(measures.probe)
    beside = _Beside(texts, measures if before else None)
    trainer = run(config, callbacks=[beside], ask_before=before, leave="all" if measures.pages else "metrics")
    if not trainer.eval_dataset:
        raise UsageError("--eval_size 0: nothing is held out, so there is nothing to compare; leave it out.")
    history = trainer.state.log_history
    last = {key: value for log in history for key, value in log.items()}
    speeds = [log["tokens_per_second"] for log in history if "tokens_per_second" in log]
    result = {
        "steps": trainer.state.global_step,
        "curve": [
            {"step": log["step"]} | {k: v for k, v in log.items() if k.startswith("eval_")} | beside.at(log["step"])
            for log in history
            if "eval_loss" in log
        ],
        "losses": [log["loss"] for log in history if "loss" in log],
        "before": beside.answers,
        "after": answers(trainer.model, trainer.processing_class, trainer.eval_dataset, config, measures),
        "right": json.loads((Path(str(config.output_dir)) / "metrics.json").read_text()).get("right", {}),
        "train_seconds": last["train_runtime"],
        "tokens_per_second": median(speeds) if speeds else None,
        "peak_gib": _peak(config) / GIB,
    }
    if not measures.keep_model:
        for path in Path(str(config.output_dir)).glob("*.safetensors"):
            path.unlink()
    return result


class _Beside(TrainerCallback):
    """Perplexity on the probe at every evaluation, and the starting point's answers."""

    def __init__(self, texts: Sequence[str], measures: Measures | None) -> None:
        self.texts, self.measures = texts, measures
        self.perplexities: dict[int, float] = {}
        self.answers: list[dict[str, Any]] | None = None

    def at(self, step: int) -> dict[str, float]:
        return {"probe_perplexity": self.perplexities[step]} if self.texts else {}

    def on_evaluate(
        self, args: BNFConfig, state: Any, control: Any, model: Any, processing_class: Any, eval_dataloader: Any, **kwargs: Any
    ) -> None:
        if self.texts and state.global_step not in self.perplexities:
            self.perplexities[state.global_step] = perplexity(model, processing_class, self.texts, args)
        if self.measures is not None and state.global_step == 0:
            self.answers = answers(model, processing_class, eval_dataloader.dataset, args, self.measures)


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], config: BNFConfig, batch_size: int = 8
) -> float:
    """exp(mean over tokens of -log pi) of plain texts, each from its own beginning; a text's first token is not predicted."""
    ids: list[list[int]] = [tokenizer(text, truncation=True, max_length=config.max_length)["input_ids"] for text in texts]
    responses = [Response(x, 1, True) for x in ids if len(x) > 1]
    if not responses:
        raise UsageError("--probe: expected paragraphs of more than one token.")
    batches = [responses[start : start + batch_size] for start in range(0, len(responses), batch_size)]
    scored = score(model, batches, Collator(int(tokenizer.pad_token_id or 0)), config.device, _autocast(config))
    return float((-F.logsigmoid(torch.cat([s.log_odds for s in scored]).double()).mean()).exp())


def answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], config: BNFConfig, measures: Measures
) -> list[dict[str, Any]]:
    """Greedy answers to the first distinct prompts: {"prompt", "answer", "tokens"}, the end-of-turn token counted."""
    prompts = list(dict.fromkeys(tuple(r.input_ids[: r.prompt_length]) for row in rows for r in row.responses))
    prompts = prompts[: measures.responses]
    if not prompts:
        return []
    longest = max(map(len, prompts))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = measures.max_new_tokens if context is None else min(measures.max_new_tokens, context - longest)
    if room < 1:
        raise UsageError(f"--max_length {config.max_length}: a prompt of {longest} tokens leaves no room for an answer.")
    found = generate(model, tokenizer, prompts, config.device, _autocast(config), max_new_tokens=room)
    return [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "answer": tokenizer.decode(answer.tokens, skip_special_tokens=True),
            "tokens": len(answer.tokens),
        }
        for prompt, answer in zip(prompts, found, strict=True)
    ]


def _autocast(config: BNFConfig) -> torch.dtype | None:
    return torch.bfloat16 if config.bf16 else None


def paragraphs(path: Path | None) -> list[str]:
    """The paragraphs of a text file; none of None.

    Raises:
      UsageError: no such file, or nothing in it.
    """
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--probe {path}: expected a text file, got {' '.join(str(error).split())}.") from error
    found = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    if not found:
        raise UsageError(f"--probe {path}: expected paragraphs of text between blank lines, found none.")
    return found


def _peak(config: BNFConfig) -> float:
    """Bytes: of the GPU, or of this process on a CPU."""
    if config.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(config.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
