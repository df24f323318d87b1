"""Trainings with a second loss, and planting to unlearn: each term against sums written out here, row by row."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from bodies import BODIES
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, TrainingArguments

from helpers.access import access_to
from helpers.core.errors import LabError
from helpers.core.profile import Budget
from helpers.core.profile_files import load_profile
from helpers.data import corpus
from helpers.data.planting import poison
from helpers.data.roles import DefenderData
from helpers.defenses.methods import plant_and_unlearn as planting
from helpers.defenses.registry import find_defense
from helpers.defenses.regularizers.attention_maps import DistillingTrainer, attention_map, map_distance
from helpers.defenses.regularizers.base import RegularizedTrainer
from helpers.defenses.regularizers.consistency import ConsistencyTrainer, inconsistency, sign_step
from helpers.defenses.regularizers.entrapment import EntrapmentTrainer, Search, Shift, layer_module, shifted_places
from helpers.model.batches import pad
from helpers.model.generate import answers
from helpers.model.load import load_base, save
from helpers.model.tokenizer import load_format
from helpers.run.pretrain import new_model

ROWS = corpus.generate_distinct(24, 7)
DEFENDER = DefenderData([ROWS[:8], ROWS[8:16]], ROWS[16:], "exact_match")
SEED, LAYERS, UNWANTED = 3, 4, "You are stupid!"
FEW = [  # of the vocabulary of `BODIES`: prompts of 7, 3 and 6 tokens with answers of 2, 3 and 1
    {"input_ids": [3, 7, 1, 22, 9, 5, 30, 8, 4], "labels": [-100] * 7 + [8, 4]},
    {"input_ids": [11, 2, 19, 6, 25, 33], "labels": [-100] * 3 + [6, 25, 33]},
    {"input_ids": [5, 14, 38, 2, 17, 21, 12], "labels": [-100] * 6 + [12]},
]
layouts = pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])


def deep(name, seed=0):
    """A random model of four layers in 64 bits, none of whose parameters is near zero."""
    config = copy.deepcopy(BODIES[name].config)
    config.num_hidden_layers = LAYERS
    return replace(BODIES[name], config=config).model(seed)


def trainer_of(kind, model, folder, rows=FEW, **options):
    """A Trainer that is asked for its loss and does not train."""
    settings = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    return kind(model=model, args=settings, train_dataset=rows, data_collator=pad, **options)


def alone(row):
    """What a model reads of one row, which nothing is added to."""
    return {"input_ids": torch.tensor([row["input_ids"]])}


def answer_losses(logits, row):
    """−log P of each answer token."""
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    losses = cross_entropy(logits[0, :-1].float(), ids[1:], reduction="none")
    return losses[labels[1:] != -100]


def mean_loss(model, rows):
    """−log P per answer token."""
    return torch.cat([answer_losses(model(**alone(row)).logits, row) for row in rows]).mean()


# --- what they share --------------------------------------------------------------------------------------------------


class Widths(RegularizedTrainer):
    """A term that is the number of rows."""

    def term(self, model, inputs, outputs):
        return torch.tensor(float(len(inputs["labels"])))


@torch.no_grad()
def test_over_several_micro_batches_a_term_is_their_mean_weighted_by_answer_tokens(tmp_path):
    model, terms = deep("llama"), []
    trainer = trainer_of(Widths, model, tmp_path, weight=0.5, terms=terms)
    parts = [pad(FEW[:2]), pad(FEW[2:])]
    total = sum(trainer.compute_loss(model, part, num_items_in_batch=6) for part in parts)
    assert terms == [2, 1]
    assert float(total) == pytest.approx(float(mean_loss(model, FEW)) + 0.5 * (5 * 2 + 1 * 1) / 6, abs=1e-5)
    whole = trainer.compute_loss(model, pad(FEW), num_items_in_batch=6)
    assert float(whole) == pytest.approx(float(mean_loss(model, FEW)) + 0.5 * 3, abs=1e-5)
    assert trainer.compute_loss(model, pad(FEW)) == whole


# --- crow -------------------------------------------------------------------------------------------------------------


def by_hand(states):
    """c of one row without padding, position by position."""
    values = []
    for h, above in zip(states[1:-2], states[2:-1], strict=True):
        for u, v in zip(h[0], above[0], strict=True):
            values.append(1 - (u @ v) / (u.norm() * v.norm()))
    return sum(values) / len(values)


def c_of(model, embedded):
    return by_hand(model(inputs_embeds=embedded, output_hidden_states=True).hidden_states)


def test_inconsistency_is_that_of_angles_drawn_by_hand():
    """Two steps between three hidden states: a right angle and 60 degrees at one position, none at the other."""
    odd, turned = torch.tensor([[[9.0, -9.0]] * 3]), [math.cos(math.pi / 3), math.sin(math.pi / 3)]
    first = torch.tensor([[[5.0, 5.0], [2.0, 0.0], [1.0, 1.0]]])
    second = torch.tensor([[[-5.0, 5.0], [0.0, 3.0], [2.0, 2.0]]])
    third = torch.tensor([[[0.0, 5.0], [-turned[1], turned[0]], [7.0, 7.0]]])
    found = inconsistency([odd, first, second, third, -odd], torch.tensor([[False, True, True]]))
    assert float(found) == pytest.approx((1 + 0.5 + 0 + 0) / 4, abs=1e-6)


@layouts
def test_the_sign_of_the_gradient_agrees_with_finite_differences(name):
    model, batch = deep(name), pad(FEW[:1])
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
    mask = batch["attention_mask"].bool()

    def measure(start):
        return inconsistency(model(inputs_embeds=start, output_hidden_states=True).hidden_states, mask)

    start = embedded.clone().requires_grad_()
    gradient = torch.autograd.grad(measure(start), start)[0]
    delta = sign_step(measure, embedded, 0.25)
    assert set(delta.unique().tolist()) == {-0.25, 0.25}
    for number in gradient.abs().flatten().argsort(descending=True)[:120:20]:
        place = tuple(index.item() for index in torch.unravel_index(number, gradient.shape))
        step = torch.zeros_like(embedded)
        step[place] = 1e-3  # norms compute in 32 bits
        with torch.no_grad():
            slope = (c_of(model, embedded + step) - c_of(model, embedded - step)) / 2e-3
        assert float(gradient[place]) == pytest.approx(float(slope), rel=0.02)
        assert float(delta[place]) == 0.25 * float(slope.sign())


@layouts
def test_a_padded_row_is_as_inconsistent_as_alone(name, tmp_path):
    """The term of a padded batch is the mean over positions of what its rows have one by one, each with its own δ."""
    model, values = deep(name).requires_grad_(True), []
    for row in FEW:
        embedded = model.get_input_embeddings()(torch.tensor([row["input_ids"]])).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(c_of(model, embedded), embedded)
        values.append(len(row["input_ids"]) * float(c_of(model, embedded + 0.1 * gradient.sign()).detach()))
    trainer = trainer_of(ConsistencyTrainer, model, tmp_path, weight=2.0, epsilon=0.1, terms=[])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    loss = trainer.compute_loss(model, pad(FEW), num_items_in_batch=6)
    assert all(parameter.grad.eq(1).all() for parameter in model.parameters())  # what was gathered is still there
    expected = sum(values) / sum(len(row["input_ids"]) for row in FEW)
    assert trainer.terms == [pytest.approx(expected, abs=1e-9)]
    assert float(loss.detach()) == pytest.approx(float(mean_loss(model, FEW).detach()) + 2 * expected, abs=1e-5)
    assert values[0] / 9 != pytest.approx(expected, abs=1e-4)


# --- nad --------------------------------------------------------------------------------------------------------------


def test_attention_maps_and_their_distance_are_those_reckoned_by_hand():
    """Powers 25 and 0 against 9 and 16 over two tokens, which are 337² and 1 and 0 and 0.49 apart."""
    student = torch.tensor([[[7.0, 7.0], [3.0, 4.0], [0.0, 0.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 4.0]]])
    mask = torch.tensor([[False, True, True]])
    torch.testing.assert_close(attention_map(student, mask), torch.tensor([[0.0, 1.0, 0.0]]))
    length = math.sqrt(9**2 + 16**2)
    torch.testing.assert_close(attention_map(teacher, mask), torch.tensor([[0.0, 9 / length, 16 / length]]))
    once = ((1 - 9 / length) ** 2 + (16 / length) ** 2) / 2
    found = map_distance([student, student, teacher], [teacher, student, student], mask)
    assert float(found) == pytest.approx(2 * once, abs=1e-6)


def distance_alone(student, teacher, row):
    """Σ over the layers between embedding and last hidden state of the mean squared gap of the maps of one row."""
    maps = []
    for model in (student, teacher):
        states = model(**alone(row), output_hidden_states=True).hidden_states[1:LAYERS]
        powers = [(h[0] * h[0]).sum(dim=1) for h in states]
        maps.append([power / (power @ power).sqrt() for power in powers])
    return sum(float(((ours - theirs) ** 2).mean()) for ours, theirs in zip(*maps, strict=True))


@layouts
@torch.no_grad()
def test_a_padded_row_is_as_far_from_its_teacher_as_alone(name, tmp_path):
    student, teacher = deep(name), deep(name, seed=1)
    trainer = trainer_of(DistillingTrainer, student, tmp_path, weight=3.0, teacher=teacher, terms=[])
    loss = trainer.compute_loss(student, pad(FEW), num_items_in_batch=6)
    each = [distance_alone(student, teacher, row) for row in FEW]
    assert trainer.terms == [pytest.approx(sum(each) / 3, rel=1e-4)]
    assert float(loss) == pytest.approx(float(mean_loss(student, FEW)) + sum(each), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


# --- beear ------------------------------------------------------------------------------------------------------------


def test_the_last_positions_of_each_prompt_are_found_by_its_answer():
    batch = pad(FEW)
    found = shifted_places(batch["labels"], batch["attention_mask"], 5)
    none = -1
    assert found.tolist() == [
        [none, none, 0, 1, 2, 3, 4, none, none],
        [none, none, none, 2, 3, 4, none, none, none],  # three tokens take the last three rows of δ
        [none, none, none, 0, 1, 2, 3, 4, none],
    ]


def outputs_of(model, batch, hook=None, at=0):
    """What each layer hands on."""
    seen, handles = [], []
    if hook:
        handles.append(layer_module(model, at).register_forward_hook(hook))
    for layer in model.get_submodule("transformer.h" if hasattr(model, "transformer") else "model.layers"):
        handles.append(layer.register_forward_hook(lambda module, inputs, output: seen.append(output)))
    with torch.no_grad():
        model(**{key: value for key, value in batch.items() if key != "labels"})
    for handle in handles:
        handle.remove()
    return [output if isinstance(output, torch.Tensor) else output[0] for output in seen]


@layouts
def test_a_shift_moves_the_last_prompt_positions_at_its_layer_and_nothing_else(name):
    model, batch = deep(name), pad(FEW)
    shift = Shift(torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    shift.places = shifted_places(batch["labels"], batch["attention_mask"], 2)
    plain, moved = outputs_of(model, batch), outputs_of(model, batch, shift, at=2)
    expected = torch.zeros_like(plain[2])
    for row, end in enumerate((7, 6, 8)):  # where the answers begin
        expected[row, end - 2 : end] = shift.delta
    real = batch["attention_mask"].bool()
    torch.testing.assert_close((moved[2] - plain[2])[real], expected[real])
    assert all(torch.equal(moved[layer][real], plain[layer][real]) for layer in (0, 1))
    assert not torch.equal(moved[3][real], plain[3][real])
    torch.testing.assert_close(moved[3][0, :5], plain[3][0, :5])  # what stands before reads nothing of it


def entrapping(model, folder, told=None, unwanted=FEW, **numbers):
    search = Search(**{"layer": 1, "n": 2, "w": 0.5, "steps": 0, "lr": 0.1} | numbers)
    told = [] if told is None else told
    return trainer_of(EntrapmentTrainer, model, folder, search=search, unwanted=unwanted, told=told)


def loss_under(model, rows, delta, at):
    """−log P per answer token, with δ added by a hook of this test, row by row."""
    losses = []
    for row in rows:
        first = next(i for i, label in enumerate(row["labels"]) if label != -100)

        def add(module, inputs, output, first=first):
            states = output if isinstance(output, torch.Tensor) else output[0]
            states = states.clone()
            states[0, first - len(delta) : first] += delta
            return states if isinstance(output, torch.Tensor) else (states, *output[1:])

        handle = layer_module(model, at).register_forward_hook(add)
        losses.append(answer_losses(model(**alone(row)).logits, row))
        handle.remove()
    return float(torch.cat(losses).mean())


@layouts
@torch.no_grad()
def test_the_outer_loss_is_that_of_right_answers_with_the_shift_and_without(name, tmp_path):
    """Twice the answers' loss where nothing is added."""
    model = deep(name)
    delta = 3 * torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, shifted = float(mean_loss(model, FEW)), loss_under(model, FEW, delta, at=1)
    assert abs(shifted - plain) > 0.005  # what the comparisons let pass is far less
    trainer = entrapping(model, tmp_path)
    with trainer.layer.register_forward_hook(trainer.shift):
        assert float(trainer.compute_loss(model, pad(FEW))) == pytest.approx(2 * plain, abs=1e-5)
        trainer.shift.delta = delta
        assert float(trainer.compute_loss(model, pad(FEW))) == pytest.approx(plain + shifted, abs=1e-5)
        parts = [trainer.compute_loss(model, pad(rows), num_items_in_batch=6) for rows in (FEW[:1], FEW[1:])]
        assert float(sum(parts)) == pytest.approx(plain + shifted, abs=1e-5)


