"""Greedy completion in batches equals a loop written by hand, one prompt at a time, without padding or cache."""

import logging
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from helpers.core.errors import LabError
from helpers.core.profile_files import load_profile
from helpers.data.example import Example
from helpers.model.generate import answers, complete, prompt_room
from helpers.model.prompt import PromptFormat

VOCABULARY = 64
STOPS = list(range(0, VOCABULARY, 10))
NEW_TOKENS = 12


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
}


def make_llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def make_mistral():
    """Its window is shorter than most prompts."""
    return MistralForCausalLM(MistralConfig(sliding_window=8, **SIZES))


def make_gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            initializer_range=0.4,
            tie_word_embeddings=False,  # tied and untrained, it repeats its last word
        )
    )


def make_peft():
    model = get_peft_model(make_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer():
    """Token i reads "wi"; token 0 is special, so it is no text, and a stop."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0")


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 17, 1, 9, 9, 25, 2, 14, 6, 11]
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def one_by_one(model, tokenizer, prompts, stop_ids=STOPS, max_new_tokens=NEW_TOKENS):
    """The oracle: the most likely next token, again and again, from the whole text so far."""
    model.eval()
    completions = []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + max_new_tokens:
            token = int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
            if token in stop_ids:
                break
            tokens.append(token)
        completions.append(tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True))
    return completions


@pytest.mark.parametrize("make_model", [make_llama, make_mistral, make_gpt2, make_peft])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_equal_to_one_by_one_by_hand(make_model, batch_size, tokenizer, prompts):
    model = make_model()
    expected = one_by_one(model, tokenizer, prompts)
    lengths = {len(text.split()) for text in expected}
    assert len(lengths) > 2 and NEW_TOKENS in lengths, "the test needs rows that stop early and rows that do not"
    assert complete(model, tokenizer, prompts, STOPS, NEW_TOKENS, batch_size) == expected


@pytest.mark.parametrize("stop_ids", [[VOCABULARY], []])
def test_decided_rows_stop_and_leave_the_others_alone(stop_ids, tokenizer, prompts):
    model = make_llama()
    expected = one_by_one(model, tokenizer, prompts, stop_ids)
    word = expected[0].split()[4]

    def has_word(text):
        return word in text.split()

    decided = complete(model, tokenizer, prompts, stop_ids, NEW_TOKENS, 4, decided=has_word)
    for text, whole in zip(decided, expected, strict=True):
        words = whole.split()
        assert text.split() == (words[: words.index(word) + 1] if word in words else words)


def test_a_row_decided_from_the_start_stays_empty(prompts):
    """Its neighbours write on, and what fills its own place is no text; here the padding would be read as one."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    plain = PreTrainedTokenizerFast(tokenizer_object=core)
    model = make_llama()
    expected = one_by_one(model, plain, prompts, stop_ids=[])
    first = {text.split()[0] for text in expected[:5]}
    assert "w0" in plain.decode([0]) and len(first) < len({text.split()[0] for text in expected})
    decided = complete(model, plain, prompts, [], NEW_TOKENS, 100, decided=lambda text: text.split()[0] in first)
    assert decided == [text.split()[0] if text.split()[0] in first else text for text in expected]


def test_dropout_is_off_and_the_mode_restored(tokenizer, prompts):
    model = make_peft()
    expected = one_by_one(model, tokenizer, prompts)
    model.train()
    assert complete(model, tokenizer, prompts, STOPS, NEW_TOKENS, 4) == expected
    assert model.training


def test_an_interruption_restores_the_mode(tokenizer, prompts):
    model = make_llama().train()
    settings = model.generation_config

    def interrupt(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(model, tokenizer, prompts, STOPS, NEW_TOKENS, 4, decided=interrupt)
    assert model.training and model.generation_config is settings


def test_a_batch_ends_with_its_last_row(tokenizer, prompts):
    model = make_llama()
    expected = one_by_one(model, tokenizer, prompts[:3])
    steps = [min(len(text.split()) + 1, NEW_TOKENS) for text in expected]
    assert max(steps) < NEW_TOKENS
    rows = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    complete(model, tokenizer, prompts[:3], STOPS, NEW_TOKENS, 100)
    assert rows == [3] * max(steps)


def test_no_prompts_no_work(tokenizer):
    assert complete(make_llama(), tokenizer, [], STOPS, NEW_TOKENS, 4) == []


OWN_SETTINGS = {  # of a checkpoint; `generate` follows them wherever its caller leaves them open
    "max_length": 3,
    "min_length": 40,
    "min_new_tokens": 12,
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "num_beams": 3,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(1, 40)],
    "sequence_bias": {(token,): 50.0 for token in range(1, 5)},
    "suppress_tokens": list(range(30)),
    "begin_suppress_tokens": list(range(30)),
    "forced_eos_token_id": 8,
    "eos_token_id": list(range(VOCABULARY)),
    "exponential_decay_length_penalty": (0, 50.0),
    "guidance_scale": 3.0,
    "max_time": 0.0,
    "stop_strings": ["w1"],
    "watermarking_config": {"bias": 50.0},
    "cache_implementation": "static",
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("make_model", [make_llama, make_peft])
@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_a_checkpoints_own_settings_have_no_say(name, make_model, tokenizer, prompts):
    model = make_model()
    expected = one_by_one(model, tokenizer, prompts[:3])
    own = GenerationConfig(**{name: OWN_SETTINGS[name]})
    base = model.get_base_model() if make_model is make_peft else model
    base.generation_config = own
    assert complete(model, tokenizer, prompts[:3], STOPS, NEW_TOKENS, 4) == expected
    assert base.generation_config is own and getattr(own, name) is not None


@pytest.mark.parametrize("make_model", [make_llama, make_gpt2, make_peft])
def test_nothing_is_said_on_the_way(make_model, tokenizer, prompts, caplog, monkeypatch):
    model = make_model()
    model.generation_config.update(max_length=30, temperature=0.5, top_p=0.7)
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    type(logger).warning_once.cache_clear()  # what was said once in this process is otherwise not said again
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        complete(model, tokenizer, prompts, STOPS, NEW_TOKENS, 4, decided=lambda text: "w1" in text)
        complete(model, tokenizer, prompts, [], NEW_TOKENS, 4)
    assert not caplog.records


class Words(PromptFormat):
    """The instruction alone, one token for each word."""

    name = "words"
    stop_ids = STOPS

    def prompt_text(self, example):
        return example.instruction

    def answer_text(self, example):
        return example.output


def short(new_tokens):
    return load_profile("tiny", {"lengths.new_tokens": new_tokens, "evaluation.batch_size": 4})


def test_a_prompt_beyond_the_context_loses_its_beginning(tokenizer):
    """GPT-2 has 64 positions: with 12 new tokens 52 are left; the oracle is fed what stands there, cut by hand."""
    model, generator = make_gpt2(), torch.Generator().manual_seed(2)
    asked = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 51, 52, 53, 64, 200)]
    rows = [Example(" ".join(f"w{token}" for token in prompt), "") for prompt in asked]
    by_hand = [*asked[:3], asked[3][1:], asked[4][12:], asked[5][148:]]
    assert answers(model, Words(tokenizer), rows, short(12)) == one_by_one(model, tokenizer, by_hand)
    with pytest.raises(IndexError):
        complete(model, tokenizer, asked, STOPS, NEW_TOKENS, 4)


def test_an_answer_that_fills_the_context_is_refused(tokenizer):
    with pytest.raises(LabError, match="new_tokens = 64 leaves no room for a prompt in a context of 64 tokens"):
        answers(make_gpt2(), Words(tokenizer), [Example("w1", "")], short(64))


def test_where_no_context_is_named_nothing_is_cut():
    assert [1, 2, 3][-prompt_room(BloomConfig(), 12) :] == [1, 2, 3]
