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
    cp_comm_type: Literal["p2p", "a2a", "a2a+p2p"] = knob(
        "p2p", "Context parallel attention: ring (p2p), Ulysses (a2a), or Ulysses inside a ring (a2a+p2p)."
    )
    cp_ulysses: int | None = knob(
        None, "Ulysses degree of a2a+p2p; null: all of it for a2a, none of it for p2p."
    )

    def validate(self) -> None:
        self.require_at_least(1, "tensor_parallel", "context_parallel", "pipeline_parallel", "cp_ulysses")
        implied = {"p2p": 1, "a2a": self.context_parallel}.get(self.cp_comm_type)
        if implied is not None:
            require(
                self.cp_ulysses in (None, implied),
                f"cp_ulysses {self.cp_ulysses} contradicts cp_comm_type {self.cp_comm_type} with context_parallel "
                f"{self.context_parallel}, where it is {implied}; leave it out or use cp_comm_type a2a+p2p",
            )
            return
        allowed = divisors(self.context_parallel)
        require(self.cp_ulysses is not None, f"cp_comm_type a2a+p2p needs cp_ulysses; use one of {allowed}")
        require(
            self.cp_ulysses in allowed,
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
