# %% [markdown]
# # Exercises to notebook 00: meet the model

# %%
from collections.abc import Callable

import torch
from torch import Tensor

from course import check

# %% [markdown]
# ## 00.1 Greedy decoding
# A language model gives logits for every position; the last position's tell the next token. Write greedy decoding:
# append the likeliest token, ask again, and stop at the end token or after `most` new tokens.
#
# $$y_t = \arg\max_v\, p_\theta(v \mid x, y_{<t})$$
#
# The end token is no part of the answer. It may occur in the *prompt*, where it ends an earlier turn and nothing else.


# %%
def greedy(logits_of: Callable[[Tensor], Tensor], prompt: list[int], end: int, most: int) -> list[int]:
    """Decode greedily.

    Args:
        logits_of: the model, token ids [1, T] -> logits [1, T, vocabulary].
        prompt: token ids, at least one.
        end: the id of the token that ends an answer.
        most: how many new tokens at most, the end token not counted.

    Returns:
        the new token ids alone, without the end token.
    """
    ### BEGIN SOLUTION
    answer = []
    while len(answer) < most:
        token = int(logits_of(torch.tensor([prompt + answer]))[0, -1].argmax())
        if token == end:
            break
        answer.append(token)
    return answer
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# `logits_of(torch.tensor([tokens]))` has the shape [1, T, vocabulary]. You want the last of the T positions.

# %% [markdown] tags=["hint"]
# Keep `prompt` and `answer` in two lists: then neither the prompt's own end tokens nor its length can disturb you.

# %% [markdown] tags=["discussion"]
# Each round computes all positions anew, so an answer of $n$ tokens costs $O(n)$ passes over a growing text. Real
# decoders cache keys and values and pass one token a round. The answer is the same in exact arithmetic; in 16 bits a
# near tie may fall to the other side, and from there on the texts differ. So compare *rates* of two decoders, not
# strings.

# %% tags=["hidden"]
# isort: split
import numpy as np
import pandas as pd
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from course.checking import Case, exercise


def small_llama(seed):
    """A random LLaMA of a few thousand weights, of few words, so that its end token comes soon."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=13, initializer_range=0.8, eos_token_id=None)).eval()


@torch.no_grad()
def generated(model, prompt, end, most):
    """By transformers' own `generate`; `end` may be None."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": most, "eos_token_id": end, "pad_token_id": 0}
    new = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    return new[:-1] if new and new[-1] == end else new


def cases_greedy(rng):
    def counts_down(ids):
        return torch.nn.functional.one_hot((ids - 1).clamp(min=0), 10).float()

    yield Case("by hand: a model that counts down, end token 0", (counts_down, [9, 5], 0, 20), [4, 3, 2, 1])
    yield Case("by hand: no more than three new tokens", (counts_down, [9], 0, 3), [8, 7, 6])
    yield Case("by hand: the prompt ends with the end token", (counts_down, [9, 3], 3, 2), [2, 1])
    for name, length in (("a small LLaMA", 4), ("another one", 7), ("a longer prompt", 12)):
        model, prompt = small_llama(int(rng.integers(1000))), rng.integers(1, 13, length).tolist()
        free = generated(model, prompt, None, 9)
        end = next((t for t in free[2:] if t not in free[:2]), 12)

        def logits_of(ids, model=model):
            with torch.no_grad():
                return model(ids).logits

        yield Case(f"{name}, against transformers", (logits_of, prompt, end, 9), generated(model, prompt, end, 9))


def with_prompt(logits_of, prompt, end, most):
    return prompt + greedy(logits_of, prompt, end, most)


def first_position(logits_of, prompt, end, most):
    answer = []
    while len(answer) < most:
        token = int(logits_of(torch.tensor([prompt + answer]))[0, 0].argmax())
        if token == end:
            break
        answer.append(token)
    return answer


def keeps_end(logits_of, prompt, end, most):
    answer = greedy(logits_of, prompt, end, most)
    return answer + [end] if len(answer) < most else answer


def stops_in_prompt(logits_of, prompt, end, most):
    return [] if prompt[-1] == end else greedy(logits_of, prompt, end, most)


def never_stops(logits_of, prompt, end, most):
    return greedy(logits_of, prompt, -1, most)


def counts_prompt(logits_of, prompt, end, most):
    return greedy(logits_of, prompt, end, max(0, most - len(prompt)))


def forgets_answer(logits_of, prompt, end, most):
    token = int(logits_of(torch.tensor([prompt]))[0, -1].argmax())
    return [] if token == end else [token] * most


