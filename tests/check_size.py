"""The size rules that ruff has no rule for; run by `make check`. Prints file:line and the rule, exits 1.

- a function has at most 60 lines, its docstring not counted
- a function inside a function has at most 5
- a file in llm/ has at most 400, or says why in a comment `# size: <why>`

Branches and arguments are counted by ruff (C90, PLR0913).
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("llm", "examples", "tests", "benchmarks")
FUNCTION_LINES = 60
NESTED_FUNCTION_LINES = 5
FILE_LINES = 400

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(node: ast.AST, nested: bool = False) -> Iterator[tuple[Function, bool]]:
    """Every function below `node`, and whether it stands inside another function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child, nested
        yield from functions(child, nested or isinstance(child, Function))


def num_lines(function: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    assert docstring.end_lineno is not None
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def problems(path: Path) -> Iterator[str]:
    """One line of text for each broken rule of a file."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    lines = text.splitlines()
    explained = any(line.startswith("# size: ") for line in lines)
    if name.parts[0] == "llm" and len(lines) > FILE_LINES and not explained:
        yield f"{name}:1: {len(lines)} lines, at most {FILE_LINES}"
    for function, nested in functions(ast.parse(text, filename=str(name))):
        most = NESTED_FUNCTION_LINES if nested else FUNCTION_LINES
        if (lines_here := num_lines(function)) > most:
            kind = "nested function" if nested else "function"
            yield f"{name}:{function.lineno}: {kind} {function.name} has {lines_here} lines, at most {most}"


def main() -> int:
    """0 when every file keeps the rules, else 1."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    found = [problem for path in paths for problem in problems(path)]
    print("\n".join([*found, f"sizes: {len(paths)} files, {len(found)} problems"]))
    return 1 if found or not paths else 0


if __name__ == "__main__":
    sys.exit(main())
