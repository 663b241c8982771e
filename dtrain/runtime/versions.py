"""Versions of the packages that decide bits. It imports only the standard library: it also runs without dtrain."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("dtrain", "torch", "numpy", "zarr", "distributed")


def versions() -> dict[str, str]:
    """Return the versions of Python (``major.minor``) and of `PACKAGES`; an empty text for a missing package."""
    installed = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = ""
    return installed
