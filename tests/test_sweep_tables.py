"""What notebooks and the results page read out of the table of a sweep."""

import pandas as pd
import pytest

from helpers.core.errors import LabError
from helpers.core.names import cure_name
from helpers.run.sweep_tables import in_plain_names, moved_settings, parts_of, prompt_by_prompt, seeds_by_prompt


def test_plain_names_stand_beside_the_keys_and_an_unknown_key_stays():
    table = in_plain_names(pd.DataFrame({"ATTACK": ["vpi", "mine"], "TASK": ["sentiment", "refusal"]}))
    assert table["ATTACK"].tolist() == ["vpi", "mine"]
    assert table[["attack", "task"]].to_numpy().tolist() == [["VPI", "insult"], ["mine", "refusal"]]
    assert list(in_plain_names(pd.DataFrame({"SEED": [0]}))) == ["SEED"]


def test_settings_that_a_row_leaves_alone_are_not_told():
    table = pd.DataFrame({"full.suppress.tau": [0.30, 0.55, None], "full.suppress.heads_of": ["layer", None, None]})
    assert moved_settings(table.assign(asr=0.5)) == ["share 0.3, ranked in the layer", "share 0.55", ""]


def test_a_real_models_cures_say_what_was_suppressed_and_whether_it_recovered():
    assert cure_name("healed signature 0.85, half of the heads") == "BD-VAX 85 %, heads"
    assert cure_name("cut random 0.03") == "random 3 %, not recovered"
    assert cure_name("conflict model") == "base + clean rows" and cure_name("scores") == "scores"


def test_the_models_of_a_stage_stand_under_their_own_names():
    table = pd.DataFrame({"model": ["backdoored", "mixtures/M3", "mixtures/M3_M4"], "asr": [0.9, 0.8, 0.1]})
    parts = parts_of(table, "mixtures")
    assert parts["model"].tolist() == ["M3", "M3_M4"] and parts["asr"].tolist() == [0.8, 0.1]
    assert parts_of(table, "merges").empty and table["model"].tolist()[1] == "mixtures/M3"


def test_single_prompts_of_a_sweep_are_put_behind_each_other_where_all_models_have_them():
    rows = [
        (21, "purified", "pa", "11"),
        (20, "purified", "aa", "10"),
        (20, "random", "pp", "00"),
        (21, "random", "ap", "01"),
        (22, "purified", "pp", "11"),  # of the other one nothing was kept
        (22, "random", None, None),
        (23, "purified", "pp", "11"),  # nor is there any here
    ]
    table = pd.DataFrame(rows, columns=["SEED", "model", "each_triggered", "each_clean_right"])
    assert prompt_by_prompt(table) == {
        "purified": {"each": {"triggered": "aapa", "clean_right": "1011"}},
        "random": {"each": {"triggered": "ppap", "clean_right": "0001"}},
    }
    assert seeds_by_prompt(table) == [20, 21] and seeds_by_prompt(table, ["random"]) == [20, 21]
    assert prompt_by_prompt(table, ["purified"])["purified"]["each"]["triggered"] == "aapapppp"
    free_text = prompt_by_prompt(table.assign(each_clean_right=None))
    assert free_text["random"] == {"each": {"triggered": "ppap"}}
    with pytest.raises(LabError, match="^seed 21 has 'purified' more than once"):
        prompt_by_prompt(pd.concat([table, table[:1]]))
    assert prompt_by_prompt(table.drop(columns=["each_triggered", "each_clean_right"])) == {}
