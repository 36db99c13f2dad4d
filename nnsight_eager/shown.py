"""What is shown as lines and tables: in a terminal as text, in a notebook as HTML, both made of the same parts.

    class Edits(Shown):
        def _parts(self):
            yield Line("one change", "title")
            yield Grid([Column("point"), Column("value", least=19)], [("model.h[5].output", "[1, 9, 768] float32")])

Whatever stands in a part may come from a model, a path or a prompt: it is escaped here, and nowhere else.
"""

import contextlib
import html
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from rich.text import Text

LOOKS: Final = {
    "": ("", ""),
    "title": ("bold", "font-weight:600"),
    "dim": ("dim", "opacity:.65"),
    "type": ("cyan", "color:#0e8ea8"),
    "ran": ("green", "color:#2e9d5c"),
    "running": ("yellow", "color:#b7791f"),
    "paused": ("bold reverse", "font-weight:600;background:rgba(255,176,0,.3)"),
    "warning": ("red", "color:#d9534f"),
}
"""How a thing looks, in rich's words and in those of CSS: colours that can be read on white and on black."""

NO_TERMINAL: Final = (160, 24)
"""The columns and lines that are filled where nobody says how many there are."""

APART: Final = "  "
"""What stands between two columns, and where a line that is too long is broken."""


def plain(text: str) -> str:
    """Text on one line, without what a terminal would obey: control characters are spelled out."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def styled(text: str, look: str, more: str = "", tag: str = "span") -> str:
    """A piece of HTML that says `text`, whatever is in it."""
    style = ";".join(filter(None, (LOOKS[look][1], more)))
    return f'<{tag} style="{style}">{html.escape(plain(text))}</{tag}>'


class Part(Protocol):
    """Something that is shown: as lines that are so many columns wide, and as HTML."""

    def lines(self, width: int) -> "Iterator[Text]": ...  # noqa: D102

    def html(self) -> str: ...  # noqa: D102


class Line(NamedTuple):
    """A line, broken where it is too long; where `cut`, as code is, the end is left away instead."""

    text: str = ""
    look: str = ""
    cut: bool = False

    def lines(self, width: int) -> "Iterator[Text]":
        """The line, and what of it does not fit below."""
        from rich.text import Text

        text = plain(self.text.expandtabs())
        indent = " " * (len(text) - len(text.lstrip()))
        for each in [text] if self.cut else [indent + line for line in wrapped(text.lstrip(), width - len(indent))]:
            line = Text(each, LOOKS[self.look][0])
            line.truncate(width, overflow="ellipsis")
            yield line

    def html(self) -> str:
        """The line as a block of its own."""
        space = "pre" if self.cut else "pre-wrap"
        return styled(self.text.expandtabs() or " ", self.look, f"white-space:{space}", "div")


class Column(NamedTuple):
    """A column of a table: with `least` it is cut, down to so many signs, where the table is too wide; or `broken` there."""

    head: str
    least: int = 0
    broken: bool = False
    right: bool = False
    look: str = ""


class Grid(NamedTuple):
    """A table; each row has as many words as there are columns, and a look where it has one more."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    headed: bool = True

    def lines(self, width: int) -> "Iterator[Text]":
        """The rows; where they do not fit, columns are cut, and where that is not enough the leftmost of those is left out."""
        shown = [*range(len(self.columns))]
        while (widths := self._widths(shown, width)) is None:
            shown.remove(next(number for number in shown if self.columns[number].least))
        head = [each.head for each in self.columns], ["─" * widths.get(n, 0) for n in range(len(self.columns))]
        for row in (*head, *self.rows) if self.headed else self.rows:
            for line in self._row(row, shown, widths, *row[len(self.columns) :]):
                line.truncate(width, overflow="ellipsis")
                yield line
        missing = [column.head for n, column in enumerate(self.columns) if n not in shown]
        if missing and self.headed:
            yield from Line(f"too narrow for: {', '.join(missing)}", "dim").lines(width)

    def _widths(self, shown: Sequence[int], width: int) -> dict[int, int] | None:
        """How wide each column is, or `None` where they do not fit."""
        from rich.cells import cell_len

        every = [[each.head for each in self.columns], *self.rows] if self.headed else self.rows
        widths = {number: max((cell_len(plain(row[number])) for row in every), default=0) for number in shown}
        least = {n: min(widths[n], self.columns[n].least) for n in shown if self.columns[n].least}
        while sum(widths.values()) + len(APART) * (len(shown) - 1) > width:
            widest = max((n for n in least if widths[n] > least[n]), key=lambda n: widths[n], default=None)
            if widest is None:
                return None if least else widths
            widths[widest] -= 1
        return widths

    def _row(self, row: Sequence[str], shown: Sequence[int], widths: dict[int, int], look: str = "") -> "Iterator[Text]":
        """A row, in several lines where a word of it is broken."""
        from rich.text import Text

        words = [wrapped(plain(row[n]), widths[n]) if self.columns[n].broken else [plain(row[n])] for n in shown]
        for line in zip_longest(*words, fillvalue=""):
            text = Text()
            for place, (number, word) in enumerate(zip(shown, line, strict=True)):
                column = self.columns[number]
                cell = Text(word, LOOKS[look or column.look][0])
                cell.truncate(widths[number], overflow="ellipsis")
                cell.align("right" if column.right else "left", widths[number])
                text.append(APART if place else "").append_text(cell)
            text.rstrip()
            yield text

    def html(self) -> str:
        """All rows and columns."""
        head = "".join(self._cell(each, each.head, "", "th") for each in self.columns)
        body = "".join(f"<tr>{self._cells(row)}</tr>" for row in self.rows)
        return (
            '<table style="border-collapse:collapse;margin:4px 0;font:inherit;color:inherit">'
            f"{f'<thead><tr>{head}</tr></thead>' if self.headed else ''}<tbody>{body}</tbody></table>"
        )

    def _cells(self, row: Sequence[str]) -> str:
        look = "".join(row[len(self.columns) :])
        return "".join(self._cell(column, word, look) for column, word in zip(self.columns, row, strict=False))

    def _cell(self, column: Column, word: str, look: str, tag: str = "td") -> str:
        line = "border-bottom:1px solid rgba(128,128,128,.5);font-weight:600;" if tag == "th" else ""
        space = f"pre-wrap;min-width:{column.least}ch" if column.broken or column.least else "pre"
        side = "right" if column.right else "left"
        return styled(
            word,
            look or column.look,
            f"{line}text-align:{side};white-space:{space};vertical-align:top;padding:1px 2ch 1px 0",
            tag,
        )


