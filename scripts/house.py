"""How large the house is: files, lines of code, how deep files import each other, and what is too long.

    python scripts/house.py [src/sku]

A line of code is one that holds a token other than a comment and is no part of a docstring. The import depth is the
number of files in the longest chain in which each imports the next, imports inside functions included; a circle counts
as one. Complexity is McCabe's, by ruff (C901).
"""

from __future__ import annotations

import ast
import io
import json
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import networkx  # torch brings it.

_BLANK = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
)  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LONGEST_FILE, LONGEST_FUNCTION, MOST_COMPLEX = 350, 60, 10


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines that hold code."""
    texts: set[int] = set()
    for node in ast.walk(tree):
        for statement in node.body if isinstance(node, _DOCUMENTED) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                texts.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _BLANK:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - texts


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of what a file imports, and of what may be modules among it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def complex_functions(root: Path) -> int:
    """How many functions ruff finds too complex."""
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "C901", "--output-format", "json"]
    found = subprocess.run(
        [*ruff, "--config", f"lint.mccabe.max-complexity={MOST_COMPLEX}", str(root)], capture_output=True, check=False
    )
    if not found.stdout:
        raise SystemExit(f"ruff gave no answer ({found.stderr.decode().strip()}): run this by .venv/bin/python")
    return len(json.loads(found.stdout))


def main() -> None:
    """Prints the measures of a package."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "src/sku")
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = {path: code_lines(texts[path], trees[path]) for path in texts}
    names = {
        path: ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__") for path in texts
    }
    modules = set(names.values())
    arrows = networkx.DiGraph({names[path]: ({*imported(trees[path])} & modules) - {names[path]} for path in texts})
    circles = list(networkx.strongly_connected_components(arrows))
    functions = [
        (path, node) for path in texts for node in ast.walk(trees[path])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]  # fmt: skip
    long = [
        node for path, node in functions
        if len(lines[path] & set(range(node.lineno, (node.end_lineno or 0) + 1))) > LONGEST_FUNCTION
    ]  # fmt: skip
    sizes = [len(found) for found in lines.values()]
    measures = {
        "files": len(sizes),
        "lines of code": sum(sizes),
        "lines of a file, median": round(statistics.median(sizes)),
        f"files above {LONGEST_FILE} lines": sum(size > LONGEST_FILE for size in sizes),
        f"functions above {LONGEST_FUNCTION} lines": len(long),
        f"functions above complexity {MOST_COMPLEX}": complex_functions(root),
        "import depth": networkx.dag_longest_path_length(networkx.condensation(arrows, circles)) + 1,
        "circles of imports": sum(len(group) > 1 for group in circles),
    }
    for what, value in measures.items():
        print(f"{what:<32}{value:>8,}")
    print()
    parts: dict[str, list[int]] = {}
    for path, size in zip(texts, sizes, strict=True):
        parts.setdefault(path.relative_to(root).parts[0], []).append(size)
    for part, own in sorted(parts.items(), key=lambda item: -sum(item[1])):
        print(f"{part:<32}{sum(own):>8,}  in {len(own)}")


if __name__ == "__main__":
    main()
