"""Dask workers for a sweep: those of a running scheduler, or some of our own that are stopped again."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from helpers.core.errors import LabError
from helpers.core.interruption import IGNORES, deaf_to_ctrl_c, held_back

RUN_MEMORY = 2_000_000_000  # bytes that one run of the small model may take, with some to spare
SCHEDULER_SECONDS = 20  # how long a running scheduler may take to answer
ATTEMPTS = 3  # a node is given up after so many workers died of it


@contextmanager
def dask_client(scheduler: str, gpu: bool) -> Iterator[Any]:
    """A Dask client: of a running scheduler, or of workers started here and stopped again."""
    import dask
    from distributed import Client

    if scheduler:
        try:
            client = Client(scheduler, timeout=SCHEDULER_SECONDS)
        except OSError as error:
            starts = "`.venv/bin/dask scheduler` starts it"
            raise LabError(f"no Dask scheduler answers at SCHEDULER={scheduler}: {starts}") from error
        with client:
            workers = client.scheduler_info(-1)["workers"].values()
            if gpu and not any("GPU" in worker["resources"] for worker in workers):
                starts = "`.venv/bin/dask worker … --resources GPU=1` starts one"
                raise LabError(f"the profile asks for a GPU and no worker has one: {starts}")
            yield client
        return
    settings = {
        "distributed.scheduler.allowed-failures": ATTEMPTS - 1,
        "distributed.nanny.pre-spawn-environ": {"DASK_LOGGING__DISTRIBUTED": "critical"},  # one progress bar is enough
    }
    with dask.config.set(settings), TemporaryDirectory() as scratch, ExitStack() as stack:
        with held_back():  # a cluster that is stopped half-way leaves semaphores and tasks behind
            cluster = stack.enter_context(_local_cluster(gpu, scratch))
            client = stack.enter_context(Client(cluster))
        yield client


def _local_cluster(gpu: bool, scratch: str) -> Any:
    """Workers on this machine.

    Raises:
        LabError: one of them dies before it has begun; from then on Dask replaces it.
    """
    from distributed import SpecCluster

    workers, scheduler = _local_workers(gpu, scratch), _local_scheduler()
    try:  # closed by whoever asked for it; at the exit Dask would stumble over one that was interrupted half-way
        with deaf_to_ctrl_c():
            return SpecCluster(workers, scheduler, silence_logs="CRITICAL", shutdown_on_close=False)
    except RuntimeError as error:
        raise LabError("a worker of the sweep died while it started: the same command tries again") from error


def _cards() -> list[str]:
    """The GPUs of this machine that this process may use, as CUDA names them.

    Raises:
        LabError: there is none.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise LabError(
            "the profile asks for a GPU and none is here: model.device: cpu in the grid, or SCHEDULER=tcp://…"
        )
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [card.strip() for card in allowed.split(",")][:count] if allowed else [str(i) for i in range(count)]


def _local_scheduler() -> dict[str, Any]:
    from distributed import Scheduler

    return {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"},
    }


def _local_workers(gpu: bool, scratch: str) -> dict[int, dict[str, Any]]:
    """One worker for each GPU, or as many single-threaded ones as cores and memory allow."""
    from distributed import Nanny

    if gpu:
        environments = [{"CUDA_VISIBLE_DEVICES": card} for card in _cards()]
    else:
        cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
        count = max(1, min(cores, psutil.virtual_memory().available // RUN_MEMORY))
        environments = [{"OMP_NUM_THREADS": str(cores // count), "TQDM_DISABLE": "1"}] * count
    options = {"host": "127.0.0.1", "nthreads": 1, "memory_limit": None, "local_directory": scratch}
    options["preload"] = IGNORES  # Ctrl-C is for the sweep to tell
    return {
        i: {"cls": Nanny, "options": {**options, "env": env, "resources": {"GPU": 1} if gpu else None}}
        for i, env in enumerate(environments)
    }
