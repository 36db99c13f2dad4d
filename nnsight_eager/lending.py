"""What the bodies of a run were given of a visit, and what comes back of it before the model goes on.

    part = lending.lend(visit, body, visit.value, factors, lambda: "model.lm_head.output")    # its rows
    lending.settle(body)         # what the body has changed in it is the model's
    lending.give_back(visit)     # the model is about to go on: it computes on with what the bodies hold

A body's rows are views, so that a change in place is a change of the whole. Containers and what all invokes share are copies:
an item that is exchanged is put into the whole, a shared value that is changed is refused. And since a view hangs off the graph
to the side, the model goes on with the views put together where they have gradients: what a body has read is upstream.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .batching import Factors, Rows
from .bodies import Asker
from .errors import EditError
from .nested import as_where_made, mapped, tensors
from .snapshots import snapshot
from .visits import OUTPUT, Visit

State = list[tuple[int, int]]


class View(NamedTuple):
    """A body's rows of one tensor."""

    whole: torch.Tensor
    rows: slice
    part: torch.Tensor


class Copy(NamedTuple):
    """A body's copy of a tensor that all invokes share, or of rows that are one row in memory."""

    whole: torch.Tensor
    copy: torch.Tensor
    rows: slice | None
    point: str

    @property
    def changed(self) -> bool:
        """Whether the body has changed it in place."""
        if self.copy.is_inference():  # torch counts no versions there
            return not torch.equal(self.copy, self.whole if self.rows is None else self.whole[self.rows])
        return self.copy._version > 0


class Loan:
    """One value as one body was given it."""

    __slots__ = ("complete", "part", "state", "whole")

    def __init__(self, whole: Any, part: Any, complete: bool) -> None:
        self.whole = whole
        self.part = part
        self.complete = complete  # it is what the model goes on with, not something inside that
        self.state = state(part)


class Account:
    """What one body has been given, by the identity of the whole."""

    __slots__ = ("copies", "loans", "views")

    def __init__(self) -> None:
        self.loans: dict[int, Loan] = {}
        self.views: dict[int, View] = {}
        self.copies: dict[int, Copy] = {}

    def part(self, tensor: torch.Tensor, rows: slice | None, point: Callable[[], str]) -> torch.Tensor:
        """A view of the rows of `tensor`; a copy where it has none, or its rows share their memory (`expand`)."""
        key = id(tensor)
        with as_where_made(tensor):
            if rows is None or not tensor.stride(0):
                if key not in self.copies:
                    own = tensor if rows is None else tensor[rows]
                    self.copies[key] = Copy(tensor, snapshot(own), rows, point())
                return self.copies[key].copy
            if key not in self.views:
                self.views[key] = View(tensor, rows, tensor[rows])
            return self.views[key].part

    def without_copies(self, value: Any) -> Any:
        """`value` with the shared tensors themselves in the place of the copies of them."""
        shared = {id(each.copy): each.whole for each in self.copies.values() if each.rows is None}
        return mapped(value, lambda tensor: shared.get(id(tensor), tensor)) if shared else value


class Lending:
    """The loans at the visit the model is paused at."""

    __slots__ = ("_accounts", "_put_together")

    def __init__(self) -> None:
        self._accounts: dict[int, Account] = {}
        self._put_together: list[tuple[torch.Tensor, int]] = []

    def lend(self, visit: Visit, body: Asker, rows: Rows, whole: Any, factors: Factors, point: Callable[[], str]) -> Any:
        """The body's rows of `whole`; the same object again where it asks again."""
        account = self._accounts.setdefault(body.number, Account())
        loan = account.loans.get(id(whole))
        if loan is None:
            rows.require(whole, factors, point)
            part = mapped(whole, lambda tensor: account.part(tensor, rows.of(tensor, factors), point))
            loan = account.loans[id(whole)] = Loan(whole, part, is_held(visit, whole))
        return loan.part

    def settle(self, body: Asker, visit: Visit, written: Callable[[Any, Any], Any]) -> None:
        """Put into the whole what the body has exchanged in the containers it was given; `written` does so with its rows."""
        account = self._accounts.get(body.number)
        if account is None:
            return
        for copied in account.copies.values():
            if copied.changed:
                raise EditError(
                    f"`{copied.point}` was changed in place in {body.label}, and all invokes share it.",
                    "Change a copy (`.clone()`), or change it in an invoke that sees all rows: `with tracer.invoke():`.",
                )
        for loan in account.loans.values():
            if loan.complete and not isinstance(loan.part, torch.Tensor):
                now = state(loan.part)
                if now != loan.state:
                    loan.state = now
                    hold(visit, written(held(visit), account.without_copies(loan.part)))

    def replaces(self, body: Asker, value: Any) -> Any:
        """The body replaces the value it was given: that no longer matters; `value` as it is to be written."""
        account = self._accounts.get(body.number)
        if account is None:
            return value
        account.loans.clear()
        return account.without_copies(value)

    def put_together(self, visit: Visit) -> None:
        """Have the model go on with the bodies' views themselves, where their gradients would not be its gradients."""
        pieces: dict[int, list[View]] = {}
        for account in self._accounts.values():
            for key, view in [*account.views.items()]:
                if view.part.requires_grad:
                    pieces.setdefault(key, []).append(view)
                    self._put_together.append((view.part, view.part._version))
                    del account.views[key]
                    account.loans.pop(key, None)
        if pieces:
            together = {key: _together(sorted(views, key=lambda view: view.rows.start)) for key, views in pieces.items()}
            hold(visit, mapped(held(visit), lambda tensor: together.get(id(tensor), tensor)))

    def give_back(self, visit: Visit | None) -> None:
        """The model is about to go on: nothing is lent any more."""
        for part, version in self._put_together:
            if part._version != version:
                raise EditError(
                    "A value was changed in place after another invoke had replaced its rows at the same point.",
                    "Assign the changed value: `layer.output = ...`.",
                )
        if visit is not None:
            self.put_together(visit)
        self._accounts.clear()
        self._put_together.clear()


def held(visit: Visit) -> Any:
    """What the model goes on with at this visit."""
    return visit.value if visit.kind is OUTPUT else (visit.args, visit.kwargs)


def is_held(visit: Visit, value: Any) -> bool:
    """Whether `value` is what the model goes on with at this visit."""
    if visit.kind is OUTPUT:
        return value is visit.value
    return isinstance(value, tuple) and len(value) == 2 and value[0] is visit.args and value[1] is visit.kwargs


def hold(visit: Visit, value: Any) -> None:
    """Have the model go on with `value` at this visit."""
    if visit.kind is OUTPUT:
        visit.value = value
    else:
        visit.args, visit.kwargs = value


def state(value: Any) -> State:
    """Which tensors a value holds, and in which version, to tell whether it was changed."""
    return [(id(each), 0 if each.is_inference() else each._version) for each in tensors(value)]


def _together(views: list[View]) -> torch.Tensor:
    """The whole tensor, built of the views and what lies between them."""
    whole, pieces, done = views[0].whole, [], 0
    with as_where_made(whole, *(view.part for view in views)):
        for view in views:
            pieces += [whole[done : view.rows.start], view.part]
            done = view.rows.stop
        return torch.cat((*pieces, whole[done:]))
