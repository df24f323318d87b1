"""Merging two models: the lab's streamed merges against mergekit's program, on a random LLaMA in several files.

Each merge runs in a process of its own, ours and mergekit's in turn, from the command line to the finished folder; time
and peak memory (resident, mapped pages of the inputs included) are the whole process's. Both results are then compared
tensor by tensor (`apart`: the share of numbers more than one rounding apart; 0, but for TIES, where bfloat16 weights
have many changes of equal magnitude at the cut: the lab keeps all of them, mergekit some).
Usage: python benchmarks/bench_merging.py --mergekit .venv/bin/mergekit-yaml [--threads 2] [--small] [--record]
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import psutil
import torch
import yaml

from helpers.defenses.conflict.merge import linear, passthrough, slerp_by_tensor, ties
from helpers.model.shards import CONFIG, layout, read, shards, write

RESULTS = Path(__file__).parent / "results" / "merging.json"
T, K, LAM, REPEATS = 0.3, 0.2, 1.0, 3  # the best of the repeats counts
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "vocab_size": 32000}  # 542 MB
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2000}
LAYERS_A_FILE = 4
ALLOWED = {"linear": 0.0, "slerp": 0.0, "ties": 0.005, "passthrough": 0.0}  # shares of numbers apart
METHODS = tuple(ALLOWED)
MODELS = ("base", "suspicious", "conflict")


def write_model(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """A random bfloat16 LLaMA in several files."""
    hidden, width = sizes["hidden_size"], sizes["intermediate_size"]
    block = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    block |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    block |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shapes = {"model.embed_tokens.weight": (sizes["vocab_size"], hidden)}
    files = {"model-00000.safetensors": ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (sizes["vocab_size"], hidden)}
    for layer in range(sizes["num_hidden_layers"]):
        parts = {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
        shapes |= parts
        files.setdefault(f"model-{layer // LAYERS_A_FILE + 1:05}.safetensors", []).extend(parts)
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    write(folder, files, lambda name: torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16())
    config = sizes | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def plan(layers: int) -> list[tuple[str, range]]:
    """Half of the suspicious layers, then half of the conflict model's, and the last one of the suspicious again."""
    return [("suspicious", range(layers // 2)), ("conflict", range(layers // 2, layers)), ("suspicious", [layers - 1])]


def merge(method: str, folder: Path, layers: int) -> None:
    """The lab's merge of the models in `folder`."""
    base, suspicious, conflict = (folder / model for model in MODELS)
    match method:
        case "linear":
            linear(suspicious, conflict, folder / "ours", T)
        case "slerp":
            slerp_by_tensor(suspicious, conflict, folder / "ours", T)
        case "ties":
            ties(suspicious, conflict, base, folder / "ours", K, LAM)
        case "passthrough":
            passthrough(suspicious, conflict, folder / "ours", plan(layers))


def recipe(method: str, folder: Path, layers: int) -> dict[str, object]:
    """The same merge for mergekit, in its own words; weights are computed in float32 there, too."""
    base, suspicious, conflict = (str(folder / model) for model in MODELS)
    settings = {"merge_method": method, "dtype": "float32", "out_dtype": "bfloat16"}
    pair = [{"model": suspicious}, {"model": conflict}]
    match method:
        case "linear":
            return settings | {"models": [pair[0] | weight(1 - T), pair[1] | weight(T)]}
        case "slerp":
            return settings | {"models": pair, "base_model": suspicious, "parameters": {"t": T}}
        case "ties":
            models = [model | weight(1.0, density=K) for model in pair]
            return settings | {"models": models, "base_model": base, "parameters": {"lambda": LAM, "normalize": True}}
    parts = [(folder / model, [part[0], part[-1] + 1]) for model, part in plan(layers)]
    slices = [{"sources": [{"model": str(model), "layer_range": part}]} for model, part in parts]
    return {"merge_method": method, "slices": slices}


def weight(share: float, **others: float) -> dict[str, object]:
    """A model's parameters in mergekit's notation."""
    return {"parameters": {"weight": share} | others}


def measured(command: list[str], threads: int) -> dict[str, float]:
    """Seconds of one process, and its largest resident memory, looked up every 5 ms."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        start, peak = time.perf_counter(), 0
        process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # it may end between two looks
                peak = max(peak, process.memory_info().rss)
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
    return {"seconds": seconds, "peak_mb": peak / 1e6}


def best(runs: list[dict[str, float]]) -> dict[str, float]:
    """The shortest time and the smallest peak of several runs."""
    return {key: min(run[key] for run in runs) for key in runs[0]}


def compare(method: str, folder: Path, layers: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Both programs on one merge, in turn."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(method, folder, layers)), encoding="utf-8")
    threads = str(arguments.threads)
    commands = {
        "ours": [sys.executable, __file__, "--method", method, "--folder", str(folder), "--threads", threads],
        "mergekit": [arguments.mergekit, str(folder / "recipe.yaml"), str(folder / "mergekit"), "-j", threads],
    }
    commands["ours"] += ["--small"] * arguments.small
    commands["mergekit"] += ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    runs = {program: [] for program in commands}
    for _ in range(arguments.repeats):
        for program, command in commands.items():
            shutil.rmtree(folder / program, ignore_errors=True)
            runs[program].append(measured(command, arguments.threads))
    row = {program: best(found) for program, found in runs.items()}
    row |= {f"{key}_ratio": row["ours"][key] / row["mergekit"][key] for key in ("seconds", "peak_mb")}
    return row | {"apart": apart(folder / "ours", folder / "mergekit")}


def apart(ours: Path, theirs: Path) -> float:
    """The share of numbers that are more than one rounding of their dtype apart; 1 when names differ."""
    names, count, off = [name for found in layout(ours).values() for name in found], 0, 0
    if sorted(names) != sorted(name for found in layout(theirs).values() for name in found):
        return 1.0
    for name in names:
        a, b = read(ours, name).float(), read(theirs, name).float()
        rounding = torch.finfo(read(ours, name).dtype).eps * b.abs().clamp(min=1e-3)
        count, off = count + a.numel(), off + int(((a - b).abs() > 1.01 * rounding).sum())
    return off / count


def report(arguments: argparse.Namespace) -> dict[str, object]:
    """All methods, and what they were measured on."""
    from bench_scoring import machine  # the merging process would pay for what it imports

    sizes = SMALL if arguments.small else LARGE
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        for seed, model in enumerate(MODELS):
            write_model(folder / model, sizes, seed)
        megabytes = sum(path.stat().st_size for path in shards(folder / "base")) / 1e6
        files = len(shards(folder / "base"))
        results = {m: compare(m, folder, sizes["num_hidden_layers"], arguments) for m in METHODS}
    start = {
        "ours": measured([sys.executable, __file__, "--method", "nothing", "--folder", "."], arguments.threads),
        "mergekit": measured([arguments.mergekit, "--help"], arguments.threads),
    }
    return {
        "model": sizes | {"megabytes": round(megabytes), "files": files, "dtype": "bfloat16"},
        "threads": arguments.threads,
        "machine": machine(),
        "versions": versions(arguments.mergekit),
        "start_alone": start,
        "results": results,
    }


def versions(mergekit: str) -> dict[str, str]:
    """Of both programs; mergekit may live in an environment of its own, whose Python stands beside it."""
    question = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))"
    command = [str(Path(mergekit).parent / "python"), "-c", question]
    theirs = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    own = {name: metadata.version(name) for name in ("torch", "safetensors", "transformers")}
    return {"python": platform.python_version(), **own, "mergekit": theirs[0], "torch_of_mergekit": theirs[1]}


def print_table(facts: dict) -> None:
    """The results as a table."""
    model = facts["model"]
    print(f"{model['megabytes']} MB in {model['files']} files, {facts['threads']} threads, {facts['machine']['cpu']}")
    print(f"{'':14}{'seconds':^26}{'peak MB':^26}{'apart':>10}")
    print(f"{'method':14}" + f"{'ours':>8}{'mergekit':>10}{'ratio':>8}" * 2 + f"{'share':>10}")
    for method, row in facts["results"].items():
        print(f"{method:14}", end="")
        for key, digits in (("seconds", 1), ("peak_mb", 0)):
            ours, theirs, ratio = row["ours"][key], row["mergekit"][key], row[f"{key}_ratio"]
            print(f"{ours:8.{digits}f}{theirs:10.{digits}f}{ratio:8.2f}", end="")
        print(f"{row['apart']:10.5f}")
    alone = {
        program: f"{row['seconds']:.1f} s, {row['peak_mb']:.0f} MB" for program, row in facts["start_alone"].items()
    }
    print(f"starting the program alone: ours {alone['ours']}; mergekit {alone['mergekit']}")


def main() -> None:
    """Merge once (in its own process), or compare all methods and tell."""
    parser = argparse.ArgumentParser(description="Merging a random LLaMA: the lab against mergekit-yaml.")
    parser.add_argument("--mergekit", metavar="PATH", default=shutil.which("mergekit-yaml"), help="mergekit-yaml")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--scratch", help="folder for three models and two results, 3 GB (default: the system's)")
    parser.add_argument("--small", action="store_true", help="a few megabytes, to try the script")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.parent.name}/{RESULTS.name}")
    parser.add_argument("--method", choices=(*METHODS, "nothing"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.method:
        return merge(arguments.method, arguments.folder, (SMALL if arguments.small else LARGE)["num_hidden_layers"])
    if not arguments.mergekit:
        sys.exit("mergekit-yaml is not on the path: give it with --mergekit PATH")
    facts = report(arguments)
    print_table(facts)
    if arguments.record:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if wrong := [method for method, row in facts["results"].items() if row["apart"] > ALLOWED[method]]:
        sys.exit(f"not what mergekit makes: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