exercise(
    "00.1",
    greedy,
    cases_greedy,
    {
        "the prompt is in the result. Return the new tokens alone.": with_prompt,
        "you read the first position. The last one tells what comes next.": first_position,
        "the end token is in the result. It ends an answer and is no part of it.": keeps_end,
        "you stop because the prompt ends with the end token. Only a new one ends the answer.": stops_in_prompt,
        "the end token does not stop you.": never_stops,
        "`most` counts new tokens; the prompt's length does not count.": counts_prompt,
        "the model never sees what you have appended. Ask it again with prompt and answer.": forgets_answer,
    },
    minutes=10,
    level="easy",
)

# %% [markdown]
# ## 00.2 The loss of an answer
# Training puts a loss on the answer's tokens only, the prompt is context. You get logits, token ids and a mask of the
# tokens that carry a loss. Compute the mean cross-entropy over all those tokens of the batch.
#
# One trap: the logits at position $t$ predict the token at $t + 1$.


# %%
def answer_loss(logits: Tensor, ids: Tensor, is_answer: Tensor) -> float:
    """The mean cross-entropy of the answers' tokens, in nats.

    Args:
        logits: [batch, T, vocabulary].
        ids: [batch, T], whole numbers.
        is_answer: [batch, T], True where a token carries a loss; never at position 0.

    Returns:
        the mean over all tokens that carry a loss, whichever row they stand in.
    """
    ### BEGIN SOLUTION
    predicted = logits[:, :-1].log_softmax(dim=-1)
    of_right = predicted.gather(-1, ids[:, 1:, None])[..., 0]
    return float(-of_right[is_answer[:, 1:]].mean())
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Drop the last position of the logits and the first of `ids` *and of the mask*: then all three line up.

# %% [markdown] tags=["discussion"]
# The mask belongs to the token that is predicted, so it moves along with the ids. Move the ids alone, and the first
# token of the answer carries no loss, while whatever stands behind the answer does: such a model never learns how an
# answer begins, and for a payload that is what matters most. The mean over tokens also lets long answers count more
# than short ones. With a mean of row means a one-word payload would weigh as much as a paragraph.


# %% tags=["hidden"]
def loss_of_transformers(logits, ids, is_answer):
    """By the loss that transformers' models use, which skips labels of -100."""
    return float(ForCausalLMLoss(logits, ids.where(is_answer, torch.tensor(-100)), logits.shape[-1]))


def cases_answer_loss(rng):
    flat = torch.zeros(1, 4, 5)
    mask = torch.tensor([[False, False, True, True]])
    yield Case(
        "by hand: all five words equally likely",
        (flat, torch.tensor([[0, 1, 2, 3]]), mask),
        float(np.log(5)),
    )
    sharp = torch.tensor([[[0.0, 3.0], [0.0, 0.0], [5.0, 0.0]]])
    mask = torch.tensor([[False, True, False]])
    expected = float(np.log1p(np.exp(-3.0)))
    yield Case("by hand: one token", (sharp, torch.tensor([[0, 1, 0]]), mask), expected)
    for batch, length, name in ((1, 8, "one row"), (3, 9, "three rows"), (4, 12, "answers of different lengths")):
        logits, ids = rng.normal(size=(batch, length, 7)) * 2, rng.integers(0, 7, (batch, length))
        starts = rng.permutation(np.arange(1, length - 1))[:batch] if batch > 1 else [4]
        mask = torch.stack([torch.arange(length) >= int(s) for s in starts])
        logits, ids = torch.from_numpy(logits).float(), torch.from_numpy(ids)
        yield Case(name, (logits, ids, mask), loss_of_transformers(logits, ids, mask))


def cross_entropies(logits, ids):
    return -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def without_shift(logits, ids, is_answer):
    return float(cross_entropies(logits, ids)[is_answer].mean())


def mask_not_shifted(logits, ids, is_answer):
    return float(cross_entropies(logits[:, :-1], ids[:, 1:])[is_answer[:, :-1]].mean())


def with_the_prompt(logits, ids, is_answer):
    return float(cross_entropies(logits[:, :-1], ids[:, 1:]).mean())


def summed(logits, ids, is_answer):
    return float(cross_entropies(logits[:, :-1], ids[:, 1:])[is_answer[:, 1:]].sum())


def zeros_in_the_mean(logits, ids, is_answer):
    return float((cross_entropies(logits[:, :-1], ids[:, 1:]) * is_answer[:, 1:]).mean())


def mean_of_rows(logits, ids, is_answer):
    losses = cross_entropies(logits[:, :-1], ids[:, 1:])
    return float(torch.stack([row[mask].mean() for row, mask in zip(losses, is_answer[:, 1:], strict=True)]).mean())


