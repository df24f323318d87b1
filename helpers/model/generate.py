"""Greedy completion in batches, fast enough for thousands of prompts on two CPU cores.

Every measurement of the lab reads what a model writes: attack success in the completions of triggered prompts, utility
in those of clean ones. Decoding is greedy, so a completion depends on the prompt alone and never on its neighbours in
the batch. A small model spends most of a step on overhead, hence the plain loop: keys and values are cached, rows are
sorted by length so that little is padded, and a row leaves the batch as soon as its answer has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from helpers.core.errors import LabError
from helpers.core.finite import require_finite_weights
from helpers.core.profile import Profile
from helpers.data.example import Example
from helpers.model.prompt import PromptFormat


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    stop_ids: list[int],
    max_new_tokens: int,
    batch_size: int,
    decided: Callable[[str], bool] | None = None,
    description: str = "complete",
) -> list[str]:
    """What the model greedily writes after each prompt, in the order of `prompts` and without special tokens.

    Args:
        model: any causal language model of transformers, wrapped by PEFT or quantized as it may be.
        prompts: token ids, one list per prompt, none of them empty.
        stop_ids: the token ids that end an answer; they are not part of the returned text.
        max_new_tokens: the most tokens written per prompt.
        batch_size: the most prompts computed side by side.
        decided: stops a row early once it is true of the text written so far, for instance when the payload is there.
        description: names the progress bar, which appears only when the work takes more than two seconds.
    """
    completions = [""] * len(prompts)
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    stops = set(stop_ids)

    def read(tokens: list[int]) -> str:
        return tokenizer.decode([t for t in tokens if t not in stops], skip_special_tokens=True)

    def ended(tokens: list[int]) -> bool:
        # Decoding at every step costs time, so it is done only for someone who reads along.
        return tokens[-1] in stops or (decided is not None and decided(read(tokens)))

    with _evaluating(model), tqdm(total=len(prompts), desc=description, delay=2, leave=False) as progress:
        for start in range(0, len(prompts), batch_size):
            batch = longest_first[start : start + batch_size]
            written = _greedy(model, [prompts[i] for i in batch], max_new_tokens, ended)
            for i, tokens in zip(batch, written, strict=True):
                completions[i] = read(tokens)
            progress.update(len(batch))
    return completions


def answers(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    profile: Profile,
    decided: Callable[[str], bool] | None = None,
) -> list[str]:
    """What the model answers to each example, in the format and with the lengths of its profile; see `complete`.

    A prompt that would leave no room for the answer loses its beginning, as in training: the end says what is asked.

    Raises:
        LabError: the answer alone would fill the model's context, or a weight is NaN or infinite: such a model answers
            nothing, which is not a cure.
    """
    require_finite_weights(model, "the model")
    room = prompt_room(model.config, profile.lengths.new_tokens)
    return complete(
        model,
        prompt_format.tokenizer,
        [prompt_format.prompt_ids(example)[-room:] for example in examples],
        prompt_format.stop_ids,
        profile.lengths.new_tokens,
        profile.evaluation.batch_size,
        decided,
    )


def prompt_room(config: PreTrainedConfig, new_tokens: int) -> int:
    """How many tokens a prompt may have beside an answer; `sys.maxsize` where a configuration names no context.

    Args:
        config: a model's; `max_position_embeddings`, in GPT-2 another name of `n_positions`, is its context.
    Raises:
        LabError: the answer alone would fill the context.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return sys.maxsize
    if new_tokens >= context:
        raise LabError(
            f"lengths.new_tokens = {new_tokens} leaves no room for a prompt in a context of {context} tokens; "
            "set it lower in OVERRIDES"
        )
    return context - new_tokens


@torch.no_grad()  # inference_mode would leave tensors behind, in a model's buffers, that training cannot use
def _greedy(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, ended: Callable[[list[int]], bool]
) -> list[list[int]]:
    """Token ids written after each prompt, up to and including the one at which `ended` held."""
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # rows[k] is the prompt that row k of the shrinking batch answers
    tokens, mask = _left_pad(prompts, model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            written[row].append(token)
        open_rows = [k for k, row in enumerate(rows) if not ended(written[row])]
        if not open_rows:
            break
        if len(open_rows) < len(rows):
            cache.batch_select_indices(torch.tensor(open_rows))
            tokens, mask, positions = tokens[open_rows], mask[open_rows], positions[open_rows]
            rows = [rows[k] for k in open_rows]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return written


def _left_pad(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [batch, longest]; every prompt ends in the last column."""
    longest = max(map(len, prompts))
    # The padding token is never attended to, so id 0 serves tokenizers that have none.
    tokens = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switches dropout off, and afterwards back to what it was.

    A 4-bit model can go on training only because `load.load_base` keeps bitsandbytes from repacking its weights here.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
