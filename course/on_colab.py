"""What the first cell of a notebook runs on Google Colab, from the clone that it has just made.

Colab gives every notebook an empty machine and one kernel that is older than anything installed on it. Only the
standard library is there when this starts.
"""

import os
import subprocess
import sys
from pathlib import Path

PACKS = "*.tar.gz"  # of `make pack`, uploaded beside the clone


def prepare(lab: Path) -> None:
    """Install the locked packages and make this kernel work as one that was started in the clone's notebooks.

    Args:
        lab: the clone; finished runs that lie packed beside it are unpacked.

    Raises:
        CalledProcessError: an installation or an unpacking that failed; what it said stands above.
    """
    install = ("-m", "pip", "install", "--quiet")
    _python(*install, "-r", str(lab / "requirements-lock.txt"))
    _python(*install, "--no-deps", "--no-build-isolation", "--editable", str(lab))
    os.chdir(lab / "notebooks")
    sys.path.insert(0, str(lab))  # an editable installation is seen by kernels that start after it
    os.environ["PYTHONPATH"] = str(lab)
    for pack in sorted(lab.parent.glob(PACKS)):
        _python("-m", "helpers.run.packing", "unpack", str(pack))


def _python(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True)


if __name__ == "__main__":
    prepare(Path(__file__).resolve().parents[1])
