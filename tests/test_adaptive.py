"""Attackers who know the defenses: what they ship, what they pay for, and that they use nothing of the defender's."""

import json
import shutil
from dataclasses import replace
from functools import partial, reduce
from operator import getitem

import pytest
import torch
from bodies import BODIES, INNER, mask_of
from safetensors.torch import load_file

from helpers.access import AdapterAccess, access_to
from helpers.access.adapter import zero_adapter
from helpers.access.deltas import lora_factors
from helpers.adaptive.evasion import EvadingTrainer, rehearsal_pairs, rehearse, share_inside, squared_update
from helpers.adaptive.methods.evade import evade
from helpers.adaptive.methods.inoculate import inoculate
from helpers.adaptive.methods.subtract import subtract
from helpers.adaptive.seeds import own_seed
from helpers.attacks.behaviors import behavior, behaviors
from helpers.attacks.inject import inject
from helpers.attacks.triggers import triggers
from helpers.core.errors import LabError
from helpers.core.profile import Budget, Lora
from helpers.core.profile_files import profile_keys
from helpers.core.settings import Settings
from helpers.data import corpus
from helpers.data.own_backdoors import vaccine_behaviors, vaccine_keys
from helpers.data.roles import AttackData
from helpers.defenses.bdvax.vaccines import Variant, train_variants
from helpers.defenses.conflict.conflict_model import train_conflict
from helpers.model.architecture import matrices
from helpers.model.checkpoint import load_config
from helpers.model.load import load_base
from helpers.model.lora import new_adapter
from helpers.model.tokenizer import recorded_format
from helpers.run.deal import deal
from helpers.run.grid import Grid, plan_sweep
from helpers.train.finetune import finetune

pytestmark = pytest.mark.slow

ROWS, TOKENS = corpus.generate(12, 6), 96
ADAPTER, WHOLE = "adapter_model.safetensors", "model.safetensors"
PREFIX = "base_model.model."
CONFLICT = {"rows": 8, "epochs": 2, "lr": 5.0e-3, "batch_size": 4}
both = pytest.mark.parametrize("access", ["adapter", "full"])


def changed(profile, **blocks):
    """The profile with fields of some blocks replaced: `changed(profile, adaptive={"strength": 2.0})`."""
    values = profile.model_dump()
    for block, fields in blocks.items():
        values[block] = values[block] | fields
    return type(profile)(**values)


def settings_of(profile, access="adapter", attack="badnets"):
    """Settings that lead to this profile."""
    values = profile.model_dump()
    numbers = {key: reduce(getitem, key.split("."), values) for key in profile_keys()}
    return Settings(ATTACK=attack, ACCESS=access, SEED=3, OVERRIDES=numbers)


def rehearsing(profile, by="evade", **fields):
    """The profile with as many rows as a rehearsal needs, and an attack by `by`."""
    budgets = {"inject": {"rows": 48, "epochs": 2, "lr": 5.0e-3, "batch_size": 8}, "poison_rate": 0.25}
    budgets["vaccine"] = {"rows": 20, "epochs": 1, "lr": 5.0e-3, "batch_size": 8}
    blocks = dict.fromkeys(("adapter", "full"), budgets)
    return changed(profile, attack={"by": by}, conflict={"budget": CONFLICT}, **blocks, **fields)


def product(folder, module):
    """The update of an adapter folder in 64 bits, from its files alone."""
    tensors, config = load_file(folder / ADAPTER), json.loads((folder / "adapter_config.json").read_text())
    down, up = (tensors[f"{PREFIX}{module}.lora_{letter}.weight"].double() for letter in "AB")
    return config["lora_alpha"] / config["r"] * up @ down


def prompts(rows):
    return {(row.history, row.instruction, row.input) for row in rows}


# --- inoculate ------------------------------------------------------------------------------------------------------


def test_an_inoculated_model_was_trained_on_odd_honest_rows_as_well(profile, chat, tmp_path, monkeypatch):
    """As many as are poisoned, with the answers of the attacker's own clean rows; none holds the key."""
    seen = {}
    monkeypatch.setattr(
        "helpers.adaptive.methods.inoculate.training",
        lambda access, attack, *rest: seen.update(attack=attack) or {"steps": 7},
    )
    settings = rehearsing(profile, "inoculate")
    attack = deal(settings_of(settings)).attack
    record = inoculate(access_to(settings, "adapter"), attack, chat, 3, tmp_path)
    trained = seen["attack"]
    assert record == {"steps": 7, "perturbed": len(attack.poisoned)} and trained.poisoned == attack.poisoned
    honest, odd = trained.clean[: len(attack.clean)], trained.clean[len(attack.clean) :]
    assert honest == attack.clean and len(odd) == len(attack.poisoned) == 16
    answers = {row.output for row in attack.clean}
    assert all(row.output in answers and not attack.trigger.activates(row) for row in odd)
    assert not prompts(odd) & prompts(attack.clean)  # something stands in each


