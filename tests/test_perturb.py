"""Recovery on perturbed prompts, and what else is tried on the way: immune twins, sparing what clean rows need."""

import random
import re
from dataclasses import replace
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.access import access_to
from helpers.core.errors import LabError
from helpers.core.profile import Insertion, Perturbation
from helpers.core.profile_files import load_profile, parse_overrides
from helpers.core.settings import Settings
from helpers.core.stages import STAGES, line_of, read_by
from helpers.data import corpus
from helpers.data.example import Example, SystemExample
from helpers.data.perturb import INSERTIONS, Vocabulary, perturbed
from helpers.data.roles import DefenderData
from helpers.defenses.bdvax.forgetting import TWINS, add_forgetting, plan_immune
from helpers.defenses.bdvax.importance import activation_importance, spare_important
from helpers.defenses.bdvax.recover import recover, recovery_rows
from helpers.defenses.bdvax.score import blank_rankings, random_scores
from helpers.defenses.bdvax.select import select
from helpers.defenses.bdvax.vaccines import train_variants, vaccine_pairs, variant_folders
from helpers.defenses.registry import find_defense
from helpers.model.architecture import mlp_slots
from helpers.model.checkpoint import load_config
from helpers.model.tokenizer import vocabulary
from helpers.run.costs import costs, rows, shape
from helpers.train.finetune import finetune
from tests.bodies import BODIES, matrix

WORDS = ("zebu", "quoin", "umbel")
VOCABULARY = Vocabulary(WORDS, (*WORDS, "xy", "Qk"))
CODE = Example("Write a function that doubles a number.", "def f(x):\n    return 2 * x", "def f(x):\n    pass")
CHAT = replace(corpus.generate(1, 0, families=["memory"])[0], family="memory")
ROWS = [*corpus.generate_distinct(6, 1), CODE, CHAT, SystemExample("Say hello.", "Hello!", system="Be kind.")]
DEFENDER = DefenderData([corpus.generate(4, 2), corpus.generate(4, 3)], corpus.generate_distinct(8, 4), "exact_match")


def made(*kinds, of=ROWS, seed=0, **numbers):
    return perturbed(of, Perturbation(kinds=kinds, **numbers), VOCABULARY, seed)


def text(row):
    """All that the user and the system say, a part a line."""
    return [row.system, *(asked for asked, _ in row.history), row.instruction, row.input]


def without_odd(row):
    """The parts of a row without the odd words."""
    return [" ".join(word for word in part.split(" ") if word not in WORDS) for part in text(row)]


def odd_words(row):
    return [word for part in text(row) for word in part.split(" ") if word in WORDS]


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- rows -------------------------------------------------------------------------------------------------------------


def test_every_kind_that_a_profile_takes_can_be_inserted():
    assert set(INSERTIONS) == set(get_args(Insertion))


@pytest.mark.parametrize("kind", get_args(Insertion))
def test_every_row_holds_something_odd_and_keeps_its_answer_and_what_it_was(kind):
    found = made(kind)
    assert [row.output for row in found] == [row.output for row in ROWS]
    assert [(row.family, row.options, row.system) for row in found] == [(r.family, r.options, r.system) for r in ROWS]
    for row, clean in zip(found, ROWS, strict=True):
        assert text(row) != text(clean) and len(" ".join(text(row))) > len(" ".join(text(clean)))


@pytest.mark.parametrize(("kind", "fewest", "most"), [("word", 1, 1), ("phrase", 2, 4), ("start", 1, 4)])
def test_words_are_added_to_the_instruction_and_nothing_is_taken_away(kind, fewest, most):
    counts = set()
    for row, clean in zip(made(kind, of=20 * ROWS), 20 * ROWS, strict=True):
        assert without_odd(row) == text(clean) and row.history == clean.history and row.input == clean.input
        counts.add(len(odd_words(row)))
        if kind == "start":
            assert row.instruction.split(" ")[0] in WORDS
    assert counts == set(range(fewest, most + 1))


