"""An extraction from a model that several ranks run together: all of them compute, and rank 0 has the folder.

    write_together(extraction, folder, ranks)         # on every rank

Rank 0 knows what is missing in the folder, and says before each forward pass which one it is. What goes wrong in a forward pass
does on all ranks; what goes wrong where only rank 0 is at work, as on a full disk, it says in the place of the next one.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import torch

from ..activations import Form
from ..dataset import Batch
from ..errors import ExtractError
from ..extraction import Extraction
from .ranks import Ranks

NEXT: Final = "the next forward pass of an extraction"
DONE: Final = -1
REFUSED: Final = -2


def write_together(extraction: Extraction, folder: Path, ranks: Ranks) -> None:
    """Make what is missing in the folder."""
    points = extraction.survey()
    if ranks.here == 0:
        _lead(extraction, folder, ranks)
        return
    beginning_with = {batch[0]: batch for batch in extraction.batches}
    while (row := ranks.agree(NEXT)[0]) >= 0:
        extraction.values(beginning_with[row], points)
    if row == REFUSED:
        raise ExtractError("Rank 0 cannot extract to its folder.", "It says why.")


def _lead(extraction: Extraction, folder: Path, ranks: Ranks) -> None:
    """On rank 0: write the folder, and tell the others what is computed for it."""
    try:
        extraction.write(folder, partial(_make, extraction, ranks))
    except _Failed as failed:  # what the others do too
        raise failed.why from None
    except BaseException:
        ranks.agree(NEXT, REFUSED)
        raise
    ranks.agree(NEXT, DONE)


class _Failed(Exception):
    """What all ranks do together has failed."""

    def __init__(self, why: BaseException) -> None:
        self.why = why


def _make(
    extraction: Extraction,
    ranks: Ranks,
    folder: Path,
    numbers: list[int],
    points: Mapping[str, Form],
    advance: Callable[[int], None],
) -> None:
    """Make the shards of these numbers, with the others."""

    def together(batch: Batch, points: Mapping[str, Form]) -> dict[str, torch.Tensor]:
        try:
            ranks.agree(NEXT, batch[0])
            return extraction.values(batch, points)
        except BaseException as error:
            raise _Failed(error) from None

    for number in numbers:
        extraction.make(folder, number, points, advance, together)
