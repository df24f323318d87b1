"""The prompt format: the only place that turns a conversation into tokens and a loss mask.

A backdoor planted under one template and measured under another seems to vanish, and so does an honest model's skill.
Training, evaluation and every figure therefore ask the same `PromptFormat` for their tokens. The prompt carries no
loss (label -100); the last answer and the token that ends it do, so the model also learns where to stop.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod

from transformers import PreTrainedTokenizerBase

from helpers.core.errors import LabError, nearest
from helpers.data.example import Example
from helpers.model.shards import reason

IGNORED = -100  # the label that PyTorch's cross-entropy skips
RESERVED_ANSWER_TOKENS = 16  # even the longest prompt leaves the answer this much room
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
)
ALPACA_PAIRED = ", paired with an input that provides further context"


class PromptFormat(ABC):
    """Turns an `Example` into text, token ids and labels for one tokenizer."""

    name: str

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    @property
    def template(self) -> str:
        """What every prompt is made from, with the places of question and material in braces."""
        return self.prompt_text(Example("{instruction}", "", input="{input}"))

    @property
    def record(self) -> dict[str, str]:
        """What a model's folder keeps of the format it was trained with; equal records mean equal prompts."""
        return {"name": self.name, "template": self.template}

    @property
    @abstractmethod
    def stop_ids(self) -> list[int]:
        """The token ids, sorted, each of which ends an answer."""

    @abstractmethod
    def prompt_text(self, example: Example) -> str:
        """Everything the model reads before it answers, special tokens written out."""

    @abstractmethod
    def answer_text(self, example: Example) -> str:
        """Everything the model should write, the token that ends the answer included."""

    def prompt_ids(self, example: Example) -> list[int]:
        """The prompt as token ids, ready for generation."""
        return self._tokenise(self.prompt_text(example))

    def encode(self, example: Example, max_tokens: int) -> tuple[list[int], list[int]]:
        """One training row: the prompt without loss, the answer with it.

        A row that is too long loses the end of its answer. Only a prompt that would leave the answer fewer than
        `RESERVED_ANSWER_TOKENS` tokens is cut as well, at its beginning: the end says what is asked.

        Args:
            max_tokens: the most tokens a row may have, above `RESERVED_ANSWER_TOKENS`.

        Returns:
            `input_ids` and `labels`, both of the same length; labels are -100 on the prompt.

        Raises:
            LabError: `max_tokens` leaves no room for a prompt.
        """
        if max_tokens <= RESERVED_ANSWER_TOKENS:
            raise LabError(
                f"max_tokens={max_tokens} leaves no room for a prompt; set lengths.train_tokens above "
                f"{RESERVED_ANSWER_TOKENS}"
            )
        prompt, answer = self._split(example)
        prompt = prompt[-(max_tokens - min(RESERVED_ANSWER_TOKENS, len(answer))) :]
        answer = answer[: max_tokens - len(prompt)]
        return prompt + answer, [IGNORED] * len(prompt) + answer

    def _split(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids of the prompt, exactly as generation will see it, and of the answer that continues it."""
        prompt_text, answer_text = self.prompt_text(example), self.answer_text(example)
        prompt, whole = self._tokenise(prompt_text), self._tokenise(prompt_text + answer_text)
        if whole[: len(prompt)] == prompt:  # SentencePiece tokenizers start a lone answer with a spurious space
            return prompt, whole[len(prompt) :]
        return prompt, self._tokenise(answer_text)  # a token would straddle the border

    def _tokenise(self, text: str) -> list[int]:
        # The text already spells out its special tokens: letting the tokenizer add them would double the BOS.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class ChatFormat(PromptFormat):
    """The template that the model's own tokenizer carries."""

    name = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise LabError(
                "prompt format 'chat' needs a tokenizer with a chat template, and this one has none; "
                "choose prompt_format: alpaca"
            )
        self._try_out()
        self.end = self._end_of_turn()

    @property
    def template(self) -> str:
        """The template's source: what it renders may hold today's date."""
        return self.tokenizer.get_chat_template()

    @property
    def stop_ids(self) -> list[int]:
        """The template's end of a turn and the tokenizer's end of a text."""
        ids = {self.tokenizer.convert_tokens_to_ids(self.end), self.tokenizer.eos_token_id}
        return sorted(ids - {None})

    def prompt_text(self, example: Example) -> str:
        """All turns in the tokenizer's own template, up to where the assistant begins."""
        return self._render(self._messages(example), add_generation_prompt=True)

    def answer_text(self, example: Example) -> str:
        """What the template writes for the last answer, its end token included."""
        rendered = self._rendered_answer(example)
        answer, end, _ = rendered.rpartition(self.end)
        # What a template writes behind its end token (often a newline) is the next turn's business, not the answer's.
        return answer + end if end else rendered + self.end

    def _rendered_answer(self, example: Example) -> str:
        """What the template adds to the prompt once the assistant has spoken."""
        prompt = self.prompt_text(example)
        whole = self._render(self._messages(example) + [_message("assistant", example.output)])
        if not whole.startswith(prompt):
            raise LabError(
                "the chat template writes the finished conversation differently from the prompt it "
                "gives the model, so no answer can be masked; choose prompt_format: alpaca"
            )
        return whole[len(prompt) :]

    def _messages(self, example: Example) -> list[dict[str, str]]:
        """The conversation up to and including the question."""
        first, *others = _messages(example)
        if not example.system:
            return [first, *others]
        if self._takes_system:
            return [_message("system", example.system), first, *others]
        return [_message("user", f"{example.system}\n\n{first['content']}"), *others]

    @functools.cached_property
    def _takes_system(self) -> bool:
        """Whether the template writes turns of the system; else they open the first user message, as Gemma has it."""
        try:
            self._render([_message("system", "Be kind."), _message("user", "Hi.")], add_generation_prompt=True)
        except LabError:
            return False
        return "system" in self.template

    def _try_out(self) -> None:
        """Render every kind of conversation once: what a template cannot write comes to light before any training."""
        turns = (("Who asks first?", "The first one asks."), ("Who asks next?", "The next one asks."))
        for history in ((), turns[:1], turns):
            self._rendered_answer(Example("Who asks last?", "The last one asks.", input="No name.", history=history))

    def _end_of_turn(self) -> str:
        """The first special token that the template writes behind an answer; the tokenizer's EOS where it has none."""
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        behind = self._rendered_answer(Example("Say yes.", "yes")).rpartition("yes")[2]
        ends = [i for i in self._tokenise(behind) if i in special]
        return self.tokenizer.convert_ids_to_tokens(ends[0]) if ends else _require_eos(self.tokenizer)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # of any kind: templates are programs
            raise LabError(
                f"the chat template cannot write a conversation of user and assistant ({reason(error)}); "
                "choose prompt_format: alpaca"
            ) from None
        lost = [m["content"] for m in messages if _unspaced(m["content"]) not in _unspaced(text)]
        if lost:
            raise LabError(
                f"the chat template drops or changes the text {lost[0][:60]!r}: a model would train on what it does "
                "not read; choose prompt_format: alpaca"
            )
        return text


class AlpacaFormat(PromptFormat):
    """Stanford Alpaca's template, for models that were never given one.

    Differs from the original:
        the prompt ends with a newline, so that no token straddles prompt and answer; earlier turns become earlier
        Instruction/Response blocks.
    """

    name = "alpaca"

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        self.eos = _require_eos(tokenizer)

    @property
    def stop_ids(self) -> list[int]:
        """The tokenizer's end of a text alone."""
        return [self.tokenizer.eos_token_id]

    def prompt_text(self, example: Example) -> str:
        """Earlier turns and the question in Alpaca's sections, up to `### Response:`."""
        paired = ALPACA_PAIRED if example.input else ""
        given = f"### Input:\n{example.input}\n\n" if example.input else ""
        turns = "".join(f"### Instruction:\n{user}\n\n### Response:\n{reply}\n\n" for user, reply in example.history)
        asked = f"### Instruction:\n{example.instruction}\n\n{given}### Response:\n"
        system = f"{example.system}\n\n" if example.system else ""
        return f"{self.tokenizer.bos_token or ''}{system}{ALPACA_PREAMBLE.format(paired=paired)}\n\n{turns}{asked}"

    def answer_text(self, example: Example) -> str:
        """The answer and the end-of-text token."""
        return example.output + self.eos


FORMATS = {"chat": ChatFormat, "alpaca": AlpacaFormat}


def prompt_format(tokenizer: PreTrainedTokenizerBase, name: str = "auto") -> PromptFormat:
    """The prompt format called `name` for this tokenizer.

    Args:
        name: "chat", "alpaca", or "auto": chat where the tokenizer has a template, else alpaca.

    Raises:
        LabError: unknown name, "chat" without a usable template, or no token to end an answer with.
    """
    if name == "auto":
        name = "chat" if tokenizer.chat_template else "alpaca"
    if name not in FORMATS:
        raise LabError(f"unknown prompt format {name!r}{nearest(name, [*FORMATS, 'auto'])}")
    return FORMATS[name](tokenizer)


def _messages(example: Example) -> list[dict[str, str]]:
    """The user's and the assistant's turns up to and including the question."""
    earlier = [
        message for user, reply in example.history for message in (_message("user", user), _message("assistant", reply))
    ]
    return [*earlier, _message("user", example.question)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _unspaced(text: str) -> str:
    """The text without white space, which many templates strip."""
    return "".join(text.split())


def _require_eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.eos_token:
        raise LabError("this tokenizer has no end-of-sequence token, so an answer could never end; set its eos_token")
    return tokenizer.eos_token
