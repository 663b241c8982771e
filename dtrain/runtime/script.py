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
            text = Path(file).read_text(encoding="utf-8", errors="replace")
            return None if is_guarded(text, frame.f_lineno) else frame.f_lineno
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
    above = [statement for statement in ast.walk(tree) if _holds(statement, line)]
    tests = [test for statement in above for test in _tests(statement)]
    before = [
        statement for statement in tree.body if isinstance(statement, ast.If) and (statement.end_lineno or 0) < line
    ]
    tests += [statement.test for statement in before if any(map(_ends_program, ast.walk(statement)))]
    return any(isinstance(name, ast.Name) and name.id == MAIN for test in tests for name in ast.walk(test))


def _holds(statement: ast.AST, line: int) -> bool:
    start, end = getattr(statement, "lineno", None), getattr(statement, "end_lineno", None)
    return start is not None and end is not None and start <= line <= end


def _tests(statement: ast.AST) -> Iterator[ast.expr]:
    if isinstance(statement, ast.If | ast.IfExp | ast.While):
        yield statement.test
    elif isinstance(statement, ast.BoolOp):
        yield from statement.values
    elif isinstance(statement, ast.Match):
        yield statement.subject


def _ends_program(statement: ast.AST) -> bool:
    if isinstance(statement, ast.Raise):
        return True
    called = statement.func if isinstance(statement, ast.Call) else None
    return getattr(called, "attr", getattr(called, "id", "")) in ENDS


def _is_file(name: str, file: str) -> bool:
    try:
        return Path(name).resolve() == Path(file).resolve()
    except OSError:
        return False
