"""What a stage's result can depend on beside settings and other stages: the code that makes it.

Of `helpers/` that is every module that can be reached by import. Of a notebook it is a slice: the function itself, and
the statements that made the names it reads, and so on back to the imports. What the notebook prints and draws beside
it does not count, and neither do comments, docstrings and layout.
"""

import ast
import dis
import functools
import linecache
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from helpers.core.errors import LabError
from helpers.core.modules import digest, in_package, is_module, text_of, version_of
from helpers.core.settings import Settings

# What a manifest tells anyway: a notebook's parameters, and what it makes of them alone.
TOLD = frozenset(Settings.model_fields) | {"run", "settings"}

PRESENTATION = {"helpers.plots", "helpers.run.start"}  # the figures; the checks before anything runs


@dataclass(frozen=True)
class Code:
    """The code that a stage is made by.

    Args:
        modules: of `helpers`, those that it names itself; what they import counts as well.
        cell: digest of the statements of a notebook or script; "" where the function is one of `helpers`.
    """

    modules: tuple[str, ...]
    cell: str = ""

    def reaching(self, modules: Iterable[str]) -> "Code":
        """The same code where it also reaches these modules of `helpers`."""
        return Code(tuple(sorted({*self.modules, *modules})), self.cell)

    def identity(self) -> dict[str, Any]:
        """What a manifest keeps of it, JSON-able."""
        return {"modules": list(self.modules), "helpers": version_of(self.modules), "cell": self.cell}


def code_of(make: Callable[..., Any]) -> Code:
    """The code that a function reaches, in a notebook, a script or `helpers`.

    Args:
        make: a function, a `partial` or an object that can be called.
    """
    modules, dumps = set(), set()
    for function in _functions(make):
        if _is_library(function):
            continue
        if in_package(function.__module__ or ""):
            modules.add(function.__module__)
            continue
        history, roots = _sources(function)
        named, kept = _slice(history, roots)
        modules |= named
        dumps |= kept
    return Code(tuple(sorted(modules)), digest(dumps) if dumps else "")


