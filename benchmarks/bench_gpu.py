"""The lab at LLaMA-2-7B's shape on one GPU: vaccines in one pass against PEFT one after the other, and all the rest.

The weights are random, for speed and memory do not depend on them; the shapes are the published ones. Rows are random
tokens of random lengths. Tokens per second count every token of every row once per epoch. Each part writes its results
as soon as it has them, and a part that runs out of memory says so and lets the others go on.
"""

import argparse
import gc
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bench_scoring import machine
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, get_scheduler

from helpers.access.deltas import adapter_pairs
from helpers.access.full import reinitialize
from helpers.core.cost import versions
from helpers.core.finite import require_finite_weights
from helpers.core.profile import Budget, Lora
from helpers.core.profile_files import load_profile
from helpers.defenses.bdvax.score import score_mlp
from helpers.defenses.bdvax.select import select
from helpers.defenses.conflict.merge import linear
from helpers.model.architecture import channel_axes
from helpers.model.attention import true_attention_gradients
from helpers.model.batches import Row, pad
from helpers.model.generate import complete
from helpers.model.load import save
from helpers.model.lora import adapter_tensors, new_adapter, save_adapter
from helpers.train.finetune import SCHEDULES, finetune, row_order
from helpers.train.multi_lora import Job, StackedLora, train_multi_lora

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
LIMITS = {16: 8192, 22: 16384, 40: 49152}  # gigabytes of the card that may be used: tokens computed at once
STEPS = 4  # optimizer steps of an injection or a recovery
PROMPTS, NEW_TOKENS = 64, 128

Encoded = tuple[list[int], list[int]]  # tokens and labels of a row
Part = Iterator[tuple[str, dict[str, Any]]]  # what was tried and what was measured


class Tokens:
    """Stands where a prompt format does: the rows are encoded already."""

    def encode(self, row: Encoded, max_tokens: int) -> Encoded:
        """Return the row, (tokens, labels)."""
        return row


