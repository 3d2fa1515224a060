"""What a run must remember to go on as if it had never stopped."""

from dataclasses import asdict, dataclass, fields

from torch import Tensor, nn

from megavila.checkpoint.manager import Checkpoint, CheckpointManager
from megavila.data.dataset import PromptStream
from megavila.runtime.seeds import load_rng_state, rng_state
from megavila.training.errors import ResumeError
from megavila.training.optimizer import MasterAdamW


@dataclass
class TrainState:
    """Counters of a run; the same on every rank.

    ``reference`` names the weights that a KL penalty pulls towards, so that a resumed run cannot silently get
    others.
    """

    step: int = 0
    updates: int = 0
    rows: int = 0
    reference: str = ""


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's parameters by name, frozen ones included; they share memory with the model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_model_state(model: nn.Module, saved: dict[str, Tensor], source: str) -> None:
    """Copy ``saved`` into the model's parameters.

    Raises:
        ResumeError: the names or shapes are another model's.
    """
    own = model_state(model)
    missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or unknown:
        raise ResumeError(
            f"{source} holds another model: {len(missing)} weights are missing (first: {missing[:1]}) and "
            f"{len(unknown)} are unknown (first: {unknown[:1]}); use the model section the checkpoint was "
            "trained with"
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ResumeError(
                f"{source}: {name} has shape {tuple(saved[name].shape)}, this model needs "
                f"{tuple(tensor.shape)}; use the model section the checkpoint was trained with"
            )
        tensor.copy_(saved[name])


def save(
    manager: CheckpointManager,
    state: TrainState,
    model: nn.Module,
    optimizer: MasterAdamW,
    prompts: PromptStream,
) -> None:
    """Write a checkpoint of the whole run after ``state.step``."""
    manager.save(
        state.step,
        model=model_state(model),
        optimizer=optimizer.state_dict(),
        rng=rng_state(),
        data=prompts.state_dict(),
        extra=asdict(state),
    )


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: MasterAdamW, prompts: PromptStream
) -> TrainState:
    """Put model, optimizer, random generators and data position back; return the counters."""
    load_model_state(model, checkpoint.model, str(checkpoint.path))
    optimizer.load_state_dict(checkpoint.optimizer)
    if checkpoint.rng is not None:
        load_rng_state(checkpoint.rng)
    prompts.load_state_dict(checkpoint.data)
    known = {field.name for field in fields(TrainState)}
    return TrainState(**{name: value for name, value in checkpoint.extra.items() if name in known})
