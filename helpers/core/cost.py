"""What a stage costs: seconds, memory, and the versions of the packages that it ran on."""

import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import psutil

from helpers.core.disk import MEGABYTE

SAMPLE_SECONDS = 0.02
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measure a block: yields a dict that afterwards holds `seconds` and `peak_rss_mb` (of this process, sampled)."""
    process, done = psutil.Process(), threading.Event()
    peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cost, start = {}, time.perf_counter()
    try:
        yield cost
    finally:
        cost["seconds"] = round(time.perf_counter() - start, 3)
        done.set()
        watcher.join()
        cost["peak_rss_mb"] = round(max(peak, process.memory_info().rss) / MEGABYTE, 1)
