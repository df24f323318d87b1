"""Nothing lost: the lab's main job is struck at random moments and repeated, and must end as if nothing had happened.

Struck are the chain of notebooks (`python -m helpers.run.pipeline run`) and a sweep: a kernel, the pipeline itself or a
Dask worker gets SIGKILL, SIGTERM or SIGINT, the disk is full, the folder turns read-only, or a second run of the same
NAME starts. Then the same command runs again. Whatever differs from an undisturbed run, was made twice, is left outside
of the run folder or still runs is a failure, and the exit status says so. A small random model and tiny budgets keep a
run to about two minutes, most of which its kernels spend on importing.

    python benchmarks/faults.py                     # 50 cases, two at a time
    python benchmarks/faults.py --next 2            # two of those that are still missing in --folder
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import psutil
import yaml
from bench_scoring import machine

from helpers.core.cost import versions
from helpers.core.disk import read_json, write_json
from helpers.core.modules import version_of
from helpers.core.paths import ROOT
from helpers.core.stages import METHODS, notebooks_of
from helpers.data import corpus
from helpers.run.pretrain import new_model, train_tokenizer

RESULTS = Path(__file__).parent / "results" / "faults.json"
MARK = "LAB_FAULTS_CASE"  # by this variable the processes of a case are found again
NAME = "mine"
ATTEMPTS = 4  # to strike before the run has ended: the machine may have been busier when it ran undisturbed
LONGEST = 900  # seconds that a run may take
GONE = 15  # seconds within which every process of an ended run must have ended
MODEL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
NUMBERS = {
    "signature.n": 2,
    "evaluation.n": 5,
    "evaluation.per_family": 1,
    "lengths.new_tokens": 24,
    "full.poison_rate": 0.5,
    "full.suppress.tau": 0.1,
    "conflict.t": 0.5,
}
BUDGETS = {  # rows, epochs, learning rate
    "full.inject": (100, 4, 1.0e-2),
    "full.vaccine": (24, 3, 2.0e-3),
    "full.recover": (16, 2, 1.0e-3),
    "conflict.budget": (16, 3, 1.0e-2),
}
GRID = {"notebooks": ["01", "07"], "optional": False, "grid": {"SEED": [1, 2]}}
# (job, what is struck, how): times
PLAN = {
    ("run", "kernel", "SIGKILL"): 4,
    ("run", "kernel", "SIGTERM"): 4,
    ("run", "kernel", "SIGINT"): 4,
    ("run", "pipeline", "SIGKILL"): 6,
    ("run", "pipeline", "SIGTERM"): 4,
    ("run", "pipeline", "SIGINT"): 4,
    ("run", "disk", "full"): 6,
    ("run", "folder", "read-only"): 3,
    ("run", "name", "twice"): 2,
    ("sweep", "worker", "SIGKILL"): 3,
    ("sweep", "worker", "SIGTERM"): 2,
    ("sweep", "worker", "SIGINT"): 2,
    ("sweep", "kernel", "SIGKILL"): 2,
    ("sweep", "pipeline", "SIGKILL"): 2,
    ("sweep", "pipeline", "SIGTERM"): 1,
    ("sweep", "pipeline", "SIGINT"): 1,
}
SHARES = {"bdvax": 2, "conflict": 2, "bdvax_then_conflict": 1}  # how often each is struck; all of it takes longest
STATUS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}  # of a pipeline that got the signal itself
COMMAND = {"pipeline": "helpers.run.pipeline", "kernel": "ipykernel_launcher", "worker": "spawn_main"}


@dataclass
class Case:
    """One fault and what came of it."""

    number: int
    job: str
    target: str
    how: str
    method: str
    moment: float  # share of the undisturbed duration, or of the disk that an undisturbed run fills
    seconds: float = 0.0  # after the start, when it struck
    status: int | None = None
    told: str = ""
    finished: int = 0  # stages that were finished by then
    vanished: float = 0.0  # seconds until the last process was gone
    problems: list[str] = field(default_factory=list)
    skipped: str = ""


def plan_cases(seed: int) -> list[Case]:
    """The campaign: every fault of `PLAN`, in an order, at moments and with methods that the seed draws."""
    rng = random.Random(seed)
    faults = [fault for fault, times in PLAN.items() for _ in range(times)]
    rng.shuffle(faults)
    methods = rng.choices(sorted(SHARES), [SHARES[method] for method in sorted(SHARES)], k=len(faults))
    return [Case(i, *fault, methods[i], round(rng.random(), 4)) for i, fault in enumerate(faults)]


class Lab:
    """The folders of one case, and the processes that run in them."""

    def __init__(self, root: Path, mark: str):
        self.root, self.shared, self.mark, self.started = root / mark, root, f"{os.getpid()}-{mark}", 0.0
        for name in ("runs", "tmp"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        if (root / "home").is_dir():
            shutil.copytree(root / "home", self.root / "home", dirs_exist_ok=True)
        (self.root / "home").mkdir(exist_ok=True)

    @property
    def run(self) -> Path:
        """The folder that the job writes."""
        return self.root / "runs" / NAME

    def clear(self) -> None:
        """Remove what the job has made."""
        subprocess.run(["umount", self.root / "runs"], capture_output=True)
        shutil.rmtree(self.root / "runs")
        (self.root / "runs").mkdir()

    def start(self, job: str, method: str = "bdvax_then_conflict", before: tuple[str, ...] = ()) -> subprocess.Popen:
        """Start the main job in a session of its own."""
        settings = " ".join(f"{key}={value}" for key, value in overrides(self.shared).items())
        options = {
            "run": ["run", "--method", method, "--access", "full", "--set", settings],
            "sweep": ["sweep", str(self.shared / "grid.yaml")],
        }
        variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
        variables |= {"HOME": str(self.root / "home"), "TMPDIR": str(self.root / "tmp"), MARK: self.mark}
        self.started = time.monotonic()
        return subprocess.Popen(
            [*before, sys.executable, "-m", "helpers.run.pipeline", *options[job], "--name", NAME],
            env=os.environ | variables | {"LAB_RUNS": str(self.root / "runs")},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def processes(self, words: str = "") -> list[psutil.Process]:
        """The processes of this case whose command line holds these words, the oldest first."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: process.create_time())

    def outside(self) -> dict[str, int]:
        """What lies where a run must leave nothing, {path: size}: system's temporary folder, home, repository."""
        found = {}
        for folder in (self.root / "home", self.root / "tmp", ROOT):
            for path in folder.rglob("*"):
                inside = {".git", "__pycache__", ".venv", "runs", ".ruff_cache", ".pytest_cache"} & set(path.parts)
                if path.is_file() and not inside:
                    found[str(path)] = path.stat().st_size
        return found


