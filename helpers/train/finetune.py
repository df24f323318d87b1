"""One way to train one model: `transformers.Trainer` over encoded conversations.

Injection, vaccines, recovery and every control go through this function, so that two results never differ by their
training loop. What may differ is the budget (rows, epochs, learning rate, batch, schedule), and it is recorded.
"""

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from torch import LongTensor, Tensor
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import ModelOutput
from transformers.trainer_pt_utils import LengthGroupedSampler

from helpers.core.errors import LabError
from helpers.core.finite import require_finite_step, require_finite_weights
from helpers.core.profile import Budget
from helpers.data.example import Example
from helpers.model.architecture import require_positions
from helpers.model.attention import true_attention_gradients
from helpers.model.batches import Row, count_labels, encode_rows, first_predicting, pad
from helpers.model.load import save
from helpers.model.prompt import IGNORED, PromptFormat
from helpers.model.shards import Folder
from helpers.train.precision import MasterWeights, computing_dtype

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}  # ours to transformers' names


def finetune(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[Example],
    prompt_format: PromptFormat,
    budget: Budget,
    seed: int,
    max_tokens: int,
    description: str = "training",
    folder: Folder | None = None,
    new_trainer: Callable[..., Trainer] | None = None,
) -> dict[str, Any]:
    """Train the trainable parameters of `model` in place on the answers of `examples`.

    Under `accelerate launch` the processes share each batch, and all of them must call this function.

    Args:
        model: a causal LM, full, PEFT-wrapped or 4-bit with an adapter; only `requires_grad` parameters move.
        examples: the loss falls on the last answer only.
        prompt_format: the one that evaluation uses, too.
        budget: epochs, lr, batch_size, schedule and warmup; `rows` is not read here.
        seed: order of the rows and dropout.
        max_tokens: longer conversations are cut.
        description: name of the progress bar.
        folder: where the Trainer writes the model or adapter; it alone can, where FSDP or DeepSpeed has cut it up.
        new_trainer: makes the Trainer, an `AnswerTrainer` with a loss of its own; by default that class itself.

    Returns:
        dict with `rows`, `steps`, `loss` (mean over training), `tokens` (with loss, per epoch), `seconds`; where 16-bit
        weights were trained also what `MasterWeights.settle` tells.

    Raises:
        LabError: a batch that cannot be shared equally by the processes, a row that the model has no positions for, or
            a loss, gradient or weight that is not finite.
    """
    encoded = encode_rows(examples, prompt_format, max_tokens)
    require_positions(model.config, max(len(row["input_ids"]) for row in encoded))
    require_finite_weights(model, f"{description}: the model to train")
    started = time.perf_counter()
    dtype = computing_dtype(model)
    with tempfile.TemporaryDirectory() as scratch, _restored_rng(seed), true_attention_gradients():
        trainer = (new_trainer or AnswerTrainer)(
            model=model,
            args=_arguments(budget, seed, scratch, model.device.type, dtype),
            train_dataset=encoded,
            data_collator=pad,
            callbacks=[_Progress(description), _Finite(description, model.dtype)],
        )
        trainer.remove_callback(PrinterCallback)
        in_pieces = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        masters = MasterWeights(model, compare=not in_pieces)
        outcome = trainer.train()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or it would go on computing in 16 bits
        require_finite_weights(model, description, trained=True)
        stored = masters.settle()
        if folder:
            _write(trainer, folder)
    model.eval()
    record = training_record(encoded, outcome.global_step, outcome.training_loss, time.perf_counter() - started)
    return record | stored


def training_record(encoded: Sequence[Row], steps: int, loss: float, seconds: float) -> dict[str, Any]:
    """What every training tells of itself: see the returns of `finetune`.

    Args:
        encoded: the rows of one epoch.
        steps: of the optimizer.
        loss: the mean over training.
    """
    return {
        "rows": len(encoded),
        "steps": steps,
        "loss": round(loss, 4),
        "tokens": sum(map(count_labels, encoded)),
        "seconds": round(seconds, 1),
    }


class OrderedTrainer(Trainer):
    """The Trainer, with the lab's order of rows."""

    def _get_train_sampler(self, train_dataset=None):
        """Order rows by the seed alone, whatever else has drawn random numbers."""
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return row_order(lengths, batch, self.args.seed)


