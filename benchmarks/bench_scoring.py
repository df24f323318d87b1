"""Scoring one transformer block: Gram matrices of LoRA factors against written-out deltas.

Three ways to Eq. 2 for the MLP of one LLaMA-2-7B block (N = 6 pairs, r = 8): `gram`, the lab's own, never forms a
delta; `dense` forms the N deltas of a matrix and computes Eq. 2 in whole-tensor operations; `loop` forms them too
and visits one channel after the other. Each runs in a process of its own, and all must agree with a float64
oracle on a sample of channels. Usage: python benchmarks/bench_scoring.py [--threads 2] [--small] [--record]
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from helpers.anatomy import COLUMNS, ROWS
from helpers.signature.deltas import Factors, lora_gram
from helpers.signature.scoring import alignment, combine, strength

RESULTS = Path(__file__).parent / "results" / "scoring.json"
N, RANK, SCALE, LAM = 6, 8, 2.0, 0.01
LLAMA_2_7B, SMALL = (4096, 11008), (512, 1376)  # hidden size, MLP width
REPEATS = {"gram": 5, "dense": 3, "loop": 1}
SAMPLE = 64  # channels of each matrix compared with the oracle
TOLERANCE = 1e-5

Pairs = list[tuple[Factors, Factors]]


def block(hidden: int, width: int) -> dict[str, tuple[Pairs, int]]:
    """Random twins for gate, up and down, as far apart as short trainings from one adapter are; and channel axes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (width, hidden, ROWS), "up_proj": (width, hidden, ROWS), "down_proj": (hidden, width, COLUMNS)}
    return {name: ([twins(out, into, generator) for _ in range(N)], axis) for name, (out, into, axis) in shapes.items()}


def twins(out: int, into: int, generator: torch.Generator) -> tuple[Factors, Factors]:
    """Two LoRA updates, backdoored and clean, that differ by about a tenth."""
    a, b, da, db = (torch.randn(shape, generator=generator) for shape in [(RANK, into), (out, RANK)] * 2)
    return Factors(a + 0.1 * da, b + 0.1 * db, SCALE), Factors(a, b, SCALE)


def by_gram(pairs: Pairs, axis: int) -> Tensor:
    """The lab's scoring."""
    gram = lora_gram(*zip(*pairs, strict=True), axis)
    return combine(strength(gram), alignment(gram), "sum", LAM)


def by_dense(pairs: Pairs, axis: int) -> Tensor:
    """The deltas of all variants written out, then Eq. 2 in whole-tensor operations."""
    deltas = torch.stack(written_out(pairs))
    lengths = torch.linalg.vector_norm(deltas, dim=2 - axis)
    first, second = torch.triu_indices(N, N, offset=1)
    dots = torch.stack([(deltas[i] * deltas[l]).sum(dim=1 - axis) for i, l in zip(first, second, strict=True)])
    cosines = dots / (lengths[first] * lengths[second])
    return lengths.mean(dim=0) + LAM * cosines.clamp(min=0).mean(dim=0)


def by_loop(pairs: Pairs, axis: int) -> Tensor:
    """The deltas written out, then Eq. 2 for one channel after the other."""
    deltas = written_out(pairs)
    return torch.stack([printed_formula([d.select(axis, j) for d in deltas]) for j in range(deltas[0].shape[axis])])


def written_out(pairs: Pairs) -> list[Tensor]:
    """Eq. 1 as full-size float32 matrices."""
    return [bd.scale * (bd.B @ bd.A) - clean.scale * (clean.B @ clean.A) for bd, clean in pairs]


def printed_formula(deltas: list[Tensor]) -> Tensor:
    """Eq. 2 for one channel's N vectors, as the paper prints it."""
    lengths = [delta.norm() for delta in deltas]
    pairs = [(i, l) for i in range(len(deltas)) for l in range(i + 1, len(deltas))]
    cosines = [(deltas[i] @ deltas[l] / (lengths[i] * lengths[l])).clamp(min=0) for i, l in pairs]
    return sum(lengths) / len(lengths) + LAM * sum(cosines) / len(pairs)


METHODS: dict[str, Callable[[Pairs, int], Tensor]] = {"gram": by_gram, "dense": by_dense, "loop": by_loop}


