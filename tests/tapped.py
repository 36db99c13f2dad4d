"""A module to tap, and what is seen of it afterwards."""

import torch


class Scaled(torch.nn.Module):
    """One child, a signature to look at and a weight to tell copies apart."""

    def __init__(self):
        super().__init__()
        self.child = torch.nn.Linear(3, 3)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, *, shift: float = 0.0):
        """Scale what the child gives."""
        return self.child(x) * self.scale + shift


def entries(module):
    """Every module's own dictionary, with its order, and what hangs on it."""
    return [
        (name, list(each.__dict__), each.__dict__.get("forward"), [[*each._forward_hooks], [*each._forward_pre_hooks]])
        for name, each in module.named_modules()
    ]
