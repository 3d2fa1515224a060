"""How one model is spread over ranks; what remains of the world is data parallel."""

from dataclasses import dataclass
from typing import Literal

from megavila.config.model import divisors
from megavila.config.section import Section, knob, require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """Parallel degrees, in Megatron's terms. Their product must divide the number of ranks."""

    tensor_parallel: int = knob(1, "Ranks that split each weight matrix and the attention heads.")
    context_parallel: int = knob(
        1, "Ranks that split the tokens of one sequence (Ulysses degree x ring degree)."
    )
    pipeline_parallel: int = knob(1, "Ranks that split the layers.")
    sequence_parallel: bool = knob(
        True, "With tensor parallel, split activations between the matrices by token."
    )
    cp_comm_type: Literal["auto", "p2p", "a2a", "a2a+p2p"] = knob(
        "auto",
        "Context parallel attention: ring (p2p), Ulysses (a2a), Ulysses inside a ring (a2a+p2p), or by length (auto): a "
        "ring for sequences long enough to hide what it sends behind what it computes, else what sends least.",
    )
    cp_ulysses: int | None = knob(
        None,
        "Ulysses degree of a2a+p2p and of auto's shorter sequences; null: all of it for a2a, none of it for p2p, and for "
        "auto the degree that sends least.",
    )
    cp_ring_tokens: int = knob(
        2600, "auto: a sequence of at least this many tokens on each rank goes by a ring."
    )
    cp_split: Literal["auto", "always"] = knob(
        "auto",
        "always: the tokens of each group are split over the context parallel ranks. auto: a rank takes whole groups, and "
        "nothing is sent, where that keeps all ranks busy or the sequence is short.",
    )

    def validate(self) -> None:
        self.require_at_least(1, "tensor_parallel", "context_parallel", "pipeline_parallel", "cp_ulysses")
        self.require_at_least(0, "cp_ring_tokens")
        implied = {"p2p": 1, "a2a": self.context_parallel}.get(self.cp_comm_type)
        if implied is not None:
            require(
                self.cp_ulysses in (None, implied),
                f"cp_ulysses {self.cp_ulysses} contradicts cp_comm_type {self.cp_comm_type} with context_parallel "
                f"{self.context_parallel}, where it is {implied}; leave it out or use cp_comm_type a2a+p2p",
            )
            return
        allowed = divisors(self.context_parallel)
        require(
            self.cp_ulysses is not None or self.cp_comm_type == "auto",
            f"cp_comm_type a2a+p2p needs cp_ulysses; use one of {allowed}",
        )
        require(
            self.cp_ulysses in (None, *allowed),
            f"cp_ulysses {self.cp_ulysses} does not divide context_parallel {self.context_parallel}; "
            f"use one of {allowed}",
        )

    @property
    def ulysses(self) -> int:
        """Ulysses degree: ranks that exchange heads for tokens with all-to-all."""
        if self.cp_comm_type == "a2a":
            return self.context_parallel
        return self.cp_ulysses or 1

    @property
    def ring(self) -> int:
        """Ring degree: ranks that pass keys and values around."""
        return self.context_parallel // self.ulysses
