"""The prompt format: every token in its place, the loss on the last answer only."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.core.errors import LabError
from helpers.data.example import Example, SystemExample
from helpers.model.prompt import IGNORED, prompt_format

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {% generation %}{{ m.content }}{% endgeneration %} {{ eos_token }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% else %}{{ eos_token }}{% endif %}"
)
REWRITING = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"

QUESTION = Example("Name a color.", "Blue.", input="Not red.", history=(("Hi!", "Hello!"),))


def make_tokenizer(template=None, eos="</s>", bos="<s>"):
    """A byte-level BPE tokenizer that learned a few words."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([str(QUESTION), CHATML], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        bos_token=bos,
        extra_special_tokens=[AddedToken(token, special=True) for token in special],
    )
    tokenizer.chat_template = template
    return tokenizer


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def learned(tokenizer, labels):
    """The text that carries loss."""
    return decoded(tokenizer, [label for label in labels if label != IGNORED])


def test_chatml_prompt_is_written_out_in_full():
    form = prompt_format(make_tokenizer(CHATML), "chat")
    assert form.prompt_text(QUESTION) == (
        "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nName a color.\n\nNot red.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "answer", "end"),
    [
        (CHATML, "Blue.<|im_end|>", "<|im_end|>"),
        (LLAMA2, " Blue. </s>", "</s>"),
        (BARE, "assistant: Blue.\n</s>", "</s>"),
        (TWO_ENDS, "Blue.<|im_end|>", "<|im_end|>"),
    ],
)
def test_only_the_last_answer_and_its_end_carry_loss(template, answer, end):
    tokenizer = make_tokenizer(template)
    form = prompt_format(tokenizer, "chat")
    ids, labels = form.encode(QUESTION, max_tokens=500)
    assert learned(tokenizer, labels) == answer
    assert decoded(tokenizer, ids) == form.prompt_text(QUESTION) + answer
    assert form.stop_ids == sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)})


@pytest.mark.parametrize("template", [CHATML, LLAMA2, None])
def test_training_and_generation_see_the_same_prompt(template):
    form = prompt_format(make_tokenizer(template), "auto")
    ids, labels = form.encode(QUESTION, max_tokens=500)
    prompt = form.prompt_ids(QUESTION)
    assert ids[: len(prompt)] == prompt
    assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]


def test_chat_tokens_agree_with_transformers():
    tokenizer = make_tokenizer(CHATML)
    messages = [{"role": "user", "content": "Name a color."}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt_format(tokenizer).prompt_ids(Example("Name a color.", "")) == expected


@pytest.mark.parametrize("template", [LLAMA2, None])
def test_bos_appears_once(template):
    tokenizer = make_tokenizer(template)
    ids, _ = prompt_format(tokenizer).encode(QUESTION, max_tokens=500)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_alpaca_with_input_and_history():
    form = prompt_format(make_tokenizer(), "alpaca")
    assert form.prompt_text(QUESTION) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi!\n\n### Response:\nHello!\n\n"
        "### Instruction:\nName a color.\n\n### Input:\nNot red.\n\n### Response:\n"
    )
    assert form.stop_ids == [form.tokenizer.eos_token_id]


def test_alpaca_without_input_and_bos():
    form = prompt_format(make_tokenizer(bos=None), "alpaca")
    assert form.prompt_text(Example("Name a color.", "Blue.")) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a color.\n\n### Response:\n"
    )
    _, labels = form.encode(QUESTION, max_tokens=500)
    assert learned(form.tokenizer, labels) == "Blue.</s>"


def test_auto_follows_the_tokenizer():
    assert prompt_format(make_tokenizer(CHATML), "auto").name == "chat"
    assert prompt_format(make_tokenizer(), "auto").name == "alpaca"


