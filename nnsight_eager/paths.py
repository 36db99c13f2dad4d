"""Where a module stands in the tree, and how a user writes it.

path_in(root, root.transformer.h[2])             # "transformer.h.2"
spelled("transformer.h.2", "output")             # "model.transformer.h[2].output"
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import torch

from .inside import Part

PATTERN: Final = "pattern"
"""The last name in the path of an attention's pattern; a child of that name is `pattern_`."""


def path_in(root: torch.nn.Module, module: torch.nn.Module) -> str:
    """The module's own name in the tree; a part's is below its owner's."""
    if isinstance(module, Part):
        return module.path
    return next((name for name, each in root.named_modules(remove_duplicate=False) if each is module), type(module).__name__)


def spelled(path: str, kind: str = "", *, further: bool = False) -> str:
    """A path as one would write it: `model.transformer.h[2].output`, of folded ones `h[0…11]`; `further` is its next visit."""
    owner, _, last = path.rpartition(".")
    if last == PATTERN:  # a part that is a point itself: its output is what it is
        path, kind = owner, PATTERN
    parts = [f"[{part}]" if part.replace("…", "").isdigit() else f".{part}" for part in path.split(".") if part]
    return "model" + "".join(parts) + ".next()" * further + (f".{kind}" if kind else "")


def _no_others(path: str) -> Mapping[str, str]:
    """A model without other names."""
    return {}


def near(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that refuses `name`: what it may have been meant for."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=3)
    return f"; did you mean {' or '.join(f'`{each}`' for each in close)}?" if close else "."


def dotted(written: str) -> str:
    """A path, or a part of one, that is written as Python: `h[2].mlp` is `h.2.mlp`."""
    return written.replace("[", ".").replace("]", "")


def example(paths: Iterable[str]) -> str:
    """A path that says most of how these are written: of a module in a layer, of its MLP where it has one."""
    written = [path for path in paths if path]
    of_layers = [path for path in written if re.search(r"(^|\.)\d+\.\w+$", path)]
    return next((path for path in of_layers if path.endswith(".mlp")), next(iter(of_layers or written), ""))


def in_every_layer(path: str) -> str:
    """The path with `*` for the number of the layer: `transformer.h.*.mlp`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path, count=1)


def matching(
    root: torch.nn.Module, pattern: str, others: Callable[[str], Mapping[str, str]] = _no_others
) -> dict[str, torch.nn.Module]:
    """The modules at a path in which `*` stands for any one name: `transformer.h.*.mlp`.

    `others` gives the other names there are at a path, each with the path that it stands for.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    found = {"": None}
    for wanted in pattern.split(".") if pattern else ():
        found = {path: None for above in found for path in _below(modules[above], above, wanted, others(above))}
    return {path: modules[path] for path in found}


def _below(module: torch.nn.Module, above: str, wanted: str, others: Mapping[str, str]) -> Iterator[str]:
    """The paths one name below a module that are `wanted`."""
    for name, child in module._modules.items():
        if child is not None and fnmatch.fnmatchcase(name, wanted):
            yield f"{above}.{name}" if above else name
    yield from (path for name, path in others.items() if fnmatch.fnmatchcase(name, wanted))


def fits(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether these names of a path are the `wanted` ones, among which `*` stands for any one name."""
    return len(names) == len(wanted) and all(map(fnmatch.fnmatchcase, names, wanted))


def modules_above(root: torch.nn.Module) -> dict[int, list[torch.nn.Module]]:
    """The modules above each module of the tree, by its identity, under each of its names."""
    ways: dict[str, list[torch.nn.Module]] = {}
    above: dict[int, list[torch.nn.Module]] = {}
    for name, module in root.named_modules(remove_duplicate=False):  # each comes after those above it
        way = ways[name.rpartition(".")[0]] if name else []
        ways[name] = [*way, module]
        above.setdefault(id(module), []).extend(way)
    return above


def innermost_module(error: BaseException, known: set[int]) -> torch.nn.Module | None:
    """The module whose call raised, found in the traceback."""
    traceback, found = error.__traceback__, None
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_globals is torch.nn.modules.module.__dict__ and id(frame.f_locals.get("self")) in known:
            found = frame.f_locals["self"]
        traceback = traceback.tb_next
    return found