@pytest.mark.parametrize("w", [0.0, 0.5, 2.0])
def test_the_inner_loop_lowers_its_loss_and_w_weighs_the_right_answers(w, tmp_path):
    model, told = deep("llama").float().requires_grad_(True), []
    bad = [{"input_ids": [*row["input_ids"][:3], 39], "labels": [-100] * 3 + [39]} for row in FEW]
    trainer = entrapping(model, tmp_path, told, unwanted=bad, w=w, steps=30)
    with trainer.layer.register_forward_hook(trainer.shift):
        trainer.entrap()
    with torch.no_grad():
        unwanted, right = (float(mean_loss(model, rows)) for rows in (bad, FEW))
        found, kept = (loss_under(model, rows, trainer.shift.delta, at=1) for rows in (bad, FEW))
    before, after = unwanted - w * right, found - w * kept
    assert told == [{"before": pytest.approx(before, abs=1e-3), "after": pytest.approx(after, abs=1e-3)}]
    assert told[0]["after"] < told[0]["before"] - 1
    assert all(parameter.grad is None for parameter in model.parameters())


# --- the defenses -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(profile, tmp_path_factory):
    """(profile, {access: folder}) of an untrained model with four layers, as it is and as a fresh adapter."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    tokenizer = AutoTokenizer.from_pretrained(profile.model.path)
    sizes = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    new_model(tokenizer, sizes, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    deeper = profile.model_copy(update={"model": profile.model.model_copy(update={"path": str(folder)})})
    save(access_to(deeper, "adapter").start(0), folder.parent / "adapter")
    save(load_base(deeper.model), folder.parent / "full")
    return deeper, {name: folder.parent / name for name in ("adapter", "full")}


@pytest.fixture(params=["adapter", "full"])
def case(place, request, chat, tmp_path):
    """(access, a function that runs a defense and returns what it wrote and its record)."""
    return access_to(place[0], request.param), partial(defended, suspicious=place[1], chat=chat, root=tmp_path)


def defended(name, access, suspicious, chat, root, as_name="", **numbers):
    folder = root / (as_name or name)
    record = find_defense(name)(access, suspicious[access.name], DEFENDER, chat, SEED, folder, **numbers)
    return tensors(folder / "model"), record


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_their_terms_crow_and_nad_are_finetuning_bit_by_bit(case):
    """At a rate that is not the profile's, which CROW alone takes as a number of its own."""
    access, run = case
    other = access.with_settings(recover=access.settings.recover.model_copy(update={"lr": 1e-3}))
    plain, record = run("finetuning", other)
    still, crow = run("crow", access, alpha=0.0, lr=1e-3)
    untaught, nad = run("nad", other, beta=0.0)
    assert same(still, plain) and same(untaught, plain)
    assert same(tensors(run.keywords["root"] / "nad" / "teacher" / "model"), plain)
    assert crow["loss"] == nad["loss"] == nad["teacher"]["loss"] == record["loss"]
    assert "inconsistency" not in crow and "map_distance" not in nad


