"""The ten sets and the small model's families by lm-evaluation-harness: the lab's own numbers, and what is missing."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from helpers.core.errors import LabError
from helpers.core.profile_files import load_profile
from helpers.data import corpus
from helpers.data.example import Example, SystemExample
from helpers.measure.benchmarks.running import run_benchmarks, run_families
from helpers.measure.benchmarks.sets import AVERAGED, BENCHMARKS, chosen, require_copies
from helpers.measure.utility import exact_match, teacher_forced
from helpers.model.generate import answers
from helpers.model.load import load_base, load_suspect
from helpers.model.lora import with_adapter
from helpers.model.prompt import prompt_format
from helpers.model.tokenizer import load_tokenizer

HERE = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HERE, reason="no lm-evaluation-harness: `make harness` installs it")

# --- names and data ---------------------------------------------------------------------------------------------------


def test_sets_come_in_the_order_of_the_papers_table():
    assert list(chosen(["mmlu", "BoolQ", "rte"])) == ["RTE", "BoolQ", "MMLU"]
    assert list(chosen()) == list(BENCHMARKS) == [*AVERAGED[0], *AVERAGED[1]] and len(BENCHMARKS) == 10


def test_an_unknown_set_is_refused():
    with pytest.raises(LabError, match="unknown benchmark 'BoolQA'; did you mean 'BoolQ'"):
        chosen(["RTE", "BoolQA"])


def test_missing_copies_are_told_with_the_command_that_fetches_them(tmp_path):
    (tmp_path / "glue").mkdir()
    with pytest.raises(LabError) as caught:
        require_copies(chosen(["RTE", "ARC-Easy", "ARC-Challenge", "BoolQ"]), tmp_path)
    assert str(caught.value) == (
        "no data for ARC-Challenge (allenai/ai2_arc), ARC-Easy (allenai/ai2_arc), BoolQ (aps/super_glue); where there "
        f"is a network, run `hf download allenai/ai2_arc --repo-type dataset --local-dir {tmp_path}/ai2_arc && "
        f"hf download aps/super_glue --repo-type dataset --local-dir {tmp_path}/super_glue`"
    )


def test_without_the_harness_the_command_that_installs_it_is_named(profile, chat, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for run in (lambda: run_benchmarks(None, chat, batch_size=1), lambda: run_families(None, chat, [], profile)):
        with pytest.raises(LabError, match="lm-evaluation-harness is not installed: `make harness` adds it"):
            run()


@needs_harness
def test_the_table_of_sets_is_the_harnesss_own():
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    folders = [own / benchmark.folder for benchmark in BENCHMARKS.values()]
    known = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders).task_index
    for benchmark in BENCHMARKS.values():
        config = known["mmlu_anatomy" if benchmark.task == "mmlu" else benchmark.task].cfg
        config = known["arc_easy"].cfg | config
        assert config["dataset_path"] == benchmark.hub
        metric, filtered = benchmark.metric.split(",")
        assert metric in {entry["metric"] for entry in config["metric_list"]}
        assert filtered in {entry["name"] for entry in config.get("filter_list", [{"name": "none"}])}


@needs_harness
def test_a_set_that_the_hub_does_not_give_is_told(profile, chat, monkeypatch):
    def offline(path, **_):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(LabError) as caught:
        run_benchmarks(load_base(profile.model), chat, ["piqa", "boolq"], batch_size=2)
    assert str(caught.value) == (
        "no data for BoolQ (aps/super_glue), PIQA (baber/piqa): Couldn't reach 'aps/super_glue' on the Hub; where "
        "there is a network, run `hf download aps/super_glue --repo-type dataset --local-dir FOLDER/super_glue && "
        "hf download baber/piqa --repo-type dataset --local-dir FOLDER/piqa`, and give that folder as data"
    )


# --- families ---------------------------------------------------------------------------------------------------------


def same_as_the_labs(model, chat, rows, profile):
    """What the harness says of the families, once it is what the lab says."""
    found = run_families(model, chat, rows, profile)
    utility, by_family = exact_match(rows, answers(model, chat, rows, profile))
    scored = teacher_forced(model, chat, rows, profile.lengths.train_tokens, profile.evaluation.batch_size)
    assert found["utility"] == pytest.approx(utility) and found["utility_by_family"] == pytest.approx(by_family)
    assert found["token_accuracy"] == pytest.approx(scored["token_accuracy"])
    assert found["perplexity"] == pytest.approx(scored["perplexity"], rel=1e-4)
    return found


@needs_harness
def test_families_of_the_small_model_get_the_labs_own_numbers():
    """Every family is there, lists and conversations of several turns among them; a little noise makes some wrong.

    The tokenizer's end of text is not the template's end of a turn, which alone ends an answer.
    """
    profile = load_profile("tiny", {"evaluation.batch_size": 8})
    rows = corpus.generate(2 * len(corpus.FAMILIES), 5, "heldout")
    model = load_base(profile.model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    tokenizer = load_tokenizer(profile.model)
    tokenizer.eos_token = tokenizer.bos_token
    found = same_as_the_labs(model, prompt_format(tokenizer), rows, profile)
    assert found["utility_by_family"].keys() == corpus.FAMILIES.keys() and 0.5 < found["utility"] < 1
    assert (found["batch_size"], found["largest_batch"]) == (8, 8)
    assert found["harness"].startswith("0.") and found["prompt_format"] == "chat" and json.dumps(found)


@needs_harness
def test_prompts_are_the_labs_own_in_every_format(profile, chat):
    """An input of its own, earlier turns and a system message, which the harness's conversations know differently."""
    row = corpus.generate(1, 5, "heldout", ["capital"])[0]
    rows = [
        replace(row, input="Answer in one word."),
        SystemExample(row.instruction, row.output, "", (("Hello!", "Good day."),), row.family, system="Be brief."),
    ]
    from helpers.measure.benchmarks.families import family_tasks  # needs the harness

    for form in (chat, prompt_format(chat.tokenizer, "alpaca")):
        first, *_ = family_tasks(rows, form, profile)
        assert [first.fewshot_context({"row": i}, 0) for i in (0, 1)] == [form.prompt_text(one) for one in rows]
        same_as_the_labs(load_base(profile.model), form, rows, profile)


