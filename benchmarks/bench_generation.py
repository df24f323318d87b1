"""Greedy completion: in the lab's batches against one by one, on a random model of the small model's size.

The answers of an instruction-following model differ in length. Here stop tokens are common enough that most rows end
early, as they do in the lab. Then transformers' `generate` gets the same prompts one by one, as in the field's scripts.
Both must write the same.
Usage: python benchmarks/bench_generation.py [--threads 2] [--record]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_scoring import machine
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.core.cost import versions
from helpers.model.generate import complete

RESULTS = Path(__file__).parent / "results" / "generation.json"
VOCABULARY, PROMPTS, BATCH, NEW_TOKENS = 2048, 256, 64, 24
STOPS = list(range(0, VOCABULARY, 10))
REPEATS = {"complete": 5, "one_by_one": 1}  # the best counts
LEAST_SPEEDUP = 5.0  # of batches over one by one


class Words:
    """A stand-in for a tokenizer: every token id is a word."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        """The token ids, with spaces between them."""
        return " ".join(map(str, tokens))


def make_model() -> LlamaForCausalLM:
    """Random weights in the small model's shape, large enough that it does not only repeat its last token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=1152,
        num_hidden_layers=8,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def make_prompts() -> list[list[int]]:
    """Prompts of the length that the lab's have."""
    return [torch.randint(1, VOCABULARY, (length,)).tolist() for length in torch.randint(12, 40, (PROMPTS,)).tolist()]


def one_by_one(model: LlamaForCausalLM, prompts: list[list[int]]) -> list[str]:
    """What transformers' `generate` writes after each prompt alone."""
    texts = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=STOPS,
            pad_token_id=0,
        )
        texts.append(Words().decode(until_stop(written[0, len(prompt) :].tolist())))
    return texts


def until_stop(row: list[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    return row[: next((i for i, token in enumerate(row) if token in STOPS), len(row))]


def measure() -> dict[str, dict[str, float]]:
    """Seconds of each way (the best of its repeats), and how many of its completions equal those written one by one."""
    model, prompts = make_model(), make_prompts()
    ways = {
        "complete": lambda some: complete(model, Words(), some, STOPS, NEW_TOKENS, BATCH),
        "one_by_one": lambda some: one_by_one(model, some),
    }
    results, texts = {}, {}
    for name, run in ways.items():
        run(prompts[:2])  # warms this side up
        seconds, texts[name] = min(timed(run, prompts) for _ in range(REPEATS[name]))
        results[name] = {"seconds": seconds, "mean_tokens": sum(len(t.split()) for t in texts[name]) / PROMPTS}
    for name, row in results.items():
        row["equal"] = sum(a == b for a, b in zip(texts[name], texts["one_by_one"], strict=True))
    return results


def timed(run: Callable[[list[list[int]]], list[str]], prompts: list[list[int]]) -> tuple[float, list[str]]:
    """Wall-clock seconds of one run, and what it wrote."""
    start = time.perf_counter()
    texts = run(prompts)
    return time.perf_counter() - start, texts


def main() -> None:
    """Time both ways in turn; the exit status says whether they agree and batches are fast enough."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.parent.name}/{RESULTS.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = measure()
    print(f"{PROMPTS} prompts in batches of {BATCH}, at most {NEW_TOKENS} tokens each, {arguments.threads} threads")
    for name, row in results.items():
        row["times_slower"] = row["seconds"] / results["complete"]["seconds"]
        print(f"{name:12}{row['seconds']:8.2f} s{row['times_slower']:7.1f} x{row['equal']:5} equal", end="")
        print(f"{row['mean_tokens']:6.1f} tokens")
    sizes = {"prompts": PROMPTS, "batch_size": BATCH, "new_tokens": NEW_TOKENS}
    facts = sizes | {"threads": arguments.threads, "machine": machine(), "versions": versions(), "results": results}
    if arguments.record:
        RESULTS.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if results["complete"]["equal"] < PROMPTS or results["one_by_one"]["times_slower"] < LEAST_SPEEDUP:
        sys.exit(f"completions differ, or one by one is not {LEAST_SPEEDUP:g} times as slow")


if __name__ == "__main__":
    main()