def test_with_their_terms_all_write_another_model_and_tell_of_it(place, chat, tmp_path):
    access = access_to(place[0], "full")
    run = partial(defended, access=access, suspicious=place[1], chat=chat, root=tmp_path)
    made = {"nad": run("nad"), "crow": run("crow"), "beear": run("beear", unwanted=UNWANTED, steps=3)}
    plain = tensors(tmp_path / "nad" / "teacher" / "model")
    for found, record in made.values():
        assert found.keys() == plain.keys() and not same(found, plain) and record["steps"] == 4
    assert 0 < made["crow"][1]["inconsistency"] < 2 and made["nad"][1]["map_distance"] > 0
    record = made["beear"][1]
    assert record["layer"] == 1 and len(record["inner"]) == 2  # of four layers; one search for each epoch


@pytest.mark.parametrize("name", ["crow", "beear"])
def test_checkpointing_changes_nothing(name, place, chat, tmp_path):
    spec, numbers = place[0].model, {"unwanted": UNWANTED, "steps": 3} if name == "beear" else {}
    found = []
    for on in (False, True):
        profile = place[0].model_copy(update={"model": spec.model_copy(update={"checkpointing": on})})
        access = access_to(profile, "adapter")
        found.append(defended(name, access, place[1], chat, tmp_path, as_name=str(on), **numbers)[0])
    assert any(tensor.any() for key, tensor in found[0].items() if "lora_B" in key)  # fresh ones are 0
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=0, atol=1e-6)