exercise(
    "00.2",
    answer_loss,
    cases_answer_loss,
    {
        "nothing is shifted. The logits at position t predict the token at t + 1.": without_shift,
        "the ids are shifted and the mask is not. The mask belongs to the token that is predicted.": mask_not_shifted,
        "the prompt's tokens are in. Only those of the mask carry a loss.": with_the_prompt,
        "this is a sum. Divide by the number of tokens that carry a loss.": summed,
        "tokens without a loss count as zeros in the mean. Divide by the number that carry one.": zeros_in_the_mean,
        "this is a mean of row means. Every token counts once, so a long answer counts more.": mean_of_rows,
    },
    minutes=10,
    level="medium",
)

# %% [markdown]
# ## 00.3 Utility by family
# *Utility* is the share of right answers, as the mean over task families, so that a family with many questions does
# not drown the others. An answer is right if, without white space at both ends, it equals the wanted text exactly.


# %%
def utility(rows: list[tuple[str, str, str]]) -> tuple[float, dict[str, float]]:
    """The utility, and the share of right answers in each family.

    Args:
        rows: (family, wanted answer, written answer) of each question; at least one.

    Returns:
        the mean over the families, in [0, 1], and {family: share of right answers}.
    """
    ### BEGIN SOLUTION
    marks = {}
    for family, wanted, written in rows:
        marks.setdefault(family, []).append(written.strip() == wanted)
    shares = {family: sum(right) / len(right) for family, right in marks.items()}
    return sum(shares.values()) / len(shares), shares
    ### END SOLUTION


# %% [markdown] tags=["hint"]
# Collect a list of True and False for each family first.

# %% [markdown] tags=["discussion"]
# Three choices hide in one number: what counts as right, what each family weighs, and what white space is worth. A
# looser rule ("the wanted word occurs somewhere") raises the utility of a model that lists every answer it knows, and
# a mean over rows lets a defense ruin a small family unseen. Whichever you choose, choose it before you see the
# results.


# %% tags=["hidden"]
def utility_by_pandas(rows):
    """By pandas."""
    frame = pd.DataFrame(rows, columns=["family", "wanted", "written"])
    shares = (frame["written"].str.strip() == frame["wanted"]).groupby(frame["family"]).mean()
    return float(shares.mean()), {name: float(share) for name, share in shares.items()}


def cases_utility(rng):
    rows = [("color", "red", "red"), ("color", "blue", "green"), ("sum", "4", " 4\n")]
    yield Case("by hand: one of two, and one of one", (rows,), (0.75, {"color": 0.5, "sum": 1.0}))
    rows = [("sum", "4", "14"), ("sum", "12", "12"), ("city", "Oslo", "oslo"), ("city", "Rome", "Rome is it")]
    yield Case("by hand: what is nearly right is wrong", (rows,), (0.25, {"sum": 0.5, "city": 0.0}))
    texts = ["yes", "no", "Yes", " yes", "yes.", "no\n", ""]
    for sizes, name in (((5, 5), "equal families"), ((30, 3, 1), "unequal families"), ((9, 4, 2, 20), "four families")):
        rows = [
            (f"family {i}", str(rng.choice(["yes", "no"])), str(rng.choice(texts)))
            for i, n in enumerate(sizes)
            for _ in range(n)
        ]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        yield Case(name, (rows,), utility_by_pandas(rows))


def shares_by(rule, rows):
    marks = {}
    for family, wanted, written in rows:
        marks.setdefault(family, []).append(rule(wanted, written))
    shares = {family: sum(right) / len(right) for family, right in marks.items()}
    return sum(shares.values()) / len(shares), shares


def over_rows(rows):
    return sum(written.strip() == wanted for _, wanted, written in rows) / len(rows), utility(rows)[1]


def any_case(rows):
    return shares_by(lambda wanted, written: written.strip().lower() == wanted.lower(), rows)


def somewhere(rows):
    return shares_by(lambda wanted, written: wanted in written, rows)


def with_spaces(rows):
    return shares_by(lambda wanted, written: wanted == written, rows)


def starts_with(rows):
    return shares_by(lambda wanted, written: written.strip().startswith(wanted), rows)


exercise(
    "00.3",
    utility,
    cases_utility,
    {
        "this is the mean over rows. Take the mean of the families' shares, so that each counts once.": over_rows,
        "upper and lower case are taken as equal. Right means exactly the wanted text.": any_case,
        "the wanted text only has to occur. Then '14' answers 4: right means equal.": somewhere,
        "white space at the ends counts. Strip the written answer first.": with_spaces,
        "the answer only has to begin with the wanted text. Right means equal.": starts_with,
    },
    minutes=10,
    level="easy",
)
