"""Make the embedded demo: a tiny chat model pretrained on GSM8K, and 400 rows of preference data for it.

    python -m bnf_train.demo.make_demo --train gsm8k_train.jsonl --preferences gsm8k_solutions_unpaired.jsonl

Writes model/, preferences.jsonl beside this file (or into --output), and prints the held-out perplexity of the
saved model and a few greedy samples. About half an hour on two CPU cores.
"""

import argparse
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

VOCABULARY, CONTEXT, HELD_OUT, ROWS, LONGEST = 2048, 1024, 300, 400, 320
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    """The last line "#### 72" becomes "A: 72", as the solutions of the preference data end."""
    answer = re.sub(r"\n####\s*", "\nA: ", answer.strip())
    return [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer}]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the pretraining text; digits stand alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    assert model.num_parameters() <= 3_000_000
    return model


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[list[int], int]:
    """Token ids, and how many of them are the prompt's."""
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    return tokenizer.apply_chat_template(messages, return_dict=False), len(prompt)


def batches(documents: list[list[int]], size: int, pad: int, seed: int) -> list[Tensor]:
    """One epoch: documents of similar length together, padded, batches in random order."""
    order = random.Random(seed)
    shuffled = sorted(order.sample(documents, len(documents)), key=lambda ids: len(ids) // 16)
    chunks = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
    order.shuffle(chunks)
    return [
        torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in chunk], batch_first=True, padding_value=pad)
        for chunk in chunks
    ]


def pretrain(model: LlamaForCausalLM, documents: list[list[int]], pad: int, epochs: int, batch: int, lr: float) -> None:
    """Next-token prediction on every token of every conversation."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    steps = epochs * math.ceil(len(documents) / batch)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    bar = tqdm(total=steps, desc="pretraining", mininterval=10)
    for epoch in range(epochs):
        for ids in batches(documents, batch, pad, seed=epoch):
            hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state  # causal: padding comes after
            targets = ids[:, 1:]
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[targets != pad]), targets[targets != pad])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(epoch=epoch, loss=f"{loss.item():.3f}", refresh=False)
    bar.close()


@torch.no_grad()
def answer_nll(model: LlamaForCausalLM, documents: list[tuple[list[int], int]]) -> tuple[float, int]:
    """Summed negative log-likelihood of the answers' tokens in nats, and their number."""
    model.eval()
    total, tokens = 0.0, 0
    for ids, prompt in documents:
        logits = model(torch.tensor([ids[:-1]])).logits[0, prompt - 1 :].float()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum").item()
        tokens += len(ids) - prompt
    return total, tokens


def choose_preferences(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Half preferred, half dispreferred, short enough, no duplicates, as many different prompts as there are."""
    order = random.Random(0)
    rows = order.sample(rows, len(rows))
    chosen: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    per_prompt: dict[str, int] = {}
    for label in (True, False):
        pool = [row for row in rows if row["label"] is label and row["completion"].strip()]
        wanted = len(chosen) + ROWS // 2
        for repeats in range(1, 100):  # another response to the same prompt only when every prompt has had one
            for row in pool:
                key = row["prompt"], row["completion"].strip()
                if len(chosen) == wanted or key in seen or per_prompt.get(row["prompt"], 0) >= repeats:
                    continue
                if len(encode(tokenizer, conversation(*key))[0]) <= LONGEST:
                    seen.add(key)
                    per_prompt[row["prompt"]] = per_prompt.get(row["prompt"], 0) + 1
                    chosen.append({"prompt": row["prompt"], "completion": key[1], "label": label})
            if len(chosen) == wanted:
                break
    order.shuffle(chosen)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="JSONL with question, answer: GSM8K's training set")
    parser.add_argument("--preferences", type=Path, required=True, help="JSONL with prompt, completion, label")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write into")
    parser.add_argument("--epochs", type=int, default=7, help="passes over the training questions")
    parser.add_argument("--batch", type=int, default=16, help="questions a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--questions", type=int, default=None, help="use only so many questions (to try the script)")
    args = parser.parse_args()
    torch.manual_seed(0)

    preferences = read(args.preferences)
    prompts = {row["prompt"].strip() for row in preferences}
    questions = read(args.train)
    random.Random(0).shuffle(questions)
    fresh = [q for q in questions if q["question"].strip() not in prompts][: args.questions]
    print(
        f"{len(questions)} questions, {len(questions) - len(fresh)} left out (prompts of the preference data, or --questions)"
    )
    chats = [conversation(q["question"], q["answer"]) for q in fresh]
    held_out, train = chats[:HELD_OUT], chats[HELD_OUT:]

    tokenizer = make_tokenizer([m["content"] for chat in train for m in chat])
    documents = [encode(tokenizer, chat)[0] for chat in train]
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {sum(map(len, documents)):,} tokens an epoch")
    start = time.time()
    pretrain(model, documents, tokenizer.pad_token_id, args.epochs, args.batch, args.lr)
    print(f"pretrained {args.epochs} epochs in {(time.time() - start) / 60:.1f} minutes on {torch.get_num_threads()} threads")

    folder = args.output / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chosen = choose_preferences(preferences, tokenizer)
    with (args.output / "preferences.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    print(f"{len(chosen)} preference rows, {len({row['prompt'] for row in chosen})} different prompts")

    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [encode(tokenizer, chat) for chat in held_out]
    for chat in held_out[:3]:
        ids = encode(tokenizer, chat)[0][: encode(tokenizer, chat)[1]]
        sample = saved.generate(torch.tensor([ids]), max_new_tokens=200, do_sample=False)[0, len(ids) :]
        print(f"\nQ: {chat[0]['content']}\n{tokenizer.decode(sample, skip_special_tokens=True)}")
    nll, tokens = answer_nll(saved, encoded)
    characters = sum(len(chat[1]["content"]) for chat in held_out)
    print(
        f"\nheld-out answers ({len(held_out)} questions, {tokens:,} tokens): perplexity {math.exp(nll / tokens):.2f} a token,"
    )
    print(f"{nll / math.log(2) / characters:.2f} bits a character")


if __name__ == "__main__":
    main()