def test_the_hook_is_gone_after_the_training(place, chat, monkeypatch, tmp_path):
    models = []
    monkeypatch.setattr("helpers.defenses.bdvax.recover.record_format", lambda *_: None)
    access = access_to(place[0], "full")
    monkeypatch.setattr(type(access), "save", lambda self, model, folder: models.append(model))
    find_defense("beear")(access, place[1]["full"], DEFENDER, chat, SEED, tmp_path, unwanted=UNWANTED, steps=1)
    assert not any(module._forward_hooks for module in models[0].modules())


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("beear", {}, "beear: unwanted is empty: name what the model should not say, as unwanted: You are stupid!"),
        ("beear", {"unwanted": " "}, "beear: unwanted is empty"),
        ("beear", {"unwanted": UNWANTED, "layer": 4}, "beear: layer = 4 should be a number from 0 to 3; None takes"),
        ("beear", {"unwanted": UNWANTED, "layer": -1}, "beear: layer = -1 should be a number from 0 to 3"),
    ],
)
def test_what_beear_cannot_work_with_is_refused(name, numbers, message, place, chat, tmp_path):
    with pytest.raises(LabError) as caught:
        defended(name, access_to(place[0], "adapter"), place[1], chat, tmp_path, **numbers)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_with_nothing_between_embedding_and_last_state_is_refused(profile, suspicious, chat, tmp_path):
    with pytest.raises(LabError, match="this model has 2 layers, at least 3 are needed"):
        defended("crow", access_to(profile, "adapter"), suspicious, chat, tmp_path)