def random_rows(count: int, seed: int, longest: int, vocabulary: int) -> list[Encoded]:
    """Rows of random tokens, the last third of each to be learned.

    Args:
        longest: tokens of the longest row; the shortest has an eighth of them.
        vocabulary: number of token ids.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(vocabulary) for _ in range(rng.randint(longest // 8, longest))]
        rows.append((ids, [-100] * (2 * len(ids) // 3) + ids[2 * len(ids) // 3 :]))
    return rows


def random_base(config: PretrainedConfig, device: str, dtype: torch.dtype, four_bit: bool) -> PreTrainedModel:
    """A model of this shape with random weights, drawn on the device one matrix at a time.

    Args:
        four_bit: whether its blocks are held in NF4 with double quantization.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name in channel_axes(config) if four_bit else ():
        parent, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        old = getattr(parent, last)
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        values = torch.randn(old.out_features, old.in_features, dtype=dtype, device=device) * 0.02
        new.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=True)
        new.support_avx512bf16_for_cpu = False  # see helpers.model.load.load_base
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
    """Shapes and rows, and what each part of the benchmark does with them."""

    def __init__(self, args: argparse.Namespace):
        published = load_profile("llama-2-7b-chat").model.published
        sizes = SMALL | {"num_key_value_heads": 4} if args.small else {}
        self.config = AutoConfig.for_model(**{**published, **sizes})
        self.device, self.args = args.device, args
        self.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.budget = Budget(rows=args.rows, epochs=args.epochs, lr=2e-4, batch_size=8)
        self.lora = Lora(r=8, alpha=16)
        counts = [args.rows if i % 2 else args.rows // 2 for i in range(args.adapters)]
        self.rows = [random_rows(n, i, args.longest, self.config.vocab_size) for i, n in enumerate(counts)]
        self.trained = {}
        self.tokens = args.epochs * sum(len(ids) for rows in self.rows for ids, _ in rows)
        torch.manual_seed(0)

    def base(self, four_bit: bool, checkpointing: bool) -> PreTrainedModel:
        """A random base; the one before it must be gone."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        model = random_base(self.config, self.device, self.dtype, four_bit)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        return model

    def vaccines(self, folder: Path) -> Part:
        """All adapters in one pass and one after the other, with and without checkpointing, under memory limits."""
        base = self.base(four_bit=True, checkpointing=True)
        model = new_adapter(base, self.lora, 0)
        start, config = adapter_tensors(model), model.peft_config["default"]
        base = model.unload()
        self._sequential(base, self.rows[:1])  # what happens once only is not timed
        yield "sequential, checkpointing, 22 GB", self._limited(22, self._sequential, base, self.rows)
        for limit, at_once in LIMITS.items():
            name = f"together, checkpointing, {limit} GB, {at_once} tokens at once"
            yield name, self._limited(limit, self._together, base, start, at_once)
        yield "apart", self._apart(start)
        for limit in LIMITS:
            name = f"together, checkpointing, {limit} GB, as many tokens at once as fit"
            yield name, self._limited(limit, self._together, base, start, None)
        for i, tensors in enumerate(self.trained["together"]):
            save_adapter(config, tensors, folder / f"adapter-{i:02}")
        base.activation_checkpointing_disable()
        yield "together, 16384 tokens at once", self._limited(None, self._together, base, start, 16384)
        yield "sequential", self._limited(None, self._sequential, base, self.rows)

    def training(self, folder: Path) -> Part:
        """Injection and recovery: an adapter over the 16-bit base, then all weights with their 32-bit masters."""
        for name, lr in (("adapter", 2e-4), ("full", 1e-5)):
            base = self.base(four_bit=False, checkpointing=True)
            model = new_adapter(base, self.lora, 0) if name == "adapter" else base.requires_grad_(True)
            yield f"{name}: {STEPS} steps, batch 8, checkpointing", self._limited(None, self._train, model, lr)
            require_finite_weights(model, name)
            del base, model

    def disk(self, folder: Path) -> Part:
        """Scoring of the adapters, suppression and merging of the whole model, shard by shard on the CPU."""
        base = self.base(four_bit=False, checkpointing=False)
        save(base, folder / "model")
        del base
        pairs = [sorted(folder.glob("adapter-*"))[half::2] for half in (1, 0)]
        signature = load_profile("llama-2-7b-chat").signature.model_copy(update={"n": len(pairs[0])})

        def score():
            return score_mlp(adapter_pairs(*pairs), self.config, signature)

        scores = score()
        yield "scores", self._timed(score)
        masks = select(scores, 0.03, "module")
        yield (
            "suppress 3 %",
            self._timed(reinitialize, folder / "model", folder / "suppressed", masks, self.config, 0),
        )
        yield "linear merge", self._timed(linear, folder / "model", folder / "suppressed", folder / "merged", 0.5)

    def generation(self, folder: Path) -> Part:
        """Greedy answers in batches."""
        base, rng = self.base(four_bit=False, checkpointing=False), random.Random(0)
        prompts = [[rng.randrange(self.config.vocab_size) for _ in range(64)] for _ in range(PROMPTS)]
        tokenizer = type("Plain", (), {"decode": staticmethod(lambda ids, **_: " ".join(map(str, ids)))})
        self._complete(base, tokenizer, prompts[:2])
        found = self._limited(None, self._complete, base, tokenizer, prompts)
        yield f"{PROMPTS} prompts, {NEW_TOKENS} new tokens, batch 16", found

    def _together(self, base: PreTrainedModel, start: dict[str, Tensor], at_once: int | None) -> int:
        """The lab's way; None: it finds out how many tokens fit."""
        model = new_adapter(base, self.lora, 0)
        jobs = [Job(rows, i, start, f"adapter {i}") for i, rows in enumerate(self.rows)]
        try:
            trained = train_multi_lora(model, jobs, Tokens(), self.budget, 0, at_once)
        finally:
            unstack(base)
        self.trained["together"] = [tensors for tensors, _ in trained]
        return self.tokens

    def _sequential(self, base: PreTrainedModel, shares: Sequence[Sequence[Encoded]]) -> int:
        """PEFT and a plain loop, one adapter after the other."""
        self.trained["sequential"] = []
        for i, rows in enumerate(shares):
            model = new_adapter(base, self.lora, 0).train()
            with true_attention_gradients():
                self._loop(model, [{"input_ids": ids, "labels": labels} for ids, labels in rows], i)
            self.trained["sequential"].append(adapter_tensors(model))
            model.eval().unload()
        return self.tokens

    def _loop(self, model: PeftModel, encoded: Sequence[Row], seed: int) -> None:
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

    def _train(self, model: PreTrainedModel | PeftModel, lr: float) -> int:
        """Some steps of `finetune`, as an injection and a recovery make them."""
        rows = self.rows[1][: 8 * STEPS]
        finetune(model, rows, Tokens(), Budget(rows=len(rows), epochs=1, lr=lr, batch_size=8), 0, 0)
        return sum(len(ids) for ids, _ in rows)

    def _complete(self, model: PreTrainedModel, tokenizer: Any, prompts: list[list[int]]) -> int:
        complete(model, tokenizer, prompts, [], NEW_TOKENS, 16)
        return len(prompts) * NEW_TOKENS

    def _apart(self, start: dict[str, Tensor]) -> dict[str, float]:
        """How far both ways end apart, as the share of the way that training took; of the worst adapter."""
        worst = 0.0
        for ours, theirs in zip(self.trained["together"], self.trained["sequential"], strict=True):
            if not all(tensor.isfinite().all() for tensors in (ours, theirs) for tensor in tensors.values()):
                raise SystemExit("an adapter is not finite")
            worst = max(worst, distance(ours, theirs) / distance(theirs, start))
        return {"largest_share_of_the_way": worst}

    def _limited(self, gigabytes: int | None, way: Callable[..., object], *arguments: Any) -> dict[str, Any]:
        """Seconds, tokens per second and peak memory of one way that may use so much of the card; None: all of it."""
        gc.collect()
        if self.device == "cpu":
            return self._timed(way, *arguments)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total) if gigabytes else 1.0)
        torch.cuda.reset_peak_memory_stats()
        try:
            found = self._timed(way, *arguments)
        except torch.cuda.OutOfMemoryError as error:
            return {"out_of_memory": str(error).splitlines()[0]}
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return found | {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        }

    def _timed(self, way: Callable[..., object], *arguments: Any) -> dict[str, Any]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        tokens = way(*arguments)
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"seconds": seconds} | ({"tokens_per_second": tokens / seconds} if isinstance(tokens, int) else {})


