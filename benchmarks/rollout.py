"""Rollouts of the Megatron engine and of vLLM on the same model, prompts and weights, in one process.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --prompt-tokens 8192 --group-size 16

One engine after the other, each round with a new prompt, so that no prefix is left over from the last one.
No response ends early, so both sample the same number of tokens. Load on the machine is kept beside the numbers.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import measured, results_directory
from benchmarks.mrsp_world import MODELS
from megavila.config import EngineConfig, LanguageConfig, ModelConfig, ParallelConfig
from megavila.data import Prompt, Row
from megavila.data.tokenizer import build_word_tokenizer, load_tokenizer
from megavila.models import build_model
from megavila.rollout.engines import open_engine
from megavila.rollout.protocol import RolloutEngine, SamplingParams
from megavila.runtime.platform import get_platform
from megavila.runtime.seeds import seed_everything
from megavila.runtime.topology import opened

WORDS = 8000


def main(
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 4096,
    group_size: Annotated[int, typer.Option(help="Responses to it (G).")] = 8,
    response_tokens: Annotated[int, typer.Option(help="Tokens of each response.")] = 128,
    rounds: Annotated[int, typer.Option(help="Times that each engine is measured.")] = 3,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "small",
    engines: Annotated[list[str] | None, typer.Option(help="Engines to measure; default: both.")] = None,
    out: Annotated[Path | None, typer.Option(help="File of results.")] = None,
) -> None:
    """Seconds, tokens per second and shared prompt tokens of each engine."""
    platform = get_platform()
    with opened(ParallelConfig(), platform) as topology:
        seed_everything(0, topology)
        with tempfile.TemporaryDirectory() as directory:
            tokenizer = load_tokenizer(build_word_tokenizer([" ".join(map(str, range(WORDS)))], directory))
        tokenizer.eos_id, tokenizer.directory = -1, None  # no response ends early
        language = LanguageConfig(**MODELS[model]["language"], vocab_size=tokenizer.vocab_size)
        trained = build_model(ModelConfig(language=language), topology, platform)
        params = SamplingParams(max_tokens=response_tokens, group_size=group_size)
        records: list[dict[str, Any]] = []
        for name in engines or ["megatron", "vllm"]:
            with open_engine(
                EngineConfig(engine=name, max_batch_tokens=1 << 20, kv_cache_gib=1.0),
                trained,
                tokenizer,
                topology,
                max_tokens=prompt_tokens + response_tokens,
            ) as engine:
                started = time.perf_counter()
                engine.update_weights()
                transfer = time.perf_counter() - started
                for number in range(rounds + 1):  # the first one warms up
                    record = _measure(engine, _prompt(prompt_tokens, number), params, number)
                    record |= {"engine": name, "round": number, "weight_transfer_seconds": transfer}
                    if number:
                        records.append(record)
    summary = summarise(records)
    _print(summary)
    sizes = {"prompt_tokens": prompt_tokens, "group_size": group_size, "response_tokens": response_tokens}
    options = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in sizes.items())
    result = {
        **measured(f"python -m benchmarks.rollout {options} --model {model} --rounds {rounds}"),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "dtype": str(trained.dtype).removeprefix("torch."),
        **sizes,
        "summary": summary,
        "rounds": records,
    }
    path = out or results_directory() / "rollout.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def _prompt(tokens: int, seed: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(
        token_ids=torch.randint(0, WORDS, (tokens,), generator=generator),
        position_ids=torch.arange(tokens),
        media_index=torch.full((tokens,), -1),
        videos=(),
        tokens_per_frame=1,
        next_position=tokens,
        row=Row(problem_id=f"prompt-{seed}", problem="", data_type="text"),
        fingerprint=f"prompt-{seed}",
    )


def _measure(engine: RolloutEngine, prompt: Prompt, params: SamplingParams, seed: int) -> dict[str, Any]:
    engine.take_counts()
    started, cpu = time.perf_counter(), time.process_time()
    ((*group,),) = engine.generate([prompt], [None], params, [seed])
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    counts, sampled = engine.take_counts(), sum(len(response.token_ids) for response in group)
    assert sampled == params.group_size * params.max_tokens
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "sampled_tokens": sampled,
        "prefill_tokens": counts.prefill_tokens,
        "reused_prompt_tokens": counts.reused_prompt_tokens,
    }


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry an engine: medians over its rounds. The CPU seconds leave out what other processes took."""
    summary = []
    for name in dict.fromkeys(record["engine"] for record in records):
        own = [record for record in records if record["engine"] == name]
        medians = {
            key: statistics.median(record[key] for record in own)
            for key in ("seconds", "cpu_seconds", "weight_transfer_seconds")
        }
        prompt = own[0]["prefill_tokens"] + own[0]["reused_prompt_tokens"]
        summary.append(
            {
                "engine": name,
                **medians,
                "tokens_per_second": own[0]["sampled_tokens"] / medians["seconds"],
                "tokens_per_cpu_second": own[0]["sampled_tokens"] / medians["cpu_seconds"],
                "prefill_tokens": own[0]["prefill_tokens"],
                "reused_prompt_tokens": own[0]["reused_prompt_tokens"],
                "reused_share": own[0]["reused_prompt_tokens"] / prompt,
            }
        )
    return summary


def _print(summary: list[dict[str, Any]]) -> None:
    table = Table("engine", "seconds", "tokens/s", "tokens/CPU s", "prompt tokens read", "found in cache")
    for entry in summary:
        table.add_row(
            entry["engine"],
            f"{entry['seconds']:.2f}",
            f"{entry['tokens_per_second']:.0f}",
            f"{entry['tokens_per_cpu_second']:.0f}",
            str(entry["prefill_tokens"]),
            f"{entry['reused_prompt_tokens']} ({100 * entry['reused_share']:.1f} %)",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
