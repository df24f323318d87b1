"""What the sweep over information conflicts' eight defenses says of each."""

import pandas as pd

from helpers.run.conflict_defenses import defended


def test_defenses_have_plain_names_a_corpus_and_the_accuracy_of_the_paper():
    rows = [
        ("argued/book-merged-evidence", "sst2", 0.1, 0.8, 0.7),
        ("clean", "sst2", 0.0, 1.0, 1.0),  # no defense
        ("arena/wanda", "sst2", 0.9, 0.6, 0.5),
        ("backdoored", "sst2", 1.0, 0.9, 0.9),
        ("conflict", "autopoison", 0.2, 0.8, None),  # a brand goes with every kind of prompt
        ("arena/cleangen", "autopoison", 0.3, None, None),  # decodes, and its answers were not checked
        ("argued/book-backdoored-evidence", "sst2", 0.8, 0.6, 0.5),  # evidence alone is no defense of the table
    ]
    found = defended(pd.DataFrame(rows, columns=["model", "TASK", "asr", "utility", "task_utility"]))
    assert found["defense"].tolist() == [
        "backdoored",
        "Wanda",
        "CleanGen",
        "conflict merge",
        "conflict merge and evidence",
    ]
    assert found["corpus"].tolist() == ["sst2", "sst2", "conversation", "conversation", "sst2"]
    assert found["right"].fillna(-1).tolist() == [0.9, 0.5, -1, 0.8, 0.7]
