"""Shows the help of a settings field in the reference.

Fields of ``SkuConfig`` and ``UnlearningConfig`` carry their text as transformers' own do, in
``field(metadata={"help": ...})``; mkdocstrings reads docstrings. This extension makes the one of the other.
"""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension, ObjectNode


class FieldHelp(Extension):
    """Gives fields without a docstring their ``help``."""

    def on_attribute_instance(self, *, node: ast.AST | ObjectNode, attr: Attribute, **_: Any) -> None:
        """Called by griffe for each attribute of a class."""
        if attr.docstring is None and isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            text = _help_of(node.value)
            if text is not None:
                attr.docstring = Docstring(text, lineno=node.lineno, parent=attr)


def _help_of(call: ast.Call) -> str | None:
    for keyword in call.keywords:
        if keyword.arg == "metadata":
            help_text = ast.literal_eval(keyword.value).get("help")
            return help_text if isinstance(help_text, str) else None
    return None
