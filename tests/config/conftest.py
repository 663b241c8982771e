from __future__ import annotations

import pytest
import tomli_w


@pytest.fixture
def write(tmp_path):
    """Write a config file and return its path."""

    def write(name, content):
        text = content if isinstance(content, str) else tomli_w.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write
