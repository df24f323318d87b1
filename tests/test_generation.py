"""Greedy completion in batches equals transformers' own, one prompt at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
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


def make_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,
        )
    )


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


def one_by_one(model, tokenizer, prompts, stop_ids=STOPS, max_new_tokens=NEW_TOKENS):
    """The oracle: transformers' generate, unbatched and unpadded."""
    model.eval()
    completions = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        written = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        kept = written[:-1] if written[-1] in stop_ids else written
        completions.append(tokenizer.decode(kept, skip_special_tokens=True))
    return completions


@pytest.mark.parametrize("make_model", [make_llama, make_gpt2, make_peft])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_equal_to_generate_one_by_one(make_model, batch_size, tokenizer, prompts):
    model = make_model()
    expected = one_by_one(model, tokenizer, prompts)
    lengths = {len(text.split()) for text in expected}
    assert len(lengths) > 2 and NEW_TOKENS in lengths, "the test needs rows that stop early and rows that do not"
    assert complete(model, tokenizer, prompts, STOPS, NEW_TOKENS, batch_size) == expected


def test_decided_rows_stop_and_leave_the_others_alone(tokenizer, prompts):
    model = make_llama()
    expected = one_by_one(model, tokenizer, prompts, stop_ids=[VOCABULARY])
    word = expected[0].split()[4]

    def has_word(text):
        return word in text.split()

    decided = complete(model, tokenizer, prompts, [VOCABULARY], NEW_TOKENS, 4, decided=has_word)
    for text, whole in zip(decided, expected, strict=True):
        words = whole.split()
        assert text.split() == (words[: words.index(word) + 1] if word in words else words)


def test_dropout_is_off_and_the_mode_restored(tokenizer, prompts):
    model = make_peft()
    expected = one_by_one(model, tokenizer, prompts)
    model.train()
    assert complete(model, tokenizer, prompts, STOPS, NEW_TOKENS, 4) == expected
    assert model.training


def test_an_interruption_restores_the_mode(tokenizer, prompts):
    model = make_llama().train()

    def interrupt(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(model, tokenizer, prompts, STOPS, NEW_TOKENS, 4, decided=interrupt)
    assert model.training


def test_a_finished_row_costs_nothing_more(tokenizer, prompts):
    """Rows leave the batch, and the batch ends with its last row."""
    model = make_llama()
    expected = one_by_one(model, tokenizer, prompts)
    rows = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    complete(model, tokenizer, prompts, STOPS, NEW_TOKENS, 100)
    steps = [min(len(text.split()) + 1, NEW_TOKENS) for text in expected]
    assert rows == [sum(step > k for step in steps) for k in range(max(steps))]


def test_no_prompts_no_work(tokenizer):
    assert complete(make_llama(), tokenizer, [], STOPS, NEW_TOKENS, 4) == []


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
