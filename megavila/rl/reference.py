"""The reference model of the KL penalty: weights that are put into the model for one pass."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from megavila.runtime.collectives import gather_objects
from megavila.runtime.topology import Topology


class ReferenceWeights:
    """A frozen copy of a model's trainable weights.

    Frozen weights are the same in both models, so they are not copied; and a second module is not needed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._copies = [parameter.detach().clone() for _, parameter in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the reference while this is entered; only for passes without gradient."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, (_, parameter) in enumerate(self._parameters):
            parameter.data, self._copies[index] = self._copies[index], parameter.data

    def fingerprint(self, topology: Topology) -> str:
        """Return a name of these weights, over all tensor-parallel ranks."""
        digest = hashlib.blake2b(digest_size=16)
        for (name, _), copy in zip(self._parameters, self._copies, strict=True):
            digest.update(name.encode())
            digest.update(copy.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return "-".join(gather_objects(digest.hexdigest(), topology.tensor_group))
