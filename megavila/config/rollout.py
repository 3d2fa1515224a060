"""How responses are sampled, and how they are scored."""

from dataclasses import dataclass
from typing import Literal

from megavila.config.section import Section, knob, require


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Section):
    """The engine that generates."""

    engine: Literal["megatron", "vllm"] = knob("megatron", "Who generates: our own decoder, or vLLM.")
    placement: Literal["colocated", "server"] = knob(
        "colocated",
        "Where vLLM runs: in our processes, or each rank's in a process of its own (CPU, tensor_parallel 1), which may "
        "die or hang and is started again.",
    )
    max_batch_tokens: int = knob(
        262_144,
        "Most tokens whose keys and values our own decoder holds at once; prompts beyond that wait for the next batch.",
    )
    kv_cache_gib: float = knob(4.0, "Memory for vLLM's keys and values on each rank, in GiB.")
    timeout_seconds: float | None = knob(
        600.0, "vLLM has failed when it computes nothing for so many seconds; null: it may take its time."
    )
    retries: int = knob(
        2,
        "How often prompts are sampled again that vLLM left without responses when it failed; what it had finished is kept.",
    )

    def validate(self) -> None:
        self.require_at_least(1, "max_batch_tokens")
        self.require_at_least(0, "retries")
        self.require_positive("kv_cache_gib", "timeout_seconds")
        require(
            self.engine == "vllm" or self.placement == "colocated",
            f"placement is {self.placement} and engine is {self.engine}, which generates where the model is; "
            "use placement colocated, or engine vllm",
        )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(EngineConfig):
    """Engine and sampling parameters of the rollouts."""

    group_size: int = knob(8, "Responses for each prompt (G in the paper).")
    temperature: float = knob(1.0, "Softmax temperature; 0: greedy.")
    top_p: float = knob(1.0, "Sample from the smallest set of tokens with this much probability.")
    top_k: int = knob(0, "Sample from the k most likely tokens; 0: from all.")
    max_response_tokens: int = knob(1024, "Longest response, in tokens.")
    stop: tuple[str, ...] = knob((), "Strings that end a response besides the end-of-sequence token.")
    max_logprob_diff: float | None = knob(
        None,
        "Stop the run where a sampled token's log-prob differs by more than this between engine and trainer, which "
        "have the same weights; null: only report it.",
    )
    importance: Literal["none", "token_truncated", "token_masked", "sequence", "geometric_mean"] = knob(
        "none",
        "Weigh the loss by how much likelier the trainer finds what the engine sampled: token ratios cut at the cap, "
        "tokens above the cap left out, or one ratio a response (product or geometric mean of its tokens') cut at the "
        "cap.",
    )
    importance_cap: float = knob(2.0, "Largest weight of a token or response; see importance.")

    def validate(self) -> None:
        super().validate()
        self.require_at_least(1, "group_size", "max_response_tokens", "importance_cap")
        self.require_at_least(0, "temperature", "top_k")
        self.require_positive("max_logprob_diff")
        require(
            self.engine != "vllm" or (self.top_p == 1 and self.top_k == 0),
            f"top_p is {self.top_p} and top_k is {self.top_k}: vLLM's log-probs are then those of the truncated "
            "distribution, which the trainer cannot compare with its own; use top_p 1 and top_k 0, or engine megatron",
        )
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}, must be greater than 0 and at most 1")
        require(all(self.stop), "stop contains an empty string, which would end every response at once")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Section):
    """Rule-based rewards (paper, section 4.2) and plug-ins; the total is the weighted sum."""

    accuracy_weight: float = knob(0.9, "Weight of a right answer.")
    format_weight: float = knob(0.1, "Weight of the form <think>...</think> <answer>...</answer>.")
    functions: tuple[str, ...] = knob((), "Further rewards, each module:function(row, text) -> float.")
    function_weights: tuple[float, ...] = knob((), "Weights of those functions, in order.")

    def validate(self) -> None:
        require(
            len(self.functions) == len(self.function_weights),
            f"{len(self.functions)} functions but {len(self.function_weights)} function_weights; give one weight each",
        )
        for name in self.functions:
            module, _, function = name.partition(":")
            require(
                bool(module and function), f"functions has {name!r}, must look like package.module:function"
            )
        require(
            any((self.accuracy_weight, self.format_weight, *self.function_weights)),
            "all reward weights are 0: nothing could be learned",
        )