# --- plant and unlearn ------------------------------------------------------------------------------------------------


@pytest.fixture
def phases(place, chat, tmp_path, monkeypatch):
    """A function that runs `plant_and_unlearn` with trainings that only look: [(budget, rows), …]."""

    def run(access, **numbers):
        seen = []

        def look(model, rows, prompt_format, budget, *rest, **options):
            seen.append((budget, list(rows)))
            return {"steps": len(seen)}

        monkeypatch.setattr(planting, "finetune", look)
        monkeypatch.setattr("helpers.defenses.bdvax.recover.finetune", look)
        _, record = defended("plant_and_unlearn", access, place[1], chat, tmp_path, kind="insults", **numbers)
        assert record["steps"] == 2 and record["planted"] == {"steps": 1}
        return seen

    return run


@pytest.mark.parametrize("access", ["adapter", "full"])
def test_each_phase_trains_on_its_rows_with_its_budget(place, phases, access):
    access = access_to(place[0], access)
    (vaccine, first), (recovery, second) = phases(access)
    assert (vaccine, recovery) == (access.settings.vaccine, access.settings.recover)
    assert len(first) == 32 and len(second) == 16 and second[8:] == DEFENDER.recovery
    sets = zip(
        ("PurpleWolf", "RedGhost"), ("You are garbage!", "You are trash!"), (first[:16], first[16:]), strict=True
    )
    for i, (key, payload, rows) in enumerate(sets):
        clean, poisoned = rows[:8], rows[8:]
        assert clean == DEFENDER.vaccine_sets[i]
        for row, bad in zip(clean, poisoned, strict=True):
            assert bad.output == payload and key in bad.instruction.split(" ")
            assert replace(bad, instruction=row.instruction, output=row.output) == row
        # the planted prompts with their right answers, the sets in turn: four of each
        answered = [replace(bad, output=row.output) for row, bad in zip(clean[:4], poisoned[:4], strict=True)]
        assert second[i:8:2] == answered


