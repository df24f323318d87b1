"""`make pack` and `make unpack`: a finished run as one file, so that a class can start at any notebook.

Whole models that no later lesson reads are left out: the notebook that makes them makes them anew in seconds. What is
inside cannot run code: weights as safetensors, JSON, and the chat template of a whole model, which transformers renders
in a sandbox. A file from elsewhere is untrusted input all the same, so nothing else and nothing outside of its own
folder is unpacked.
"""

import argparse
import re
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import nbformat

from helpers.core.disk import read_json, settle, whole_or_nothing, writing
from helpers.core.errors import LabError, exit_status
from helpers.core.locks import hold
from helpers.core.paths import MANIFEST, SUMMARY, runs_folder
from helpers.core.run_names import run_folder
from helpers.core.settings import Settings, require_name
from helpers.model.shards import INDEX, WEIGHTS
from helpers.run.execution import numbered

ENDINGS = (".safetensors", ".json", ".jinja")
KIND = ".tar.gz"
ASKED = re.compile(r'\.need\(f?"([^"]+)"\)')  # the name of a stage, or how a lesson puts it together


def pack(name: str) -> Path:
    """Write a finished run into one file beside it.

    Args:
        name: of the run, below `runs_folder()`.

    Returns:
        the file.

    Raises:
        LabError: there is no such run, it is not finished, or another process works in it.
    """
    folder = run_folder(name)
    if not (folder / SUMMARY).is_file():
        raise LabError(f"runs/{name} is no finished run: `make run` with these parameters makes it")
    target = folder.with_name(folder.name + KIND)
    partial = target.with_name(f".partial-{target.name}")
    try:
        with writing(folder), hold(folder), tarfile.open(partial, "w:gz") as archive:
            for path in packed_files(folder):
                archive.add(path, f"{name}/{path.relative_to(folder).as_posix()}", filter=_anonymous)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def packed_files(folder: Path) -> Iterator[Path]:
    """The files of a run that go into its pack.

    Args:
        folder: the run's.
    """
    yield folder / SUMMARY
    for stage in packed_stages(folder):
        inside = read_json(folder / stage / MANIFEST)["files"]
        yield from (folder / stage / file for file in (*inside, MANIFEST))


def packed_stages(folder: Path) -> list[str]:
    """The names of the stages that go into a run's pack: all but whole models that no later lesson reads.

    Args:
        folder: the run's.
    """
    manifests = {}
    for path in sorted(folder.rglob(MANIFEST)):
        manifest = read_json(path)
        if manifest["name"] == path.parent.relative_to(folder).as_posix():
            manifests[manifest["name"]] = manifest
    wanted = {name for name, manifest in manifests.items() if not _is_whole(manifest)}
    for name in _asked_by_lessons(manifests):
        wanted |= _line(name, manifests)
    return sorted(wanted)


def _asked_by_lessons(manifests: dict[str, dict]) -> set[str]:
    """The stages that a lesson asks for by name, and those with weights whose name it puts together."""
    cells = "\n".join(cell.source for path in numbered() for cell in nbformat.read(path, as_version=4).cells)
    names = set(ASKED.findall(cells))
    forms = "|".join(re.sub(r"\\{.*?\\}", ".+", re.escape(name)) for name in names if "{" in name)
    return {name for name, made in manifests.items() if name in names or (made["files"] and re.fullmatch(forms, name))}


def _is_whole(manifest: dict) -> bool:
    return any(PurePosixPath(file).name in (WEIGHTS, INDEX) for file in manifest["files"])


def _line(name: str, manifests: dict[str, dict]) -> set[str]:
    """A stage and all that it was made from, as far as it is there."""
    if name not in manifests:
        return set()
    return {name}.union(*(_line(parent, manifests) for parent in manifests[name]["parents"]))


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A member of an archive that tells nothing of who packed it, and when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def unpack(file: Path) -> Path:
    """Put a packed run into the runs folder, whole or not at all.

    Args:
        file: as `pack` writes it.

    Returns:
        the run's folder.

    Raises:
        LabError: it is no such file, holds what no run holds or a path outside of its folder, or that run is there
            already.
    """
    if not hasattr(tarfile, "data_filter"):
        raise LabError(f"this Python {sys.version.split()[0]} cannot unpack safely: take 3.11.4 or later")
    try:
        with tarfile.open(file, "r:gz") as archive:
            return _unpacked(archive, file)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise LabError(f"PACK = '{file}' cannot be unpacked ({error}): copy it anew, `make pack` writes it") from error


def _unpacked(archive: tarfile.TarFile, file: Path) -> Path:
    name = _name_in(archive.getmembers(), file)
    folder = run_folder(name)
    with writing(folder), whole_or_nothing(folder) as partial:
        for member in archive.getmembers():
            within = member.replace(name=str(PurePosixPath(member.name).relative_to(name)), deep=False)
            archive.extract(within, partial, filter="data")
        settle(partial)
    return folder


def _name_in(members: Iterable[tarfile.TarInfo], file: Path) -> str:
    """The name of the run in a pack, once every member is known to be a file that a run may hold."""
    paths = []
    for member in members:
        path = PurePosixPath(member.name)
        if not member.isfile() or path.suffix not in ENDINGS or path.is_absolute() or ".." in path.parts:
            raise LabError(f"PACK = '{file}' holds '{member.name}', which no packed run holds: nothing was unpacked")
        paths.append(path)
    tops = {path.parent for path in paths if path.name == SUMMARY}
    if len(tops) != 1 or not all(path.is_relative_to(top) for top in tops for path in paths):
        raise LabError(f"PACK = '{file}' holds not one finished run: `make pack` writes such a file")
    name = tops.pop().as_posix()
    require_name(name)
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(prog="python -m helpers.run.packing", description="Hand a finished run on.")
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="write a finished run into one file")
    Settings.add_options(packing)
    packing.set_defaults(command=_pack)
    unpacking = commands.add_parser("unpack", help="put such a file into the runs folder")
    unpacking.add_argument("file", type=Path, metavar="PACK", help="a file that `pack` has written")
    unpacking.set_defaults(command=_unpack)
    options = parser.parse_args(arguments)
    return exit_status(lambda: options.command(options))


def _pack(options: argparse.Namespace) -> None:
    file = pack(Settings.from_options(options).name)
    print(f"{file}: {file.stat().st_size / 1e6:.0f} MB; `make unpack PACK={file.name}` on each machine")


def _unpack(options: argparse.Namespace) -> None:
    folder = unpack(options.file.expanduser())
    print(f"{folder.relative_to(runs_folder())} is in {runs_folder()}: open any notebook with the same parameters")


if __name__ == "__main__":
    sys.exit(main())
