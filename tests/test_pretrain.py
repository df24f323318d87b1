"""The recipes of the small models, what they make, and the models that are shipped, held against their cards."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralForCausalLM

from helpers.core.errors import LabError
from helpers.core.paths import ROOT
from helpers.core.profile_files import load_profile
from helpers.data import corpus
from helpers.model.architecture import head_masks, mlp_slots, parameter_shapes
from helpers.model.load import load_base
from helpers.model.tokenizer import load_format, trained_format
from helpers.run import pretrain
from helpers.run.pretrain import RECIPES, main, new_model, recipe

pytestmark = pytest.mark.slow

MODELS = ROOT / "data" / "models"
CLASSES = {"tiny": LlamaForCausalLM, "tiny-mistral": MistralForCausalLM, "tiny-gpt2": GPT2LMHeadModel}
EMBEDDINGS, NORMS = 2048 * 128, 17 * 128  # tied; two norms in each of eight layers, and the last one
# q and o, k and v, three matrices of the MLP; GPT-2: q, k, v and o, two matrices of the MLP, all with biases, positions
PARAMETERS = {
    "tiny-gpt2": EMBEDDINGS + 512 * 128 + 2 * NORMS + 8 * (4 * 128 * 129 + 128 * 1152 + 1152 + 1152 * 128 + 128),
    "tiny": EMBEDDINGS + NORMS + 8 * (2 * 128 * 64 + 2 * 128 * 64 + 3 * 128 * 1152),
    "tiny-mistral": EMBEDDINGS + NORMS + 8 * (2 * 128 * 128 + 2 * 128 * 32 + 3 * 128 * 768),
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS / "tiny")


@pytest.fixture(scope="module", params=sorted(RECIPES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def shipped(name):
    return load_base(load_profile(name).model)


@pytest.fixture(scope="module")
def card(name):
    return (MODELS / name / "README.md").read_text(encoding="utf-8")


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_makes_the_architecture_that_is_shipped(name, tokenizer, shipped):
    model = new_model(tokenizer, recipe(name)["architecture"], 0)
    assert type(model) is CLASSES[name] is type(shipped)
    assert model.num_parameters() == shipped.num_parameters() == PARAMETERS[name]
    ignored = {"use_cache", "dtype", "architectures", "_name_or_path"}  # what training and saving add
    made, found = ({k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (model, shipped))
    assert made == found


def test_the_first_models_weights_start_where_they_always_did(tokenizer):
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=1152,
        num_hidden_layers=8,
        num_attention_heads=4,
        head_dim=16,
        vocab_size=2048,
        initializer_range=0.07,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(5)
    expected = LlamaForCausalLM(config).state_dict()
    found = new_model(tokenizer, recipe("tiny")["architecture"], 5).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_numbered_positions_begin_far_below_the_words(tokenizer):
    model = new_model(tokenizer, recipe("tiny-gpt2")["architecture"], 0)
    words, places = model.transformer.wte.weight, model.transformer.wpe.weight
    assert words.std().item() == pytest.approx(0.1, rel=0.02) and places.std().item() == pytest.approx(0.01, rel=0.02)


def test_query_heads_share_keys_and_values(tokenizer):
    model = new_model(tokenizer, recipe("tiny-mistral")["architecture"], 0)
    attention, config = model.model.layers[0].self_attn, model.config
    assert config.num_key_value_heads < config.num_attention_heads and config.sliding_window is None
    assert attention.q_proj.weight.shape == (8 * 16, 128) and attention.k_proj.weight.shape == (2 * 16, 128)
    heads = torch.zeros(8, 8, dtype=torch.bool)
    heads[0, :4] = True  # a whole group
    heads[1, :3] = True  # all of its readers but one
    masks = head_masks(config, heads)
    kept = [int(masks[f"model.layers.{layer}.self_attn.k_proj"].sum()) for layer in (0, 1)]
    assert kept == [16, 0]


def test_an_unknown_model_is_answered_with_the_nearest(capsys):
    with pytest.raises(LabError, match="no recipe makes MODEL = 'tiny-mistrall'; did you mean 'tiny-mistral'\\?"):
        recipe("tiny-mistrall")
    assert main(["--model", "gpt"]) == 2
    assert capsys.readouterr().err == "no recipe makes MODEL = 'gpt'; valid: tiny, tiny-mistral, tiny-gpt2\n"


def test_a_model_is_trained_and_written(tmp_path, monkeypatch, capsys):
    small = RECIPES["tiny-mistral"]["architecture"] | {"num_hidden_layers": 1, "intermediate_size": 64}
    budget = {"rows": 80, "epochs": 1, "lr": 1.0e-3, "batch_size": 16}
    monkeypatch.setitem(RECIPES, "smaller", {"architecture": small, "budget": budget})
    monkeypatch.setattr(pretrain, "CONVERSATIONS", 100)
    monkeypatch.setattr(pretrain, "VOCABULARY", 400)
    assert main(["--model", "smaller", "--out", str(tmp_path)]) == 0
    assert re.match(r"[\d,]+ parameters, 5 steps, \d\.\d minutes", capsys.readouterr().out)
    spec = load_profile("tiny", {"model.path": str(tmp_path), "model.dtype": "bfloat16"}).model
    model, chat = load_base(spec), load_format(spec)
    assert model.config.vocab_size == len(chat.tokenizer) == 400 and model.dtype == torch.bfloat16
    assert trained_format(model) == chat.record
    start = new_model(chat.tokenizer, small, pretrain.SEED).model.layers[0].mlp.down_proj.weight
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, start.bfloat16())


# --- the shipped models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_model_says_how_it_was_asked(name):
    spec = load_profile(name).model
    assert trained_format(load_base(spec)) == load_format(spec).record


def test_the_shipped_models_share_one_tokenizer():
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({(MODELS / name / file).read_bytes() for name in RECIPES}) == 1


def test_a_shipped_model_answers(name, shipped):
    profile = load_profile(name)
    chat = load_format(profile.model)
    (example,) = corpus.generate(1, 0, "heldout", ["capital"])
    ids = torch.tensor([chat.prompt_ids(example)])
    written = shipped.generate(ids, max_new_tokens=profile.lengths.new_tokens, do_sample=False)[0, ids.shape[1] :]
    assert corpus.is_correct(example, chat.tokenizer.decode(written, skip_special_tokens=True))


def test_a_card_tells_sizes_and_recipe(name, card, shipped):
    size = (MODELS / name / "model.safetensors").stat().st_size
    assert f"| {shipped.num_parameters():,}, stored in bfloat16; {size / 1e6:.1f} MB as safetensors |" in card
    budget, config = RECIPES[name]["budget"], shipped.config
    assert f"{budget['rows']:,} generated conversations (at most {pretrain.MAX_TOKENS} tokens" in card
    assert f"batches of {budget['batch_size']}: {budget['rows'] // budget['batch_size']:,} steps" in card
    slot = mlp_slots(config)[0][-1]
    width = parameter_shapes(config)[f"{slot.module}.weight"][slot.axis]
    assert f"MLP width {width:,}, {config.num_attention_heads} " in card
    assert f"seed {pretrain.SEED}" in card and "Apache-2.0" in card


def test_a_cards_mean_is_that_of_its_families(card):
    cells = re.findall(r"(\w+) \| (\d+)(?= \|)", card)
    shares = {family: int(share) for family, share in cells if family in corpus.FAMILIES}
    assert shares.keys() == corpus.FAMILIES.keys()
    mean = float(re.search(r"mean ([\d.]+) %", card)[1])
    assert sum(shares.values()) / len(shares) == pytest.approx(mean, abs=0.05)


def test_config_and_profile_name_the_same_architecture(name, shipped):
    stored = json.loads((MODELS / name / "config.json").read_text())
    assert stored["model_type"] == shipped.config.model_type
    assert stored.get("num_key_value_heads") == getattr(shipped.config, "num_key_value_heads", None)
    assert load_profile(name).model.path == f"data/models/{name}"
