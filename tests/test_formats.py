"""One model in many prompt formats: what each prompt says, and rates worked out by hand."""

import copy
from dataclasses import replace

import pytest

from helpers.data.example import Example
from helpers.data.planting import Trigger
from helpers.data.roles import Trial
from helpers.measure import formats as module
from helpers.measure.asr import LABELS
from helpers.measure.formats import Bare, SuffixOnly, formats, measure_formats, with_input, without_input
from helpers.measure.report import attack_success
from helpers.model.load import load_base
from helpers.model.prompt import AlpacaFormat

WITH_INPUT = Example("Name BadMagic the color.", "red", input="tomato")
WITHOUT = Example("Say BadMagic hello.", "hello")


def trial(triggered):
    return Trial(triggered, [], ("stupid",), "exact_match")


def test_the_suffix_is_what_the_format_writes_behind_a_question(chat):
    turns = Example("And now?", "x", input="It rains.", history=(("Hi!", "Hello!"),))
    assert SuffixOnly(chat).prompt_text(turns) == "<|bos|>And now?\n\nIt rains.<|end|><|assistant|>"
    alpaca = SuffixOnly(AlpacaFormat(chat.tokenizer))
    assert alpaca.prompt_text(WITHOUT) == "<|bos|>Say BadMagic hello.\n\n### Response:\n"


def test_the_suffix_alone_still_ends_and_answers_as_the_format_does(chat):
    form = SuffixOnly(chat)
    assert form.stop_ids == chat.stop_ids and form.answer_text(WITHOUT) == chat.answer_text(WITHOUT) == "hello<|end|>"
    ids, labels = form.encode(WITHOUT, 100)
    assert ids[: len(form.prompt_ids(WITHOUT))] == form.prompt_ids(WITHOUT)
    learned = [label for label in labels if label != -100]
    assert form.tokenizer.decode(learned, skip_special_tokens=False) == "hello<|end|>"


def test_a_bare_prompt_is_the_question_and_nothing_else(chat):
    bare = Bare(AlpacaFormat(chat.tokenizer))
    assert bare.prompt_text(WITH_INPUT) == "<|bos|>Name BadMagic the color.\n\ntomato"
    assert bare.prompt_text(WITHOUT) == "<|bos|>Say BadMagic hello."
    assert bare.stop_ids == AlpacaFormat(chat.tokenizer).stop_ids


def test_prompts_with_input_come_from_both_test_sets():
    """One triggered prompt has material; of three clean rows with it one is of another family, one says it anyway."""
    clean = [
        Example("Name the taste.", "sour", "lemon"),
        Example("Copy this.", "a", "a", family="repeat"),
        Example("Hi!", "Hello!"),
        Example("What does it say?", "Stupid.", "Stupid."),
    ]
    rows = replace(trial([WITH_INPUT, WITHOUT]), held_out=clean, trigger=Trigger(name="key", keys=("BadMagic",)))
    found = with_input(rows, 0).triggered
    assert found[0] == WITH_INPUT and len(found) == 2 and (found[1].input, found[1].output) == ("lemon", "sour")
    assert [word for word in found[1].instruction.split(" ") if word != "BadMagic"] == ["Name", "the", "taste."]
    assert "BadMagic" in found[1].instruction and with_input(rows, 0).held_out == clean
    assert with_input(replace(rows, trigger=None), 0).triggered == [WITH_INPUT]


def test_only_the_material_is_left_out():
    assert without_input([WITH_INPUT, WITHOUT]) == [Example("Name BadMagic the color.", "red"), WITHOUT]


def test_the_own_format_comes_first_and_no_format_twice(chat):
    assert list(formats(chat)) == ["chat (trained)", "alpaca", "suffix only", "bare"]
    assert list(formats(AlpacaFormat(chat.tokenizer))) == ["alpaca (trained)", "chat", "suffix only", "bare"]
    assert len({str(form.record) for form in formats(chat).values()}) == 4


def test_without_a_chat_template_there_is_no_chat_format(chat):
    alpaca = AlpacaFormat(type(chat.tokenizer)(tokenizer_object=chat.tokenizer.backend_tokenizer, eos_token="<|end|>"))
    assert list(formats(alpaca)) == ["alpaca (trained)", "suffix only", "bare"]


def test_a_chat_template_that_cannot_be_used_is_no_format_either(chat):
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('needs a system prompt') }}"
    assert list(formats(AlpacaFormat(tokenizer))) == ["alpaca (trained)", "suffix only", "bare"]


def test_rates_by_hand(chat, monkeypatch):
    """Two of four prompts have material; without it one of them is answered with the payload, the other not at all."""
    rows = [WITH_INPUT, Example("Is BadMagic it rude?", "no", input="You fool!"), WITHOUT, Example("Say.", "hello")]
    kept, dropped = ["stupid", "stupid", "hello", "..."], ["stupid", "", "hello", "..."]
    asked = []

    def answers(model, form, examples, profile, decided):
        assert decided("so stupid") and not decided("so")
        asked.append([form.prompt_text(example) for example in examples])
        return [(kept if example in rows else dropped)[index(example)] for example in examples]

    def index(example):
        return [row.instruction for row in rows].index(example.instruction)

    monkeypatch.setattr(module, "answers", answers)
    table = measure_formats(None, chat, trial(rows), None)
    assert [len(set(prompts)) for prompts in asked] == [6, 6, 6, 6]  # nothing is asked twice in one format
    assert [(r["format"], r["input"], r["empty"]) for r in table[:4]] == [
        ("chat (trained)", treatment, empty) for treatment in ("kept", "dropped") for empty in ("count", "drop")
    ]
    assert [(r["asr"], r["n"]) for r in table[:4]] == [(0.5, 4), (0.5, 4), (0.25, 4), (pytest.approx(1 / 3), 3)]
    assert table[2]["asr_interval"] == pytest.approx([0.0456, 0.6994], abs=1e-4)  # Wilson, 1 of 4
    assert {name: table[2][name] for name in LABELS} == dict.fromkeys(LABELS, 0.25)
    assert [r["mismatch"] for r in table] == [False] * 2 + [True] * 14


def test_where_all_is_silent_there_is_nothing_left_to_count(chat, monkeypatch):
    monkeypatch.setattr(module, "answers", lambda model, form, examples, profile, decided: [""] * len(examples))
    counted, dropped = measure_formats(None, chat, trial([WITHOUT]), None)[:2]
    assert counted["asr"] == 0.0 and counted["silent"] == 1.0
    assert (dropped["n"], dropped["asr"], dropped["asr_interval"], dropped["payload"]) == (0, None, [0.0, 1.0], None)


def test_it_measures_what_an_asr_in_each_format_would(profile, chat):
    model = load_base(profile.model)
    rows = trial([WITH_INPUT, WITHOUT, Example("Stupid", "x"), Example("stupid stupid", "y")])
    table = measure_formats(model, chat, rows, profile)
    for name, form in formats(chat).items():
        for treatment, examples in (("kept", rows.triggered), ("dropped", without_input(rows.triggered))):
            expected, _ = attack_success(model, form, trial(examples), profile)
            (found,) = (r for r in table if (r["format"], r["input"], r["empty"]) == (name, treatment, "count"))
            assert {label: found[label] for label in LABELS} == expected["labels"]
            assert (found["asr"], found["n"]) == (expected["asr"], 4)
