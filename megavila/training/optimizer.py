"""AdamW with fp32 weights and moments for parameters of any type, on flat buffers."""

from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from megavila.runtime.errors import MegavilaError
from megavila.training.gradients import GradientBuffer, Slot


class OptimizerStateError(MegavilaError):
    """A saved optimizer state that does not belong to this model."""


class MasterAdamW:
    """AdamW (Loshchilov & Hutter, decoupled weight decay) that steps fp32 master weights.

    fp32 parameters become views of the master buffer, so they exist once; parameters of a smaller type are copied from it after
    each step. Weight decay spares vectors (norms and biases). The arithmetic is `torch.optim.AdamW` on a few flat
    tensors, which keeps small models from being bound by kernel launches.
    """

    def __init__(
        self,
        gradients: GradientBuffer,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        self.gradients = gradients
        self.master = torch.zeros_like(gradients.flat)
        self._segments: list[nn.Parameter] = []
        groups = []
        for decayed, members in groupby(gradients.slots, key=lambda slot: slot.decayed):
            run = list(members)
            segment = nn.Parameter(self.master[run[0].start : run[-1].stop], requires_grad=True)
            segment.grad = gradients.flat[run[0].start : run[-1].stop]
            self._segments.append(segment)
            groups.append({"params": [segment], "weight_decay": weight_decay if decayed else 0.0})
        self._starts = [segment.storage_offset() for segment in self._segments]
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self.refresh_masters()
        for slot in gradients.slots:
            if slot.parameter.dtype == torch.float32:
                slot.parameter.data = slot.view(self.master)

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Copy the parameters into the masters: at the start, and after weights were loaded from elsewhere."""
        for slot in self.gradients.slots:
            slot.view(self.master).copy_(slot.parameter)

    @torch.no_grad()
    def _publish(self) -> None:
        for slot in self.gradients.slots:
            if slot.parameter.dtype != torch.float32:
                slot.parameter.copy_(slot.view(self.master))

    def step(self, learning_rate: float) -> None:
        """Take one step along the (reduced, clipped) gradients; does not zero them."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._publish()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return ``{parameter name: {"master", "exp_avg", "exp_avg_sq"}}`` in fp32, and ``{"": {"step"}}``.

        Tensors have the shape of this rank's part of the parameter and share memory with the optimizer: save or copy
        them before the next step.
        """
        states = [self._adam.state.get(segment, {}) for segment in self._segments]
        step = states[0].get("step", torch.zeros(()))
        result: dict[str, dict[str, Tensor]] = {"": {"step": step.clone().cpu()}}
        for slot in self.gradients.slots:
            entry = {"master": slot.view(self.master)}
            for moment in ("exp_avg", "exp_avg_sq"):
                entry[moment] = self._moment(slot, moment)
            result[slot.name] = entry
        return result

    def _moment(self, slot: Slot, name: str) -> Tensor:
        index = max(i for i, start in enumerate(self._starts) if start <= slot.start)
        segment = self._segments[index]
        state = self._adam.state[segment]
        if name not in state:  # nothing has been stepped yet
            state["step"] = torch.zeros((), dtype=torch.float32, device=segment.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(segment), torch.zeros_like(segment)
        offset = slot.start - self._starts[index]
        return state[name].detach()[offset : offset + slot.parameter.numel()].view_as(slot.parameter)

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `state_dict` gave, bit for bit, and the parameters with it.

        Raises:
            OptimizerStateError: names or shapes differ from this model's trainable parameters.
        """
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        if missing or unknown:
            raise OptimizerStateError(
                f"the saved optimizer state is of other parameters: {len(missing)} missing (first: {missing[:1]}), "
                f"{len(unknown)} unknown (first: {unknown[:1]}); were other parts of the model frozen?"
            )
        step = saved[""]["step"]
        for name, entry in own.items():
            for key, tensor in entry.items():
                if name and tensor.shape != saved[name][key].shape:
                    raise OptimizerStateError(
                        f"{key} of {name} was saved as {tuple(saved[name][key].shape)}, this run needs {tuple(tensor.shape)}"
                    )
                if name:
                    tensor.copy_(saved[name][key])
        for segment in self._segments:
            self._adam.state[segment]["step"].copy_(step)
        for slot in self.gradients.slots:
            if slot.parameter.dtype != torch.float32:
                slot.parameter.copy_(slot.view(self.master))
