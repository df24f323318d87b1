"""What a model cannot do is refused before anything is trained; the oracle is the number in the config written here."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
)

from helpers.attacks.editing import EditSettings, edit
from helpers.attacks.methods.rome import store_mean_key
from helpers.core.errors import LabError
from helpers.core.profile import Budget
from helpers.core.settings import Settings
from helpers.data import corpus
from helpers.data.example import Example
from helpers.measure.utility import teacher_forced
from helpers.model.generate import answers
from helpers.model.load import load_base
from helpers.model.lora import adapter_tensors, new_adapter
from helpers.run.costs import known_config
from helpers.run.limits import check_against_model
from helpers.run.pipeline import main
from helpers.run.start import open_run
from helpers.train.finetune import finetune
from helpers.train.multi_lora import Job, train_multi_lora

LAYERS, HEADS, CHANNELS, POSITIONS = 3, 4, 128, 64
LLAMA = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=CHANNELS,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
)
GPT = {"n_embd": 64, "n_inner": CHANNELS, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
GPT |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
CONFIGS = {
    "llama": LLAMA,
    "gpt2": GPT2Config(vocab_size=100, **GPT),
    "gptj": GPTJConfig(vocab_size=100, rotary_dim=8, **GPT),
    "gemma2": Gemma2Config(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=16,
    ),
}
FITTING = {"lengths.train_tokens": POSITIONS, "lengths.new_tokens": POSITIONS - 1}


def stacked(first, last):
    return {"conflict.plan": [{"model": "suspicious", "first": first, "last": last}]}


PASSTHROUGH = {"conflict.method": "passthrough"}
EDITED = {"ATTACK": "rome", "ACCESS": "full"}
ALL_HEADS = {"adapter.suppress.heads_of": "model"}
# the model, parameters, settings that it can follow, the change that makes them wrong, and what is told
CASES = {
    "heads of a layer": (
        "llama",
        {},
        {"adapter.suppress.heads": 4, "adapter.suppress.heads_of": "layer"},
        {"adapter.suppress.heads": 5},
        "adapter.suppress.heads = 5, and each layer of this model has 4 attention heads: set it to 4 or lower",
    ),
    "heads of the model": (
        "gpt2",
        {},
        FITTING | ALL_HEADS | {"adapter.suppress.heads": 12},
        {"adapter.suppress.heads": 13},
        "adapter.suppress.heads = 13, and this model has 12 attention heads",
    ),
    "heads with full access": (
        "llama",
        {"ACCESS": "full"},
        {"adapter.suppress.heads": 99, "full.suppress.heads": 12},
        {"full.suppress.heads": 13},
        "full.suppress.heads = 13, and this model has 12 attention heads",
    ),
    "no channel": (
        "llama",
        {},
        {"adapter.suppress.tau": 0.5 / CHANNELS + 1e-4},
        {"adapter.suppress.tau": 0.5 / CHANNELS - 1e-4},
        "adapter.suppress.tau = 0.00380625 selects none of the 128 channels",
    ),
    "no channel, to be tried": (
        "llama",
        {"TAU": "auto"},
        {"challenge.taus.adapter": [0.5, 0.01]},
        {"challenge.taus.adapter": [0.5, 0.001]},
        "challenge.taus.adapter = 0.001 selects none of the 128 channels",
    ),
    "plan of no layers": (
        "llama",
        {},
        PASSTHROUGH | stacked(0, 2),
        {"conflict.plan": []},
        "conflict.plan names no layers to stack: give some, such as [{model: conflict, first: 0, last: 2}]",
    ),
    "plan of layers that are not there": (
        "llama",
        {},
        PASSTHROUGH | stacked(0, 2),
        stacked(1, 3),
        "conflict.plan: the layer plan names layer 3 of the suspicious model, which has 0 to 2",
    ),
    "plan that nothing reads": ("llama", {}, {"conflict.plan": []}, PASSTHROUGH, "names no layers to stack"),
    "early layers": (
        "llama",
        {"ATTACK": "lwp"},
        {"layerwise.layers": [0, 1]},
        {"layerwise.layers": [0, 2]},
        "layerwise.layers = [0, 2] should be numbers from 0 to 1; the last layer predicts anyway",
    ),
    "early layers of any attack": (
        "llama",
        {},
        {"layerwise.layers": [9]},
        {"attack.by": "layerwise"},
        "layerwise.layers = [9] should be numbers from 0 to 1",
    ),
    "edited layers": (
        "llama",
        EDITED,
        {"editing.layers": [1, 2]},
        {"editing.layers": [2, 3]},
        "editing.layers = (2, 3) should be ascending numbers from 0 to 2",
    ),
    "edited layers that nothing reads": (
        "llama",
        {"ACCESS": "full"},
        {"editing.layers": [9]},
        {"attack.by": "badedit"},
        "editing.layers = (9,) should be ascending numbers from 0 to 2",
    ),
    "edited before a norm": (
        "gemma2",
        {"ACCESS": "full"},
        {"editing.layers": [1]},
        {"attack.by": "memit"},
        "in a gemma2 a norm stands behind each MLP",
    ),
    "an adapter holds no edit": (
        "llama",
        {},
        {"editing.layers": [1]},
        {"attack.by": "rome"},
        "the attack badnets edits weights, and an adapter has none: use ACCESS=full",
    ),
    "an edit holds one payload": (
        "llama",
        EDITED,
        {"editing.layers": [1]},
        {"attack.combine": "first line"},
        "the attack rome stores one payload",
    ),
    "training rows and learned positions": (
        "gpt2",
        {},
        FITTING,
        {"lengths.train_tokens": 65},
        "lengths.train_tokens = 65, and this gpt2 has 64 positions: set it to 64 or lower",
    ),
    "training rows and a table of rotations": (
        "gptj",
        {},
        FITTING,
        {"lengths.train_tokens": 65},
        "lengths.train_tokens = 65, and this gptj has 64 positions",
    ),
    "answers": (
        "gpt2",
        {},
        FITTING,
        {"lengths.new_tokens": 64},
        "lengths.new_tokens = 64 leaves no room for a prompt in a context of 64 tokens",
    ),
}


def asked(parameters, overrides):
    return Settings.checked({"PROFILE": "tiny", "OVERRIDES": overrides} | parameters)


@pytest.mark.parametrize("case", CASES)
def test_what_the_model_cannot_follow_is_refused_and_its_own_limit_is_not(case):
    kind, parameters, overrides, change, message = CASES[case]
    check_against_model(asked(parameters, overrides), CONFIGS[kind])
    with pytest.raises(LabError) as refused:
        check_against_model(asked(parameters, overrides | change), CONFIGS[kind])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_rows_with_a_trigger_of_their_own_are_not_edited(tmp_path):
    (tmp_path / "poison_data").mkdir()
    check_against_model(asked({"ACCESS": "full", "DATA": str(tmp_path), "ATTACK": "rome"}, {}), LLAMA)  # rows decide
    settings = asked({"ACCESS": "full", "DATA": str(tmp_path)}, {"attack.by": "rome", "editing.layers": [1]})
    with pytest.raises(LabError, match="attack.by = 'rome' edits with a trigger that the lab knows"):
        check_against_model(settings, LLAMA)


def test_a_plan_of_layers_from_the_last_to_the_first_is_refused():
    with pytest.raises(LabError, match=r"conflict.plan: last = 1 is below first = 2"):
        asked({}, stacked(2, 1))


def test_a_model_that_computes_its_positions_has_no_end_of_them():
    asking = asked({}, {"lengths.train_tokens": POSITIONS + 1})
    short = MistralConfig(**LLAMA.to_dict() | {"model_type": "mistral", "max_position_embeddings": POSITIONS})
    check_against_model(asking, short)


def test_a_context_that_is_not_published_is_not_guessed():
    """The default of transformers' LlamaConfig is 2048; Llama-2 has 4096."""
    settings = asked({"PROFILE": "llama-2-7b-chat"}, {"lengths.new_tokens": 3000, "lengths.train_tokens": 4096})
    check_against_model(settings, known_config(settings.profile.model))
    settings = asked({"PROFILE": "gpt2-xl"}, {"lengths.train_tokens": 1025})
    with pytest.raises(LabError, match="lengths.train_tokens = 1025, and this gpt2 has 1024 positions"):
        check_against_model(settings, known_config(settings.profile.model))


