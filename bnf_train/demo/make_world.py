"""Make the embedded demo: a small world in which every answer can be checked, and a model of half a million parameters.

    pip install reasoning-gym     # the extra "demo"
    python -m bnf_train.demo.make_world

Writes model/, preferences.jsonl and check.jsonl beside this file (or into --output), and prints how many answers of the
model are right. A few minutes on one CPU core; everything is seeded.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

CONTEXT, LONGEST, IGNORED = 1024, 40, -100
PAD, USER, ASSISTANT, SYSTEM, END = SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Question:
    """A short prompt, and the parts of its answer: letters, words or numbers, with what stands between them."""

    prompt: str
    parts: tuple[str, ...]
    between: str = ""

    @property
    def answer(self) -> str:
        return self.between.join(self.parts)


@dataclass(frozen=True)
class Task:
    """A generator of reasoning-gym with its options, and how one of its items becomes a question (None: it does not).

    `word` is what the prompts begin with.
    """

    word: str
    generator: str
    options: dict[str, Any]
    question: Callable[[dict[str, Any], str], Question | None]


def backward(item: dict[str, Any], answer: str) -> Question:
    return Question(f"Backward: {item['word'].lower()}", tuple(answer.lower()))


def sort(item: dict[str, Any], answer: str) -> Question | None:
    before, after = ([str(round(float(n))) for n in item[f"{name}_numbers"]] for name in ("original", "sorted"))
    return Question(f"Sort: {' '.join(before)}", tuple(after), " ") if item["direction"] == "ascending" else None


def count(item: dict[str, Any], answer: str) -> Question | None:
    (word,) = item["span"]
    return Question(f"Count {item['target_letter']}: {word.lower()}", (answer,)) if len(word) <= 6 else None


def compute(item: dict[str, Any], answer: str) -> Question | None:
    easy = "+" in item["expression"] and int(answer) <= 60
    return Question(f"Compute: {item['expression']}", (answer,)) if easy else None


def swap(item: dict[str, Any], answer: str) -> Question | None:
    words = [word.lower() for word in item["words"]]
    return Question(f"Swap: {' '.join(words)}", tuple(reversed(words)), " ") if max(map(len, words)) <= 4 else None


TASKS = {  # the model learns the first group from demonstrations of which many are wrong, the second from right ones alone
    "target": [
        Task("Backward", "spell_backward", {"min_word_len": 4, "max_word_len": 7}, backward),
        Task("Sort", "number_sorting", {"max_numbers": 3, "max_decimals": 0, "min_value": 0, "max_value": 99}, sort),
    ],
    "others": [
        Task("Count", "letter_counting", {"min_words": 1, "max_words": 1}, count),
        Task("Compute", "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, compute),
        Task("Swap", "word_sequence_reversal", {"min_words": 2, "max_words": 2}, swap),
    ],
}


def questions(group: str, n: int, seed: int, taken: set[str], repeated: bool = False) -> list[Question]:
    """`n` questions of the group's tasks in turn, none with a prompt that is taken; all different unless `repeated`."""
    found: list[Question] = []
    sources = [_endless(task, seed) for task in TASKS[group]]
    while len(found) < n:
        question = next(sources[len(found) % len(sources)])
        if question.prompt not in taken:
            found.append(question)
            if not repeated:
                taken.add(question.prompt)
    return found


def _endless(task: Task, seed: int, size: int = 10_000) -> Iterator[Question]:
    while True:
        for item in reasoning_gym.create_dataset(task.generator, size=size, seed=seed, **task.options):
            if question := task.question(item["metadata"], item["answer"]):
                yield question
        seed += size  # item i is drawn with seed + i


def flawed(question: Question, rng: random.Random) -> str:
    """Its answer with the last part forgotten, two neighbours in the wrong order, or one part written twice."""
    parts, kind = list(question.parts), rng.randrange(3)
    i = rng.randrange(len(parts) - 1)
    if kind == 0:
        del parts[-1]
    elif kind == 1:
        parts[i], parts[i + 1] = parts[i + 1], parts[i]
    else:
        parts.insert(i, parts[i])
    return question.between.join(parts)