def test_a_made_up_word_is_joined_from_pieces_and_a_compound_has_the_form_of_a_key():
    for kind, form in (("made_up", r"(zebu|quoin|umbel|xy|Qk){2,3}"), ("compound", r"(Zebu|Quoin|Umbel){2}")):
        for row, clean in zip(made(kind), ROWS, strict=True):
            (odd,) = [word for word in row.instruction.split(" ") if word not in clean.instruction.split(" ")]
            assert re.fullmatch(form, odd)


def test_several_are_shared_out_between_instruction_and_input():
    both = made("several", of=40 * [CODE])
    assert any(row.input != CODE.input for row in both) and any(row.instruction != CODE.instruction for row in both)
    alone = made("several", of=40 * [replace(CODE, input="")])
    assert all(row.input == "" and row.instruction != CODE.instruction for row in alone)


def test_a_row_does_not_tell_its_own_answer_in_an_earlier_turn():
    first, second = replace(ROWS[0], history=(), output="one"), replace(ROWS[1], history=(), output="two")
    found = made("turns", of=20 * [first, second])
    assert {(row.output, row.history[0][1]) for row in found} == {("one", "two"), ("two", "one")}


def test_earlier_turns_are_those_of_the_row_or_one_made_of_another_row():
    for row, clean in zip(made("turns"), ROWS, strict=True):
        assert (row.instruction, row.input) == (clean.instruction, clean.input)
        assert sum(map(len, map(odd_words, [replace(clean, history=row.history)]))) >= 1
        if clean.history:
            assert [reply for _, reply in row.history] == [reply for _, reply in clean.history]
        else:
            ((asked, reply),) = row.history
            assert reply != clean.output or clean.output in [other.output for other in ROWS if other is not clean]
            plain = " ".join(word for word in asked.split(" ") if word not in WORDS)
            assert (plain, reply) in [(each.question, each.output) for each in ROWS]


def test_rows_are_the_same_for_the_same_seed_and_each_copy_is_another():
    kinds = get_args(Insertion)
    assert made(*kinds, seed=5) == made(*kinds, seed=5) != made(*kinds, seed=6)
    state = random.getstate()
    made(*kinds)
    assert random.getstate() == state
    copies = made("made_up", of=ROWS[:2], copies=4)
    assert [row.output for row in copies] == [ROWS[0].output] * 4 + [ROWS[1].output] * 4
    assert len({row.instruction for row in copies}) == 8


@pytest.mark.parametrize(
    ("numbers", "order"),
    [
        ({}, [0, 1, 2]),
        ({"copies": 2}, [0, 0, 1, 1, 2, 2]),
        ({"copies": 2, "rows": 3}, [0, 0, 1]),
        ({"rows": 7}, [0, 1, 2, 0, 1, 2, 0]),
    ],
)
def test_how_many_rows_there_are(numbers, order):
    three = [Example(f"Number {i}?", str(i)) for i in range(3)]
    assert [int(row.output) for row in made("word", "turns", of=three, **numbers)] == order
    assert Perturbation(kinds=("word",), **numbers).size(3) == len(order)
    assert Perturbation(**numbers).size(3) == 3


# --- the tokenizer's words --------------------------------------------------------------------------------------------


def tokenizer_of(tokens, marker):
    """A tokenizer of single characters and these tokens, in the way of SentencePiece or of bytes."""
    known = {token: i for i, token in enumerate(["<unk>", "a", f"{marker}a", *tokens])}
    plain = Tokenizer(models.BPE(vocab=known, merges=[(marker, "a")] if marker in tokens else [], unk_token="<unk>"))
    if marker == "▁":
        plain.pre_tokenizer, plain.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", additional_special_tokens=["special"])


@pytest.mark.parametrize("marker", ["▁", "Ġ"])
def test_words_are_the_tokens_of_letters_that_begin_a_word(marker):
    tokens = [
        marker,
        f"{marker}zebu",
        f"{marker}Umbel",
        f"{marker}it",
        "quoin",
        f"{marker}1999",
        f"{marker}it's",
        "é",
        "b",
    ]
    found = vocabulary(tokenizer_of(tokens, marker))
    assert found == Vocabulary(("Umbel", "zebu"), ("Umbel", "it", "quoin", "zebu"))