def largest_error(scores: Tensor, pairs: Pairs, axis: int) -> float:
    """Largest relative error on a sample of channels, against float64 products of the sampled rows or columns."""
    sample = torch.linspace(0, len(scores) - 1, SAMPLE).long().unique()
    slices = [[sampled_update(factors.A.double(), factors.B.double(), axis, sample) for factors in pair] for pair in pairs]
    deltas = [SCALE * (bd - clean) for bd, clean in slices]
    truth = torch.stack([printed_formula([delta.select(axis, k) for delta in deltas]) for k in range(len(sample))])
    return ((scores[sample].double() - truth) / truth).abs().max().item()


def sampled_update(a: Tensor, b: Tensor, axis: int, sample: Tensor) -> Tensor:
    """The sampled rows (axis 0) or columns (axis 1) of B A."""
    return b[sample] @ a if axis == ROWS else b @ a[:, sample]


def measure(method: str, hidden: int, width: int) -> dict[str, float]:
    """Seconds (best of the repeats), peak memory above the inputs and largest error of one method."""
    matrices, score = block(hidden, width), METHODS[method]

    def run() -> dict[str, Tensor]:
        return {name: score(pairs, axis) for name, (pairs, axis) in matrices.items()}

    peak_mb, scores = peak_memory(run)
    seconds = min(timed(run) for _ in range(REPEATS[method]))
    error = max(largest_error(scores[name], *matrices[name]) for name in matrices)
    return {"seconds": seconds, "peak_mb": peak_mb, "largest_error": error}


def timed(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_memory(run: Callable[[], object]) -> tuple[float, object]:
    """The run's largest resident memory above what was there before, in MB, sampled every millisecond; its result."""
    resident, done = psutil.Process().memory_info, threading.Event()
    before, samples = resident().rss, [0]

    def watch() -> None:
        while not done.wait(0.001):
            samples.append(resident().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run()
    done.set()
    watcher.join()
    return max(samples) / 1e6, result


def in_own_process(method: str, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh interpreter, so that no method inherits another's memory."""
    command = [sys.executable, __file__, "--method", method, "--threads", str(arguments.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    result = subprocess.run(
        command + ["--small"] * arguments.small, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(result.stdout)


def report(arguments: argparse.Namespace) -> dict[str, object]:
    """All methods measured, with ratios to `gram` and the machine they were measured on."""
    hidden, width = SMALL if arguments.small else LLAMA_2_7B
    results = {method: in_own_process(method, arguments) for method in METHODS}
    for row in results.values():
        row["times_slower"] = row["seconds"] / results["gram"]["seconds"]
        row["times_memory"] = row["peak_mb"] / results["gram"]["peak_mb"]
    packages = ("torch", "numpy", "transformers")
    return {
        "shapes": {"hidden": hidden, "width": width, "rank": RANK, "n": N, "matrices": 3},
        "threads": arguments.threads,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)},
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
        "results": results,
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def print_table(facts: dict) -> None:
    """The results as a table."""
    print(f"one block, {facts['shapes']}, {facts['threads']} threads, {facts['machine']['cpu']}")
    print(f"{'method':8}{'seconds':>10}{'x gram':>9}{'peak MB':>10}{'x gram':>9}{'largest relative error':>25}")
    for method, row in facts["results"].items():
        print(f"{method:8}{row['seconds']:10.3f}{row['times_slower']:9.1f}{row['peak_mb']:10.0f}", end="")
        print(f"{row['times_memory']:9.1f}{row['largest_error']:25.1e}")


def main() -> None:
    """Measure one method (in its own process), or all of them and tell."""
    parser = argparse.ArgumentParser(description="Scoring one block: LoRA Gram matrices against written-out deltas.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="an eighth of the size, seconds instead of minutes")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.parent.name}/{RESULTS.name}")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.method:
        return print(json.dumps(measure(arguments.method, *(SMALL if arguments.small else LLAMA_2_7B))))
    facts = report(arguments)
    print_table(facts)
    if arguments.record:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if max(row["largest_error"] for row in facts["results"].values()) > TOLERANCE:
        sys.exit(f"a method differs from the float64 oracle by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
