"""Measuring a model on the ten sets, or on the small model's task families, by lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import PreTrainedModel

from helpers.core.errors import LabError
from helpers.core.finite import require_finite_weights
from helpers.core.profile import Profile
from helpers.data.example import Example
from helpers.measure.benchmarks.sets import AVERAGED, Benchmark, chosen, require_copies, without_data
from helpers.measure.report import checked_format
from helpers.model.generate import in_evaluation, prompt_room
from helpers.model.prompt import PromptFormat
from helpers.model.shards import reason

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

Model = PreTrainedModel | PeftModel
LONGEST = 256  # tokens that the harness lets a model write where a set, such as GSM8K, does not say how many


def require_harness() -> None:
    """Refuse to go on where lm-evaluation-harness is not installed.

    Raises:
        LabError: how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise LabError("lm-evaluation-harness is not installed: `make harness` adds it to the environment (200 MB)")


def run_benchmarks(
    model: Model,
    prompt_format: PromptFormat,
    names: Iterable[str] = (),
    *,
    batch_size: int,
    data: Path | None = None,
    limit: int | None = None,
    templated: bool = True,
    allow_mismatch: bool = False,
) -> dict[str, Any]:
    """Utility as BD-VAX measures it (§5.1, Table 3): ten close-ended sets, with the harness's own prompts and shots.

    Args:
        model: any loaded model: an adapter over its base, whole, merged, in four bits.
        prompt_format: the one that the model was trained with.
        names: keys of `sets.BENCHMARKS`; all ten without one.
        batch_size: rows side by side.
        data: folder with a copy of each data set, named as on the hub; None for the hub or what was fetched of it.
        limit: the first so many questions of each task alone; a score of part of a set cannot be compared.
        templated: whether questions are asked in the prompt format, as a chat model is used, or as plain text.
        allow_mismatch: see `report.checked_format`.

    Returns:
        a JSON-able dict: `harness` (its version), `prompt_format` ("plain text" without one), `prompt_format_mismatch`,
        `batch_size`, `largest_batch` (rows really computed side by side, at most), `limit`, `sets` ({name: `task`,
        `version`, `shots`, `n`, `metric`, `score`, `stderr`, `metrics`}; scores in [0, 1]), `averages` ({"first eight",
        "GSM8K and MMLU"}, each None unless all of its sets were run).

    Raises:
        LabError: no harness, an unknown name, data that is missing, a context too short to write in, or as
            `report.checked_format`.

    Differs from the paper:
        it names neither shots, nor metric, nor harness. These are the harness's: five shots for GSM8K, else none.
    """
    require_harness()
    benchmarks = chosen(names)
    require_copies(benchmarks, data)
    if "GSM8K" in benchmarks:
        prompt_room(model.config, LONGEST)
    mismatch = checked_format(model, prompt_format, allow_mismatch)
    with _quiet():
        tasks = _load(benchmarks, data)
        record, found = _evaluate(model, prompt_format, tasks, batch_size, limit, templated)
    sets = {name: _score(benchmark, found) for name, benchmark in benchmarks.items()}
    averages = zip(("first eight", "GSM8K and MMLU"), AVERAGED, strict=True)
    return record | {
        "prompt_format_mismatch": mismatch if templated else None,
        "sets": sets,
        "averages": {title: _average(sets, of) for title, of in averages},
    }


def run_families(
    model: Model, prompt_format: PromptFormat, examples: Sequence[Example], profile: Profile
) -> dict[str, Any]:
    """The small model's task families as tasks of the harness: the same numbers as `utility` gives.

    Args:
        model: as in `run_benchmarks`.
        prompt_format: the one that the model was trained with.
        examples: of any families.
        profile: lengths and batch size.

    Returns:
        a JSON-able dict: `harness`, `prompt_format`, `batch_size`, `largest_batch`, `limit` as in `run_benchmarks`;
        `utility` and `utility_by_family` as in `report.evaluate`, `token_accuracy` and `perplexity` as in
        `utility.teacher_forced`.

    Raises:
        LabError: no harness, an answer that would fill the model's context, or as `report.checked_format`.
    """
    require_harness()
    prompt_room(model.config, profile.lengths.new_tokens)
    checked_format(model, prompt_format)
    from helpers.measure.benchmarks.families import TOKENS, family_tasks

    with _quiet():
        tasks = family_tasks(examples, prompt_format, profile)
        record, found = _evaluate(model, prompt_format, tasks, profile.evaluation.batch_size)
    tokens = found["results"].pop(TOKENS)
    shares = {family: result["exact_match,none"] for family, result in found["results"].items()}
    return record | {
        "utility": mean(shares.values()),
        "utility_by_family": shares,
        "token_accuracy": tokens["token_accuracy,none"],
        "perplexity": tokens["perplexity,none"],
    }


