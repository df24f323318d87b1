"""The one reader of YAML files. Whatever is wrong in one is told with the file's name and the line's number."""

import functools
from pathlib import Path
from typing import Any

import yaml

from helpers.core.errors import LabError


def read_yaml(path: Path, expected: str = "settings as `key: value` lines") -> dict[str, Any]:
    """The mapping that a YAML file holds. The result is shared: read it, do not change it.

    Args:
        path: of the file.
        expected: what the file should hold, for the error where it holds no mapping.

    Raises:
        LabError: a file that cannot be read, is not UTF-8 or no YAML, that names a key twice, or holds anything but a
            mapping.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LabError(f"{path} cannot be read ({error.strerror})") from None
    return _parsed(path.name, content, expected)


@functools.lru_cache(maxsize=32)
def _parsed(name: str, content: bytes, expected: str) -> dict[str, Any]:
    """A sweep reads the same profile ten thousand times, and parsing is what takes long."""
    text = _decoded(name, content)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        values = loader.construct_document(root) if root else None
    except yaml.MarkedYAMLError as error:
        raise LabError(f"{name}, line {error.problem_mark.line + 1}: no YAML, {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise LabError(f"{name}, line {line}: no YAML, it holds the character {chr(error.character)!r}") from None
    except RecursionError:
        raise LabError(
            f"{name}: no YAML that can be read, its lists or mappings lie in each other too deeply"
        ) from None
    if not isinstance(values, dict):
        raise LabError(f"{name}{f', line {root.start_mark.line + 1},' if root else ''} should hold {expected}")
    return values


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LabError(f"{name}, line {line}: no UTF-8 text; save it as UTF-8") from None


class _Loader(yaml.SafeLoader):
    """YAML as `yaml.safe_load` reads it, but every fault has its place, and a key that is there twice is one."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A mapping before it is made: of two equal keys the last would win."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"the key '{key.value}' is there twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; what its type cannot hold, such as the date 2024-13-45, is a fault of the file."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None
