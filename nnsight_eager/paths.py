"""Where a module stands in the tree, and how a user writes it.

path_in(root, root.transformer.h[2])             # "transformer.h.2"
spelled("transformer.h.2", "output")             # "model.transformer.h[2].output"
"""

import difflib
import fnmatch
from collections.abc import Iterable, Iterator

import torch

from .inside import Part


def path_in(root: torch.nn.Module, module: torch.nn.Module) -> str:
    """The module's own name in the tree; a part's is below its owner's."""
    if isinstance(module, Part):
        return module.path
    return next((name for name, each in root.named_modules(remove_duplicate=False) if each is module), type(module).__name__)


def spelled(path: str, kind: str = "") -> str:
    """A path as one would write it: `model.transformer.h[2].output`."""
    parts = [f"[{part}]" if part.isdigit() else f".{part}" for part in path.split(".") if part]
    return "model" + "".join(parts) + (f".{kind}" if kind else "")


def near(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that refuses `name`: what it may have been meant for."""
    close = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(f'`{each}`' for each in close)}?" if close else "."


def matching(root: torch.nn.Module, pattern: str) -> dict[str, torch.nn.Module]:
    """The modules at a path in which `*` stands for any one name: `transformer.h.*.mlp`."""
    wanted = pattern.split(".") if pattern else []
    return {
        path: module
        for path, module in root.named_modules(remove_duplicate=False)
        if len(names := path.split(".") if path else []) == len(wanted)
        and all(fnmatch.fnmatchcase(name, part) for name, part in zip(names, wanted, strict=True))
    }


def modules_above(root: torch.nn.Module, module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules above `module` in the tree, under each of its names."""
    for name, each in root.named_modules(remove_duplicate=False):
        if each is module and each is not root:
            above = root
            yield above
            for part in name.split(".")[:-1]:
                above = above._modules[part]  # type: ignore[assignment]
                yield above


def innermost_module(error: BaseException, known: set[int]) -> torch.nn.Module | None:
    """The module whose call raised, found in the traceback."""
    traceback, found = error.__traceback__, None
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_globals is torch.nn.modules.module.__dict__ and id(frame.f_locals.get("self")) in known:
            found = frame.f_locals["self"]
        traceback = traceback.tb_next
    return found