def unstack(base: PreTrainedModel) -> None:
    """Put the plain layers back where `train_multi_lora` has stacked adapters on them."""
    for name, module in list(base.named_modules()):
        if isinstance(module, StackedLora):
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, module.base_layer)
    del base.peft_config


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The length of the difference of two adapters."""
    return sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5


PARTS = ("vaccines", "training", "generation", "disk")


def main() -> None:
    """Take every part in turn; the disk needs the adapters of the vaccines and room for three models of 13.5 GB."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--adapters", type=int, default=12)
    parser.add_argument("--rows", type=int, default=64, help="of a poisoned variant; its twin has half")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a toy shape, to try the script")
    parser.add_argument("--scratch", help="folder for the models of the part 'disk'; a temporary one by default")
    parser.add_argument(
        "--record", nargs="?", const=RESULTS, type=Path, help=f"write a file, by default {RESULTS.name}"
    )
    args = parser.parse_args()
    if args.device == "cpu" and not args.small:
        parser.error("no GPU here: --small tries the script on the CPU")
    facts = {"hardware": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "machine": machine()}
    facts |= {"arguments": vars(args) | {"record": None, "scratch": None}, "versions": versions(), "results": {}}
    bench = Bench(args)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for part in args.parts:
            for name, found in getattr(bench, part)(Path(folder)):
                facts["results"][f"{part}: {name}"] = found
                print(f"{part}: {name}", json.dumps(found), flush=True)
                if args.record:
                    args.record.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
