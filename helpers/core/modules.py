"""Which code of `helpers/` a result was made by: modules, and all that they reach by import."""

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from helpers.core.paths import ROOT

PACKAGE = "helpers"


def reachable(modules: Iterable[str]) -> set[str]:
    """These modules of `helpers` and all that they reach by import, as far as they are there."""
    found, wanted = set(), [inner for name in modules for inner in (name, *_inside(name))]
    while wanted:
        if (name := wanted.pop()) not in found and file_of(name).is_file():
            found.add(name)
            wanted += _imported_by(name)
    return found


@functools.cache
def version_of(modules: tuple[str, ...]) -> str:
    """Digest of what these modules of `helpers` reach, without docstrings and layout."""
    found = reachable(modules)
    return digest([f"{name} {_module_digest(name)}" for name in found] + [f"{m} is gone" for m in {*modules} - found])


@functools.cache
def _imported_by(module: str) -> tuple[str, ...]:
    """The modules of `helpers` that a module imports, anywhere in it, but for its types alone.

    Of a package that is imported itself these are all its modules, which may be chosen by their names.
    """
    found = [".".join(module.split(".")[:i]) for i in range(2, module.count(".") + 1)]  # the packages it lies in
    for node in _imports(_module_tree(module)):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        else:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            imported = [name if is_module(name) else node.module or "" for name in whole]
        found += [inner for name in imported if in_package(name) for inner in (name, *_inside(name))]
    return tuple(dict.fromkeys(found))


def _inside(package: str) -> Iterator[str]:
    """All modules of a package, those of its packages too; none of a module."""
    file = file_of(package)
    if file.name == "__init__.py" and package != PACKAGE:
        for path in sorted(file.parent.rglob("*.py")):
            parts = path.relative_to(file.parent).with_suffix("").parts
            yield ".".join([package, *parts[:-1], *([] if parts[-1] == "__init__" else parts[-1:])])


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports but those for type checkers."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


def in_package(name: str) -> bool:
    """Whether a dotted name is one of `helpers`."""
    return name.split(".")[0] == PACKAGE


def is_module(name: str) -> bool:
    """Whether a dotted name is that of a module or package of `helpers`."""
    return in_package(name) and file_of(name).is_file()


def file_of(module: str) -> Path:
    """The file of a module, there or not."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _module_tree(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


@functools.cache
def _module_digest(module: str) -> str:
    return digest([text_of(_module_tree(module))])


def text_of(node: ast.AST) -> str:
    """A syntax tree as text: two sources that differ only in layout or prose give the same."""
    return ast.dump(_WithoutProse().visit(ast.parse(ast.unparse(node))))


class _WithoutProse(ast.NodeTransformer):
    """Takes the docstrings out."""

    def _stripped(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _stripped


def digest(texts: Iterable[str]) -> str:
    """One digest of several texts, in whatever order they come."""
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()
