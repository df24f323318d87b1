"""Greedy completion: the lab's loop against transformers' generate, on a random model of the small model's size.

The answers of an instruction-following model differ in length. Here stop tokens are common enough that most rows end
early, as they do in the lab, and both sides get the same prompts in the same batches.
"""

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.evaluation.generation import complete

VOCABULARY, PROMPTS, BATCH, NEW_TOKENS = 2048, 256, 64, 24
STOPS = list(range(0, VOCABULARY, 10))


class Words:
    """A stand-in for a tokenizer: every token id is a word."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, tokens))


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=5,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def make_prompts() -> list[list[int]]:
    lengths = torch.randint(12, 40, (PROMPTS,)).tolist()
    return [torch.randint(1, VOCABULARY, (length,)).tolist() for length in lengths]


def with_generate(model: LlamaForCausalLM, prompts: list[list[int]]) -> list[str]:
    prompts, texts = sorted(prompts, key=len, reverse=True), []
    for start in range(0, PROMPTS, BATCH):
        batch = prompts[start : start + BATCH]
        width = len(batch[0])
        tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        written = model.generate(
            tokens,
            attention_mask=(tokens != 0).long(),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=STOPS,
            pad_token_id=0,
        )[:, width:]
        for row in written.tolist():
            end = next((i for i, token in enumerate(row) if token in STOPS), len(row))
            texts.append(Words().decode(row[:end]))
    return texts


def main() -> None:
    model, prompts = make_model(), make_prompts()
    ours = complete(model, Words(), prompts, STOPS, NEW_TOKENS, BATCH)  # also warms both sides up
    theirs = with_generate(model, prompts)
    seconds = {"complete": [], "generate": []}
    for _ in range(3):
        for name, run in (
            ("complete", lambda: complete(model, Words(), prompts, STOPS, NEW_TOKENS, BATCH)),
            ("generate", lambda: with_generate(model, prompts)),
        ):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    same = sum(a == b for a, b in zip(sorted(ours), sorted(theirs), strict=True))
    best = {name: min(times) for name, times in seconds.items()}
    mean = sum(len(text.split()) for text in ours) / PROMPTS
    print(f"{PROMPTS} prompts in batches of {BATCH}, {mean:.1f} of at most {NEW_TOKENS} tokens written, {same} equal")
    print(
        f"complete {best['complete']:.2f} s, generate {best['generate']:.2f} s: "
        f"{best['generate'] / best['complete']:.1f} times as fast"
    )


if __name__ == "__main__":
    main()