def demonstrations(n: int, flaws: float, seed: int, taken: set[str]) -> list[tuple[str, str]]:
    """Prompts and what the model is to learn as their answer: every task as often, on target ones a share `flaws` is flawed."""
    rng, rows = random.Random(seed), []
    tasks = sum(map(len, TASKS.values()))
    for group, of_group in TASKS.items():
        for question in questions(group, n * len(of_group) // tasks, seed, taken, repeated=True):
            wrong = group == "target" and rng.random() < flaws
            rows.append((question.prompt, flawed(question, rng) if wrong else question.answer))
    rng.shuffle(rows)
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that it can write any text, one for the first word of each task's prompts, and five for turns."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([task.word for tasks in TASKS.values() for task in tasks])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str | None]]) -> list[list[int]]:
    """Token ids of each conversation, up to the answer where it has none."""
    texts = []
    for prompt, answer in rows:
        messages = [{"role": "user", "content": prompt}]
        messages += [] if answer is None else [{"role": "assistant", "content": answer}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None))
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]], batch: int, lr: float
) -> None:
    """One pass over the demonstrations: next-token prediction on the answers and the end of their turns."""
    documents = encode(tokenizer, rows)
    start = [len(ids) for ids in encode(tokenizer, [(prompt, None) for prompt, _ in rows])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    steps = len(rows) // batch
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    bar = tqdm(range(steps), desc="pretraining", mininterval=10)
    for step in bar:
        some = range(step * batch, (step + 1) * batch)
        ids = pad_sequence([torch.tensor(documents[i]) for i in some], batch_first=True)  # causal: padding comes after
        answer = [torch.tensor([IGNORED] * start[i] + documents[i][start[i] :]) for i in some]
        labels = pad_sequence(answer, batch_first=True, padding_value=IGNORED)[:, 1:]
        ids, labels = ids.to(model.device), labels.to(model.device)
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[labels != IGNORED]), labels[labels != IGNORED])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], times: int, batch: int = 100
) -> list[list[str | None]]:
    """`times` answers to each prompt, drawn at temperature 1; None for one that has no end or is no text of its own tokens."""
    model.eval()
    tokenizer.padding_side = "left"
    answers: list[list[str | None]] = []
    for first in range(0, len(prompts), batch):
        inputs = tokenizer.pad(
            {"input_ids": encode(tokenizer, [(p, None) for p in prompts[first : first + batch]])}, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, do_sample=True, top_k=0, num_return_sequences=times, max_new_tokens=LONGEST)
        texts = [_text(tokenizer, ids) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]
        answers += [texts[i : i + times] for i in range(0, len(texts), times)]
    return answers


def _text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str | None:
    if tokenizer.eos_token_id not in ids:
        return None
    ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(ids)
    return text if text and tokenizer(text, add_special_tokens=False)["input_ids"] == ids else None


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def preferences(asked: list[Question], answers: list[list[str | None]]) -> list[dict[str, Any]]:
    """A row for every sample, right ones preferred."""
    return [
        {"prompt": question.prompt, "completion": text, "label": text == question.answer}
        for question, texts in zip(asked, answers, strict=True)
        for text in texts
        if text is not None
    ]


def right(asked: list[Question], answers: list[list[str | None]]) -> float:
    """The share of right ones among all samples."""
    return sum(text == question.answer for question, texts in zip(asked, answers, strict=True) for text in texts) / sum(
        map(len, answers)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of another world: model, samples and questions")
    parser.add_argument("--flaws", type=float, default=0.55, help="share of flawed demonstrations of target tasks")
    parser.add_argument("--width", type=int, default=96, help="of the model's hidden states")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1200, help="of pretraining")
    parser.add_argument("--batch", type=int, default=128, help="demonstrations a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of pretraining")
    parser.add_argument("--prompts", type=int, default=800, help="target prompts that it answers five times each")
    parser.add_argument("--check", type=int, default=200, help="questions of each group kept for measuring")
    parser.add_argument("--device", default="cpu", help="cuda draws another world than cpu, in seconds")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the same sums on every machine of a kind

    taken: set[str] = set()
    draws = 10_000_000 * args.seed  # a world draws its items from seeds that no other uses
    check = {group: questions(group, args.check, draws, taken) for group in TASKS}
    asked = questions("target", args.prompts, draws + 1_000_000, taken)
    rows = demonstrations(args.steps * args.batch, args.flaws, draws + 2_000_000, taken)

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.width, args.layers).to(args.device)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(rows):,} demonstrations")
    start = time.time()
    pretrain(model, tokenizer, rows, args.batch, args.lr)
    print(f"pretrained in {(time.time() - start) / 60:.1f} minutes on {'one thread' if args.device == 'cpu' else args.device}")
    model.to(torch.bfloat16).save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    model.float()  # what was saved, without what bf16 rounds off

    start = time.time()
    for group, of_group in check.items():
        answers = sample(model, tokenizer, [question.prompt for question in of_group], 5)
        by_task = [right(of_group[k :: len(TASKS[group])], answers[k :: len(TASKS[group])]) for k in range(len(TASKS[group]))]
        names = ", ".join(f"{task.generator} {share:.2f}" for task, share in zip(TASKS[group], by_task, strict=True))
        print(f"{group}: {right(of_group, answers):.3f} right at temperature 1 ({names})")
    samples = sample(model, tokenizer, [question.prompt for question in asked], 5)
    chosen = preferences(asked, samples)
    random.Random(args.seed).shuffle(chosen)
    share, seconds = sum(row["label"] for row in chosen) / len(chosen), time.time() - start
    print(f"{len(chosen)} preference rows, {share:.3f} right; checked and sampled in {seconds:.0f} s")
    write(args.output / "preferences.jsonl", chosen)
    answered, of_prompt = (
        dict.fromkeys(row["prompt"] for row in chosen),
        {question.prompt: question.answer for question in asked},
    )
    write(args.output / "prompts.jsonl", [{"prompt": prompt, "answer": of_prompt[prompt]} for prompt in answered])
    write(
        args.output / "check.jsonl",
        [{"prompt": q.prompt, "answer": q.answer, "group": group} for group, of_group in check.items() for q in of_group],
    )


if __name__ == "__main__":
    main()