def code_in_notebook(notebook: Path, stage: str) -> Code:
    """The same for the stage that a notebook makes, read from the file: nothing is run.

    Args:
        stage: a name that stands as it is in a call of `run.stage`.

    Raises:
        LabError: no such call in the notebook.
    """
    import nbformat  # takes a second, which the kernels of all notebooks would wait for

    cells = [_python(cell.source) for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    for i, source in enumerate(cells):
        for node in ast.walk(_parsed(source)):
            if _makes(node, stage):
                modules, dumps = _slice(cells[: i + 1], [node.args[1]])
                return Code(tuple(sorted(modules)), digest(dumps))
    raise LabError(f'{notebook.name} has no call of run.stage("{stage}", …)')


def modules_named_in(cells: Iterable[str]) -> tuple[str, ...]:
    """The modules of `helpers` that cells import and that can change what they compute.

    Args:
        cells: their sources.
    """
    named = set()
    for statement in (one for source in cells for one in ast.walk(_parsed(_python(source)))):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            named |= {_imported(statement, _bound_by(alias))[0] for alias in statement.names}
    return tuple(sorted(name for name in named - PRESENTATION if in_package(name)))


def _makes(node: ast.AST, stage: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "stage"
        and len(node.args) > 1
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == stage
    )


def _functions(make: Any) -> list[FunctionType]:
    """The Python functions behind something that can be called: what it wraps, binds and closes over, each once."""
    found, wanted = [], [make]
    while wanted:
        part = wanted.pop()
        if isinstance(part, functools.partial):
            wanted += [part.func, *part.args, *part.keywords.values()]
        elif isinstance(part, FunctionType):
            if part not in found:  # a function may close over itself
                found.append(part)
                wanted += _closed_over(part)
        elif hasattr(part, "__func__"):
            wanted.append(part.__func__)
        elif callable(part) and isinstance(called := vars(type(part)).get("__call__"), FunctionType):
            wanted.append(called)
    return found


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not bound yet
            yield cell.cell_contents


def _is_library(function: FunctionType) -> bool:
    file = function.__code__.co_filename
    return any(file.startswith(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib"))


def _sources(function: FunctionType) -> tuple[list[str], list[ast.AST]]:
    """What was executed before a function is called, a text for each cell, and the nodes that the function is."""
    code = function.__code__
    source = "".join(linecache.getlines(code.co_filename))
    if not source:
        raise LabError(
            f"the source of {function.__qualname__} cannot be read, so its stage could not be told from an earlier "
            "one: define it in a notebook or a file"
        )
    cells = function.__globals__.get("In")
    history = [_python(text) for text in cells] if isinstance(cells, list) else [source]
    return history, _defined_at(_parsed(source), code)


def _defined_at(tree: ast.Module, code: CodeType) -> list[ast.AST]:
    """The outermost definition that holds a function, or the lambdas of its line where it stands in no definition."""
    for statement in tree.body:
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        if not first <= code.co_firstlineno <= statement.end_lineno:
            continue
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            return [statement]
        inside = [node for node in ast.walk(statement) if isinstance(node, ast.Lambda | ast.FunctionDef)]
        return [node for node in inside if node.lineno == code.co_firstlineno] or [statement]
    return list(tree.body)


def _slice(history: Sequence[str], roots: Iterable[ast.AST]) -> tuple[set[str], set[str]]:
    """The modules of `helpers` and the statements, as text, that these nodes depend on."""
    statements = [part for source in history for statement in _parsed(source).body for part in _parts(statement)]
    writers: dict[str, list[tuple[int, bool]]] = defaultdict(list)
    for i, statement in enumerate(statements):
        for name, binds in _written(statement):
            writers[name].append((i, binds))
    modules, dumps, seen = set(), {text_of(root) for root in roots}, set()
    wanted = [(name, len(statements)) for root in roots for name in _read(root)]
    while wanted:
        name, before = wanted.pop()
        if name in TOLD:
            continue
        for i in _reaching(writers[name], before):
            if (name, i) in seen:
                continue
            seen.add((name, i))
            statement = statements[i]
            if isinstance(statement, ast.Import | ast.ImportFrom):
                module, what = _imported(statement, name)
                if in_package(module):
                    modules.add(module)
                dumps.add(f"{name} is {what}")
                continue
            dumps.add(text_of(statement))
            # the body of a function is run later, with what the names mean by then
            at = len(statements) if isinstance(statement, ast.FunctionDef | ast.ClassDef) else i
            wanted += [(other, at) for other in _read(statement)]
    return modules, dumps


def _reaching(writers: Sequence[tuple[int, bool]], before: int) -> Iterator[int]:
    """The statements that decide what a name means before another one: the last that binds it, and later changes."""
    for i, binds in reversed([writer for writer in writers if writer[0] < before]):
        yield i
        if binds:
            return


def _parts(statement: ast.stmt) -> Iterator[ast.stmt]:
    """A statement, or the several that `a, b = x, y` stands for."""
    pair = isinstance(statement, ast.Assign) and len(statement.targets) == 1
    if pair and isinstance(statement.targets[0], ast.Tuple) and isinstance(statement.value, ast.Tuple):
        targets, values = statement.targets[0].elts, statement.value.elts
        if len(targets) == len(values) and not any(isinstance(one, ast.Starred) for one in targets + values):
            for target, value in zip(targets, values, strict=True):
                yield ast.copy_location(ast.Assign([target], value, lineno=statement.lineno), statement)
            return
    yield statement


def _written(statement: ast.stmt) -> Iterator[tuple[str, bool]]:
    """The names that a statement binds (True) or changes (False)."""
    match statement:
        case ast.Import() | ast.ImportFrom():
            for alias in statement.names:
                yield _bound_by(alias), True
        case ast.FunctionDef() | ast.ClassDef():
            yield statement.name, True
        case ast.Assign():
            for target in statement.targets:
                yield from _targets(target)
        case ast.AnnAssign():
            yield from _targets(statement.target)
        case ast.AugAssign():
            yield from ((name, False) for name, _ in _targets(statement.target))
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=owner, attr="shuffle"), args=[ast.Name(id=name)])):
            yield name, False  # rng.shuffle(rows) and random.Random(1).shuffle(rows) change the rows
            yield from ((one, False) for one, _ in _targets(owner))
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
            yield name, False  # such as rows.append(…)
        case ast.With():
            for item in statement.items:
                yield from _targets(item.optional_vars) if item.optional_vars else ()
            for inner in statement.body:
                yield from _written(inner)
        case ast.For():
            yield from ((name, False) for name, _ in _targets(statement.target))
    for block in ("body", "orelse", "finalbody", "handlers"):
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.With):
            for inner in getattr(statement, block, []):
                yield from ((name, False) for name, _ in _written(inner))


def _targets(target: ast.expr) -> Iterator[tuple[str, bool]]:
    match target:
        case ast.Name():
            yield target.id, True
        case ast.Tuple() | ast.List():
            for element in target.elts:
                yield from _targets(element)
        case ast.Starred():
            yield from _targets(target.value)
        case ast.Subscript() | ast.Attribute():
            yield from ((name, False) for name, _ in _targets(target.value))


def _read(node: ast.AST) -> set[str]:
    """The names that a statement or an expression takes from outside of itself."""
    if isinstance(node, ast.stmt):
        code = compile(ast.Module([node], []), "", "exec")
    else:
        code = compile(ast.Expression(node), "", "eval")
    return set(_global_names(code))


def _global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _bound_by(alias: ast.alias) -> str:
    """The name that an import binds."""
    return alias.asname or alias.name.split(".")[0]


def _imported(statement: ast.Import | ast.ImportFrom, name: str) -> tuple[str, str]:
    """The module that an import takes a name from, and the name's full one."""
    for alias in statement.names:
        if _bound_by(alias) == name:
            if isinstance(statement, ast.Import):
                return alias.name, alias.name
            whole = f"{statement.module}.{alias.name}"
            return whole if is_module(whole) else statement.module or "", whole
    raise AssertionError(name)


@functools.cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


@functools.cache
def _python(cell: str) -> str:
    """A cell without the magic commands of IPython; "" where it was no Python at all."""
    from IPython.core.inputtransformer2 import TransformerManager

    text = TransformerManager().transform_cell(cell)
    try:
        _parsed(text)
    except SyntaxError:
        return ""
    return text
