"""One store has one identity, however its path or URL is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.data.paths import identity


def test_spellings_of_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "a b" / "s.zarr"
    store.mkdir(parents=True)
    (tmp_path / "link").symlink_to(store)
    (tmp_path / "above").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = [
        str(store),
        "a b/s.zarr",
        "./a b/../a b/s.zarr/",
        "link",
        "above/link",
        "~/a b/s.zarr",
        f"file://{tmp_path}/a%20b/s.zarr",
        f"file://{tmp_path}/above/a%20b/s.zarr/",
    ]
    assert {identity(path, tmp_path) for path in spellings} == {str(store.resolve())}
    assert identity("s.zarr", tmp_path) != identity("s.zarr", tmp_path / "a b") == str(store.resolve())
    assert identity("nowhere/s.zarr/", tmp_path) == str(tmp_path.resolve() / "nowhere/s.zarr")  # it need not be there


@pytest.mark.parametrize(
    "spellings",
    [
        ("s3://bucket/A/s.zarr", "s3://bucket/A/s.zarr/", "S3://bucket/A/s.zarr", "s3a://bucket/A/s.zarr"),
        ("gs://bucket/s", "gcs://bucket/s"),
        ("http://Host.org/A/s", "HTTP://host.org:80/A/s/"),
        ("https://host.org/s", "https://host.org:443/s"),
        ("memory://s.zarr", "memory:///s.zarr/"),
    ],
)
def test_spellings_of_a_url(spellings: tuple[str, ...], tmp_path: Path) -> None:
    assert len({identity(url, tmp_path) for url in spellings}) == 1


def test_other_stores_have_other_identities(tmp_path: Path) -> None:
    urls = [
        *("s3://bucket/s", "s3://bucket/S", "s3://Bucket/s", "gs://bucket/s", "http://bucket/s", "https://bucket/s"),
        *("http://bucket:8080/s", "http://bucket/s?v=1", "memory://s", "s", "bucket/s", "/bucket/s"),
    ]
    assert len({identity(url, tmp_path) for url in urls}) == len(urls)