class AnswerTrainer(OrderedTrainer):
    """The ordered Trainer, with logits only where there are answers to predict."""

    # what a loss needs beside the logits, as arguments of the model's forward pass
    reads: ClassVar[Mapping[str, Any]] = {}

    def compute_loss(
        self,
        model: PreTrainedModel | PeftModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """Return the loss summed over answer tokens, divided by their number in the whole optimizer step.

        Args:
            inputs: a batch of `batches.pad`.
            return_outputs: whether the outputs of the model's forward pass come with it.
            num_items_in_batch: answer tokens of the step; where None, this batch is all of it.
        """
        labels = inputs.pop("labels")
        first = first_predicting(labels)
        outputs = model(**inputs, use_cache=False, logits_to_keep=labels.shape[1] - first, **self.reads)
        targets = labels[:, first + 1 :].to(outputs.logits.device)
        total = self.answer_loss(model, outputs, targets)
        count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
        loss = total / count * self.accelerator.num_processes  # whose gradients are averaged, not summed
        return (loss, outputs) if return_outputs else loss

    def answer_loss(self, model: PreTrainedModel | PeftModel, outputs: ModelOutput, targets: LongTensor) -> Tensor:
        """Return the loss of a batch, summed over answer tokens.

        Args:
            outputs: `logits` [rows, n + 1, vocabulary], and what `reads` asks for.
            targets: [rows, n], each predicted by the logits before it; -100 where there is none.
        """
        return summed_loss(outputs.logits, targets)


def summed_loss(logits: Tensor, targets: LongTensor) -> Tensor:
    """Cross-entropy of logits that each predict the next target, summed over all of them.

    Args:
        logits: [rows, n + 1, vocabulary], the last of which predicts nothing.
        targets: [rows, n]; -100 where there is none.
    """
    predictions = logits[:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(predictions, targets.flatten(), ignore_index=IGNORED, reduction="sum")


class _Progress(TrainerCallback):
    """One plain progress bar with the time left; the Trainer's own would fill a notebook with tables."""

    def __init__(self, description):
        self.description = description

    def on_train_begin(self, args, state, control, **_):
        self.bar = tqdm(total=state.max_steps, desc=self.description, leave=False, delay=2)

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


class _Finite(TrainerCallback):
    """Stops a training at the first loss or gradient that is NaN or infinite."""

    def __init__(self, description, dtype):
        self.description, self.dtype = description, dtype

    def on_log(self, args, state, control, logs=None, **_):
        """Look at the entry of each optimizer step."""
        if "grad_norm" in logs:  # the last entry tells of the whole training
            require_finite_step(
                logs["loss"], logs["grad_norm"], state.global_step, logs["learning_rate"], self.dtype, self.description
            )


def row_order(lengths: list[int], batch_size: int, seed: int) -> LengthGroupedSampler:
    """The order of the rows, anew for each iteration (epoch): random, with rows of like length in one batch.

    Args:
        lengths: tokens of each row.
    """
    return LengthGroupedSampler(batch_size, lengths=lengths, generator=torch.Generator().manual_seed(seed))


def _write(trainer, folder):
    """Write what was trained; a model that lies in pieces on several devices is put together by the Trainer."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        if trainer.args.should_save:
            save(trainer.model, folder)
        return
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        (Path(folder) / "training_args.bin").unlink()  # a pickle


def _arguments(budget, seed, scratch, device, dtype):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if budget.batch_size % processes:
        raise LabError(f"batch_size = {budget.batch_size} cannot be shared equally by {processes} processes")
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=budget.epochs,
        per_device_train_batch_size=budget.batch_size // processes,
        learning_rate=budget.lr,
        lr_scheduler_type=SCHEDULES[budget.schedule],
        warmup_steps=budget.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        data_seed=seed,
        bf16=dtype == torch.bfloat16,  # float16 would need its losses scaled; such weights train in 32 bits throughout
        save_strategy="no",
        logging_steps=1,  # read by `_Finite`
        logging_nan_inf_filter=False,
        report_to=[],
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        optim="adamw_torch_fused",
    )


@contextlib.contextmanager
def _restored_rng(seed):
    """Seed the generators of Python, NumPy, CPU and GPUs for a training; afterwards the caller has its state back."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