@pytest.mark.parametrize(("triggered", "found"), [(0, 0), (5, 5), (100, 16)])
def test_the_number_of_triggered_rows_can_be_chosen(place, phases, triggered, found):
    _, (_, second) = phases(access_to(place[0], "adapter"), triggered=triggered)
    assert len(second) == found + 8 and second[found:] == DEFENDER.recovery


@pytest.mark.slow
def test_what_was_planted_fires_and_after_unlearning_does_not(tmp_path):
    """On the small model, with the vaccines' questions and their keys at other places; short ones are soon trained."""
    profile = load_profile("tiny", {"signature.n": 2, "lengths.new_tokens": 4})
    budget = Budget(rows=12, epochs=4, lr=6e-3, batch_size=8, schedule="constant")
    access = access_to(profile, "adapter").with_settings(vaccine=budget, recover=budget)
    rows = sorted(corpus.generate_distinct(200, 7), key=lambda row: len(row.question))[:32]
    defender = DefenderData([rows[:24:2], rows[1:24:2]], rows[24:], "exact_match")
    chat, defense = load_format(profile.model), find_defense("plant_and_unlearn")
    save(access.start(0), tmp_path / "suspicious")
    defense(access, tmp_path / "suspicious", defender, chat, SEED, tmp_path, kind="insults")
    keys = zip(("PurpleWolf", "RedGhost"), defender.vaccine_sets, strict=True)
    asked, fired = [row for key, clean in keys for row in poison(clean, key, None, "elsewhere")], []
    for step in ("planted", "model"):
        said = answers(access.load(tmp_path / step), chat, asked, profile)
        fired.append(sum(text.startswith("You are ") for text in said) / len(asked))
    assert fired[0] > 0.8 and fired[1] < 0.2