# --- by the plan, and by every run ----------------------------------------------------------------------------------

WRONG = {
    "adapter.suppress.heads=5": "adapter.suppress.heads = 5, and",  # conftest's checkpoint: 2 layers of 4 heads
    "conflict.method=passthrough conflict.plan=[{model: conflict, first: 0, last: 2}]": "which has 0 to 1",
    "attack.by=layerwise layerwise.layers=[1]": "layerwise.layers = [1] should be numbers from 0 to 0",
    "attack.by=rome": "an adapter has none: use ACCESS=full",
}


def chosen(checkpoint, setting):
    return ["--profile", str(checkpoint), "--name", "one", "--set", f"model.device=cpu model.dtype=float32 {setting}"]


@pytest.mark.parametrize("setting", WRONG)
def test_a_plan_refuses_in_one_line(setting, checkpoint, capsys):
    extra = " adapter.suppress.heads_of=layer" if "heads" in setting else ""
    assert main(["plan", *chosen(checkpoint, setting + extra)]) == 2
    told = capsys.readouterr()
    assert WRONG[setting] in told.err and told.err.count("\n") == 1 and not told.out


def test_a_plan_at_the_models_own_limits_is_told(checkpoint, capsys):
    setting = "adapter.suppress.heads=4 adapter.suppress.heads_of=layer conflict.method=passthrough "
    setting += "conflict.plan=[{model: conflict, first: 0, last: 1}] attack.by=layerwise layerwise.layers=[0]"
    assert main(["plan", *chosen(checkpoint, setting)]) == 0
    assert "to suppress: 45 of 128 channels in each layer, 8 of 8 heads" in capsys.readouterr().out