@needs_harness
def test_any_kind_of_model_is_measured(profile, chat, suspicious):
    """An adapter over its base, the same merged, a whole model, and an adapter over four bits."""
    rows = corpus.generate(6, 1, "heldout", ["capital", "memory"])
    for model in (
        with_adapter(load_base(profile.model), suspicious["adapter"]),
        load_suspect(profile.model, suspicious["adapter"]),
        load_suspect(profile.model, suspicious["full"]),
        with_adapter(load_base(profile.model, four_bit=True), suspicious["adapter"]),
    ):
        same_as_the_labs(model, chat, rows, profile)


# --- sets -------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "validation", "test", "dev")


def copy_set(folder, config, rows):
    """A data set as the hub keeps one: a README that names a configuration's files, and the files."""
    splits = "\n".join(f"  - split: {split}\n    path: {config}/{split}.jsonl" for split in SPLITS)
    described = f"- config_name: {config}\n  data_files:\n{splits}\n"
    readme = folder / "README.md"
    before = readme.read_text(encoding="utf-8").strip("-\n") + "\n" if readme.is_file() else "configs:\n"
    (folder / config).mkdir(parents=True)
    readme.write_text(f"---\n{before}{described}---\n", encoding="utf-8")
    for split in SPLITS:
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / config / f"{split}.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Copies of some sets with three questions each, and a cache of this test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = [("is fire cold", "Fire is hot.", 0), ("is ice cold", "Ice is cold.", 1), ("is tea wet", "Tea is wet.", 1)]
    boolq = [{"question": q, "passage": p, "label": label, "idx": i} for i, (q, p, label) in enumerate(words)]
    copy_set(tmp_path / "super_glue", "boolq", boolq)
    letters = {"text": ["Paris", "the city of Rome", "Oslo"], "label": ["A", "B", "C"]}
    arc = [
        {"id": str(i), "question": q, "choices": letters, "answerKey": key}
        for i, (q, key) in enumerate([("Where is the Seine?", "A"), ("Where is the Tiber?", "B"), ("And fjords?", "C")])
    ]
    copy_set(tmp_path / "ai2_arc", "ARC-Easy", arc)
    copy_set(tmp_path / "ai2_arc", "ARC-Challenge", arc)
    copy_set(
        tmp_path / "gsm8k", "main", [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)]
    )
    return tmp_path