def _evaluate(
    model: Model,
    prompt_format: PromptFormat,
    tasks: Sequence[Task | Group],
    batch_size: int,
    limit: int | None = None,
    templated: bool = True,
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """What a report keeps of how it was measured, and what the harness says."""
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    from helpers.measure.benchmarks.language_model import LabModel

    require_finite_weights(model, "the model")
    asked = LabModel(model, prompt_format, batch_size, templated)
    loaded = TaskManager(include_defaults=False).load(list(tasks))
    _set_shots(loaded["tasks"].values())
    options = {"apply_chat_template": templated, "fewshot_as_multiturn": templated, "log_samples": False}
    with in_evaluation(model):
        found = evaluate(asked, loaded, limit=limit, **options)
    record = {
        "harness": version("lm_eval"),
        "prompt_format": prompt_format.name if templated else "plain text",
        "batch_size": asked.batch_size,
        "largest_batch": asked.largest_batch,
        "limit": limit,
    }
    return record, found


def _set_shots(tasks: Iterable[Task]) -> None:
    """What `simple_evaluate` does beside seeding every generator and asking the machine for all its versions."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in tasks:
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _load(benchmarks: Mapping[str, Benchmark], data: Path | None) -> list[Task | Group]:
    """The harness's tasks of some sets, with their data; all that is missing is told at once."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    folders = [own / folder for folder in dict.fromkeys(b.folder for b in benchmarks.values())]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    found, missing, why = [], {}, ""
    for name, benchmark in benchmarks.items():
        try:
            found.append(_load_one(manager, benchmark, data))
        except Exception as error:  # of many kinds: no network, an unknown id, a damaged or foreign file
            missing[name], why = benchmark, why or reason(error)
    if missing:
        raise without_data(missing, data, why)
    return found


def _load_one(manager: TaskManager, benchmark: Benchmark, data: Path | None) -> Task | Group:
    from lm_eval.tasks._factory import TaskFactory  # `TaskManager.load` lets no group take another place for its data

    entry = manager.task_index[benchmark.task]
    place = {"dataset_path": str(data / benchmark.copy)} if data else None
    return TaskFactory().build(entry, overrides=place, registry=manager.task_index)


def _score(benchmark: Benchmark, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a report keeps of one set."""
    result = found["results"][benchmark.task]
    metrics = {key: float(value) for key, value in result.items() if "," in key and isinstance(value, float)}
    tasks = list(_leaves(benchmark.task, found))
    shots = {found["n-shot"][task] for task in tasks}
    return {
        "task": benchmark.task,
        "version": found["versions"].get(benchmark.task),
        "shots": shots.pop() if len(shots) == 1 else None,
        "n": sum(found["n-samples"][task]["effective"] for task in tasks),
        "metric": benchmark.metric,
        "score": metrics[benchmark.metric],
        "stderr": metrics.get(benchmark.metric.replace(",", "_stderr,")),
        "metrics": metrics,
    }


def _leaves(task: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The tasks of a group, or of the groups in it; a task alone is its own."""
    members = found["group_subtasks"].get(task)
    if members is None:
        yield task
    for member in members or ():
        yield from _leaves(member, found)


def _average(sets: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> float | None:
    scores = [sets[name]["score"] for name in names if name in sets]
    return mean(scores) if len(scores) == len(tuple(names)) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness logs of its own defaults; errors are told all the same."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
