"""Tables for notebooks."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.display import NARROWEST, columns_of, html_table, joined, number, shown, text_table, width_of, wrapped


class Cells(HTMLParser):
    """Collects the text of every cell and the caption, by tag."""

    def __init__(self) -> None:
        super().__init__()
        self.tag, self.cells = "", []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tag = tag

    def handle_data(self, data: str) -> None:
        self.cells.append((self.tag, data))


def cells(text: str) -> list[tuple[str, str]]:
    parser = Cells()
    parser.feed(text)
    return parser.cells


def test_a_table_has_a_caption_a_header_and_rows() -> None:
    text = html_table("losses", [("1", "0.5"), ("2", "0.25")], ["round", "loss"])
    assert cells(text) == [
        ("caption", "losses"),
        ("th", "round"),
        ("th", "loss"),
        ("th", "1"),
        ("td", "0.5"),
        ("th", "2"),
        ("td", "0.25"),
    ]
    assert text.count("<tr>") == text.count("</tr>") == 3


def test_text_is_never_taken_for_html() -> None:
    raw = "<script>&\"'"
    text = html_table(raw, [(raw, raw)], [raw, raw])
    assert [data for _, data in cells(text)] == [raw] * 5
    assert "<script>" not in text


def test_without_rows_there_is_the_caption_alone() -> None:
    assert cells(html_table("nothing yet", [])) == [("caption", "nothing yet")]


# Text -------------------------------------------------------------------------------------------------------------


@given(st.floats(-1e300, 1e300))
def test_a_number_never_looks_like_nothing(value: float) -> None:
    text = number(value)
    assert float(text) != 0 or value == 0
    assert len(text) <= 11
    assert abs(float(text) - value) <= max(5.001e-4 * abs(value), 0 if "e" in text else 5.001e-5)


WORDS = st.lists(st.text("abcé", min_size=1, max_size=30), max_size=20)


@given(WORDS, st.integers(20, 100))
def test_lines_end_between_words(words: list[str], width: int) -> None:
    for text in (wrapped(" ".join(words), width), joined(words, width), text_table([("a", " ".join(words))], width)):
        assert [word for word in text.split() if word != "a"] == [word for word in words if word != "a"]
        longest = max(map(len, words), default=0)
        assert all(len(line) <= max(width, NARROWEST + 3, longest + 3) for line in text.splitlines())


def test_a_long_text_of_a_table_goes_on_below_its_beginning() -> None:
    assert text_table([("label", "one two three four five"), ("x", "y")], 24) == (
        "label  one two three four\n       five\nx      y"
    )


def test_the_width_is_that_of_the_terminal_or_eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert (columns_of(io.StringIO()), width_of(io.StringIO())) == (None, 80)
    for columns, width in (("7", 20), ("66", 66), ("300", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        assert width_of(io.StringIO()) == width


def test_a_path_is_shown_without_detours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weather").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "weather/../era5.zarr") == "era5.zarr"
    assert shown("weather/runs") == "weather/runs"
    assert shown("s3://bucket/../x") == "s3://bucket/../x"
    monkeypatch.chdir(tmp_path / "weather")
    assert shown("../era5.zarr") == str(tmp_path.resolve() / "era5.zarr")