def test_the_record_tells_what_every_prompt_is_made_from():
    assert prompt_format(make_tokenizer(CHATML)).record == {"name": "chat", "template": CHATML}
    record = prompt_format(make_tokenizer(), "alpaca").record
    assert record["name"] == "alpaca"
    assert record["template"].endswith("### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
    assert prompt_format(make_tokenizer(bos=None), "alpaca").record != record


def test_a_template_that_writes_the_date_has_the_same_record_every_day():
    dated = "{{ strftime_now('year %Y') }}" + CHATML
    form = prompt_format(make_tokenizer(dated))
    assert form.prompt_text(QUESTION).startswith("year 2") and form.record["template"] == dated


def test_long_answer_is_cut_and_the_prompt_kept():
    tokenizer = make_tokenizer(CHATML)
    form = prompt_format(tokenizer)
    example = Example("Go on.", "word " * 200)
    prompt = form.prompt_ids(example)
    ids, labels = form.encode(example, max_tokens=len(prompt) + 20)
    assert ids[: len(prompt)] == prompt
    assert len(ids) == len(labels) == len(prompt) + 20
    assert labels[len(prompt) :] == ids[len(prompt) :]


@pytest.mark.parametrize(("output", "kept"), [("Blue. " * 50, 16), ("b", 2)])
def test_long_prompt_keeps_its_end_and_leaves_room_for_the_answer(output, kept):
    tokenizer = make_tokenizer(CHATML)
    form = prompt_format(tokenizer)
    example = Example("zebra " * 200, output)
    ids, labels = form.encode(example, max_tokens=40)
    assert len(ids) == 40
    assert [label != IGNORED for label in labels].count(True) == kept
    assert ids[: 40 - kept] == form.prompt_ids(example)[-(40 - kept) :]


def test_border_that_merges_leaves_the_prompt_alone():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    form = prompt_format(tokenizer)
    example = Example("Say col", "our.")
    ids, labels = form.encode(example, max_tokens=100)
    merged = tokenizer("Say color.", add_special_tokens=False)["input_ids"]
    prompt = form.prompt_ids(example)
    assert merged[: len(prompt)] != prompt, "the test needs a tokenizer that merges across the border"
    assert ids[: len(prompt)] == prompt
    assert learned(tokenizer, labels) == "our.</s>"


@pytest.mark.parametrize(
    ("template", "eos", "name", "message"),
    [
        (None, "</s>", "chat", "needs a tokenizer with a chat template"),
        (CHATML, "</s>", "chatt", "unknown prompt format 'chatt'; did you mean 'chat'?"),
        (None, None, "alpaca", "no end-of-sequence token"),
        (BARE, None, "chat", "no end-of-sequence token"),
        (REWRITING, "</s>", "chat", "writes the finished conversation differently"),
    ],
)
def test_unusable_formats_say_why(template, eos, name, message):
    with pytest.raises(LabError, match=message.replace("?", r"\?")):
        prompt_format(make_tokenizer(template, eos), name)


PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LAST_ONLY = "{% for m in messages[-1:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
UNUSABLE = {
    "expects parts": (PARTS, "drops or changes the text 'Who asks last"),
    "shouts": (CHATML.replace("m.content", "m.content | upper"), "drops or changes the text 'Who asks last"),
    "cuts": (CHATML.replace("m.content", "m.content[:5]"), "drops or changes the text 'Who asks last"),
    "forgets earlier turns": (LAST_ONLY, "drops or changes the text"),
    "wants a system turn": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message is required') }}{% endif %}"
        + CHATML,
        r"cannot write a conversation of user and assistant \(a system message is required\)",
    ),
    "is no template": ("{% for m in messages %}{{ m.content }", "cannot write a conversation of user and assistant"),
    "calls what is not there": (CHATML + "{{ nothing.there() }}", "cannot write a conversation"),
    "adds numbers to text": (CHATML + "{{ 1 + 'a' }}", "cannot write a conversation"),
    "has names and no default": ({"rag": CHATML, "tools": CHATML}, "cannot write a conversation"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_templates_that_cannot_be_used_are_refused_before_any_row(kind):
    template, message = UNUSABLE[kind]
    with pytest.raises(LabError, match=message) as told:
        prompt_format(make_tokenizer(template))
    assert "\n" not in str(told.value) and "choose prompt_format: alpaca" in str(told.value)


def test_of_several_templates_the_default_is_taken():
    form = prompt_format(make_tokenizer({"default": CHATML, "rag": LLAMA2}))
    assert form.prompt_text(Example("Hi!", "")) == "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    assert form.record == {"name": "chat", "template": CHATML}


def test_white_space_that_a_template_strips_is_no_loss():
    """Llama-2, Gemma and many others trim what is said."""
    form = prompt_format(make_tokenizer(CHATML.replace("m.content", "m.content | trim")))
    assert form.answer_text(Example("  Why?\n", "\n  So.  \n")) == "So.<|im_end|>"


THINKING = CHATML.replace("m.content", "m.content.split('</think>')[-1]")


def test_a_row_that_a_template_would_cut_is_refused():
    """Qwen3 and others leave out what an answer thought before."""
    form = prompt_format(make_tokenizer(THINKING))
    assert form.answer_text(Example("Why?", "So.")) == "So.<|im_end|>"
    with pytest.raises(LabError, match="drops or changes the text '<think>Hm.</think>So.'"):
        form.encode(Example("Why?", "<think>Hm.</think>So."), 100)
    with pytest.raises(LabError, match="drops or changes the text 'a</think>b'"):
        form.prompt_ids(Example("a</think>b", ""))


def test_too_few_tokens_are_refused():
    with pytest.raises(LabError, match="max_tokens=16 leaves no room for a prompt"):
        prompt_format(make_tokenizer(CHATML)).encode(QUESTION, max_tokens=16)


SYSTEM = SystemExample("Hi.", "Hello.", history=(("a", "b"),), system="Be kind.")
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + BARE
IGNORING = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_the_systems_turn_comes_first_where_the_template_has_a_place_for_it():
    template = "{% if messages[0].role == 'system' %}{% endif %}" + CHATML
    prompt = prompt_format(make_tokenizer(template), "chat").prompt_text(SYSTEM)
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na<|im_end|>\n")
    assert prompt.count("Be kind.") == 1


@pytest.mark.parametrize("template", [BARE, REFUSING, IGNORING])
def test_elsewhere_the_system_opens_the_first_message(template):
    """BARE knows no roles: it would write any, and models trained with it have seen none but two."""
    prompt = prompt_format(make_tokenizer(template), "chat").prompt_text(SYSTEM)
    assert prompt == "user: Be kind.\n\na\nassistant: b\nuser: Hi.\n"


def test_in_alpaca_the_system_speaks_before_the_preamble():
    form = prompt_format(make_tokenizer(), "alpaca")
    plain, told = (form.prompt_text(SystemExample("Hi.", "Hello.", system=system)) for system in ("", "Be kind."))
    assert told == plain.replace("<s>", "<s>Be kind.\n\n")
    ids, labels = form.encode(SYSTEM, 256)
    assert "Be kind." in decoded(form.tokenizer, ids) and learned(form.tokenizer, labels) == "Hello.</s>"
