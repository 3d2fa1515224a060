"""What a step computed, in floating-point operations of the model, and how fast that was."""

from collections.abc import Sequence

from megavila.models import VisionLanguageModel
from megavila.models.flops import ModelFlops
from megavila.mrsp.layout import Layout
from megavila.runtime.platform import Platform
from megavila.runtime.topology import Topology
from megavila.training.tally import Tally

_TOTAL = "model_flops"


class ModelWork:
    """Adds the operations of passes to a step's tally; see `ModelFlops` for what is counted.

    A pass back through weights that train costs twice the pass forward, through frozen ones once. A recomputed layer
    counts once.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self.flops = ModelFlops(model.config)
        trains = any(parameter.requires_grad for parameter in model.language.parameters())
        self.backward = 2.0 if trains else 1.0

    def count_layout(self, layout: Layout, tally: Tally, *, grad: bool) -> None:
        """One pass over a layout, with its backward pass if ``grad``."""
        forward = self.flops.language(layout.num_tokens, layout.mask.pairs, layout.num_targets)
        tally.total(_TOTAL, forward * (1.0 + self.backward if grad else 1.0))

    def count_rollout(self, prompt_tokens: int, responses: Sequence[int], tally: Tally) -> None:
        """A prompt read once, and responses of so many tokens to it."""
        sampled = sum(responses)
        pairs = _triangle(prompt_tokens) + sum(
            prompt_tokens * tokens + _triangle(tokens) for tokens in responses
        )
        tally.total(_TOTAL, self.flops.language(prompt_tokens + sampled, pairs, sampled))

    def count_frames(self, frames: int, with_grad: int, tally: Tally) -> None:
        """Frames that went through tower and projector; ``with_grad`` of them come back in the backward pass."""
        tally.total(_TOTAL, self.flops.vision(1) * (frames + 2.0 * with_grad) if frames else 0.0)


def throughput(
    metrics: dict[str, float], seconds: float, topology: Topology, platform: Platform
) -> dict[str, float]:
    """``metrics`` with the operations turned into `tflops_per_gpu`, a rank's share of them per second of the step (also on
    a CPU), and on a GPU whose limit is known into `mfu`, the share of that limit."""
    metrics = dict(metrics)
    rate = metrics.pop(_TOTAL, 0.0) / seconds / topology.world_size / 1e12
    metrics["tflops_per_gpu"] = rate
    peak = platform.peak_tflops()
    if peak is not None:
        metrics["mfu"] = rate / peak
    return metrics


def _triangle(tokens: int) -> int:
    return tokens * (tokens + 1) // 2