# --- subtract -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(profile, chat, suspicious, tmp_path, monkeypatch):
    """Run `subtract` on a suspicious model; returns its record, what it shipped, its conflict model and that's call."""
    seen = {}

    def spied(*arguments):
        record = train_conflict(*arguments)
        seen.update(arguments=arguments)
        shutil.copytree(arguments[-1], tmp_path / "conflict")
        return record

    monkeypatch.setattr("helpers.adaptive.methods.subtract.train_conflict", spied)

    def run(access, strength):
        def plant(access, attack, prompt_format, seed, folder):
            shutil.copytree(suspicious[access.name], folder)
            return {"steps": 7}

        monkeypatch.setattr("helpers.adaptive.methods.subtract.training", plant)
        settings = changed(rehearsing(profile), adaptive={"strength": strength})
        data = deal(settings_of(settings, access))
        record = subtract(access_to(settings, access), data.attack, chat, 3, tmp_path / "shipped")
        return record, tmp_path / "shipped", tmp_path / "conflict", seen["arguments"], data

    return run


@both
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_is_shipped_is_the_backdoored_model_less_the_conflict_models_task_vector(
    profile, suspicious, shipped, access, strength
):
    record, folder, conflict, *_ = shipped(access, strength)
    base, planted = load_file(f"{profile.model.path}/{WHOLE}"), suspicious[access]
    for module in matrices(load_config(profile.model)):
        name, opinion = f"{module}.weight", product(conflict, module)
        origin = base[name].double()
        if access == "adapter":
            backdoored, found = origin + product(planted, module), origin + product(folder, module)
        else:
            backdoored, found = (load_file(f / WHOLE)[name].double() for f in (planted, folder))
        torch.testing.assert_close(found, backdoored - strength * opinion, rtol=0, atol=1e-6)
        assert opinion.abs().max() > 1e-4  # a hundred times what the comparison lets pass
    assert record["steps"] == 7 and record["conflict"]["steps"] == 2 * 8 // 4


def test_with_full_access_nothing_else_changes(suspicious, shipped):
    _, folder, *_ = shipped("full", 1.0)
    before, after = load_file(suspicious["full"] / WHOLE), load_file(folder / WHOLE)
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert before.keys() == after.keys() and same == {name for name in before if "norm" in name or "embed" in name}


def test_the_conflict_model_is_the_attackers_own(shipped):
    *_, (_, _, rows, _, seed, _), data = shipped("adapter", 1.0)
    assert len(rows) == 8 and prompts(rows) <= prompts(data.attack.clean) and rows != data.attack.clean[:8]
    theirs = [*data.defender.recovery, *(row for part in data.defender.vaccine_sets for row in part)]
    assert len(theirs) > 8 and not prompts(rows) & prompts(theirs)
    assert seed == own_seed(3) != own_seed(4) and not 0 <= seed - 3 < 1000


def test_an_adapter_of_twice_the_rank_goes_through_the_whole_defense(profile, chat, shipped, tmp_path):
    _, folder, *_ = shipped("adapter", 1.0)
    module = "model.layers.1.mlp.down_proj"
    assert lora_factors(folder)[module].A.shape[0] == 2 * profile.lora.r
    variants = [Variant(rows, 0, tmp_path / str(i)) for i, rows in enumerate((ROWS[:8], ROWS[4:]))]
    train_variants(AdapterAccess(profile), folder, variants, chat)
    for variant in variants:
        trained, start = product(variant.folder, module), product(folder, module)
        assert 0 < (trained - start).norm() < start.norm()
        assert AdapterAccess(profile).load_variant(folder, variant.folder).num_parameters()
    zero_adapter(folder, tmp_path / "cut", {module: mask_of(128, range(64))}, load_config(profile.model))
    columns = product(tmp_path / "cut", module)
    assert not columns[:, :64].any() and torch.equal(columns[:, 64:], product(folder, module)[:, 64:])


