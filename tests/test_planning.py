"""The plan of a run, held against real models, published numbers and real peaks."""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.core.profile_files import load_profile, profile_names
from helpers.core.settings import Settings
from helpers.model.load import load_base
from helpers.model.lora import new_adapter
from helpers.run import costs as costing
from helpers.run.costs import NF4_BYTES, Rows, costs, rows, shape
from helpers.run.machine import Machine
from helpers.run.pipeline import main
from helpers.run.planning import fits, plan_lines, remedy, verdict, vouched

SEVEN_B = Settings.checked({"PROFILE": "llama-2-7b-chat"})
ASSUMED = Rows(mean=128, longest=512, answer=64, counted=False)


def card(gigabytes):
    return Machine("a card", gigabytes * 1e9, 1e14, 6e8)


def test_a_checkpoint_is_counted_as_it_loads(profile):
    found, model = shape(profile), load_base(profile.model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights("float32") == model.get_memory_footprint(return_buffers=False)
    adapter = new_adapter(model, profile.lora, 0)
    assert found.adapter == sum(p.numel() for p in adapter.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_four_bits_take_what_bitsandbytes_takes(name, odd):
    profile = odd if name == "odd" else load_profile(name)
    quantized = load_base(profile.model, four_bit=True)
    states = [module.weight.quant_state for module in quantized.modules() if hasattr(module, "quant_state")]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    held = quantized.get_memory_footprint(return_buffers=False) + scales
    assert shape(profile).weights("float32", four_bit=True) == pytest.approx(held, rel=0.01)


def test_seven_billion_from_published_sizes_alone():
    found = shape(SEVEN_B.profile)
    assert found.parameters == 6_738_415_616  # the number on the model's card
    assert found.adapter == 19_988_480  # what PEFT prints for r = 8 on all linear layers
    assert found.weights("bfloat16") == 2 * found.parameters


MILLIONS = {  # as the models' cards and papers count them
    "codellama-13b-instruct": 13_016,
    "codellama-7b-instruct": 6_739,
    "gpt-j-6b": 6_051,
    "gpt2-xl": 1_558,
    "llama-2-13b-chat": 13_016,
    "llama-2-7b": 6_738,
    "llama-2-7b-chat": 6_738,
    "llama-7b": 6_738,
    "mistral-7b-instruct": 7_242,
    "qwen2.5-0.5b-instruct": 494,
    "qwen3-4b-instruct": 4_022,
    "smollm2": 134.5,
    "smollm2-135m-instruct": 134.5,
    "tiny": 4.1,
    "tiny-gpt2": 3.23,
    "tiny-mistral": 2.95,
    "tinyllama-1.1b-chat": 1_100,
}


@pytest.mark.parametrize("name", sorted(set(profile_names()) - {"local"}))
@pytest.mark.parametrize("access", ["adapter", "full"])
def test_every_profile_is_planned_without_a_download(name, access):
    settings = Settings.checked({"PROFILE": name, "ACCESS": access})
    model = shape(settings.profile)
    assert model.parameters / 1e6 == pytest.approx(MILLIONS[name], rel=0.01)
    assert 0 < model.adapter < model.blocks < model.parameters
    planned = costs(settings, model, ASSUMED)
    assert [c.stage for c in planned] == [
        "inject",
        "evaluate",
        "variants",
        "scores",
        "suppress",
        "recover",
        "conflict model",
        "merge",
    ]
    assert all(c.memory > 0 for c in planned)


SHAPES = {  # hidden, inner, query, cached: from the architectures' papers
    "gpt2-xl": (1600, 6400, 1600, 3200),
    "gpt-j-6b": (4096, 16384, 4096, 8192),
    "mistral-7b-instruct": (4096, 14336, 4096, 2048),
    "tiny-gpt2": (128, 1152, 128, 256),
    "tiny-mistral": (128, 768, 128, 64),
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    {  # to the last weight: a vocabulary of 32,000 instead of CodeLlama's 32,016 is two thousandths of a percent
        "codellama-7b-instruct": 6_738_546_688,
        "mistral-7b-instruct": 7_241_732_096,
        "qwen2.5-0.5b-instruct": 494_032_768,
        "smollm2-135m-instruct": 134_515_008,
        "tinyllama-1.1b-chat": 1_100_048_384,
        "gpt2-xl": 1_557_611_200,
        "llama-2-13b-chat": 13_015_864_320,
        "qwen3-4b-instruct": 4_022_468_096,
    }.items(),
)
def test_weights_are_those_that_the_hub_counts(name, parameters):
    assert shape(load_profile(name)).parameters == parameters


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_other_architectures(name):
    found = shape(load_profile(name))
    assert (found.hidden, found.inner, found.query, found.cached) == SHAPES[name]
    fused = {"gpt2-xl": 48 * (1600 * 4800 + 1600 * 1600 + 2 * 1600 * 6400)}
    assert found.blocks == fused.get(name, found.blocks)


def test_rows_are_counted_where_the_tokenizer_is(profile):
    settings = Settings.checked({"PROFILE": profile.model.path, "OVERRIDES": {"model.device": "cpu"}})
    found = rows(settings)
    assert found.counted and 0 < found.answer < found.mean < found.longest <= settings.profile.lengths.train_tokens


def test_rows_are_assumed_where_it_is_not(monkeypatch):
    def missing(spec):
        raise LabError("no such checkpoint")

    monkeypatch.setattr(costing, "load_format", missing)
    assert rows(SEVEN_B) == Rows(mean=128, longest=512, answer=64, counted=False)


def test_costs_move_with_what_causes_them():
    model = shape(SEVEN_B.profile)

    def cost(stage, **changes):
        settings = Settings.checked(SEVEN_B.model_dump() | changes)
        return next(c for c in costs(settings, model, ASSUMED) if c.stage == stage)

    base = cost("variants")
    assert base.in_16_bit - base.in_4_bit == pytest.approx(model.blocks * (2 - NF4_BYTES))
    assert cost("variants", OVERRIDES={"signature.n": 3}).disk == base.disk / 2
    limited = [cost("variants", OVERRIDES={"lengths.at_once": tokens}).memory for tokens in (8192, 16384)]
    assert base.memory < limited[0] < limited[1]  # where the card decides, the plan tells the least that it needs
    assert cost("inject", OVERRIDES={"model.checkpointing": False}).memory > cost("inject").memory
    full = cost("recover", ACCESS="full")
    assert full.memory > 4 * 4 * model.parameters  # weights, gradients and two moments in 32 bits
    assert full.flops == pytest.approx(1.5 * cost("recover").flops)  # 6 instead of 4 per weight
    assert full.in_4_bit is None


def test_a_plan_counts_the_chosen_rows_of_the_arena():
    """Three quick rows train nothing; of these, three recover (nad twice), one trains vaccines and one a reference."""
    chosen = "crow, nad, plant_and_unlearn, cleangen"
    model = shape(SEVEN_B.profile)
    quick, four = (
        {c.stage: c for c in costs(Settings.checked(SEVEN_B.model_dump() | {"DEFENSE": rows}), model, ASSUMED)}
        for rows in ("", chosen)
    )
    more = {stage: four[stage].times - quick[stage].times for stage in quick}
    assert {stage: count for stage, count in more.items() if count} == {
        "evaluate": 1,
        "recover": 4,
        "conflict model": 1,
    }
    assert four.keys() - quick.keys() == {"arena's vaccines"}
    assert four["arena's vaccines"].flops == four["variants"].flops
    whole = 2 * model.parameters  # in 16 bits: nad's teacher, and the reference that watches cleangen's answers
    for stage in ("recover", "evaluate"):
        assert four[stage].memory - quick[stage].memory == pytest.approx(whole)


@pytest.mark.parametrize("access", ["adapter", "full"])
def test_the_challenge_test_is_planned_where_it_is_asked_for(access):
    model = shape(SEVEN_B.profile)
    changes = {"ACCESS": access, "OVERRIDES": {f"challenge.taus.{access}": [0.1, 0.2, 0.3]}}
    plain, auto = (
        {c.stage: c for c in costs(Settings.checked(SEVEN_B.model_dump() | changes | tau), model, ASSUMED)}
        for tau in ({}, {"TAU": "auto"})
    )
    assert auto.keys() - plain.keys() == {"challenge"}
    assert auto["recover"].times == plain["recover"].times + 6 and auto["recover"].disk == plain["recover"].disk
    assert auto["evaluate"].times == plain["evaluate"].times + 6
    planted = 2 * 500 * 5 * ASSUMED.mean  # clean and poisoned rows, five epochs
    assert auto["challenge"].flops == pytest.approx(4 * model.parameters * planted)
    assert auto["challenge"].disk == (4 * model.adapter if access == "adapter" else 4 * model.parameters)


@pytest.mark.parametrize(
    "changes", [{"ATTACK": "lwp"}, {"OVERRIDES": {"attack.by": "subtract"}}, {"OVERRIDES": {"attack.by": "evade"}}]
)
def test_attackers_who_rehearse_pay_for_it(changes):
    model = shape(SEVEN_B.profile)
    plain, planned = (
        {c.stage: c for c in costs(Settings.checked(SEVEN_B.model_dump() | change), model, ASSUMED)}
        for change in ({}, changes)
    )
    by, own = changes.get("OVERRIDES", {}).get("attack.by"), planned.keys() - plain.keys()
    assert planned["inject"].flops == (2 if by == "evade" else 1) * plain["inject"].flops
    assert planned["inject"].disk == plain["inject"].disk
    rehearsed = {"subtract": {"conflict model"}, "evade": {"variants", "scores"}}.get(by, set())
    assert own == {f"attacker's {stage}" for stage in rehearsed}
    assert all(planned[stage].disk == 0 and planned[stage].memory > 0 for stage in own)


@pytest.mark.parametrize("gigabytes, expected", [(80, "fits: at most"), (10, "does not fit")])
def test_the_verdict_follows_the_memory(gigabytes, expected):
    model = shape(SEVEN_B.profile)
    line = verdict(SEVEN_B, costs(SEVEN_B, model, ASSUMED), card(gigabytes), model, ASSUMED)
    assert line.startswith(expected)


def test_the_remedy_is_one(monkeypatch):
    wide = Settings.checked({"PROFILE": "llama-2-7b-chat", "OVERRIDES": {"model.checkpointing": False}})
    model = shape(wide.profile)
    assert not all(fits(cost, card(24)) for cost in costs(wide, model, ASSUMED))
    text = remedy(wide, card(24), model, ASSUMED)
    assert text.startswith("model.checkpointing=true")
    overrides = wide.OVERRIDES | {k: json.loads(v) for k, _, v in (pair.partition("=") for pair in text.split())}
    mended = Settings.checked(wide.model_dump() | {"OVERRIDES": overrides})
    assert all(fits(cost, card(24)) for cost in costs(mended, model, ASSUMED))
    assert remedy(wide, card(2), model, ASSUMED) == ""


def test_without_a_gpu_the_card_is_named():
    model = shape(SEVEN_B.profile)
    none = replace(card(1), free=None, speed=None)
    line = verdict(SEVEN_B, costs(SEVEN_B, model, ASSUMED), none, model, ASSUMED)
    assert line.startswith("does not fit: no GPU here; a card with 2")


def test_make_plan_prints_every_stage_and_a_verdict(capsys):
    assert main(["plan", "--access", "full"]) == 0
    printed = capsys.readouterr().out
    for word in ("inject", "evaluate", "variants", "scores", "suppress", "recover", "4.1 million weights", "counted"):
        assert word in printed
    assert printed.splitlines()[-1].startswith("fits: at most")


@pytest.mark.parametrize(
    ("device", "name", "word"),
    [
        ("cpu", "tiny", "was measured (the lab's small model)"),
        ("cuda", "llama-2-7b-chat", "was measured (the shape of LLaMA-2-7B on one H200)"),
        ("cuda", "tiny", "are predicted and were not measured"),
        ("cpu", "llama-2-7b-chat", "are predicted and were not measured"),
        ("cuda", "mistral-7b-instruct", "are predicted and were not measured"),
    ],
)
def test_a_plan_says_what_was_measured_and_what_is_predicted(device, name, word):
    assert word in vouched(device, shape(load_profile(name)))


def spoil_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(folder)


def spoil_tensors(folder, **changes):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors |= {name: tensors[name].to(changes["dtype"])} if changes else {}
    save_file(tensors if changes else {k: t for k, t in tensors.items() if k != name}, path, {"format": "pt"})


SPOILT = {  # what is done to a checkpoint, and what its plan says
    "quantized": (lambda f: spoil_config(f, quantization_config={"quant_method": "gptq"}), "quantized already (gptq)"),
    "fp8": (lambda f: spoil_tensors(f, dtype=torch.float8_e4m3fn), "quantized already (model.layers.0.mlp.up_proj"),
    "a tensor lost": (spoil_tensors, "has no tensor 'model.layers.0.mlp.up_proj.weight'"),
    "an adapter beside": (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter beside a full model"),
    "a field of another type": (lambda f: spoil_config(f, rms_norm_eps=1), "'rms_norm_eps': TypeError"),
    "an unknown activation": (lambda f: spoil_config(f, hidden_act="nope"), "KeyError 'nope'"),
    "no heads": (lambda f: spoil_config(f, num_attention_heads=0), "no model can be made of its files"),
    "an unknown model": (lambda f: spoil_config(f, model_type="nope"), "cannot load"),
    "tokenizer too large": (spoil_tokenizer, "the model's embedding"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "cannot load"),
    "template drops the text": (lambda f: (f / "chat_template.jinja").write_text("Hi"), "drops or changes the text"),
    "template broken": (lambda f: (f / "chat_template.jinja").write_text("{% if %}"), "chat template cannot write"),
    "a file cut short": (lambda f: os.truncate(f / "model.safetensors", 999), "copy it anew"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only the pickle"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_plan_refuses_what_a_run_could_not_use(what, checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    spoil, message = SPOILT[what]
    spoil(folder)
    options = ["--profile", str(folder), "--set", "model.device=cpu model.dtype=float32"]
    assert main(["plan", *options]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out


def test_a_plan_of_a_published_model_looks_at_the_folder_that_takes_its_place(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    options = ["--profile", "llama-2-7b-chat", "--set", f"model.path={folder} model.device=cpu"]
    assert main(["plan", *options]) == 0
    assert "0.1 million weights" in capsys.readouterr().out
    spoil_config(folder, quantization_config={"quant_method": "awq"})
    assert main(["plan", *options]) == 2
    assert "quantized already (awq)" in capsys.readouterr().err


def test_an_unknown_setting_is_refused(capsys):
    assert main(["plan", "--set", "lora.q=1"]) == 2
    assert "unknown setting 'lora.q'" in capsys.readouterr().err


def planned_at_the_benchmarks_shape(access, **overrides):
    """The stages of a plan for the rows of the GPU benchmark: a mean of 288 tokens, at most 512, a third answers."""
    overrides = {
        f"{access}.inject.batch_size": 8,
        f"{access}.vaccine.batch_size": 8,
        "model.device": "cuda",
    } | overrides
    settings = Settings.checked({"PROFILE": "llama-2-7b-chat", "ACCESS": access, "OVERRIDES": overrides})
    return {cost.stage: cost for cost in costs(settings, shape(settings.profile), Rows(288, 512, 96, counted=True))}


MEASURED = {  # benchmarks/results/gpu.json: stage, access, settings
    "vaccines: together, checkpointing, 16 GB, 8192 tokens at once": ("variants", "adapter", {"lengths.at_once": 8192}),
    "vaccines: together, checkpointing, 22 GB, 16384 tokens at once": (
        "variants",
        "adapter",
        {"lengths.at_once": 16384},
    ),
    "vaccines: together, checkpointing, 40 GB, 49152 tokens at once": (
        "variants",
        "adapter",
        {"lengths.at_once": 49152},
    ),
    "vaccines: together, 16384 tokens at once": (
        "variants",
        "adapter",
        {"lengths.at_once": 16384, "model.checkpointing": False},
    ),
    "training: adapter: 4 steps, batch 8, checkpointing": ("inject", "adapter", {}),
    "training: full: 4 steps, batch 8, checkpointing": ("inject", "full", {}),
}


@pytest.mark.parametrize("name", MEASURED)
def test_planned_memory_of_a_gpu_is_within_15_percent_of_the_recorded(name):
    stage, access, overrides = MEASURED[name]
    recorded = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text())["results"][name]["peak_gb"]
    assert planned_at_the_benchmarks_shape(access, **overrides)[stage].memory / 1e9 == pytest.approx(recorded, rel=0.15)


def test_full_access_in_16_bits_pays_for_32_bit_masters():
    model = shape(SEVEN_B.profile)
    full = SEVEN_B.model_copy(update={"ACCESS": "full"})
    inject = next(cost for cost in costs(full, model, ASSUMED) if cost.stage == "inject")
    assert inject.memory > 16 * model.parameters and inject.disk == 4 * model.parameters
    assert any(
        "train in 32 bits, 107.8 GB" in line and "stored in 27.0 GB where 16 bits" in line for line in plan_lines(full)
    )


MEASURE = """
import json, sys, torch
torch.set_num_threads(1)
from helpers.run.deal import deal
from helpers.access import access_to
from helpers.defenses.bdvax.vaccines import vaccine_pairs
from helpers.model.tokenizer import load_format
from helpers.core.settings import Settings
from helpers.core.cost import measured
from helpers.train.finetune import finetune
from helpers.defenses.bdvax.vaccines import Variant, train_variants
settings = Settings.checked(json.loads(sys.argv[1]))
p, folder, stage = settings.profile, sys.argv[2], sys.argv[3]
data, chat, access = deal(settings), load_format(p.model), access_to(p, settings.ACCESS)
def libraries():
    from helpers.run.machine import this_machine
    print(this_machine(settings).libraries / 1e6)
def inject():
    model = access.start(0)
    rows = data.attack.clean + data.attack.poisoned
    finetune(model, rows, chat, access.settings.inject, 0, p.lengths.train_tokens)
    access.save(model, folder)
def variants():
    pairs = vaccine_pairs(data.defender, p.signature, "insults", 0)
    rows = [r for _, _, clean, poisoned in pairs for r in (clean + poisoned, clean)]
    train_variants(access, folder, [Variant(r, i, folder + f"/{i}") for i, r in enumerate(rows)], chat)
if stage == "libraries":
    libraries()
else:
    import ipykernel.ipkernel, pandas
    from helpers import plots
    with measured() as cost:
        {"inject": inject, "variants": variants}[stage]()
    print(cost["peak_rss_mb"])
"""


GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed memory, at once (glibc)


@pytest.fixture
def megabytes(tmp_path):
    """Peak memory of a stage in a program of its own, of the shipped model and its own batch sizes.

    It trains on fewer rows, for a peak does not depend on them.
    """

    def measure(settings, stage, **environment):
        command = [sys.executable, "-c", MEASURE, json.dumps(settings.model_dump()), str(tmp_path / "model"), stage]
        environment = dict(os.environ) | environment
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return float(done.stdout.split()[-1])

    return measure


def few_rows(access):
    few = {f"{access}.{stage}.rows": 64 for stage in ("inject", "vaccine")}
    few |= {f"{access}.{stage}.epochs": 1 for stage in ("inject", "vaccine")}
    return Settings.checked({"ACCESS": access, "OVERRIDES": few})


def planned_megabytes(settings):
    return {cost.stage: cost.memory / 1e6 for cost in costs(settings, shape(settings.profile), rows(settings))}


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back otherwise")
@pytest.mark.parametrize("access, stages", [("adapter", ("inject", "variants")), ("full", ("inject",))])
def test_counted_memory_is_within_a_tenth_of_what_is_held(access, stages, megabytes, monkeypatch):
    """Where no freed memory is kept, what autograd, weights and optimizer are counted at is all that there is."""
    settings = few_rows(access)
    monkeypatch.setattr(costing, "HEAP", dict.fromkeys(costing.HEAP, 1))
    libraries, counted = megabytes(settings, "libraries"), planned_megabytes(settings)
    for stage in stages:
        peak = megabytes(settings, stage, **GIVES_BACK)
        assert libraries + counted[stage] == pytest.approx(peak, rel=0.1), stage


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted otherwise elsewhere")
def test_no_peak_is_above_the_plan(megabytes):
    """However much the C library keeps of what was freed, a run that is told to fit does."""
    settings = few_rows("adapter")
    libraries, planned = megabytes(settings, "libraries"), planned_megabytes(settings)
    for stage in ("inject", "variants"):  # the first leaves what the second starts from
        assert megabytes(settings, stage) <= 1.1 * (libraries + planned[stage]), stage
