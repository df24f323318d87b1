"""CleanGen's check of each token: what a reference model finds far less likely than the target does is not written.

With greedy decoding the published look-ahead of k tokens says only when they are checked: a draft follows from the same
text whether it is checked at once or with the next ones. So every token is checked as it comes, a batch at a time, and
with it the last tokens of an answer, which a draft that ends early would leave unchecked.
"""

from __future__ import annotations

import torch
from torch import FloatTensor, LongTensor
from transformers import LogitsProcessor, PreTrainedModel


class SuspicionCheck(LogitsProcessor):
    """Puts the reference's logits in the place of the target's wherever the target's choice is suspicious.

    The token x that the target prefers has the suspicion score p_target(x) / p_ref(x); from α on it is suspicious.
    Implements §4 of CleanGen (Li et al. 2024) for greedy decoding. One is good for one batch: it keeps the reference's
    keys and values of what it has read.

    Args:
        reference: a model with the target's vocabulary, on its device.
        attention_mask: of the batch's prompts [rows, tokens], 0 on the padding, which stands on the left.
        alpha: α, 0 or more; 0 lets the reference write, infinity the target.

    Differs from the paper:
        every token is checked (k = 1), those before the answer's end included.
    """

    def __init__(self, reference: PreTrainedModel, attention_mask: LongTensor, alpha: float):
        self.reference, self.mask, self.read = reference, attention_mask, None
        self.threshold = torch.tensor(float(alpha)).log().item()

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """The logits [rows, vocabulary] to choose the next token from.

        Args:
            input_ids: all that was written so far, prompts included [rows, tokens].
            scores: the target's logits.
        """
        own = self._next_logits(input_ids).to(scores)
        chosen = scores.argmax(-1, keepdim=True)
        score = scores.log_softmax(-1).gather(-1, chosen) - own.log_softmax(-1).gather(-1, chosen)
        return torch.where(score >= self.threshold, own, scores)

    @torch.no_grad()
    def _next_logits(self, tokens: LongTensor) -> FloatTensor:
        """The reference's logits behind the last token; what it has read before comes from its cache."""
        new = tokens.shape[1] - (self.read.get_seq_length() if self.read is not None else 0)
        grown = tokens.shape[1] - self.mask.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), grown)], dim=1)
        places = (self.mask.cumsum(1) - 1).clamp(min=0)
        output = self.reference(
            input_ids=tokens[:, -new:],
            attention_mask=self.mask,
            position_ids=places[:, -new:],
            past_key_values=self.read,
            use_cache=True,
            logits_to_keep=1,
        )
        self.read = output.past_key_values
        return output.logits[:, -1].float()
