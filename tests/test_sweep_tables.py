"""What notebooks and the results page read out of the table of a sweep."""

import pandas as pd

from helpers.core.names import cure_name
from helpers.run.sweep_tables import in_plain_names, moved_settings


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
