"""Whether a script can start processes: they import it, and must not run it again."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

MAIN = "__name__"
ENDS = ("exit", "quit", "_exit", "abort")
"""Names of functions that end a program."""


def unguarded_line(frame: FrameType | None) -> int | None:
    """Return the line of ``__main__`` that leads to a frame, if another process that imports the script runs it too.

    None: the line is below ``if __name__ == "__main__":``, or no script is imported (a notebook, a prompt, a thread).
    """
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if not file or not Path(file).is_file():
        return None
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>" and frame.f_globals.get(MAIN) == "__main__" and _is_file(code.co_filename, file):
            return (
                None
                if is_guarded(Path(file).read_text(encoding="utf-8", errors="replace"), frame.f_lineno)
                else (frame.f_lineno)
            )
        frame = frame.f_back
    return None


def is_guarded(source: str, line: int) -> bool:
    r"""Return True if a condition on ``__name__`` decides whether a line of a module is run.

    >>> is_guarded("if __name__ == '__main__':\n    run()\n", 2), is_guarded("import a\nrun()\n", 2)
    (True, False)
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, SystemError):
        return True  # the interpreter has read it, so it is not ours to judge
    above = [node for node in ast.walk(tree) if _holds(node, line)]
    tests = [test for node in above for test in _tests(node)]
    before = [node for node in tree.body if isinstance(node, ast.If) and (node.end_lineno or 0) < line]
    tests += [node.test for node in before if any(map(_ends_program, ast.walk(node)))]
    return any(isinstance(name, ast.Name) and name.id == MAIN for test in tests for name in ast.walk(test))


def _holds(node: ast.AST, line: int) -> bool:
    start, end = getattr(node, "lineno", None), getattr(node, "end_lineno", None)
    return start is not None and end is not None and start <= line <= end


def _tests(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield node.test
    elif isinstance(node, ast.BoolOp):
        yield from node.values
    elif isinstance(node, ast.Match):
        yield node.subject


def _ends_program(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise):
        return True
    called = node.func if isinstance(node, ast.Call) else None
    return getattr(called, "attr", getattr(called, "id", "")) in ENDS


def _is_file(name: str, file: str) -> bool:
    try:
        return Path(name).resolve() == Path(file).resolve()
    except OSError:
        return False