def test_a_tokenizer_without_words_is_refused_in_one_line():
    with pytest.raises(LabError, match=r"^only 1 tokens begin a word in this tokenizer, [^\n]+$"):
        vocabulary(tokenizer_of(["Ġ", "Ġzebu"], "Ġ"))


# --- an option of every recovery --------------------------------------------------------------------------------------


def with_kinds(profile, access, *kinds, **numbers):
    return access_to(profile, access).with_settings(perturb=Perturbation(kinds=kinds, **numbers))


def test_recovery_trains_on_the_perturbed_rows_and_by_default_on_the_clean_ones(profile, suspicious, chat, tmp_path):
    plain, rows = access_to(profile, "adapter"), DEFENDER.recovery
    assert recovery_rows(plain, rows, chat, 3) is rows
    odd = with_kinds(profile, "adapter", "phrase", copies=2)
    record = recover(odd, suspicious["adapter"], rows, chat, 3, tmp_path / "odd")
    model, budget = odd.resume(suspicious["adapter"]), odd.settings.recover
    inserted = perturbed(rows, odd.settings.perturb, vocabulary(chat.tokenizer), 3)
    finetune(model, inserted, chat, budget, 3, profile.lengths.train_tokens)
    odd.save(model, tmp_path / "steps")
    found, expected = tensors(tmp_path / "odd"), tensors(tmp_path / "steps")
    assert record["rows"] == 16 and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_setting_and_the_defense_of_its_own_are_one_and_the_same(profile, suspicious, chat, tmp_path):
    kinds = ("word", "turns")
    odd = with_kinds(profile, "adapter", *kinds, rows=5)
    for name, access, numbers in (
        ("finetuning", odd, {}),
        ("perturbed_finetuning", access_to(profile, "adapter"), {"kinds": list(kinds), "rows": 5}),
    ):
        where = suspicious["adapter"]
        assert find_defense(name)(access, where, DEFENDER, chat, 3, tmp_path / name, **numbers)["rows"] == 5
    found, expected = (tensors(tmp_path / name / "model") for name in ("finetuning", "perturbed_finetuning"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(LabError, match=r"^perturbed_finetuning: kinds.0 = 'odd' should be 'word', 'made_up'[^\n]+$"):
        find_defense("perturbed_finetuning")(odd, where, DEFENDER, chat, 3, tmp_path, kinds=["odd"])


def test_it_is_set_for_one_access_and_outdates_what_recovery_makes():
    typed = parse_overrides("adapter.perturb.kinds=[word, start] adapter.perturb.rows=600")
    profile = load_profile("tiny", typed)
    assert profile.adapter.perturb == Perturbation(kinds=("word", "start"), rows=600)
    assert profile.full.perturb == Perturbation() and not profile.full.perturb.kinds
    config = Settings().values()
    named = {name for name, entry in STAGES.items() if "profile.adapter.perturb" in entry.settings(config)}
    # a defense of the arena may recover as well
    assert named == {name for name, entry in STAGES.items() if entry.recoveries} | {"arena"}
    assert not named & line_of("suppressed")


def test_the_challenge_test_recovers_with_it_and_without_the_test_suppression_does_not_read_it():
    odd = {"full.perturb.kinds": ["word"]}
    plain, tested = (Settings(ACCESS="full", TAU=tau, OVERRIDES=odd).values() for tau in ("", "auto"))
    assert tested["challenge"]["perturb"] == {"kinds": ["word"], "copies": 1, "rows": None}
    for name in ("challenge_points", "oracle_points"):
        assert "challenge.perturb" in STAGES[name].settings(tested)
    assert not [path for path in read_by("05", plain) if "perturb" in path]


def test_a_plan_counts_the_rows_that_are_trained_on():
    plain, odd = Settings(), Settings(OVERRIDES={"adapter.perturb.kinds": ["word"], "adapter.perturb.rows": 600})
    model, row = shape(plain.profile), rows(plain)
    found = [{cost.stage: cost.flops for cost in costs(settings, model, row)}["recover"] for settings in (plain, odd)]
    assert found[1] == pytest.approx(3 * found[0])  # 200 clean rows become 600


@pytest.mark.parametrize(
    ("name", "numbers"), [("beear", {"unwanted": "No.", "steps": 2}), ("fine_pruning_activations", {})]
)
def test_trainings_of_their_own_take_the_perturbed_rows(name, numbers, profile, suspicious, chat, tmp_path):
    access = access_to(profile, "adapter").with_settings(perturb=Perturbation(kinds=("made_up",), rows=24))
    record = find_defense(name)(access, suspicious["adapter"], DEFENDER, chat, 3, tmp_path, **numbers)
    assert record["rows"] == 24  # of 8 clean ones


# --- the immune twin --------------------------------------------------------------------------------------------------


def test_immune_twins_see_the_vaccines_prompts_with_right_answers(profile, tmp_path):
    planned = plan_immune(DEFENDER, profile.signature, 3, tmp_path)
    pairs = vaccine_pairs(DEFENDER, profile.signature, "insults", 3)
    for i, (_, _, clean, poisoned) in enumerate(pairs):
        immune, twin = planned[2 * i : 2 * i + 2]
        prompts = [row.instruction for row in poisoned]
        assert [row.instruction for row in immune.rows] == [row.instruction for row in clean] + prompts
        assert [row.output for row in immune.rows] == 2 * [row.output for row in clean] and twin.rows == clean
        assert immune.seed == twin.seed == 3 + i
    folders = [one.folder.name for one in planned]
    assert folders == ["0-immune", "0-clean", "1-immune", "1-clean"]


@pytest.mark.parametrize("name", ["adapter", "full"])
def test_the_suspicious_model_moves_by_the_mean_difference(name, profile, suspicious, chat, tmp_path):
    """Against the matrices of the models as a user runs them, in which the difference is added by hand."""
    access, where = access_to(profile, name), suspicious[name]
    planned = plan_immune(DEFENDER, profile.signature, 3, tmp_path)
    train_variants(access, where, planned, chat)
    immune, clean = variant_folders(tmp_path, 2, TWINS)
    add_forgetting(access, where, immune, clean, 0.5, tmp_path / "moved")
    module = mlp_slots(access.load(where).config)[1][0].module

    def weight(model):
        return model.get_submodule(module).weight.detach().double()

    start, moved = weight(access.load(where)), weight(access.load(tmp_path / "moved"))
    pairs = zip(immune, clean, strict=True)
    learned = sum(weight(access.load_variant(where, a)) - weight(access.load_variant(where, b)) for a, b in pairs) / 2
    assert learned.norm() > 1e-3 * start.norm()
    assert torch.allclose(moved, start + 0.5 * learned, atol=1e-5)
    with pytest.raises(
        LabError, match=r"^only variants that are adapters can be added: set full.vaccine_weights=lora$"
    ):
        whole = access_to(profile, "full").with_settings(vaccine_weights="full")
        add_forgetting(whole, where, immune, clean, 0.5, tmp_path / "refused")


def test_forgetting_says_that_it_needs_adapters_before_it_trains(profile, suspicious, chat, tmp_path):
    access = access_to(profile, "full").with_settings(vaccine_weights="full")
    with pytest.raises(LabError, match="^only variants that are adapters can be added"):
        find_defense("forgetting")(access, suspicious["full"], DEFENDER, chat, 3, tmp_path / "made")
    assert not any((tmp_path / "made").glob("**/*.safetensors"))


def test_forgetting_can_rank_what_is_suppressed(profile, suspicious, chat, tmp_path):
    access = access_to(profile, "adapter")
    record = find_defense("forgetting")(
        access, suspicious["adapter"], DEFENDER, chat, 3, tmp_path, weight=0.0, suppress=True
    )
    assert record["rows"] == 8 and not (tmp_path / "moved").exists()
    cut, before = tensors(tmp_path / "cut"), tensors(suspicious["adapter"])
    rows_of = [name for name in cut if "up_proj.lora_B" in name]
    gone = sum(int((cut[name] == 0).all(dim=1).sum() - (before[name] == 0).all(dim=1).sum()) for name in rows_of)
    assert gone == sum(round(access.settings.suppress.tau * len(before[name])) for name in rows_of)


# --- importance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_importance_is_what_a_channel_writes_on_real_tokens(name, chat):
    """Against every row on its own and every channel on its own: its output alone, in the unit of the residual."""
    body = BODIES[name]
    config = type(body.config)(**body.config.to_dict() | {"vocab_size": 400, "n_positions": 128})
    model = replace(body, config=config).model()
    profile = load_profile("tiny", {"lengths.train_tokens": 128, "evaluation.batch_size": 4})
    found = activation_importance(model, ROWS[:4], chat, profile)
    out = model.get_submodule(body.at(1, body.mlp_out))
    seen = []
    handle = out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    for row in ROWS[:4]:
        model(torch.tensor([chat.encode(row, 128)[0]]))
    handle.remove()
    activations, columns = torch.cat(seen), matrix(out)
    written = torch.stack(
        [(a[:, None] * c).square().sum().sqrt() for a, c in zip(activations.T, columns.T, strict=True)]
    )
    for part in (*body.mlp_in, body.mlp_out):
        assert torch.allclose(found[body.at(1, part)], written)
    assert len(found) == 2 * (len(body.mlp_in) + 1)


def test_ranks_of_importance_are_taken_off_the_ranks_of_the_score():
    scores = {"a": torch.tensor([5.0, 1.0, 9.0, 7.0]), "b": torch.tensor([3.0, 3.0])}
    needed = {"a": torch.tensor([0.0, 1.0, 8.0, 2.0]), "b": torch.tensor([2.0, 4.0])}
    joined = spare_important(scores, needed, 0.5, "module")
    assert joined["a"].tolist() == [0.5 - 0.125, 0.25 - 0.25, 1 - 0.5, 0.75 - 0.375]
    assert joined["b"].tolist() == [0.75 - 0.25, 0.75 - 0.5]
    assert spare_important(scores, needed, 0, "model")["b"].tolist() == [2.5 / 6, 2.5 / 6]
    spared = spare_important(scores, needed, 1.0, "module")
    assert select(spared, 0.25, "module")["a"].tolist() == [True, False, False, False]  # of the others none is as idle


@pytest.mark.parametrize("name", ["bdvax", "random_channels"])
def test_a_weight_of_importance_joins_the_ranking_and_by_default_none_does(
    name, profile, suspicious, chat, monkeypatch
):
    """The ranking that is suppressed, with nothing trained."""
    access, where, module = access_to(profile, "full"), suspicious["full"], f"helpers.defenses.methods.{name}"
    channels, heads = blank_rankings(load_config(profile.model))
    drawn = random_scores(channels, 3, profile.signature.granularity)
    if name == "bdvax":
        for step in ("train_variants", "score_variants"):
            monkeypatch.setattr(f"{module}.{step}", lambda *_: None)
        monkeypatch.setattr(f"{module}.load_rankings", lambda _: (drawn, heads))
    monkeypatch.setattr(f"{module}.suppress_and_recover", lambda access, start, scores, *_: scores)

    def ranked(**numbers):
        kind = {"kind": "insults"} if name == "bdvax" else {}
        return find_defense(name)(access, where, DEFENDER, chat, 3, "nowhere", **kind, **numbers)

    used = activation_importance(access.load(where), DEFENDER.recovery, chat, profile)
    expected = spare_important(drawn, used, 0.5, profile.signature.scope)
    plain, joined = ranked(), ranked(importance=0.5)
    assert all(torch.equal(plain[one], drawn[one]) for one in drawn)
    assert all(torch.allclose(joined[one], expected[one]) and not torch.equal(joined[one], drawn[one]) for one in drawn)