def wrapped(text: str, width: int) -> list[str]:
    """Text in lines, broken where two spaces are, and only where that is not enough between words."""
    lines: list[str] = []
    for words in text.split(APART):
        if lines and len(lines[-1]) + len(APART) + len(words) <= width:
            lines[-1] += APART + words
        else:
            lines += textwrap.wrap(words, max(width, 1), break_on_hyphens=False) or [""]
    return lines


class Shown:
    """Has a `repr` and an HTML form, made of the parts it gives; looking at it never raises and runs nothing."""

    def _parts(self) -> Iterable[Part]:
        """What is shown, from top to bottom."""
        raise NotImplementedError

    def __repr__(self) -> str:
        try:
            return self._as_text(shutil.get_terminal_size(NO_TERMINAL).columns)
        except Exception as error:  # a display in a cell must not fail the cell
            return self._cannot(error)

    def _as_text(self, width: int) -> str:
        """As text of so many columns."""
        return "\n".join(line.plain.rstrip() for part in self._parts() for line in part.lines(width))

    def __rich_console__(self, console: Any, options: Any) -> "Iterator[Text]":
        """In a terminal with colours: `rich.print(run.where())`."""
        try:
            yield from [line for part in self._parts() for line in part.lines(options.max_width)]
        except Exception as error:
            from rich.text import Text

            yield Text(self._cannot(error))

    def _repr_html_(self) -> str | None:
        """In a notebook; `None`, so that the text is shown, where it cannot be."""
        with contextlib.suppress(Exception):
            return self._as_html()
        return None

    def _as_html(self) -> str:
        font = "font-family:var(--jp-code-font-family,ui-monospace,Menlo,Consolas,monospace);font-size:13px;line-height:1.45"
        return f'<div style="{font};overflow-x:auto">{"".join(part.html() for part in self._parts())}</div>'

    def _cannot(self, error: Exception) -> str:
        # An error's own text may raise too.
        with contextlib.suppress(Exception):
            return plain(f"<{type(self).__name__}, which cannot be shown: {type(error).__name__}: {error}>")
        return f"<{type(self).__name__}, which cannot be shown: {type(error).__name__}>"
