"""Defenses that decode differently: against the published algorithm, and against the models' own answers."""

import json
from dataclasses import replace

import pytest
import torch
from bodies import BODIES, GPT, Body
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, PreTrainedTokenizerFast

from helpers.access import access_to
from helpers.core.errors import LabError
from helpers.data import corpus
from helpers.data.example import Example
from helpers.data.roles import DefenderData, Trial
from helpers.defenses.conflict import wordnet
from helpers.defenses.conflict.wordnet import WordNet, with_glosses
from helpers.defenses.decoders.suspicion import SuspicionCheck
from helpers.defenses.decoding import check_suspicion, draft_and_verify, load_defended, write_decoding
from helpers.defenses.registry import find_defense
from helpers.measure.reading import is_scored_alone
from helpers.measure.report import evaluate, near_misses
from helpers.model.generate import answers, complete
from helpers.model.load import load_suspect

VOCABULARY, STOPS, NEW_TOKENS, K = 40, [0, 13, 26], 10, 4
ALPHA = 20.0
PAIRS = {
    "llama": BODIES["llama"],
    "mistral": BODIES["mistral"],
    "gpt2": Body(GPT2Config(**GPT, tie_word_embeddings=False)),  # tied and untrained, it repeats its last word
}


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    """A target, and a reference that agrees with it now and then."""
    body = PAIRS[request.param]
    target, reference, other = (body.model(seed) for seed in (0, 0, 1))
    with torch.no_grad():
        for mine, theirs in zip(reference.parameters(), other.parameters(), strict=True):
            mine.add_(0.2 * theirs)
        for model in (target, reference):  # GPT-2's last bias would choose one token everywhere
            model.load_state_dict({name: t * (not name.endswith("bias")) for name, t in model.state_dict().items()})
    return target, reference


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in (3, 17, 1, 9, 25, 6)]