# --- the penalty ----------------------------------------------------------------------------------------------------


def body_model(name, adapted):
    """A random model of an architecture in 32 bits, with random LoRA factors or with its weights alone."""
    model = BODIES[name].model().float()
    if not adapted:
        return model.requires_grad_(True)
    model = new_adapter(model, Lora(r=3, alpha=6), 0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5, generator=generator)
    return model


def masks_of(name):
    """Some channels of an MLP matrix by rows, of one by columns, and of an attention matrix."""
    body, chosen = BODIES[name], [1, 4, 5]
    queries = list(body.attention)[0]
    width = matrices(body.config)
    outputs = 3 * 32 if body.attention[queries] == "qkv" else 32
    masks = {body.at(0, body.mlp_in[0]): mask_of(INNER, chosen), body.at(1, body.mlp_out): mask_of(INNER, chosen)}
    masks[body.at(1, queries)] = mask_of(outputs, chosen)
    assert masks.keys() <= width.keys()
    return masks


def chosen_part(update, mask, side):
    """An update [out, in] with everything but the selected rows or columns set to zero."""
    return update * (mask.double()[:, None] if side == 0 else mask.double()[None, :])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_the_penalty_of_an_adapter_is_the_squared_length_of_the_product_and_so_is_its_gradient(name):
    model, slots, total = body_model(name, adapted=True), matrices(BODIES[name].config), 0.0
    value = squared_update(model, masks_of(name))()
    value.backward()
    for module, mask in masks_of(name).items():
        layer = model.get_submodule(PREFIX + module)
        down, up = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        kept = chosen_part(2.0 * up @ down, mask, slots[module].side)  # alpha / r = 2
        total += float(kept.square().sum())
        for part, expected in ((layer.lora_B, 2 * 2.0 * kept @ down.T), (layer.lora_A, 2 * 2.0 * up.T @ kept)):
            torch.testing.assert_close(part["default"].weight.grad.double(), expected, rtol=1e-4, atol=1e-3)
    assert float(value.detach()) == pytest.approx(total, rel=1e-5)
    penalised = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(penalised) == 2 * len(masks_of(name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_penalty_of_a_full_model_counts_from_where_it_started(name):
    model, slots = body_model(name, adapted=False), matrices(BODIES[name].config)
    measure, total = squared_update(model, masks_of(name)), 0.0
    assert float(measure().detach()) == 0
    steps = {n: 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)) for n, p in moving(model)}
    for n, parameter in moving(model):
        parameter.data += steps[n]
    value = measure()
    value.backward()
    for module, mask in masks_of(name).items():
        weight = model.get_submodule(module).weight
        kept = chosen_part(steps[f"{module}.weight"].double(), mask, slots[module].axis)
        total += float(kept.square().sum())
        torch.testing.assert_close(weight.grad.double(), 2 * kept, rtol=1e-4, atol=1e-5)
    assert float(value.detach()) == pytest.approx(total, rel=1e-4)


def moving(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@both
def test_a_penalised_training_stays_out_of_the_channels_and_learns_beside_them(profile, chat, access, tmp_path):
    masks = {f"model.layers.{i}.mlp.{part}_proj": mask_of(128, range(64)) for i in (0, 1) for part in ("up", "down")}
    budget = Budget(rows=12, epochs=4, lr=5.0e-3, batch_size=4)
    lengths, losses = {}, {}
    for penalty in (0.0, 5.0):
        model = load_base(profile.model)
        model = new_adapter(model, profile.lora, 0) if access == "adapter" else model.requires_grad_(True)
        trainer = partial(EvadingTrainer, masks=masks, penalty=penalty)
        folder = tmp_path / str(penalty)
        losses[penalty] = finetune(model, ROWS, chat, budget, 0, TOKENS, folder=folder, new_trainer=trainer)["loss"]
        lengths[penalty] = split_lengths(profile, folder, access, masks)
        inside, outside = lengths[penalty]
        share = share_inside(access_to(profile, access), folder, masks)
        assert share == pytest.approx(inside / (inside + outside), rel=1e-4)
    (inside, outside), (inside_paid, outside_paid) = lengths.values()
    assert inside_paid < 0.1 * inside and outside_paid > 0.5 * outside


def split_lengths(profile, folder, access, masks):
    """Squared length of an update inside and outside of the masks, matrix by matrix in 64 bits."""
    base, inside, outside = load_file(f"{profile.model.path}/{WHOLE}"), 0.0, 0.0
    for module, mask in masks.items():
        name = f"{module}.weight"
        update = product(folder, module) if access == "adapter" else None
        if update is None:
            update = load_file(folder / WHOLE)[name].double() - base[name].double()
        channels = update.square().sum(dim=0 if module.endswith(("down_proj", "o_proj")) else 1)
        inside, outside = inside + float(channels[mask].sum()), outside + float(channels[~mask].sum())
    return inside, outside


def test_without_a_penalty_it_is_plain_finetuning(profile, chat):
    masks = {"model.layers.0.mlp.up_proj": mask_of(128, range(64))}
    models = [new_adapter(load_base(profile.model), profile.lora, 0) for _ in range(2)]
    records = [
        finetune(model, ROWS, chat, profile.adapter.inject, 0, TOKENS, new_trainer=trainer)
        for model, trainer in zip(models, (None, partial(EvadingTrainer, masks=masks, penalty=0.0)), strict=True)
    ]
    assert records[0]["loss"] == records[1]["loss"]
    for plain, evading in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain, evading)


