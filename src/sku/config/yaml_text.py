"""YAML as people write it into recipes and behind ``--set``: read strictly, its faults as one type of error."""

from __future__ import annotations

from typing import Any

import yaml

MOST_VALUES = 20_000
"""Values of one text, each alias counted as what it stands for; the longest recipe of the package has under 200."""
_DEEPEST = 50
_MERGE = "tag:yaml.org,2002:merge"
_LOADER_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)
"""What PyYAML lets through beside its own errors: for ``2020-13-45``, ``!!int x``, brackets a thousand deep."""


class _Loader(yaml.SafeLoader):
    """Plain data only, and no key twice: PyYAML would take the last one without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    "while reading keys and values", node.start_mark, f"the key {key.value} stands twice",
                    key.start_mark,
                )  # fmt: skip
            seen.add((key.tag, key.value))
        return node


def read_yaml(text: str) -> Any:
    """Reads one YAML document.

    Args:
        text: Of a file, or a single value.

    Returns:
        Plain data, of a size that can be walked through and printed.

    Raises:
        yaml.YAMLError: It is no YAML, asks for a Python object, has a key twice, holds itself, or stands for more
            than ``MOST_VALUES`` values (a few lines of aliases of aliases can stand for billions).
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, 0, 0)  # Before it is built: a merge of a mapping into itself would never end.
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except _LOADER_ERRORS as error:
        what = "it is nested too deep" if isinstance(error, RecursionError) else f"a value can't be read ({error})"
        raise yaml.YAMLError(what) from None


def _count(node: yaml.Node, count: int, depth: int) -> int:
    """Counts the values that a node stands for, up to the limit."""
    if depth > _DEEPEST:
        raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep, or holds itself")
    count += 1
    if count > MOST_VALUES:
        raise yaml.YAMLError(f"it stands for more than {MOST_VALUES} values")
    if isinstance(node, yaml.MappingNode):
        for name, entry in node.value:
            count = _count(entry, _count(name, count, depth + 1), depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            count = _count(entry, count, depth + 1)
    return count