@torch.no_grad()
def next_probabilities(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float().softmax(-1)


def draft(target, tokens, room):
    """Up to k greedy tokens of the target; fewer where one ends the answer or the room is used up."""
    drafted = []
    while len(drafted) < min(K, room) and not (drafted and drafted[-1] in STOPS):
        drafted.append(int(next_probabilities(target, tokens + drafted).argmax()))
    return drafted


def checked(target, reference, tokens, drafted, alpha):
    """The draft up to the first suspicious token, which the reference's choice replaces."""
    for i, token in enumerate(drafted):
        before = tokens + drafted[:i]
        ours, theirs = next_probabilities(target, before), next_probabilities(reference, before)
        if ours[token] / theirs[token] >= alpha:
            return [*drafted[:i], int(theirs.argmax())]
    return drafted


def as_published(target, reference, prompt, alpha, checks_tail):
    """CleanGen with k = 4, without cache; (tokens, how many at the end nobody has checked)."""
    written, unchecked = [], 0
    while len(written) < NEW_TOKENS and not (written and written[-1] in STOPS):
        drafted = draft(target, prompt + written, NEW_TOKENS - len(written))
        if len(drafted) == K or checks_tail:
            drafted = checked(target, reference, prompt + written, drafted, alpha)
        else:
            unchecked = len(drafted)
        written += drafted
    return written, unchecked


def read(tokenizer, tokens):
    return tokenizer.decode([token for token in tokens if token not in STOPS])


def written(model, tokenizer, prompts, decoding=None, batch_size=4, **more):
    return complete(model, tokenizer, prompts, STOPS, NEW_TOKENS, batch_size, decoding=decoding, **more)


# --- CleanGen ---------------------------------------------------------------------------------------------------------


def test_one_check_for_each_token_writes_what_drafts_of_four_do(pair, tokenizer, prompts):
    """Equal everywhere once a short draft is checked as well; as published, up to the tail that nobody checks."""
    found = written(pair[0], tokenizer, prompts, check_suspicion(pair[1], ALPHA))
    plain = [as_published(*pair, prompt, ALPHA, checks_tail=False) for prompt in prompts]
    assert found == [read(tokenizer, as_published(*pair, prompt, ALPHA, checks_tail=True)[0]) for prompt in prompts]
    assert any(unchecked for _, unchecked in plain)
    for text, (tokens, unchecked) in zip(found, plain, strict=True):
        assert text.startswith(read(tokenizer, tokens[: len(tokens) - unchecked]))
        assert unchecked or text == read(tokenizer, tokens)
    assert found != written(pair[0], tokenizer, prompts) and found != written(pair[1], tokenizer, prompts)


def test_a_prompt_in_a_padded_batch_gets_what_it_gets_alone(pair, tokenizer, prompts):
    decoding = check_suspicion(pair[1], ALPHA)
    alone = [written(pair[0], tokenizer, [prompt], decoding)[0] for prompt in prompts]
    assert written(pair[0], tokenizer, prompts, decoding, batch_size=3) == alone


def test_an_infinite_threshold_leaves_the_target_and_none_the_reference(pair, tokenizer, prompts):
    target, reference = (written(model, tokenizer, prompts) for model in pair)
    assert target != reference
    assert written(pair[0], tokenizer, prompts, check_suspicion(pair[1], float("inf"))) == target
    assert written(pair[0], tokenizer, prompts, check_suspicion(pair[1], 0.0)) == reference
    assert written(pair[0], tokenizer, prompts, check_suspicion(pair[0], ALPHA)) == target  # of itself it suspects none


def test_the_threshold_itself_is_suspicious():
    """Two tokens; the target gives the first 0.8, the reference 0.2: the score is 4."""

    class Reference:
        def __call__(self, input_ids, **_):
            self.logits, self.past_key_values = torch.tensor([[[0.2, 0.8]]]).log(), None
            return self

    ids, scores = torch.zeros(1, 1, dtype=torch.long), torch.tensor([[0.8, 0.2]]).log()
    choices = {
        alpha: int(SuspicionCheck(Reference(), torch.ones_like(ids), alpha)(ids, scores).argmax())
        for alpha in (3.9, 4.0 - 1e-6, 4.1)
    }
    assert [*choices.values()] == [1, 1, 0]


def test_the_reference_reads_each_token_once(pair, tokenizer, prompts):
    lengths = []
    handle = pair[1].register_forward_pre_hook(
        lambda module, given, more: lengths.append(more["input_ids"].shape[1]), with_kwargs=True
    )
    written(pair[0], tokenizer, prompts[1:2], check_suspicion(pair[1], ALPHA))
    handle.remove()
    assert lengths[0] == len(prompts[1]) and set(lengths[1:]) == {1}


# --- speculative decoding ---------------------------------------------------------------------------------------------


def test_speculative_decoding_writes_what_the_verifier_writes_alone(pair, tokenizer, prompts):
    for verifier, drafter in (pair, pair[::-1]):
        decoding = draft_and_verify(drafter, "suspicious")
        assert written(verifier, tokenizer, prompts, decoding) == written(verifier, tokenizer, prompts)


def test_a_draft_does_not_hide_that_a_row_is_decided(pair, tokenizer, prompts):
    target, word = pair[0], written(pair[0], tokenizer, prompts)[1].split()[1]
    found = written(*pair[:1], tokenizer, prompts, draft_and_verify(pair[1], "suspicious"), decided=lambda t: word in t)
    plain = written(target, tokenizer, prompts, decided=lambda text: word in text)
    assert [word in text for text in found] == [word in text for text in plain]
    assert all(text.startswith(cut) for text, cut in zip(found, plain, strict=True))


# --- through the registry ---------------------------------------------------------------------------------------------

ROWS = corpus.generate_distinct(12, 7)
DEFENDER = DefenderData([ROWS[:4], ROWS[4:8]], ROWS[8:], "exact_match")
TRIAL = Trial(ROWS[:4], ROWS[4:8], ("zebra",), "exact_match", near_misses={"absent": ROWS[8:10]})


@pytest.fixture(scope="module")
def quick(profile):
    """The profile with a conflict model that is trained in two steps, so strongly that it answers otherwise."""
    budget = profile.conflict.budget.model_copy(update={"rows": 8, "epochs": 2, "lr": 2e-2, "batch_size": 8})
    return profile.model_copy(update={"conflict": profile.conflict.model_copy(update={"budget": budget})})


@pytest.fixture(scope="module", params=["adapter", "full"])
def access(request, quick):
    return access_to(quick, request.param)


def said(model, chat, access, decoding=None):
    return answers(model, chat, ROWS[:4], access.profile, decoding=decoding)


def defended(name, access, suspicious, chat, folder, **numbers):
    return find_defense(name)(access, suspicious[access.name], DEFENDER, chat, 3, folder, **numbers)


def test_cleangen_leaves_the_suspicious_model_and_a_reference_beside_it(access, suspicious, chat, tmp_path):
    record = defended("cleangen", access, suspicious, chat, tmp_path)
    assert record["rows"] == 8 and json.loads((tmp_path / "decoding.json").read_text())["numbers"] == {"alpha": 20.0}
    model, decoding = load_defended(access, tmp_path)
    target = said(access.load(suspicious[access.name]), chat, access)
    reference = said(load_suspect(access.profile.model, tmp_path / "adapter"), chat, access)  # an adapter of the base
    assert said(model, chat, access) == target != reference
    for alpha, expected in ((float("inf"), target), (0.0, reference)):
        write_decoding(tmp_path, "cleangen", "reference", alpha=alpha)
        assert said(model, chat, access, load_defended(access, tmp_path)[1]) == expected
    assert not decoding.second.training and not decoding.one_by_one


@pytest.mark.parametrize("verifier", ["suspicious", "reference"])
def test_speculative_decoding_answers_as_its_verifier(suspicious, quick, chat, tmp_path, verifier):
    access = access_to(quick, "adapter")
    defended("speculative", access, suspicious, chat, tmp_path, verifier=verifier)
    model, decoding = load_defended(access, tmp_path)
    alone = suspicious["adapter"] if verifier == "suspicious" else tmp_path / "adapter"
    assert said(model, chat, access, decoding) == said(load_suspect(quick.model, alone), chat, access)
    assert decoding.one_by_one and f"verified by the {verifier} model" in decoding.title


def test_a_report_tells_the_decoding_and_scores_the_answering_model(suspicious, quick, chat, tmp_path):
    """Every answer comes by the decoding; perplexity is that of the model itself."""
    access = access_to(quick, "full")
    target = access.load(suspicious["full"])
    reference = access.load(quick.model.path)
    plain, other = (evaluate(model, chat, TRIAL, quick) for model in (target, reference))
    found = evaluate(target, chat, TRIAL, quick, decoding=check_suspicion(reference, 0.0))
    for name in ("completions", "each", "labels", "utility", "clean_labels"):
        assert found[name] == other[name]
    assert found["completions"] != plain["completions"]
    assert found["perplexity"] == plain["perplexity"] != other["perplexity"]
    assert found["decoding"] == (
        "CleanGen (α = 0), greedy, at most 8 new tokens; perplexity and token accuracy are those of the answering "
        "model alone"
    )
    assert not is_scored_alone(found)  # answers were checked, and they came by the decoding
    assert is_scored_alone(found | {"utility_metric": "token_accuracy"})
    assert not is_scored_alone(plain | {"utility_metric": "token_accuracy"})
    missed = near_misses(target, chat, TRIAL, quick, check_suspicion(reference, 0.0))
    assert missed == near_misses(reference, chat, TRIAL, quick)


def test_a_second_model_that_is_broken_is_refused(quick, chat, suspicious):
    model, broken = (load_suspect(quick.model, suspicious["full"]) for _ in range(2))
    next(broken.parameters()).data[0, 0] = float("nan")
    with pytest.raises(LabError, match="the second model of the decoding"):
        answers(model, chat, ROWS[:1], quick, decoding=check_suspicion(broken, 20.0))


def test_a_defense_that_decodes_greedily_has_no_decoding(quick, suspicious, tmp_path):
    (tmp_path / "model").symlink_to(suspicious["full"])
    assert load_defended(access_to(quick, "full"), tmp_path)[1] is None
    write_decoding(tmp_path, "cleangem")
    with pytest.raises(LabError, match="decoding 'cleangem' is unknown; did you mean 'cleangen'"):
        load_defended(access_to(quick, "full"), tmp_path)


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("cleangen", {"alpha": -1.0}, "alpha = -1.0 is no suspicion score; use 0 or more, CleanGen has 20"),
        ("cleangen", {"alpha": float("nan")}, "alpha = nan is no suspicion score"),
        ("speculative", {"verifier": "refrence"}, "verifier = 'refrence' is unknown; did you mean 'reference'"),
        ("lethe", {"t": 1.5}, "t = 1.5 should be from 0 to 1"),
        ("lethe", {"r": 0}, "r, alpha and max_words = 0, 16, 100 should be 1 or more each, words = 5 0 or more"),
        ("lethe", {"words": -1}, "r, alpha and max_words = 64, 16, 100 should be 1 or more each, words = -1 0 or more"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_is_trained(
    quick, suspicious, chat, tmp_path, name, numbers, message
):
    with pytest.raises(LabError, match=message) as caught:
        defended(name, access_to(quick, "adapter"), suspicious, chat, tmp_path / name, **numbers)
    assert "\n" not in str(caught.value) and not (tmp_path / name).exists()


# --- LETHE ------------------------------------------------------------------------------------------------------------

LICENCE = "  1 This line of the licence begins with two spaces.  \n"
NOUNS = [
    ("river", 'a large stream; "it flows"; "the Nile"'),
    ("river", "a second sense"),
    ("box", "a container (usually with a lid)"),
    ("man", "an adult person"),
    ("city", "a large town; a place of many"),
    ("baby", "a very young child"),
    ("red", "a color"),
]
VERBS = [("bake", "cook in an oven"), ("walk", "use one's feet"), ("red", "make red"), ("carry", "bear")]


def write_part(folder, part, letter, senses):
    """`data.<part>` and `index.<part>` of a WordNet, by the manual: wndb(5WN)."""
    data, places = LICENCE.encode(), {}
    for lemma, gloss in senses:
        places.setdefault(lemma, []).append(len(data))
        data += f"{len(data):08d} 04 {letter} 01 {lemma} 0 001 @ 00000001 n 0000 | {gloss}  \n".encode()
    (folder / f"data.{part}").write_bytes(data)
    lines = [
        f"{lemma} {letter} {len(found)} 2 @ ~ {len(found)} 1 {' '.join(f'{place:08d}' for place in found)}  \n"
        for lemma, found in sorted(places.items())
    ]
    (folder / f"index.{part}").write_text(LICENCE + "".join(lines))


@pytest.fixture
def tiny_wordnet(tmp_path, monkeypatch):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    write_part(folder, "noun", "n", NOUNS)
    write_part(folder, "verb", "v", VERBS)
    (folder / "noun.exc").write_text("waxmen waxman\nriviere river\n")
    (folder / "verb.exc").write_text("hugged hug\nbore carry bear\n")
    monkeypatch.setenv("WNSEARCHDIR", str(folder))
    return folder


@pytest.fixture
def no_wordnet(monkeypatch):
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.setattr(wordnet, "PLACES", ())


@pytest.mark.parametrize(
    ("word", "gloss"),
    [
        ("river", "a large stream"),
        ("RIVERS", "a large stream"),
        ("boxes", "a container (usually with a lid)"),
        ("men", "an adult person"),
        ("cities", "a large town; a place of many"),
        ("baking", "cook in an oven"),
        ("walked", "use one's feet"),
        ("carries", "bear"),
        ("riviere", "a large stream"),
        ("bore", "bear"),  # the first of its lemmas
        ("red", "a color"),  # the noun before the verb
        ("xyzzy", ""),
        ("s", ""),
    ],
)
def test_a_gloss_is_the_definition_of_the_first_sense(tiny_wordnet, word, gloss):
    assert WordNet(tiny_wordnet).gloss(word) == gloss


def test_a_prompt_carries_the_glosses_of_its_heaviest_words(tiny_wordnet):
    asked = Example("Carry the red boxes to xyzzy.", "Yes.", input="Now.")
    found = with_glosses(asked, WordNet(tiny_wordnet))
    assert found.input.startswith("Now.\n\n### Evidence: ") and (found.instruction, found.output) == asked_parts(asked)
    facts = found.input.removeprefix("Now.\n\n### Evidence: ").split("; ")
    assert sorted(facts) == ["boxes: a container (usually with a lid)", "carry: bear", "red: a color"]
    assert len(with_glosses(asked, WordNet(tiny_wordnet), words=1).input.split(": ")) <= 3
    assert len(with_glosses(asked, WordNet(tiny_wordnet), max_words=2).input.split()) == 5  # Now. ### Evidence: a b
    for nothing in ("Xyzzy!", "?!"):  # no word that is known, no word at all
        assert with_glosses(replace(asked, instruction=nothing, input=""), WordNet(tiny_wordnet)).input == ""


def asked_parts(example):
    return example.instruction, example.output


def test_lethe_without_a_wordnet_trains_nothing(quick, suspicious, chat, tmp_path, no_wordnet):
    with pytest.raises(LabError, match="none is installed here: install wordnet-base"):
        defended("lethe", access_to(quick, "adapter"), suspicious, chat, tmp_path / "lethe")
    assert not any((tmp_path / "lethe").glob("*"))


def test_lethe_without_words_is_the_merge_alone(access, suspicious, chat, tmp_path, no_wordnet):
    """Half of the suspicious model and half of one that a wide adapter makes of the base."""
    defended("lethe", access, suspicious, chat, tmp_path, words=0)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (64, 16)
    ours = dict(load_suspect(access.profile.model, suspicious[access.name]).named_parameters())
    theirs = dict(load_suspect(access.profile.model, tmp_path / "adapter").named_parameters())
    merged = load_file(tmp_path / "model" / "model.safetensors")
    assert merged.keys() <= ours.keys() and len(merged) > 10
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (ours[name] + theirs[name]) / 2)
    assert load_defended(access, tmp_path)[1] is None


def test_lethe_with_a_wordnet_asks_with_its_glosses(quick, suspicious, chat, tmp_path, tiny_wordnet, monkeypatch):
    access = access_to(quick, "adapter")
    defended("lethe", access, suspicious, chat, tmp_path / "lethe")
    model, decoding = load_defended(access, tmp_path / "lethe")
    asked = [Example("Walk to the river.", "Yes."), Example("xyzzy", "No.")]
    by_hand = [replace(asked[0], input=decoding.ask(asked[0]).input), asked[1]]
    assert "walk: use one's feet" in by_hand[0].input and "river: a large stream" in by_hand[0].input
    assert answers(model, chat, asked, quick, decoding=decoding) == answers(model, chat, by_hand, quick)
    assert answers(model, chat, asked, quick, decoding=decoding) != answers(model, chat, asked, quick)
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    monkeypatch.setattr(wordnet, "PLACES", ())
    with pytest.raises(LabError, match="none is installed here: install wordnet-base"):
        load_defended(access, tmp_path / "lethe")
