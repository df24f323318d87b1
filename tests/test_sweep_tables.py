"""What notebooks and the results page read out of the table of a sweep."""

import pandas as pd

from helpers.core.names import cure_name
from helpers.run.sweep_tables import in_plain_names, moved_settings, recovered_on


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


def test_what_a_run_recovered_on_is_told_by_the_settings_of_its_own_access():
    table = pd.DataFrame(
        {
            "ACCESS": ["full", "full", "full", "adapter", "adapter", "adapter"],
            "full.perturb.kinds": ["[]", "['made_up', 'several']", None, None, None, None],
            "full.recover.epochs": [None, None, 15, None, None, None],
            "adapter.perturb.kinds": [None, None, None, "[]", "['word']", None],
            "adapter.recover.epochs": [None, None, None, None, None, 15],
        }
    )
    assert list(recovered_on(table)) == ["plain", "perturbed", "plain, 15 epochs"] * 2
    assert list(recovered_on(table[["ACCESS"]])) == ["plain"] * 6
