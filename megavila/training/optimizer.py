"""AdamW with fp32 weights and moments for parameters of a smaller type, on flat buffers."""

from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from megavila.runtime.errors import MegavilaError
from megavila.training.gradients import GradientBuffer


class OptimizerStateError(MegavilaError):
    """A saved optimizer state that does not belong to this model."""


class MasterAdamW:
    """AdamW (Loshchilov & Hutter, decoupled weight decay) that steps master weights of the gradients' type.

    Parameters of that type become views of the master buffer, so they exist once; those of a smaller type are
    copied from it after each step. Weight decay spares vectors (norms and biases). The arithmetic is
    `torch.optim.AdamW` on a few flat tensors, which keeps small models from being bound by kernel launches.
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
        self.master, self.exp_avg, self.exp_avg_sq = (torch.zeros_like(gradients.flat) for _ in range(3))
        self._adam = torch.optim.AdamW([{"params": []}], lr=0.0, betas=betas, eps=eps, fused=True)
        for decayed, members in groupby(gradients.slots, key=lambda slot: slot.decayed):
            run = list(members)
            span = slice(run[0].start, run[-1].stop)
            segment = nn.Parameter(self.master[span])
            segment.grad = gradients.flat[span]
            self._adam.add_param_group(
                {"params": [segment], "weight_decay": weight_decay if decayed else 0.0}
            )
            # Given here, so that the moments too are one buffer each; Adam would make them at the first step.
            self._adam.state[segment] = {
                "step": torch.zeros((), dtype=torch.float32, device=segment.device),
                "exp_avg": self.exp_avg[span],
                "exp_avg_sq": self.exp_avg_sq[span],
            }
        self.refresh_masters()
        for slot in gradients.slots:
            if slot.parameter.dtype == self.master.dtype:
                slot.parameter.data = slot.view(self.master)

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Copy the parameters into the masters: at the start, and after other weights were loaded."""
        for slot in self.gradients.slots:
            slot.view(self.master).copy_(slot.parameter)

    @torch.no_grad()
    def _publish(self) -> None:
        for slot in self.gradients.slots:
            if slot.parameter.dtype != self.master.dtype:
                slot.parameter.copy_(slot.view(self.master))

    def step(self, learning_rate: float) -> None:
        """Take one step along the (reduced, clipped) gradients; does not zero them."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._publish()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return ``{parameter name: {"exp_avg", "exp_avg_sq"}}`` and ``{"": {"step"}}``.

        Parameters of a smaller type than the masters have a ``"master"`` besides; the others are their
        masters. Tensors have the shape of this rank's part of the parameter and share memory with the
        optimizer: save or copy them before the next step.
        """
        state: dict[str, dict[str, Tensor]] = {"": {"step": self._steps()[0].clone()}}
        for slot in self.gradients.slots:
            entry = {"exp_avg": slot.view(self.exp_avg), "exp_avg_sq": slot.view(self.exp_avg_sq)}
            if slot.parameter.dtype != self.master.dtype:
                entry["master"] = slot.view(self.master)
            state[slot.name] = entry
        return state

    def _steps(self) -> list[Tensor]:
        return [state["step"] for state in self._adam.state.values()]

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `state_dict` gave, bit for bit; the model's own weights are loaded separately.

        Raises:
            OptimizerStateError: names or shapes differ from this model's trainable parameters.
        """
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        if missing or unknown:
            raise OptimizerStateError(
                f"the saved optimizer state is of other parameters: {len(missing)} missing (first: "
                f"{missing[:1]}), {len(unknown)} unknown (first: {unknown[:1]}); were other parts frozen?"
            )
        for name, entry in own.items():
            for key, tensor in entry.items():
                if key not in saved[name]:
                    raise OptimizerStateError(
                        f"the saved state has no {key} of {name}: it was trained as another model.dtype"
                    )
                if tensor.shape != saved[name][key].shape:
                    raise OptimizerStateError(
                        f"{key} of {name} was saved as {tuple(saved[name][key].shape)}, this run needs "
                        f"{tuple(tensor.shape)}"
                    )
                tensor.copy_(saved[name][key])
        for step in self._steps():
            step.copy_(saved[""]["step"])
        self._publish()
