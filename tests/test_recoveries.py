"""What a sweep over the rows of a recovery says, and its paired tests, against numbers counted by hand."""

import pandas as pd

from helpers.run.recoveries import METHODS, recovered_on, recoveries, seeds_tested, told_apart

KINDS = {"plain": "[]", "perturbed": "['several']"}


def swept(payloads, seeds=(21,)):
    """A sweep's table: {(model, rows): for each of 20 prompts whether it is a payload}; every clean answer is right."""
    rows = [
        {
            "SEED": seed,
            "ACCESS": "full",
            "full.perturb.kinds": KINDS[kind],
            "model": model,
            "each_triggered": letters,
            "each_right": 20 * "0",
            "each_clean_right": 30 * "1",
        }
        for seed in seeds
        for (model, kind), letters in payloads.items()
    ]
    return pd.DataFrame(rows)


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


def test_every_method_is_held_against_bdvax_and_against_itself_on_other_rows():
    payloads = {(model, kind): 20 * "p" for model in METHODS for kind in KINDS}
    payloads |= {("purified", "perturbed"): 18 * "a" + "pp", ("clean", "plain"): 20 * "a"}
    table = told_apart(recoveries(swept(payloads)))
    assert list(table.index) == [
        ("BD-VAX", "fine-tuning"),
        ("BD-VAX", "random"),
        ("BD-VAX", "smallest"),
        ("BD-VAX", "own update"),
        ("fine-tuning", "plain"),
        ("random", "plain"),
        ("smallest", "plain"),
        ("own update", "plain"),
        ("BD-VAX", "plain"),
    ]
    ours = table.index.get_level_values(0) == "BD-VAX"
    assert all(cell.startswith("-90.0 (") for cell in table["payload, points"][ours])  # 18 of 20 prompts
    assert all(cell.startswith("+0.0 (") for cell in table["payload, points"][~ours])
    # two-sided, 18 heads of 18 throws: 2 / 2 ** 18, times 27 tests
    assert set(table["payload, p"][ours]) == {"< 0.001"} and set(table["payload, p"][~ours]) == {"1.000"}
    assert all(cell.startswith("+0.0 (") for cell in table["clean, points"])


def test_the_prompts_of_several_seeds_are_pooled_and_seeds_without_letters_left_out():
    payloads = {(model, kind): 20 * "p" for model in METHODS for kind in KINDS}
    weak = payloads | {("purified", "perturbed"): "aaa" + 17 * "p"}
    one = recoveries(swept(weak))
    two = recoveries(swept(weak, seeds=(21, 22, 23)))
    assert one.pipe(told_apart)["payload, p"].iloc[0] == "1.000"  # three prompts: 0.25, times 27
    assert two.pipe(told_apart)["payload, p"].iloc[0] != "1.000"  # nine
    untold = pd.concat([one, recoveries(swept(payloads, seeds=(20,))).assign(each_triggered=None)])
    pd.testing.assert_frame_equal(told_apart(untold), told_apart(one))
    assert seeds_tested(untold) == [21] and seeds_tested(two) == [21, 22, 23]
    older = one.drop(columns=["each_triggered", "each_right", "each_clean_right"])
    assert told_apart(older).empty and seeds_tested(older) == []
