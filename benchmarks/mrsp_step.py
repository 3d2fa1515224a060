"""Seconds and memory of a whole GRPO step, for MR-SP and the baselines it replaces: the paper's figure 1.

    python -m benchmarks.mrsp_step
    torchrun --nproc-per-node 2 -m benchmarks.mrsp_step --frames 512

Every variant does the same work: some prompts (one for each rank, if nothing else is asked for), G responses to each, one
update. They differ in settings alone:

    plain       each rank its own prompt, repeated for each response; a video is decoded and encoded again in each pass
    stage_1     the same, but a video is decoded and encoded once a step
    stages_1_2  as stage_1, and all ranks share each sequence: what the paper does
    megavila    as stages_1_2, but a prompt stands once before its responses, and groups are split only where that pays
    megavila_dp as megavila, but each rank has its own prompt

The learning rate is too small to move a weight, so that all variants see the same weights and therefore the same responses. Variants take turns, round by
round; what is reported is the median over rounds and, as speed-up, the median of the ratios within a round.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import measured, results_directory
from benchmarks.memory import MemoryPeak
from benchmarks.mrsp_world import MODELS, write_world
from megavila.config import GrpoRunConfig, ParallelConfig, build
from megavila.rewards import Scorer
from megavila.rl.grpo import GrpoTrainer
from megavila.rollout.megatron import MegatronEngine
from megavila.runtime.collectives import broadcast_object
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import opened
from megavila.training.session import Session, open_session

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"shared": False, "mrsp": {"layout": "repeated", "reuse": "none"}},
    "stage_1": {"shared": False, "mrsp": {"layout": "repeated", "reuse": "step"}},
    "stages_1_2": {"shared": True, "split": "always", "mrsp": {"layout": "repeated", "reuse": "step"}},
    "megavila": {"shared": True, "mrsp": {"layout": "shared_prefix", "reuse": "step"}},
    "megavila_dp": {"shared": False, "mrsp": {"layout": "shared_prefix", "reuse": "step"}},
}
PHASES = ("decode", "encode", "rollout", "ref_logprob", "update")


@dataclass(frozen=True)
class Shape:
    """What one step is made of.

    Attributes:
        model: a name of `mrsp_world.MODELS`.
        frames: of each video.
        group_size, response: G, and the most tokens of each response.
        prompts: of a step.
        steps: that are measured.
        warm_up: whether one that is not comes before.
        kl: weight of the KL term; above 0 the reference model makes a pass too.
        cp_comm_type, cp_split: how the ranks of a replica share a sequence, as in parallel.
    """

    model: str
    frames: int
    group_size: int
    response: int
    prompts: int
    steps: int
    warm_up: bool
    kl: float
    cp_comm_type: str
    cp_split: str


def main(
    frames: Annotated[list[int], typer.Option(help="Frames of a video; may be repeated.")] = [128, 512],  # noqa: B006
    model: Annotated[str, typer.Option(help=f"Size of the model: {', '.join(MODELS)}.")] = "small",
    group_size: Annotated[int, typer.Option(help="Responses to each prompt (G).")] = 8,
    response: Annotated[int, typer.Option(help="Most tokens of a response.")] = 128,
    rounds: Annotated[int, typer.Option(help="Turns of each variant.")] = 3,
    prompts: Annotated[
        int | None, typer.Option(help="Prompts of a step; default: one for each rank.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Measured steps in a turn.")] = 1,
    warm_up: Annotated[bool, typer.Option(help="Do one step before that is not measured.")] = True,
    kl: Annotated[float, typer.Option(help="Weight of the KL term; 0 leaves out the reference pass.")] = 0.01,
    cp_comm_type: Annotated[str, typer.Option(help="auto, p2p (ring), a2a (Ulysses) or a2a+p2p.")] = "auto",
    cp_split: Annotated[str, typer.Option(help="Of variant megavila: auto, or always.")] = "auto",
    variant: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="File of results to write (JSON).")] = None,
) -> None:
    """Time a GRPO step in every variant and print and save seconds, memory and speed-ups."""
    names = list(variant or VARIANTS)
    records: list[dict[str, Any]] = []
    prompts = prompts or _world_size()
    with _scratch(frames, (steps + warm_up) * prompts) as scratch:
        for count in frames:
            shape = Shape(
                model, count, group_size, response, prompts, steps, warm_up, kl, cp_comm_type, cp_split
            )
            for turn in range(rounds):
                for name in names:
                    record = run_variant(name, shape, scratch)
                    records.append({"variant": name, "frames": count, "round": turn, **record})
                    if _is_main():
                        seconds = ", ".join(f"{key} {value:.2f}" for key, value in record["seconds"].items())
                        Console(stderr=True).print(f"{count} frames, round {turn}, {name}: {seconds}")
    if not _is_main():
        return
    arguments = [a for a in sys.argv[1:] if out is None or a not in ("--out", str(out))]
    command = " ".join(
        ["torchrun", "--nproc-per-node", str(_world_size()), "-m", "benchmarks.mrsp_step", *arguments]
    )
    result = {
        "measured": measured(command),
        "ranks": _world_size(),
        "model": model,
        "group_size": group_size,
        "response": response,
        "prompts": prompts,
        "summary": summarise(records),
        "records": records,
    }
    target = out or results_directory() / f"mrsp_step_{model}_{_world_size()}_ranks.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    _print(result["summary"])
    print(target)


def run_variant(name: str, shape: Shape, scratch: Path) -> dict[str, Any]:
    """Mean seconds by phase, peak memory and counters of the measured steps of one variant, the slowest rank's where they differ."""
    with _opened(name, shape, scratch) as session:
        trainer = GrpoTrainer(
            session,
            MegatronEngine(
                session.model,
                session.tokenizer,
                session.topology,
                max_batch_tokens=session.config.rollout.max_batch_tokens,  # type: ignore[attr-defined]
            ),
            Scorer(session.config.reward),  # type: ignore[attr-defined]
        )
        if shape.warm_up:
            trainer.train_step(1)
        session.timers.pop()
        counters: dict[str, float] = {}
        with MemoryPeak(session.platform) as memory:
            for step in range(1 + shape.warm_up, 1 + shape.warm_up + shape.steps):
                with session.timers("time/step"):
                    metrics = trainer.train_step(step)
                for key, value in metrics.items():
                    if key.startswith(("tokens/", "frames/")):
                        counters[key] = counters.get(key, 0.0) + value / shape.steps
        times = session.timers.pop()
        names = [f"time/{phase}" for phase in (*PHASES, "step")]
        found = torch.tensor(
            [times.get(key, 0.0) / shape.steps for key in names] + [memory.gib], dtype=torch.float64
        )
        found = found.to(session.platform.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        *seconds, peak = found.tolist()
        return {
            "seconds": dict(zip((*PHASES, "step"), seconds, strict=True)),
            "peak_gib": peak,
            "counters": counters,
        }


@contextmanager
def _scratch(frames: list[int], rows: int) -> Iterator[Path]:
    """A directory with a world for each number of frames, made by rank 0 and gone at the end."""
    with tempfile.TemporaryDirectory() as own:
        if _is_main():
            for count in frames:
                write_world(Path(own) / f"{count}", count, rows)
        platform = get_platform()
        with opened(ParallelConfig(), platform) as topology:
            shared = broadcast_object(own, topology.world_group)
        yield Path(shared)


@contextmanager
def _opened(name: str, shape: Shape, scratch: Path) -> Iterator[Session]:
    variant, ranks = VARIANTS[name], _world_size()
    world = scratch / f"{shape.frames}"
    longest = _longest(shape)
    config = build(
        GrpoRunConfig,
        {
            "run": {
                "name": name,
                "output_dir": str(scratch / "runs"),
                "steps": shape.steps + shape.warm_up,
                "log_every": 1,
            },
            "model": {
                "tokenizer": str(world / "tokenizer"),
                "train_vision": False,
                "train_projector": False,
                **MODELS[shape.model],
            },
            "data": {
                "train": [str(world / "rows.jsonl")],
                "num_frames": shape.frames,
                "template": "compact",
                "cache_frames_gib": 0.0 if variant["mrsp"]["reuse"] == "none" else 8.0,
            },
            "parallel": {
                "context_parallel": ranks if variant["shared"] else 1,
                "cp_comm_type": shape.cp_comm_type if variant["shared"] and ranks > 1 else "p2p",
                "cp_split": variant.get("split", shape.cp_split),
            },
            "optimizer": {"lr": 1e-30},  # too small to move any weight
            "checkpoint": {"every": 0, "save_final": False},
            "mrsp": variant["mrsp"],
            "rollout": {"group_size": shape.group_size, "max_response_tokens": shape.response},
            # A reward that differs within each group: with none, no group would be trained on.
            "reward": {
                "accuracy_weight": 0.0,
                "format_weight": 0.0,
                "functions": ["benchmarks.mrsp_world:reward"],
                "function_weights": [1.0],
            },
            "grpo": {
                "prompts_per_step": shape.prompts,
                "kl_beta": shape.kl,
                "drop_zero_variance": False,
                "max_tokens_per_microbatch": longest,
            },
        },
    )
    with open_session(config, max_prompt_tokens=longest - shape.response) as session:
        yield session


def _longest(shape: Shape) -> int:
    """Tokens of one group in the repeated layout, with room for the question: the micro-batch of all variants."""
    model = MODELS[shape.model]
    side = model["vision"]["image_size"] // model["vision"]["patch_size"]
    prompt = shape.frames * (-(-side // 2)) ** 2 + 256
    return shape.group_size * (prompt + shape.response)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each number of frames and variant: median seconds and memory, and speed-ups over `plain` and `stages_1_2`."""
    summary = []
    for frames in sorted({record["frames"] for record in records}):
        here = [record for record in records if record["frames"] == frames]
        by_turn = {(record["variant"], record["round"]): record for record in here}
        for name in dict.fromkeys(record["variant"] for record in here):
            own = [record for record in here if record["variant"] == name]
            entry: dict[str, Any] = {
                "frames": frames,
                "variant": name,
                "seconds": {
                    phase: statistics.median(record["seconds"][phase] for record in own)
                    for phase in own[0]["seconds"]
                },
                "peak_gib": statistics.median(record["peak_gib"] for record in own),
                "counters": own[0]["counters"],
                "speedup": {},
            }
            for baseline in ("plain", "stages_1_2"):
                for phase in ("step", "update"):
                    ratios = [
                        by_turn[baseline, record["round"]]["seconds"][phase] / record["seconds"][phase]
                        for record in own
                        if (baseline, record["round"]) in by_turn
                    ]
                    if ratios:
                        entry["speedup"][f"{phase}_over_{baseline}"] = statistics.median(ratios)
            summary.append(entry)
    return summary


def _print(summary: list[dict[str, Any]]) -> None:
    table = Table(
        "frames", "variant", *PHASES, "step (s)", "peak (GiB)", "step / plain", "update / stages 1+2"
    )
    for entry in summary:
        speedup = entry["speedup"]
        table.add_row(
            str(entry["frames"]),
            entry["variant"],
            *(f"{entry['seconds'][phase]:.2f}" for phase in (*PHASES, "step")),
            f"{entry['peak_gib']:.2f}",
            *(
                f"{speedup[key]:.2f}x" if key in speedup else "-"
                for key in ("step_over_plain", "update_over_stages_1_2")
            ),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
