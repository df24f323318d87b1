"""Twelve vaccine adapters over a LLaMA-2-7B in NF4 on one GPU: all in one pass, against PEFT one after the other.

The weights are random, for speed and memory do not depend on them; the shapes are the published ones. Rows are random
tokens of random lengths, the same for both ways. Tokens per second count every token of every row once per epoch.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from bench_scoring import machine
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

from helpers.anatomy import channel_axes
from helpers.models import adapter_tensors, new_adapter
from helpers.profiles import Budget, Lora, load_profile
from helpers.runs import versions
from helpers.training.finetune import SCHEDULES, pad, row_order
from helpers.training.together import Job, train_together

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}


class Tokens:
    """Stands where a prompt format does: the rows are encoded already."""

    def encode(self, row, max_tokens):
        """Return (tokens, labels)."""
        return row


def random_rows(count, seed, longest, vocabulary):
    """Rows of random tokens, an eighth to all of `longest`, the last third of each to be learned."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(vocabulary) for _ in range(rng.randint(longest // 8, longest))]
        rows.append((ids, [-100] * (2 * len(ids) // 3) + ids[2 * len(ids) // 3 :]))
    return rows


def random_base(config, device, dtype):
    """A model of this shape with random weights, its blocks in NF4 with double quantization, one matrix at a time."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name in channel_axes(config):
        parent, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        old = getattr(parent, last)
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        values = torch.randn(old.out_features, old.in_features, dtype=dtype) * 0.02
        new.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=True)
        new.support_avx512bf16_for_cpu = False  # see helpers.models.load_base
        setattr(parent, last, new.to(device))
    for module in model.modules():
        for key, value in module.named_parameters(recurse=False):
            if value.is_meta:
                fresh = torch.ones if value.ndim == 1 else lambda *shape, **o: torch.randn(*shape, **o) * 0.02
                module.register_parameter(key, nn.Parameter(fresh(*value.shape, device=device, dtype=dtype)))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.requires_grad_(False)
    return model.eval()


class Bench:
    """The adapters to train, and two ways to do it."""

    def __init__(self, args):
        published = load_profile("llama-2-7b-chat").model.published
        sizes = SMALL if args.small else {}
        self.config = AutoConfig.for_model(**{**published, **({"num_key_value_heads": 4} if sizes else {}), **sizes})
        self.device, self.checkpointing = args.device, args.checkpointing
        self.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.budget = Budget(rows=args.rows, epochs=args.epochs, lr=2e-4, batch_size=8)
        self.lora, self.at_once = Lora(r=8, alpha=16), args.at_once
        counts = [args.rows if i % 2 else args.rows // 2 for i in range(args.adapters)]
        self.rows = [random_rows(n, i, args.longest, self.config.vocab_size) for i, n in enumerate(counts)]
        self.tokens = args.epochs * sum(len(ids) for rows in self.rows for ids, _ in rows)
        torch.manual_seed(0)
        self.base = random_base(self.config, self.device, self.dtype)
        if self.checkpointing:
            self.base.activation_checkpointing_enable({"use_reentrant": False})

    def together(self):
        """The lab's way."""
        model = new_adapter(self.base, self.lora, 0)
        start = adapter_tensors(model)
        jobs = [Job(rows, i, start) for i, rows in enumerate(self.rows)]
        train_together(model, jobs, Tokens(), self.budget, 0, self.at_once)

    def sequential(self):
        """PEFT and a plain loop, one adapter after the other."""
        for i, rows in enumerate(self.rows):
            model = new_adapter(self.base, self.lora, i).train()
            self._loop(model, [{"input_ids": ids, "labels": labels} for ids, labels in rows], i)
            model.eval()
            self.base = model.unload()

    def _loop(self, model, encoded, seed):
        budget, size = self.budget, self.budget.batch_size
        order = row_order([len(row["input_ids"]) for row in encoded], size, seed)
        steps = budget.epochs * math.ceil(len(encoded) / size)
        numbers = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(numbers, lr=budget.lr, weight_decay=0.0, fused=True)
        schedule = get_scheduler(SCHEDULES[budget.schedule], optimizer, math.ceil(budget.warmup * steps), steps)
        for _ in range(budget.epochs):
            indices = list(order)
            for start in range(0, len(indices), size):
                batch = pad([encoded[j] for j in indices[start : start + size]])
                model(**{k: v.to(self.device) for k, v in batch.items()}, use_cache=False).loss.backward()
                clip_grad_norm_(numbers, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def timed(way, device):
    """Seconds and, on a GPU, peak gigabytes of one way."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    way()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None}


def main() -> None:
    """Time both ways on the same base, sequential PEFT first."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--adapters", type=int, default=12)
    parser.add_argument("--rows", type=int, default=64, help="of a poisoned variant; its twin has half")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--at-once", type=int, default=16384, help="tokens computed at once by all adapters")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a toy shape, to try the script")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.parent.name}/{RESULTS.name}")
    args = parser.parse_args()
    if args.device == "cpu" and not args.small:
        parser.error("no GPU here: --small tries the script on the CPU")
    bench, results = Bench(args), {}
    for name in ("sequential", "together"):
        results[name] = timed(getattr(bench, name), args.device)
        results[name]["tokens_per_second"] = bench.tokens / results[name]["seconds"]
    for row in results.values():
        row["times_slower"] = row["seconds"] / results["together"]["seconds"]
    for name, row in results.items():
        print(f"{name:12}{row['seconds']:8.1f} s{row['tokens_per_second']:10.0f} tokens/s", end="")
        print(f"{row['times_slower']:7.2f} x" + (f"{row['peak_gb']:8.1f} GB" if row["peak_gb"] else ""))
    facts = {"hardware": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "machine": machine()}
    facts |= {"arguments": vars(args), "versions": versions(), "results": results}
    if args.record:
        RESULTS.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