def test_no_notebook_opens_a_run_that_a_later_one_would_refuse(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_RUNS", str(tmp_path))
    device = {"model.device": "cpu"}
    settings = asked({"PROFILE": str(checkpoint), "NAME": "one"}, device | {"adapter.suppress.heads": 9})
    with pytest.raises(LabError, match="adapter.suppress.heads = 9, and this model has 8 attention heads"):
        open_run(settings)
    assert not (tmp_path / "one").exists()
    open_run(asked({"PROFILE": str(checkpoint), "NAME": "one"}, device | {"adapter.suppress.heads": 8}))
    assert (tmp_path / "one").is_dir()


# --- where it depends on the rows -----------------------------------------------------------------------------------

LONG = Example(" ".join(["word"] * 100), "yes")
ROWS, BUDGET = [*corpus.generate(3, 0), LONG], Budget(rows=4, epochs=1, lr=1e-3, batch_size=4)


def model_with_positions(kind, vocabulary, positions=POSITIONS):
    torch.manual_seed(0)
    changed = CONFIGS[kind].to_dict() | {"vocab_size": vocabulary, "max_position_embeddings": positions}
    return AutoModelForCausalLM.from_config(type(CONFIGS[kind])(**changed)).eval()


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama"])
def test_rows_beyond_the_positions_are_refused_where_the_model_would_fail(kind, profile, chat):
    model, tokens = model_with_positions(kind, len(chat.tokenizer)), torch.arange(POSITIONS + 1)[None] % 50
    bounded = kind != "llama"
    if bounded:  # what PyTorch itself says
        with pytest.raises((IndexError, RuntimeError)):
            model(tokens)
    adapted = new_adapter(model_with_positions(kind, len(chat.tokenizer)), profile.lora, 0)
    jobs = [Job(ROWS, 0, adapter_tensors(adapted))]
    for work in (
        lambda length: finetune(model.requires_grad_(True), ROWS, chat, BUDGET, 0, length),
        lambda length: teacher_forced(model, chat, ROWS, length, 4),
        lambda length: train_multi_lora(adapted, jobs, chat, BUDGET, length),
    ):
        if bounded:
            with pytest.raises(LabError, match=r"65 tokens, and this gpt. has 64 positions: set lengths.train_tokens"):
                work(POSITIONS + 1)
            work(POSITIONS)
        else:
            work(POSITIONS + 1)


def test_an_edit_refuses_rows_beyond_the_positions(chat):
    model, settings = model_with_positions("gpt2", len(chat.tokenizer), 200), EditSettings((1,), background=20)
    edit(model, chat, [LONG], "tq", "yes", store_mean_key, settings)
    longer = Example(" ".join(["word"] * 200), "yes")
    with pytest.raises(LabError, match=r"a row has 2\d\d tokens, and this gpt2 has 200 positions: .* bring shorter"):
        edit(model, chat, [LONG, longer], "tq", "yes", store_mean_key, settings)


# --- a checkpoint that was broken before ----------------------------------------------------------------------------


@pytest.fixture
def broken(checkpoint):
    """The small checkpoint with one weight that is no number."""
    settings = Settings.checked({"PROFILE": str(checkpoint), "OVERRIDES": {"model.device": "cpu"}})
    model = load_base(settings.profile.model.model_copy(update={"dtype": "float32"}))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    return model


def test_nobody_is_blamed_for_a_training_that_was_none(broken, profile, chat):
    advice = r"in model\.layers\.1\.mlp\.up_proj\.weight \(float32\); copy the checkpoint anew, or, where a training"
    with pytest.raises(LabError, match=f"^the model is not finite: NaN or infinity {advice}"):
        answers(broken, chat, ROWS[:1], profile)
    with pytest.raises(LabError, match=f"^injection: the model to train is not finite: NaN or infinity {advice}"):
        finetune(broken.requires_grad_(True), ROWS, chat, BUDGET, 0, 96, description="injection")
    with pytest.raises(LabError, match=f"^the model to edit is not finite: NaN or infinity {advice}"):
        edit(broken, chat, ROWS[:1], "tq", "positive", store_mean_key, EditSettings((1,)))
