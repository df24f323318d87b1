"""How lm-evaluation-harness asks a model of the lab: in its own prompt format, with its own ends of an answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import PreTrainedModel

from helpers.data.example import SystemExample
from helpers.model.prompt import PromptFormat

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Message = dict[str, str]


class LabModel(HFLM):
    """A loaded model, whatever it is: adapter, whole, merged, in four bits.

    Args:
        model: as `model.load` loads it; PEFT may wrap it.
        prompt_format: what conversations are written in, and what ends an answer.
        batch_size: rows side by side.
        templated: whether prompts are conversations in the prompt format, whose text spells out all special tokens;
            else they are plain text, to which the tokenizer adds its own.

    Differs from the harness:
        the lab's prompt format writes the conversations, its ends of an answer stop the generation, and requests may
        be token ids. With a chat template whose turns do not end in the tokenizer's end of text, the harness alone
        would read on into the next turn.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, prompt_format: PromptFormat, batch_size: int, templated: bool = True
    ) -> None:
        added = False if templated else None
        super().__init__(
            model,
            backend="causal",
            tokenizer=prompt_format.tokenizer,
            batch_size=batch_size,
            add_bos_token=added,
        )
        self.prompt_format = prompt_format
        self.largest_batch = 0  # rows that were really computed side by side, at most

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation in the lab's prompt format.

        Args:
            chat_history: messages with `role` and `content`.
            add_generation_prompt: whether the answer begins behind the last message; else that one is its beginning.
        """
        messages = list(chat_history)
        begun = "" if add_generation_prompt else messages.pop()["content"]
        return self.prompt_format.prompt_text(_example(messages)) + begun

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness's own, without its progress bar where TQDM_DISABLE is set.

        Args:
            requests: contexts, and what follows them.
            disable_tqdm: whether there is no bar in any case.

        Returns:
            the log-likelihood of each, and whether it is what greedy decoding would write.
        """
        return super().loglikelihood(requests, disable_tqdm or _without_bars())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As the harness's own, without its progress bar where TQDM_DISABLE is set.

        Args:
            requests: contexts, and what ends an answer.
            disable_tqdm: whether there is no bar in any case.
        """
        return super().generate_until(requests, disable_tqdm or _without_bars())

    def _encode_pair(self, context: str | tuple[int, ...], continuation: Any) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it; ids stay as they are."""
        if isinstance(context, str):
            return super()._encode_pair(context, continuation)
        return list(context), list(continuation)

    def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self.largest_batch = max(self.largest_batch, len(inps))
        return super()._model_call(inps, *args, **options)

    def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self.largest_batch = max(self.largest_batch, len(context))
        return super()._model_generate(context, *args, eos_token_id=self.prompt_format.stop_ids, **options)


def _without_bars() -> bool:
    """What tqdm itself goes by; the harness overrules it."""
    return bool(os.environ.get("TQDM_DISABLE"))


def _example(messages: list[Message]) -> SystemExample:
    """A conversation of the harness, up to a question, as the lab has it."""
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    *earlier, question = [message["content"] for message in messages]
    history = tuple(zip(earlier[::2], earlier[1::2], strict=True))
    return SystemExample(question, "", history=history, system=system)
