"""Scoring one transformer block: Gram matrices of LoRA factors against written-out deltas.

Ways to Eq. 2 for the MLP of one LLaMA-2-7B block (N = 6 pairs, r = 8): `gram`, the lab's own, never forms a delta;
`dense` forms the N deltas of a matrix and computes Eq. 2 in whole-tensor operations; `fused` does the same but
forms each delta by one product of rank 2r; `loop` visits one channel of the deltas after the other. Each runs in a
process of its own, and all must agree with a float64 oracle on a sample of channels.
Usage: python benchmarks/bench_scoring.py [--threads 2] [--small] [--record]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import psutil
import torch
from torch import Tensor

from helpers.access.deltas import Factors, lora_gram
from helpers.defenses.bdvax.score import alignment, combine, strength
from helpers.model.architecture import COLUMNS, ROWS

RESULTS = Path(__file__).parent / "results" / "scoring.json"
N, RANK, SCALE, LAM = 6, 8, 2.0, 0.01
LLAMA_2_7B, SMALL = (4096, 11008), (512, 1376)  # hidden size, MLP width
REPEATS = {"gram": 9, "dense": 3, "fused": 3, "loop": 1}  # the best counts
SAMPLE = 64  # channels of each matrix compared with the oracle
TOLERANCE = 1e-5

Pairs = list[tuple[Factors, Factors]]


def block(hidden: int, width: int) -> dict[str, tuple[Pairs, int]]:
    """Random twins for gate, up and down, as far apart as short trainings from one adapter are; and channel axes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (width, hidden, ROWS), "up": (width, hidden, ROWS), "down": (hidden, width, COLUMNS)}
    return {name: ([twins(out, into, generator) for _ in range(N)], axis) for name, (out, into, axis) in shapes.items()}


def twins(out: int, into: int, generator: torch.Generator) -> tuple[Factors, Factors]:
    """Two LoRA updates, backdoored and clean, that differ by about a tenth."""
    a, b, da, db = (torch.randn(shape, generator=generator) for shape in [(RANK, into), (out, RANK)] * 2)
    return Factors(a + 0.1 * da, b + 0.1 * db, SCALE), Factors(a, b, SCALE)


def by_gram(pairs: Pairs, axis: int) -> Tensor:
    """The lab's scoring."""
    return eq2(lora_gram(*zip(*pairs, strict=True), axis))


def by_dense(pairs: Pairs, axis: int) -> Tensor:
    """Whole-tensor operations on the deltas of all variants."""
    deltas = torch.stack(written_out(pairs, axis))
    return eq2(torch.einsum("ijx,ljx->ilj", deltas, deltas))


def by_fused(pairs: Pairs, axis: int) -> Tensor:
    """As `by_dense`; [B, -B'] [A; A'] gives each delta at once, all variants in one batched product."""
    left = torch.stack([torch.cat([bd.scale * bd.B, -clean.scale * clean.B], dim=1) for bd, clean in pairs])
    right = torch.stack([torch.cat([bd.A, clean.A]) for bd, clean in pairs])
    deltas = left @ right if axis == ROWS else right.mT @ left.mT
    return eq2(torch.einsum("ijx,ljx->ilj", deltas, deltas))


def by_loop(pairs: Pairs, axis: int) -> Tensor:
    """Eq. 2 for one channel after the other."""
    deltas = written_out(pairs, axis)
    return torch.stack([printed_formula(channel) for channel in zip(*deltas, strict=True)])


def eq2(gram: Tensor) -> Tensor:
    """Both terms of Eq. 2, from inner products however made."""
    return combine(strength(gram), alignment(gram), "sum", LAM)


def written_out(pairs: Pairs, axis: int) -> list[Tensor]:
    """Eq. 1 as full-size float32 matrices, laid out with channels as rows."""
    return [update(bd, axis) - update(clean, axis) for bd, clean in pairs]


def update(factors: Factors, axis: int) -> Tensor:
    """What one LoRA adds to its matrix, channels as rows."""
    product = factors.B @ factors.A if axis == ROWS else factors.A.T @ factors.B.T
    return factors.scale * product


def printed_formula(deltas: Sequence[Tensor]) -> Tensor:
    """Eq. 2 for one channel's N vectors, as the paper prints it."""
    lengths = [delta.norm() for delta in deltas]
    pairs = list(combinations(range(len(deltas)), 2))
    cosines = [(deltas[i] @ deltas[k] / (lengths[i] * lengths[k])).clamp(min=0) for i, k in pairs]
    return sum(lengths) / len(lengths) + LAM * sum(cosines) / len(pairs)


METHODS: dict[str, Callable[[Pairs, int], Tensor]] = {
    "gram": by_gram,
    "dense": by_dense,
    "fused": by_fused,
    "loop": by_loop,
}


def largest_error(scores: Tensor, pairs: Pairs, axis: int) -> float:
    """Largest relative error on a sample of channels, against float64 products of the sampled rows or columns."""
    sample = torch.linspace(0, len(scores) - 1, SAMPLE).long().unique()
    deltas = [sampled(bd, axis, sample) - sampled(clean, axis, sample) for bd, clean in pairs]
    truth = torch.stack([printed_formula(channel) for channel in zip(*deltas, strict=True)])
    return ((scores[sample].double() - truth) / truth).abs().max().item()


def sampled(factors: Factors, axis: int, sample: Tensor) -> Tensor:
    """The sampled channels of scale * B A in float64, as rows."""
    a, b = factors.A.double(), factors.B.double()
    return factors.scale * (b[sample] @ a if axis == ROWS else a.T[sample] @ b.T)


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
    return {
        "shapes": {"hidden": hidden, "width": width, "rank": RANK, "n": N, "matrices": 3},
        "threads": arguments.threads,
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "results": results,
    }


def machine() -> dict[str, object]:
    """What the figures were measured on, and how busy it was with other things."""
    memory_gb = round(psutil.virtual_memory().total / 1e9)
    load = round(psutil.getloadavg()[1], 1)
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gb": memory_gb, "load_5_minutes": load}


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