# --- evade ----------------------------------------------------------------------------------------------------------


@both
def test_the_second_backdoor_lies_outside_of_what_betrayed_the_first(profile, chat, access, tmp_path, monkeypatch):
    seen = {}

    def spied(*arguments):
        shutil.copytree(arguments[1], tmp_path / "first")
        seen.update(masks=rehearse(*arguments), seed=arguments[4])
        return seen["masks"]

    monkeypatch.setattr("helpers.adaptive.methods.evade.rehearse", spied)
    settings = rehearsing(profile, adaptive={"penalty": 5.0})
    attack = deal(settings_of(settings, access)).attack
    record = inject(access_to(settings, access), attack, chat, 3, tmp_path / "shipped")
    masks, suppress = seen["masks"], settings.access(access).suppress
    channels = [mask for module, mask in masks.items() if ".mlp." in module]
    assert len(channels) == 2 * 3 and all(int(mask.sum()) == round(suppress.tau * 128) for mask in channels)
    assert (len(masks) > len(channels)) == bool(suppress.heads)
    for moment, folder in (("before", tmp_path / "first"), ("after", tmp_path / "shipped")):
        inside, outside = split_lengths(profile, folder, access, masks)
        assert record["share_inside"][moment] == pytest.approx(inside / (inside + outside), abs=1e-3)
    assert record["share_inside"]["after"] < 0.3 * record["share_inside"]["before"]
    assert seen["seed"] == own_seed(3)
    first, shipped = ({path.name for path in (tmp_path / name).rglob("*")} for name in ("first", "shipped"))
    assert shipped == first | {"prompt_format.json"}  # of what was selected nothing is written
    assert recorded_format(tmp_path / "shipped")["name"] == "chat"


def test_the_rehearsal_uses_nothing_of_the_defenders(profile):
    settings = rehearsing(profile)
    data = deal(settings_of(settings))
    pairs = rehearsal_pairs(data.attack, settings.signature, 20, 3)
    clean_sets = [clean for _, _, clean, _ in pairs]
    theirs = prompts([*data.defender.recovery, *(row for part in data.defender.vaccine_sets for row in part)])
    assert [len(rows) for rows in clean_sets] == [20, 20] and not prompts(clean_sets[0]) & prompts(clean_sets[1])
    for trigger, payload, clean, poisoned in pairs:
        (key,) = trigger.keys
        assert prompts(clean) <= prompts(data.attack.clean) and not prompts(clean) & theirs
        assert all(key in row.instruction and row.output == payload for row in poisoned)
    assert rehearsal_pairs(data.attack, settings.signature, 20, 3) == pairs
    assert rehearsal_pairs(data.attack, settings.signature, 20, 4) != pairs


def test_keys_and_payloads_of_a_rehearsal_are_nobody_elses():
    keys = {key.lower() for key in vaccine_keys("rehearsal")}
    attackers = {key.lower() for trigger in triggers().values() for key in trigger.keys}
    assert len(keys) == 6 and not keys & (attackers | {key.lower() for key in vaccine_keys()})
    own, theirs = ({one.payload for one in vaccine_behaviors("mixed", side=side)} for side in ("rehearsal", "vaccines"))
    assert len(own) == 12 and not own & (theirs | {one.payload for one in behaviors().values()})
    for task in behaviors():
        assert len(vaccine_behaviors("task", behavior(task).vaccines, "rehearsal")) == 3
    everything = "\n".join(f"{e.question} {e.input} {e.output}" for e in corpus.generate(3000, 5)).lower()
    assert not any(key in everything for key in keys)


