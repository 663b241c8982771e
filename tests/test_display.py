"""Tables for notebooks."""

from __future__ import annotations

from html.parser import HTMLParser

from dtrain.display import html_table


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
    given = "<script>&\"'"
    text = html_table(given, [(given, given)], [given, given])
    assert [data for _, data in cells(text)] == [given] * 5
    assert "<script>" not in text


def test_without_rows_there_is_the_caption_alone() -> None:
    assert cells(html_table("nothing yet", [])) == [("caption", "nothing yet")]