def overrides(root: Path) -> dict[str, object]:
    """The profile's numbers of the tiny run."""
    numbers = {"model.path": str(root / "model"), **NUMBERS}
    for name, budget in BUDGETS.items():
        numbers |= {f"{name}.{key}": value for key, value in zip(("rows", "epochs", "lr"), budget, strict=True)}
        numbers[f"{name}.batch_size"] = 8
    return numbers


# --- what a run has made ---------------------------------------------------------------------------------------------


def stages(run: Path) -> dict[str, dict]:
    """Every whole stage below a folder: its identity, its results without times and the digests of its files."""
    found = {}
    for path in sorted(run.rglob("manifest.json")):
        place = path.parent.relative_to(run)
        if any(part.startswith(".") for part in place.parts):
            continue
        manifest = read_json(path)
        files = {name: path.parent / name for name in manifest["files"]}
        if all(file.is_file() and file.stat().st_size == manifest["files"][name] for name, file in files.items()):
            found[place.as_posix()] = {
                "digest": manifest["digest"],
                "result": without_times(manifest["result"]),
                "files": {name: digest(file, run) for name, file in files.items()},
                "manifest": manifest,
            }
    return found


def digest(file: Path, run: Path) -> str:
    """Digest of a file; the folder of the run that JSON names, as adapters name their base, does not count."""
    content = file.read_bytes()
    return hashlib.sha256(content.replace(bytes(run), b"") if file.suffix == ".json" else content).hexdigest()


def without_times(value: object) -> object:
    """A result without the seconds and the memory in it."""
    if isinstance(value, dict):
        left = {key: without_times(inner) for key, inner in value.items()}
        return {key: inner for key, inner in left.items() if key not in ("seconds", "peak_rss_mb", "versions")}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def results(job: str, run: Path) -> dict:
    """The final numbers of a run or a sweep."""
    if job == "run":
        return without_times(read_json(run / "summary.json"))
    return {"table": pd.read_csv(run / "results.csv").drop(columns="seconds").to_csv()}


def differing(found: dict[str, dict], wanted: dict[str, dict]) -> list[str]:
    """The stages that are not, bit for bit, those of the undisturbed run."""
    keys = ("digest", "result", "files")
    return [name for name, stage in found.items() if any(stage[k] != wanted.get(name, {}).get(k) for k in keys)]


