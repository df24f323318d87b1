"""Completion in batches, fast enough for thousands of prompts on two CPU cores.

Every measurement of the lab reads what a model writes: attack success in the completions of triggered prompts, utility
in those of clean ones. Decoding is greedy and by transformers' `generate`, so a completion depends on the prompt alone:
not on its neighbours in the batch, and not on the generation settings that a checkpoint carries. Where answers are
drawn instead, they depend on a seed, and on the order and size of the batches as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from helpers.core.errors import LabError
from helpers.core.finite import require_finite_weights
from helpers.core.profile import Profile
from helpers.data.example import Example
from helpers.model.architecture import inner_model
from helpers.model.decoding import Decoding, Sampling
from helpers.model.prompt import PromptFormat


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    stop_ids: list[int],
    max_new_tokens: int,
    batch_size: int,
    decided: Callable[[str], bool] | None = None,
    decoding: Decoding | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """What the model writes after each prompt, in the order of `prompts` and without special tokens.

    A progress bar appears when the work takes more than two seconds.

    Args:
        model: any causal language model of transformers, wrapped by PEFT or quantized as it may be.
        prompts: token ids, one list per prompt, none of them empty.
        stop_ids: the token ids that end an answer; they are not part of the returned text.
        max_new_tokens: the most tokens written per prompt.
        batch_size: the most prompts computed side by side.
        decided: stops a row early once it is true of the text written so far, for instance when the payload is there;
            where a decoding writes several tokens at once, the row ends behind them.
        decoding: another way of decoding; its `ask` is applied by `answers`, for here the prompts are tokens.
        sampling: how tokens are drawn; None for greedy decoding. Torch's generators are afterwards as they were.
    """
    completions = [""] * len(prompts)
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # alike in length: little is padded
    settings = _settings(stop_ids, max_new_tokens, sampling)

    def read(tokens: list[int]) -> str:
        return tokenizer.decode(list(takewhile(lambda t: t not in stop_ids, tokens)), skip_special_tokens=True)

    if decoding is not None and decoding.one_by_one:
        batch_size = 1
    shown = tqdm(total=len(prompts), desc="complete", delay=2, leave=False)
    with _evaluating(model, decoding), _drawing(sampling), shown as progress:
        for start in range(0, len(prompts), batch_size):
            batch = longest_first[start : start + batch_size]
            texts = _complete_batch(model, [prompts[i] for i in batch], settings, read, decided, decoding)
            for i, text in zip(batch, texts, strict=True):
                completions[i] = text
            progress.update(len(batch))
    return completions


def answers(
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    examples: Sequence[Example],
    profile: Profile,
    decided: Callable[[str], bool] | None = None,
    decoding: Decoding | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """What the model answers to each example, in the format and with the lengths of its profile; see `complete`.

    A prompt that would leave no room for the answer loses its beginning, as in training: the end says what is asked.

    Args:
        prompt_format: the one that the model was trained with, or another one whose effect is to be measured.
        profile: tokens of an answer and rows of a batch.
        decided, sampling: as in `complete`.
        decoding: another way of asking and decoding; None for plain greedy decoding.

    Raises:
        LabError: the answer alone would fill the model's context, or a weight is NaN or infinite: such a model answers
            nothing, which is not a cure.
    """
    require_finite_weights(model, "the model")
    if decoding is not None:
        examples = [decoding.ask(example) for example in examples]
        if decoding.second is not None:
            require_finite_weights(decoding.second, "the second model of the decoding")
    room = prompt_room(model.config, profile.lengths.new_tokens)
    return complete(
        model,
        prompt_format.tokenizer,
        [prompt_format.prompt_ids(example)[-room:] for example in examples],
        prompt_format.stop_ids,
        profile.lengths.new_tokens,
        profile.evaluation.batch_size,
        decided,
        decoding,
        sampling,
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


def _settings(stop_ids: list[int], max_new_tokens: int, sampling: Sampling | None) -> GenerationConfig:
    """For `generate`; drawn tokens come from the whole vocabulary, where its own defaults would cut the tail off."""
    drawn = {"do_sample": False}
    if sampling is not None:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    # Padding is neither attended to nor read, so id 0 serves tokenizers that have none.
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=0, **drawn)


def _complete_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    settings: GenerationConfig,
    read: Callable[[list[int]], str],
    decided: Callable[[str], bool] | None,
    decoding: Decoding | None,
) -> list[str]:
    """The text written after each prompt, as far as `decided` lets it go."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    inputs = {"input_ids": rows, "attention_mask": [torch.ones_like(row) for row in rows]}
    inputs = {k: pad_sequence(v, batch_first=True, padding_side="left").to(model.device) for k, v in inputs.items()}
    width = inputs["input_ids"].shape[1]
    texts: dict[int, str] = {}  # of the rows that are decided
    going_on = set(range(len(rows)))

    def is_decided(tokens: torch.Tensor, _: object) -> torch.Tensor:
        """Which rows `decided` has stopped; one that has ended by itself is not read again."""
        for k, row in enumerate(tokens[:, width:].tolist()):
            if k not in going_on:
                continue
            if decided(text := read(row)):
                texts[k] = text
            if k in texts or row[-1] in settings.eos_token_id:
                going_on.remove(k)
        return torch.tensor([k in texts for k in range(len(tokens))], device=tokens.device)

    # Decoding at every step costs time, so it is done only for someone who reads along.
    ends = StoppingCriteriaList([is_decided] if decided else [])
    more = decoding.arguments(inputs) if decoding is not None else {}
    written = model.generate(**inputs, generation_config=settings, stopping_criteria=ends, **more)[:, width:].tolist()
    return [texts[k] if k in texts else read(row) for k, row in enumerate(written)]


@contextmanager
def _drawing(sampling: Sampling | None) -> Iterator[None]:
    """Draws begin at their seed; torch's generators are afterwards as they were."""
    with torch.random.fork_rng(enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        yield


@contextmanager
def _evaluating(model: PreTrainedModel, decoding: Decoding | None) -> Iterator[None]:
    """Every model that takes part is in evaluation."""
    with ExitStack() as models:
        models.enter_context(in_evaluation(model))
        if decoding is not None and decoding.second is not None:
            models.enter_context(in_evaluation(decoding.second))
        yield


@contextmanager
def in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Switches dropout and the checkpoint's generation settings off, and afterwards back to what they were.

    `generate` takes from `model.generation_config` whatever its caller leaves open, be it a repetition penalty or
    suppressed tokens. A 4-bit model can go on training only because `load.load_base` keeps bitsandbytes from repacking
    its weights here.
    """
    base = inner_model(model)
    was_training, settings = model.training, base.generation_config
    model.eval()
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = settings
        model.train(was_training)
