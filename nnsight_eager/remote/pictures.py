"""What is looked at of a run on the server, as it is shown: text and HTML, and no frames, which do not travel.

print(run.where())
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..interactive.display import Edits, Locals
from ..shown import Line, Part, Shown


class Picture(Shown):
    """Something as it is shown."""

    def __init__(self, text: str, html: str | None) -> None:
        self._text = text
        self._html = html

    def _parts(self) -> Iterator[Part]:
        return (Line(line, cut=True) for line in self._text.splitlines())

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str | None:
        return self._html


class FarLocals(Picture, Mapping[str, Any]):
    """The local names of the model's own frame; a value is brought when it is read."""

    names: list[str]
    bring: Callable[[str], Any]

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.bring(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def pictured(value: Any) -> Any:
    """A value that is shown, as it can travel."""
    if isinstance(value, Locals):
        picture = FarLocals(repr(value), value._repr_html_())
        picture.names = list(value)
        return picture
    if isinstance(value, Shown) and not isinstance(value, Edits):
        return Picture(repr(value), value._repr_html_())
    return value