# --- the undisturbed run ---------------------------------------------------------------------------------------------


def reference(root: Path, job: str) -> dict:
    """How an undisturbed job ends, {seconds: of each notebook, bytes, stages, results}; made once."""
    kept = root / f"reference-{job}.json"
    if not kept.is_file():
        lab = Lab(root, f"reference-{job}")
        printed, errors = lab.start(job).communicate(timeout=LONGEST)
        total = time.monotonic() - lab.started
        notebooks = [
            line.split() for line in printed.splitlines() if line.rstrip().endswith(" s") and line[:2].isdigit()
        ]
        seconds = {words[0][:2]: float(words[-2]) for words in notebooks}
        used = sum(path.stat().st_size for path in lab.run.rglob("*") if path.is_file())
        facts = {"seconds": seconds, "total": total, "bytes": used, "stages": stages(lab.run)}
        write_json(kept, facts | {"results": results(job, lab.run)})
        shutil.copytree(lab.root / "home", root / "home", dirs_exist_ok=True)
    return read_json(kept)


def duration(undisturbed: dict, method: str) -> float:
    """Seconds of an undisturbed job with this method."""
    seconds = undisturbed["seconds"]
    left_out = sum(seconds.values()) - sum(seconds.get(number, 0) for number in notebooks_of(METHODS[method]))
    return undisturbed["total"] - (left_out if seconds else 0)


def expected(undisturbed: dict, found: dict) -> dict:
    """The part of the undisturbed summary that another method's tells of as well."""
    own = {"method": found.get("method")} | ({"tau": None} if found.get("method") == "conflict" else {})
    return {key: own.get(key, undisturbed["results"].get(key)) for key in found}


# --- faults ----------------------------------------------------------------------------------------------------------


def strike(case: Case, lab: Lab, undisturbed: dict) -> None:
    """Run the job with its fault, earlier where it came too late, and note how it ended."""
    span = duration(undisturbed, case.method if case.job == "run" else "bdvax_then_conflict")
    fault = {"disk": full_disk, "folder": read_only, "name": second_run}.get(case.target, kill)
    for _ in range(ATTEMPTS):
        fault(case, lab, span)
        if case.skipped or case.seconds:
            return
        lab.clear()
        case.moment, case.problems = round(0.6 * case.moment, 4), []
    case.problems.append("ended before it was struck")


def kill(case: Case, lab: Lab, span: float) -> None:
    """Send the signal to the pipeline, a kernel or a worker; to the first that is there after the moment."""
    process = lab.start(case.job, case.method)
    sleep_until(lab.started + case.moment * span, process)
    while process.poll() is None:
        targets = lab.processes(COMMAND[case.target])
        if targets:
            case.seconds, began = time.monotonic() - lab.started, (lab.run / "locks" / "run").exists()
            random.Random(case.number).choice(targets).send_signal(getattr(signal, case.how))
            break
        time.sleep(0.02)
    ended(case, lab, process)
    if case.target == "kernel" and case.status == 0:  # it had done its work and was about to end
        case.seconds = 0
    if not case.seconds:
        return
    if case.target == "pipeline":
        wanted = [STATUS[case.how]] + ([] if began else [-getattr(signal, case.how), 1])
        case.problems += [f"status {case.status}"] * (case.status not in wanted)
        case.problems += [f"told {case.told!r}"] * (began and case.how != "SIGKILL" and case.told.count("\n") > 0)
    else:
        unborn = case.target == "worker" and case.told.endswith("the same command tries again")
        wanted = (0,) if case.target == "worker" and not unborn else (2,)
        case.problems += [f"status {case.status}: {case.told!r}"] * (case.status not in wanted)
        case.problems += [f"told {case.told!r}"] * (case.status == 2 and case.job == "run" and "\n" in case.told)


def full_disk(case: Case, lab: Lab, span: float) -> None:
    """Give the runs a disk of a part of what they need, and more of it when they have failed."""
    needed = reference(lab.shared, case.job)["bytes"]
    whole = case.method == "bdvax_then_conflict"
    size = int(needed * (0.05 + 0.6 * case.moment)) if whole else int(needed * 0.3 * case.moment) + 8192
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", lab.root / "runs"], capture_output=True, text=True
    )
    if mounted.returncode:
        case.skipped = f"no disk can be mounted here: {mounted.stderr.strip()}"
        return
    ended(case, lab, lab.start(case.job, case.method))
    case.seconds = time.monotonic() - lab.started if case.status else 0
    subprocess.run(["mount", "-o", "remount,size=1g", lab.root / "runs"], check=True)
    case.problems += [f"told {case.told!r}"] * (not one_line(case, "disk full while writing"))


