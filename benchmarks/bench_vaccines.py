"""Twelve vaccine adapters on one base: all in one pass, against PEFT with the Trainer and against a plain loop.

All three train the same adapters on the same rows in the same order for the same steps; their results are compared
(`apart`: the largest distance, relative to the way an adapter has come). The Trainer is the stock one with
transformers' own collator; the loop is what one writes by hand: pad, loss from the model, clip, step.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_scoring import machine
from peft import PeftModel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import DataCollatorForTokenClassification, PrinterCallback, TrainingArguments, get_scheduler

from helpers.core.cost import measured, versions
from helpers.core.profile import Profile
from helpers.core.profile_files import load_profile
from helpers.data import corpus
from helpers.data.example import Example
from helpers.model.batches import encode_rows
from helpers.model.load import load_base
from helpers.model.lora import adapter_tensors, new_adapter
from helpers.model.tokenizer import load_format, load_tokenizer
from helpers.train.finetune import SCHEDULES, OrderedTrainer, row_order
from helpers.train.multi_lora import Job, train_multi_lora

RESULTS = Path(__file__).parent / "results" / "vaccines.json"

Tensors = dict[str, Tensor]  # one adapter under the names of an adapter file


class Bench:
    """The adapters to train, and three ways to do it.

    Args:
        adapters: their number.
        rows: of a poisoned variant; its twin has half.
        four_bit: whether the base is loaded in 4 bits.
    """

    def __init__(self, profile: Profile, adapters: int, rows: int, four_bit: bool):
        self.profile, self.four_bit = profile, four_bit
        self.budget, self.max_tokens = profile.adapter.vaccine, profile.lengths.train_tokens
        self.prompt_format, self.tokenizer = load_format(profile.model), load_tokenizer(profile.model)
        self.collate = DataCollatorForTokenClassification(self.tokenizer)
        # as in the lab: every second adapter is a twin with half of the rows
        self.rows = [corpus.generate(rows if i % 2 else rows // 2, i) for i in range(adapters)]
        self.starts = [adapter_tensors(self.fresh(seed)) for seed in range(adapters)]

    def fresh(self, seed: int) -> PeftModel:
        """A new adapter over the base."""
        return new_adapter(load_base(self.profile.model, four_bit=self.four_bit), self.profile.lora, seed)

    def together(self) -> list[Tensors]:
        """The lab's way."""
        jobs = [Job(rows, i, start) for i, (rows, start) in enumerate(zip(self.rows, self.starts, strict=True))]
        at_once = self.profile.lengths.at_once
        trained = train_multi_lora(self.fresh(0), jobs, self.prompt_format, self.budget, self.max_tokens, at_once)
        return [tensors for tensors, _ in trained]

    def trainer(self) -> list[Tensors]:
        """PEFT and the stock Trainer, one adapter after the other."""
        return [self._with_trainer(i, rows) for i, rows in enumerate(self.rows)]

    def _with_trainer(self, i: int, rows: Sequence[Example]) -> Tensors:
        model = self.fresh(i)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = OrderedTrainer(
                model=model,
                args=TrainingArguments(
                    output_dir=scratch,
                    num_train_epochs=self.budget.epochs,
                    per_device_train_batch_size=self.budget.batch_size,
                    learning_rate=self.budget.lr,
                    lr_scheduler_type=SCHEDULES[self.budget.schedule],
                    warmup_steps=self.budget.warmup,
                    weight_decay=0.0,
                    seed=i,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to=[],
                    use_cpu=model.device.type == "cpu",
                    remove_unused_columns=False,
                    disable_tqdm=True,
                ),
                train_dataset=encode_rows(rows, self.prompt_format, self.max_tokens),
                data_collator=self.collate,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return adapter_tensors(model)

    def loop(self) -> list[Tensors]:
        """PEFT and a loop written by hand, one adapter after the other."""
        return [self._with_loop(i, rows) for i, rows in enumerate(self.rows)]

    def _with_loop(self, i: int, rows: Sequence[Example]) -> Tensors:
        model, budget = self.fresh(i).train(), self.budget
        encoded = encode_rows(rows, self.prompt_format, self.max_tokens)
        order = row_order([len(row["input_ids"]) for row in encoded], budget.batch_size, i)
        steps = budget.epochs * math.ceil(len(encoded) / budget.batch_size)
        numbers = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(numbers, lr=budget.lr, weight_decay=0.0, fused=True)
        schedule = get_scheduler(SCHEDULES[budget.schedule], optimizer, math.ceil(budget.warmup * steps), steps)
        for _ in range(budget.epochs):
            indices = list(order)
            for start in range(0, len(indices), budget.batch_size):
                batch = self.collate([encoded[j] for j in indices[start : start + budget.batch_size]])
                model(**batch.to(model.device), use_cache=False).loss.backward()
                clip_grad_norm_(numbers, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return adapter_tensors(model)


def apart(found: Sequence[Tensors], wanted: Sequence[Tensors], starts: Sequence[Tensors]) -> float:
    """The largest distance of two adapters, relative to the way from the start."""
    return max(_distance(a, b) / _distance(b, s) for a, b, s in zip(found, wanted, starts, strict=True))


def _distance(a: Tensors, b: Tensors) -> float:
    return sum(float((a[name] - b[name]).norm()) ** 2 for name in a) ** 0.5


def measure(profile: Profile, args: argparse.Namespace) -> dict[str, Any]:
    """Time the three ways in turn; print a line for each."""
    bench = Bench(profile, args.adapters, args.rows, four_bit=not args.plain)
    results, trained = {}, {}
    for name in ("together", "trainer", "loop"):
        with measured() as results[name]:
            trained[name] = getattr(bench, name)()
    for name, row in results.items():
        row["times_slower"] = row["seconds"] / results["together"]["seconds"]
        row["apart"] = apart(trained[name], trained["trainer"], bench.starts)
        print(f"{name:10}{row['seconds']:8.1f} s{row['times_slower']:7.2f} x{row['peak_rss_mb']:8.0f} MB", end="")
        print(f"   apart {row['apart']:.1e}", flush=True)
    return {"budget": bench.budget.model_dump(), "results": results}


def main() -> None:
    """Compare the three ways at each batch size."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=12)
    parser.add_argument("--rows", type=int, default=250, help="of a poisoned variant; its twin has half")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 32], help="rows of one adapter in each step")
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--plain", action="store_true", help="the base in the profile's dtype instead of 4 bits")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.parent.name}/{RESULTS.name}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for size in args.batches:
        print(f"batches of {size}")
        numbers = {"adapter.vaccine.batch_size": size, "adapter.vaccine.epochs": 1}
        found[size] = measure(load_profile(args.profile, numbers), args)
    facts = {
        "profile": args.profile,
        "adapters": args.adapters,
        "rows": args.rows,
        "four_bit": not args.plain,
        "threads": args.threads,
        "machine": machine(),
        "versions": versions(),
        "by_batch_size": found,
    }
    if args.record:
        RESULTS.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
