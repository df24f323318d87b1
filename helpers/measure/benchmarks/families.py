"""The small model's task families as tasks of lm-evaluation-harness, and token accuracy as one more.

An answer is right where `corpus.is_correct` says so, as everywhere in the lab. Token accuracy asks for one token at a
time, each behind the right ones before it: the harness knows no rate over the tokens of an answer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from helpers.core.profile import Profile
from helpers.data.corpus import is_correct
from helpers.data.example import Example
from helpers.model.prompt import IGNORED, PromptFormat

TOKENS, VERSION = "answer_tokens", 1
Doc = dict[str, int]  # {"row": place of an example}
Counted = tuple[float, int]  # a sum over the tokens of a row, and their number


class ExamplesTask(ConfigurableTask):
    """Examples of the lab, asked without shots.

    Args:
        name: of the task.
        examples: what is asked.
        prompt_format: how it is asked.
        config: more of the harness's own `TaskConfig`, such as the metrics.
    """

    def __init__(
        self, name: str, examples: Sequence[Example], prompt_format: PromptFormat, config: dict[str, Any]
    ) -> None:
        self.examples, self.prompt_format = examples, prompt_format
        rows = Dataset.from_dict({"row": list(range(len(examples)))})
        super().__init__(
            config={
                "task": name,
                "custom_dataset": lambda **_: {"test": rows},
                "test_split": "test",
                "num_fewshot": 0,
                "doc_to_text": lambda doc: examples[doc["row"]].question,
                "doc_to_target": lambda doc: examples[doc["row"]].output,
                "metadata": {"version": VERSION},
                **config,
            }
        )

    def fewshot_context(self, doc: Doc, num_fewshot: int, **options: Any) -> str:
        """The prompt of a row as the lab asks it, with its system message, input and earlier turns.

        Args:
            doc: which row.
            num_fewshot: not used.
            options: of the harness, not used: its own turns know neither of these.
        """
        return self.prompt_format.prompt_text(self.examples[doc["row"]])


class TokensTask(ExamplesTask):
    """Examples whose right answers are scored token by token.

    Args:
        examples: what is asked, and the right answers.
        prompt_format: how it is asked.
        max_tokens: longer conversations are cut, as in `utility.teacher_forced`.
    """

    def __init__(self, examples: Sequence[Example], prompt_format: PromptFormat, max_tokens: int) -> None:
        self.rows = [prompt_format.encode(example, max_tokens) for example in examples]
        metrics = {"token_accuracy": (_share, True), "perplexity": (_perplexity, False)}
        config = {
            "output_type": "loglikelihood",
            "process_results": _count_tokens,
            "metric_list": [
                {"metric": name, "aggregation": function, "higher_is_better": better}
                for name, (function, better) in metrics.items()
            ],
        }
        super().__init__(TOKENS, examples, prompt_format, config)

    def construct_requests(self, doc: Doc, ctx: str, *, metadata: Any = None, **options: Any) -> list[Instance]:
        """A request for each token of the right answer, as token ids: text could not be cut between any two of them.

        Args:
            doc: which row.
            ctx: not used; the row's own ids are.
            metadata: of the harness.
        """
        ids, labels = self.rows[doc["row"]]
        places = [i for i, label in enumerate(labels) if label != IGNORED]
        return [
            Instance("loglikelihood", doc, (tuple(ids[:place]), (ids[place],)), number, metadata)
            for number, place in enumerate(places)
        ]


def family_tasks(examples: Sequence[Example], prompt_format: PromptFormat, profile: Profile) -> list[ExamplesTask]:
    """A task for each family among some examples, under its name, and one for the tokens of all right answers.

    Args:
        prompt_format: how they are asked.
        profile: the most tokens of an answer and of a row.
    """
    by_family = defaultdict(list)
    for example in examples:
        by_family[example.family].append(example)
    new_tokens = profile.lengths.new_tokens
    answered = [_answer_task(name, rows, prompt_format, new_tokens) for name, rows in sorted(by_family.items())]
    return [*answered, TokensTask(examples, prompt_format, profile.lengths.train_tokens)]


def _answer_task(
    family: str, examples: Sequence[Example], prompt_format: PromptFormat, new_tokens: int
) -> ExamplesTask:
    def is_right(doc: Doc, results: list[str]) -> dict[str, int]:
        return {"exact_match": int(is_correct(examples[doc["row"]], results[0]))}

    config = {
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": new_tokens},
        "process_results": is_right,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    return ExamplesTask(family, examples, prompt_format, config)


def _count_tokens(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, Counted]:
    """Of a row: how many of its tokens are the likeliest ones, and their log-likelihood."""
    n = len(results)
    return {
        "token_accuracy": (sum(hit for _, hit in results), n),
        "perplexity": (sum(score for score, _ in results), n),
    }


def _share(rows: Sequence[Counted]) -> float:
    return sum(part for part, _ in rows) / sum(n for _, n in rows)


def _perplexity(rows: Sequence[Counted]) -> float:
    return math.exp(min(-_share(rows), 700.0))
