"""What prints as a table or a tree: in a terminal as text, in a notebook as HTML, both of the same rows.

class Edits(Shown):
    def __rich__(self): return Table(...)
"""

import contextlib
import io
import shutil
from typing import Any


class Shown:
    """Has a `repr` and an HTML form, made by rich of what `__rich__` gives; looking at it never raises and runs nothing."""

    def __rich__(self) -> Any:
        """Something that rich can print."""
        raise NotImplementedError

    def __repr__(self) -> str:
        try:
            return self._as_text()
        except Exception as error:  # a display in a cell must not fail the cell
            return f"<{type(self).__name__}, which cannot be shown: {type(error).__name__}: {error}>"

    def _as_text(self, width: int | None = None) -> str:
        """As text, of `width` columns or the terminal's."""
        from rich.console import Console

        width = width or shutil.get_terminal_size((160, 24)).columns
        console = Console(file=io.StringIO(), width=width, force_jupyter=False, color_system=None)
        console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]

    def _repr_html_(self) -> str | None:
        with contextlib.suppress(Exception):
            return self._as_html()
        return None

    def _as_html(self, width: int = 130) -> str:
        """As HTML in one `<pre>`, with its colours in it."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=width, record=True, force_jupyter=False)
        console.print(self.__rich__())
        return console.export_html(
            inline_styles=True, code_format='<pre style="line-height:1.25;font-family:monospace">{code}</pre>'
        )