def read_only(case: Case, lab: Lab, span: float) -> None:
    """Take the right to write from every folder of the run, and give it back when the run has failed."""
    as_user = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")  # what root may besides
    if os.getuid() == 0 and not shutil.which("setpriv"):
        case.skipped = "root may write everywhere, and there is no setpriv"
        return
    process = lab.start(case.job, case.method, as_user if os.getuid() == 0 else ())
    sleep_until(lab.started + max(case.moment * span, 1), process)
    while process.poll() is None and not (lab.run / "locks" / "run").exists():
        time.sleep(0.05)
    case.seconds = time.monotonic() - lab.started
    allow(lab.run, 0o555)
    ended(case, lab, process)
    case.seconds = case.seconds if case.status else 0
    allow(lab.run, 0o755)
    case.problems += [f"status {case.status}: {case.told!r}"] * (case.status != 2 or "\n" in case.told)


def allow(folder: Path, mode: int) -> None:
    """Set the rights of a folder and of the folders in it, of those first that are still there."""
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        if path.exists():
            path.chmod(mode)


def second_run(case: Case, lab: Lab, span: float) -> None:
    """Start the same job a second time while it runs; the second is refused, the first goes on."""
    first = lab.start(case.job, case.method)
    while first.poll() is None and not (lab.run / "locks" / "run").exists():
        time.sleep(0.05)
    sleep_until(lab.started + case.moment * (span - 20), first)  # the second needs some seconds to begin
    case.seconds, started = time.monotonic() - lab.started, lab.started
    second = lab.start(case.job, case.method)
    _, errors = second.communicate(timeout=LONGEST)
    case.seconds = case.seconds if second.returncode else 0
    refused = second.returncode == 2 and errors.count("\n") == 1 and "is in use by another process" in errors
    case.problems += [f"the second run: status {second.returncode}, {errors!r}"] * (not refused)
    lab.started = started
    ended(case, lab, first)
    case.problems += [f"the first run: status {case.status}, {case.told!r}"] * (case.status != 0)
    case.told = case.told or errors.strip()


def one_line(case: Case, words: str) -> bool:
    """Whether a command refused, in one line with these words."""
    return case.status == 2 and "\n" not in case.told and words in case.told


def sleep_until(moment: float, process: subprocess.Popen) -> None:
    """Sleep until then, or until the process has ended."""
    while time.monotonic() < moment and process.poll() is None:
        time.sleep(0.02)


def ended(case: Case, lab: Lab, process: subprocess.Popen) -> None:
    """Wait for the end of a job and of all that it has started."""
    try:
        _, errors = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        case.problems.append(f"still running after {LONGEST} s")
        process.kill()
        _, errors = process.communicate()
    case.status, case.told, end = process.returncode, errors.strip(), time.monotonic()
    while (left := lab.processes()) and time.monotonic() - end < GONE:
        time.sleep(0.1)
    case.vanished = round(time.monotonic() - end, 1)
    for orphan in left:
        case.problems.append(f"still runs: {' '.join(orphan.cmdline())[:100]}")
        orphan.kill()


# --- the campaign ----------------------------------------------------------------------------------------------------


def try_case(case: Case, root: Path) -> Case:
    """Strike, look, repeat the command, look again."""
    undisturbed, lab = reference(root, case.job), Lab(root, f"case-{case.number:02}")
    before, began = lab.outside(), time.monotonic()
    try:
        strike(case, lab, undisturbed)
        if not case.skipped:
            kept = stages(lab.run)
            case.finished = len(kept)
            case.problems += [f"{name} is not whole" for name in differing(kept, undisturbed["stages"])]
            case.problems += outside_now(lab, before, "after the fault")
            repeat(case, lab, undisturbed, kept)
            case.problems += outside_now(lab, before, "after the rerun")
    except Exception as error:  # a broken case must not end the campaign
        case.problems.append(f"{type(error).__name__}: {error}")
    case.seconds = round(case.seconds, 2)
    subprocess.run(["umount", lab.root / "runs"], capture_output=True)
    if not case.problems:
        shutil.rmtree(lab.root)
    print(f"{line(case)}  ({time.monotonic() - began:.0f} s)", flush=True)
    return case