@torch.inference_mode()
def scored_by_hand(model, tokenizer, prompt, choice):
    """The log-likelihood of an answer behind a prompt, token by token."""
    ids = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
    begun = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logs[place - 1, ids[place]].item() for place in range(begun, len(ids)))


@needs_harness
@pytest.mark.parametrize("templated", [True, False])
def test_a_set_is_scored_as_by_hand(profile, chat, copies, templated):
    model = load_base(profile.model)
    report = run_benchmarks(model, chat, ["arc-easy"], batch_size=2, data=copies, templated=templated)
    found = report["sets"]["ARC-Easy"]
    right, normed = 0, 0
    for row in map(json.loads, (copies / "ai2_arc/ARC-Easy/test.jsonl").read_text().splitlines()):
        asked, space = f"Question: {row['question']}\nAnswer:", " "
        if templated:
            asked, space = chat.prompt_text(Example(asked, "")), ""
        texts = row["choices"]["text"]
        scores = [scored_by_hand(model, chat.tokenizer, asked, space + text) for text in texts]
        gold = row["choices"]["label"].index(row["answerKey"])
        right += max(range(3), key=scores.__getitem__) == gold
        normed += max(range(3), key=lambda i: scores[i] / len(texts[i])) == gold
    assert found["metrics"]["acc,none"] == pytest.approx(right / 3) and found["score"] == pytest.approx(normed / 3)
    assert (found["task"], found["metric"], found["shots"], found["n"]) == ("arc_easy", "acc_norm,none", 0, 3)
    assert (report["batch_size"], report["largest_batch"], report["limit"]) == (2, 2, None)
    assert report["prompt_format"] == ("chat" if templated else "plain text") and json.dumps(report)


@needs_harness
def test_several_sets_at_once_keep_their_shots(profile, chat, copies):
    names = ["GSM8K", "BoolQ", "ARC-Challenge"]
    report = run_benchmarks(load_base(profile.model), chat, names, batch_size=4, data=copies, limit=2)
    assert list(report["sets"]) == ["ARC-Challenge", "BoolQ", "GSM8K"]
    assert {name: (row["shots"], row["n"]) for name, row in report["sets"].items()} == {
        "ARC-Challenge": (0, 2),
        "BoolQ": (0, 2),
        "GSM8K": (5, 2),
    }
    assert report["averages"] == {"first eight": None, "GSM8K and MMLU": None} and report["limit"] == 2


@needs_harness
def test_a_set_of_many_tasks_is_one(profile, chat, tmp_path, monkeypatch):
    """MMLU: the same question four times, with each option right once, so that any model has one of four right."""
    rows = [{"question": "Which?", "choices": ["one", "two", "three", "four"], "answer": i} for i in range(4)]
    asked = []

    def load(path, name):
        asked.append((path, name))
        return dict.fromkeys(("test", "dev"), datasets.Dataset.from_list(rows))

    (tmp_path / "mmlu").mkdir()
    monkeypatch.setattr("datasets.load_dataset", load)
    report = run_benchmarks(load_base(profile.model), chat, ["mmlu"], batch_size=64, data=tmp_path)
    found = report["sets"]["MMLU"]
    assert (found["score"], found["n"], found["shots"], found["task"]) == (0.25, 57 * 4, 0, "mmlu")
    assert {path for path, _ in asked} == {str(tmp_path / "mmlu")} and len({name for _, name in asked}) == 57


@needs_harness
def test_a_damaged_copy_is_told(profile, chat, copies):
    (copies / "super_glue/boolq/validation.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(LabError, match=r"^no data for BoolQ \(aps/super_glue\): .*; where there is a network, run `hf"):
        run_benchmarks(load_base(profile.model), chat, ["boolq"], batch_size=2, data=copies)


@needs_harness
def test_another_prompt_format_is_refused(profile, chat, copies):
    model = load_base(profile.model)
    model.trained_format = {"name": "alpaca", "template": "other"}
    with pytest.raises(LabError, match="trained with the prompt format 'alpaca' and would be measured with another"):
        run_benchmarks(model, chat, ["boolq"], batch_size=2, data=copies)
    report = run_benchmarks(model, chat, ["boolq"], batch_size=2, data=copies, allow_mismatch=True)
    assert report["prompt_format_mismatch"] is True
