"""Stands where torch would be, for Pythons that have none: everything can be imported and called, and nothing is computed.

It is found where this folder comes first on the path; `tests.versions` puts it there.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

__path__: list[str] = []  # so that it has submodules


class Nothing:
    """What a call gives: it is false, and has every attribute."""

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> "Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: object, **__: object) -> "Nothing":
        return self


# As on a new thread.
GIVEN = {
    "_is_torch_function_enabled": True,
    "_is_multithreading_enabled": True,
    "_is_fwd_grad_enabled": True,
    "is_grad_enabled": True,
    "_top_saved_tensors_default_hooks": None,
    "get_eval_frame_callback": None,
}


class Anything(type):
    """The type of every name: a class that has further names, can be derived from, and called."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return named(name)

    def __rmul__(cls, number: int) -> int:
        return number

    def __call__(cls, *args: object, **kwargs: object) -> object:
        if cls.__dict__.get("stands_in"):
            return GIVEN.get(cls.__name__, Nothing())
        return super().__call__(*args, **kwargs)


def named(name: str) -> object:
    """What stands for a name of torch."""
    return Anything(name, (), {"stands_in": True})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every submodule that is asked for."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """One of torch's."""
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("torch.") else None

    def exec_module(self, module: ModuleType) -> None:
        """Give it every name."""
        module.__dict__["__getattr__"] = __getattr__


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    return named(name)


sys.meta_path.append(Finder())