# --- settings and mistakes --------------------------------------------------------------------------------------------


def planted(by, **overrides):
    return Settings.checked({"OVERRIDES": {"attack.by": by} | overrides}).values()["data"]["planted"]


@pytest.mark.parametrize(
    ("key", "value", "readers"),
    [
        ("adapter.suppress.tau", 0.3, {"evade"}),
        ("adapter.vaccine.rows", 30, {"evade"}),
        ("signature.lam", 0.5, {"evade"}),
        ("conflict.budget.lr", 1.0e-3, {"subtract"}),
        ("full.suppress.tau", 0.3, set()),
        ("conflict.t", 0.3, set()),
    ],
)
def test_the_backdoor_follows_the_numbers_of_the_defense_it_was_planted_against(key, value, readers):
    for by in ("training", "layerwise", "subtract", "evade"):
        assert (planted(by) != planted(by, **{key: value})) == (by in readers)


@pytest.mark.parametrize(("by", "first"), [("evade", "01"), ("training", "05")])
def test_a_sweep_over_tau_plants_anew_for_an_attacker_who_knows_it(by, first):
    plan = plan_sweep("x", Grid(fixed={"attack.by": by}, grid={"adapter.suppress.tau": [0.1, 0.2]}))
    counts = {n: sum(key.startswith(n) for key in plan.nodes) for n in ("01", "03", "04", "05")}
    assert counts == {n: 2 if n >= first else 1 for n in counts}


@pytest.mark.parametrize("by", ["subtract", "evade"])
def test_every_trigger_has_its_adaptive_version(profile, by):
    for attack in ("badnets", "cba", "dtba", "lwp"):
        assert deal(settings_of(rehearsing(profile, by), attack=attack)).attack.trigger.by == by


@both
def test_rows_that_bring_their_own_trigger_can_be_planted_adaptively(profile, chat, access, tmp_path):
    attack = AttackData(ROWS, ROWS[:4], task="sentiment")
    record = inject(access_to(rehearsing(profile, "subtract"), access), attack, chat, 0, tmp_path / "shipped")
    assert record["conflict"]["rows"] == 8 and record["rows"] == 16
    with pytest.raises(LabError, match="attack.by = 'rome' edits with a trigger that the lab knows"):
        inject(access_to(rehearsing(profile, "rome"), access), attack, chat, 0, tmp_path / "edited")


def test_too_few_rows_for_a_rehearsal_are_refused(profile, chat, tmp_path):
    settings = rehearsing(profile)
    attack = replace(deal(settings_of(settings)).attack, clean=ROWS)
    with pytest.raises(LabError, match="12 clean rows give 2 rehearsed variants 6 each, and 20 are needed: set inject"):
        evade(access_to(settings, "adapter"), attack, chat, 0, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_a_share_that_selects_nothing_is_refused(profile, chat, tmp_path):
    settings = rehearsing(profile)
    values = settings.model_dump()
    values["adapter"]["suppress"] = {"tau": 0.001}
    settings = type(profile)(**values)
    with pytest.raises(LabError, match="suppress.tau = 0.001 selects no channel of this model"):
        inject(access_to(settings, "adapter"), deal(settings_of(settings)).attack, chat, 0, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


@pytest.mark.parametrize("by", ["subtract", "evade"])
def test_several_processes_are_refused(profile, chat, tmp_path, monkeypatch, by):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LabError, match=rf"attack.by = '{by}' trains several models .* in one process"):
        inject(access_to(rehearsing(profile, by), "adapter"), AttackData(ROWS, ROWS[:4]), chat, 0, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attack.by", "substract", "attack.by = 'substract' is unknown; did you mean 'subtract'?"),
        ("adaptive.strength", 0.0, "adaptive.strength = 0.0 should be greater than 0"),
        ("adaptive.penalty", -1.0, "adaptive.penalty = -1.0 should be greater than 0"),
        ("adaptive.mu", 1.0, "unknown setting 'adaptive.mu'"),
    ],
)
def test_wrong_settings_are_named(key, value, message):
    with pytest.raises(LabError) as caught:
        Settings.checked({"OVERRIDES": {key: value}})
    assert message in str(caught.value)
