"""Which optional packages are installed. They are looked for, not imported."""

from __future__ import annotations

import importlib.util


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder of that name in the working directory is none.

    >>> is_installed("json"), is_installed("no_such_package")
    (True, False)
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None