def repeat(case: Case, lab: Lab, undisturbed: dict, kept: dict[str, dict]) -> None:
    """Run the same command again, and hold what it leaves against the undisturbed run."""
    process = lab.start(case.job, case.method)
    _, errors = process.communicate(timeout=LONGEST)
    if process.returncode:
        case.problems.append(f"the rerun: status {process.returncode}, {errors.strip()!r}")
        return
    made, final = stages(lab.run), results(case.job, lab.run)
    case.problems += [f"{name} differs" for name in differing(made, undisturbed["stages"])]
    again = [name for name, stage in kept.items() if made.get(name, {}).get("manifest") != stage["manifest"]]
    case.problems += [f"{name} was made again" for name in again]
    case.problems += ["other final numbers"] * (final != expected(undisturbed, final))
    case.problems += [f"left: {path.relative_to(lab.run)}" for path in lab.run.rglob(".*")]
    case.problems += [f"still runs after the rerun: {' '.join(p.cmdline())[:100]}" for p in lab.processes()]


def outside_now(lab: Lab, before: dict[str, int], when: str) -> list[str]:
    """What has changed outside of the run folder since `before`, a line for each path."""
    now = lab.outside()
    changed = sorted(path for path in now.keys() | before.keys() if now.get(path) != before.get(path))
    return [f"{when} outside of the run folder: {path}" for path in changed]


def line(case: Case) -> str:
    """A case in one line."""
    what = f"{case.number:2} {case.job:5} {case.target:8} {case.how:9} {case.method if case.job == 'run' else '':8}"
    how = case.skipped or "; ".join(case.problems) or f"well; status {case.status}, {case.finished} stages finished"
    return f"{what} at {case.seconds:6.1f} s: {how}"


def prepare(root: Path) -> None:
    """The small random model and the grid of the sweep.

    Raises:
        SystemExit: the folder holds cases of other code.
    """
    root.mkdir(parents=True, exist_ok=True)
    version = root / "code"
    if version.is_file() and version.read_text() != version_of(("helpers.run.pipeline", "helpers.run.start")):
        sys.exit(f"{root} holds cases of other code: remove it, or name another --folder")
    version.write_text(version_of(("helpers.run.pipeline", "helpers.run.start")))
    if not (root / "model").is_dir():
        tokenizer = train_tokenizer(corpus.generate(300, 0), 400)
        new_model(tokenizer, MODEL, 0).save_pretrained(root / "model")
        tokenizer.save_pretrained(root / "model")
    grid = GRID | {"fixed": {"ACCESS": "full", **overrides(root)}}
    (root / "grid.yaml").write_text(yaml.safe_dump(grid))


def main() -> int:
    """Strike the main job at random moments, and record how it took it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--next", type=int, help="at most so many of the cases that --folder still lacks")
    parser.add_argument("--only", type=int, nargs="*", help="these cases, by number, again")
    parser.add_argument("--together", type=int, default=2, help="cases at a time, each needs a core")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "backdoor-lab-faults")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.parent.name}/{RESULTS.name}")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    prepare(args.folder)
    kept, lock = args.folder / "cases.json", threading.Lock()
    done = {case["number"]: case for case in (read_json(kept) if kept.is_file() else [])}
    cases = plan_cases(args.seed)
    missing = [case for case in cases if (case.number in args.only if args.only else case.number not in done)]

    def keep(case: Case) -> None:
        found = asdict(try_case(case, args.folder))
        found["told"] = found["told"].rpartition("\n")[2]
        with lock:
            done[case.number] = found
            write_json(kept, [done[number] for number in sorted(done)])

    for job in ("run", "sweep"):
        reference(args.folder, job)
    with ThreadPoolExecutor(args.together) as pool:
        list(pool.map(keep, missing[: args.next]))
    found = [done[number] for number in sorted(done)]
    failed, skipped = (sum(bool(case[key]) for case in found) for key in ("problems", "skipped"))
    print(f"{len(found)} of {len(cases)} cases, {skipped} skipped: {failed} failed")
    if args.record:
        seconds = {job: round(reference(args.folder, job)["total"], 1) for job in ("run", "sweep")}
        facts = {"seed": args.seed, "planned": len(cases), "done": len(found), "skipped": skipped, "failed": failed}
        facts |= {"undisturbed_seconds": seconds, "slowest_to_vanish": max((c["vanished"] for c in found), default=0)}
        write_json(RESULTS, facts | {"machine": machine(), "versions": versions(), "cases": found})
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
