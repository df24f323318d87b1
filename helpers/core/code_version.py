"""Which version of the code made a result."""

import ast
import functools
import hashlib

from helpers.core.paths import ROOT

# modules that cannot change a result, and a package of them
PRESENTATION = (
    "core/interruption.py",
    "core/locks.py",
    "plots/",
    "run/cluster.py",
    "run/costs.py",
    "run/execution.py",
    "run/fetch.py",
    "run/grid.py",
    "run/limits.py",
    "run/machine.py",
    "run/pipeline.py",
    "run/planning.py",
    "run/sweeps.py",
)


@functools.cache
def code_version() -> str:
    """Digest of the code that can change a result: `helpers/` without comments, docstrings, figures and pipeline."""
    package = ROOT / "helpers"
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(PRESENTATION):
            digest.update(name.encode())
            digest.update(_code_only(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


def _code_only(source: str) -> str:
    """The syntax tree of a module as text: two sources that differ only in layout or prose give the same."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    return ast.dump(tree)
