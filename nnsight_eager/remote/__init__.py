"""A model on a Ray cluster, and the user in their own frame: see `connect`. Nothing here imports Ray before it is used."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import RemoteModel


def connect(name: str, address: str | None = None) -> "RemoteModel":
    """The model that a cluster serves under this name: the same envoy tree, and no weights here.

        model = nnsight_eager.connect("llama", address="10.0.0.1:6379")
        with model.trace("The Eiffel Tower is in the city of"):
            hidden = model.model.layers[5].output

    `python -m nnsight_eager serve NAME_OR_FOLDER --name llama` puts it there and prints the address. Without an address it is
    the cluster that this process is in, or that Ray finds on this machine. Raises `RemoteError` where there is no such cluster
    or model, or Ray is not installed.
    """
    from .model import connect

    return connect(name, address)
