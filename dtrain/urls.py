"""URLs as they may be shown and kept: without user, password, query and fragment, any of which may be a secret.

What a URL needs beyond its host and path cannot be told from a secret: services name their tokens and signatures as
they like. So all of it is replaced by ``***``, wherever a URL is printed, logged or written to a run. A secret that is
part of the path itself (``https://host/TOKEN/a.zarr``) is not known as one, and stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

REDACTED = "***"
"""Stands in place of a secret."""
MARK = "://"
URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]*")
"""A URL in a sentence ends where a space or a quotation mark stands."""
AS_A_PATH = re.compile(r"\b(https?|ftp|sftp|s3a?|gs|gcs|abfss?|az):/(?!/)([^\s\"'<>]*)")
"""A URL that was taken for the path of a file has lost a slash."""
NEXT_IN_CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*(?:://|::))")
"""Between the URLs that fsspec chains: ``zip://a.zarr::https://host/b.zip``."""
HOST = re.compile(r"(?:[^:\[\]]*|\[[^\[\]]*\])(?::\d*)?")
"""Host and port."""
CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")
"""Protocols of Azure: what stands before an ``@`` is the container, ``abfs://container@account/path``."""
PUNCTUATION = ".,:;)]}"
"""At the end of a URL it belongs to the sentence around it."""


def redacted(text: str) -> str:
    """Return a text whose URLs have ``***`` in place of user, password, query and fragment.

    >>> redacted("https://me:secret@host/a.zarr?sig=1: no Zarr group there")
    'https://***@host/a.zarr?***: no Zarr group there'
    """
    if ":/" not in text:
        return text
    text = URL_IN_TEXT.sub(lambda found: redacted_url(found[0], sentence=True), text)
    return AS_A_PATH.sub(
        lambda found: redacted_url(f"{found[1]}{MARK}{found[2]}", sentence=True).replace(MARK, ":/", 1), text
    )


def redacted_url(url: str, *, sentence: bool = False) -> str:
    """Return a URL, or a chain of them, with ``***`` in place of user, password, query and fragment.

    Parameters
    ----------
    url : str
        Another text is returned as it is.
    sentence : bool
        Whether it ends a sentence or a part of it, so that punctuation at its end is not its own.

    >>> redacted_url("zip://a.zarr::https://me@host/b.zip?sig=1"), redacted_url("data/a.zarr")
    ('zip://a.zarr::https://***@host/b.zip?***', 'data/a.zarr')
    """
    if MARK not in url:
        return url
    kept = url.rstrip(PUNCTUATION) if sentence else url
    texts = []
    for protocol, user, place, after in _parts(kept):
        end = f"{after[0]}{REDACTED}" if len(after) > 1 else after
        texts.append(f"{protocol}{f'{REDACTED}@' if user else ''}{place}{end}")
    return "::".join(texts) + url[len(kept) :]


def bare_url(url: str) -> str:
    """Return a URL, or a chain of them, without user, password, query and fragment; another text as it is.

    >>> bare_url("https://me:secret@host:9000/a?sig=1"), bare_url("eu-west-1")
    ('https://host:9000/a', 'eu-west-1')
    """
    return "::".join(f"{protocol}{place}" for protocol, _, place, _ in _parts(url)) if MARK in url else url


def _parts(url: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield, of each URL of a chain, the protocol with its mark, the user, host and path, and what follows them."""
    for one in NEXT_IN_CHAIN.split(url):
        protocol, mark, rest = one.partition(MARK)
        user, rest = split_user(protocol, rest) if mark else ("", rest)
        place = re.split(r"[?#]", rest, maxsplit=1)[0] if mark else rest
        yield protocol + mark, user, place, rest[len(place) :]


def split_user(protocol: str, rest: str) -> tuple[str, str]:
    """Return user and password of a URL, and what follows the ``@``; `rest` is what follows ``://``.

    A password may hold characters that should have been encoded: ``https://me:a/b?c@host/path``.
    """
    user = ""
    while "@" in rest:
        place = re.split(r"[/?#]", rest, maxsplit=1)[0]
        if "@" in place:
            found, _, left = place.rpartition("@")
            if protocol.lower().rpartition("+")[2] in CONTAINERS and ":" not in found:
                break
            rest = left + rest[len(place) :]
        elif HOST.fullmatch(place) and (place or not user):
            break
        else:
            found, _, rest = rest.partition("@")
        user += found
    return user, rest


def has_user(url: str) -> bool:
    """Return True if a URL, or one of a chain, has a user or password."""
    return MARK in url and any(user for _, user, _, _ in _parts(url))


def has_password(url: str) -> bool:
    """Return True if a URL, or one of a chain, has a password."""
    return MARK in url and any(":" in user for _, user, _, _ in _parts(url))


def has_secret(url: str) -> bool:
    """Return True if a URL has anything that a run does not keep."""
    return redacted_url(url) != url


def is_redacted(url: str) -> bool:
    """Return True for a URL of which a run has not kept everything.

    >>> is_redacted("https://***@host/a"), is_redacted("https://host/a?***"), is_redacted("s3://bucket/***.zarr")
    (True, True, False)
    """
    return MARK in url and (f"{REDACTED}@" in url or url.endswith((f"?{REDACTED}", f"#{REDACTED}")))


def redacted_in(value: Any) -> Any:
    """Return a value with `redacted` texts, at any depth of lists and tables.

    >>> redacted_in({"path": ["https://host/a?sig=1"], "rows": 3})
    {'path': ['https://host/a?***'], 'rows': 3}
    """
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {redacted_in(key): redacted_in(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(redacted_in(inner) for inner in value)
    return value
