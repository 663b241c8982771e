"""URLs as they may be shown: without user, password, query and fragment."""

from __future__ import annotations

import pytest

from dtrain.errors import InvalidConfig, one_line
from dtrain.urls import bare_url, has_password, has_secret, has_user, is_redacted, redacted, redacted_in, redacted_url

SHOWN = {
    "https://me:hush@host/a.zarr": "https://***@host/a.zarr",
    "https://hush@host:8000/a.zarr?sig=hush#hush": "https://***@host:8000/a.zarr?***",
    "https://host/a.zarr#hush": "https://host/a.zarr#***",
    "https://host?hush": "https://host?***",
    "https://me:hu/sh@host/a@b.zarr": "https://***@host/a@b.zarr",
    "https://me:hu?sh@host/a.zarr": "https://***@host/a.zarr",
    "https://me:hu#sh@host/a.zarr": "https://***@host/a.zarr",
    "https://me:hu@sh@host/a.zarr": "https://***@host/a.zarr",
    "https://me:hu::sh@host/a": "https://***@host/a",
    "https://me:hush@[::1]:80/a": "https://***@[::1]:80/a",
    "s3://hush:hush@bucket/a": "s3://***@bucket/a",
    "abfs://me:hush@account/a": "abfs://***@account/a",
    "zip://a.zarr::https://me:hush@host/b.zip?hush": "zip://a.zarr::https://***@host/b.zip?***",
    "zip://::simplecache::https://hush@host/b.zip": "zip://::simplecache::https://***@host/b.zip",
    "icechunk+https://hush@host/a?hush": "icechunk+https://***@host/a?***",
    "HTTPS://hush@host/a": "HTTPS://***@host/a",
}
AS_THEY_ARE = [
    "data/a.zarr",
    "/data/me@host:1/a?b#c.zarr",
    "s3://bucket/a.zarr",
    "s3://bucket/me@host/a.zarr",
    "abfs://container@account.dfs.core.windows.net/a.zarr",
    "tcp://[fe80::1]:8786",
    "memory:///a@b",
    "https://host:8000/a@b.zarr",
    "https://host/a.zarr?",
    "https://***@host/a.zarr?***",
    "",
]


@pytest.mark.parametrize(("url", "shown"), SHOWN.items())
def test_a_url_is_shown_without_what_may_be_secret(url: str, shown: str) -> None:
    assert redacted_url(url) == redacted(url) == redacted_url(shown) == shown
    assert redacted(f'data.path = "{url}": no.') == f'data.path = "{shown}": no.'
    assert redacted(f"of {url}: no ({url}).") == f"of {shown}: no ({shown})."
    assert has_secret(url)
    assert is_redacted(shown)
    assert "***" not in bare_url(url)
    assert "hush" not in bare_url(url)


@pytest.mark.parametrize("url", AS_THEY_ARE)
def test_other_urls_and_paths_are_shown_as_they_are(url: str) -> None:
    assert redacted_url(url) == redacted(url) == url
    assert not has_secret(url)


def test_a_url_that_was_taken_for_a_path_is_shown_without_it_too() -> None:
    assert redacted("/home/https:/me:hush@host/a?b=hush: no.") == "/home/https:/***@host/a?***: no."
    assert redacted("C:/me@host/a?b: no, a:/b@c") == "C:/me@host/a?b: no, a:/b@c"


def test_users_and_passwords_are_found_in_each_url_of_a_chain() -> None:
    assert has_user("zip://::https://me@host/a.zip")
    assert not has_password("zip://::https://me@host/a.zip")
    assert has_password("zip://::https://me:hush@host/a.zip")
    assert not has_user("https://host/me:hush@b")
    assert has_secret("https://host/a?b")
    assert not is_redacted("https://host/a?b")


def test_errors_quote_others_without_them() -> None:
    other = OSError("Cannot connect to 'https://me:hush@host/a?sig=hush' \n [URL(\"http://host/?hush\")]")
    assert one_line(other) == "Cannot connect to 'https://***@host/a?***' [URL(\"http://host/?***\")]"
    error = InvalidConfig(f"x: {other}", "https://hush@host")
    assert "hush" not in f"{error} {error!r} {error.args} {error.hint}"
    nested = {"a": [("https://h?hush",)], "https://h?hush": 1}
    assert "hush" not in str(redacted_in(nested))
