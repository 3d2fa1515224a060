"""Metrics files, timers, progress, logging, devices."""

import io
import json
import logging
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megavila.runtime import progress
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import configure_logging, get_logger
from megavila.runtime.metrics import MetricsWriter, read_metrics
from megavila.runtime.platform import get_platform
from megavila.runtime.progress import Progress, track
from megavila.runtime.timers import Timers

MAIN: Any = SimpleNamespace(is_main=True)
OTHER: Any = SimpleNamespace(is_main=False)


def test_metrics_are_there_at_once_and_in_tensorboard(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run", MAIN)
    writer.write(1, {"loss": torch.tensor(0.5), "tokens": 7})
    writer.write(2, {"loss": math.nan})
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0] == {"step": 1, "loss": 0.5, "tokens": 7}
    assert math.isnan(rows[1]["loss"])
    writer.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("tokens")] == [(1, 7.0)]


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run", OTHER)
    writer.write(1, {"loss": 1.0})
    writer.rewind(0)
    writer.close()
    assert not (tmp_path / "run").exists()


def test_rewind_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsWriter(tmp_path, MAIN)
    for step in range(1, 6):
        first.write(step, {"loss": float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    resumed = MetricsWriter(tmp_path, MAIN)
    resumed.rewind(3)
    resumed.write(4, {"loss": 40.0})
    resumed.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 3.0},
        {"step": 4, "loss": 40.0},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_damage_inside_the_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(MegavilaError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(path)


def test_timers_add_up_and_start_anew() -> None:
    timers = Timers(get_platform("cpu"))
    for _ in range(2):
        with timers("time/a"):
            time.sleep(0.02)
    with pytest.raises(ValueError), timers("time/b"):
        raise ValueError
    seconds = timers.pop()
    assert 0.04 <= seconds["time/a"] < 1.0 and set(seconds) == {"time/a", "time/b"}
    assert timers.pop() == {}


def test_progress_lines_in_a_log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress("SFT", 6, completed=2, console=Console(file=stream, width=200)) as bar:
        for _ in range(4):
            bar.advance(text="loss 1")
    assert stream.getvalue().splitlines() == [
        "SFT: 4/6, 20 s, about 20 s left  loss 1",
        "SFT: 6/6, 22 s, about 0 s left  loss 1",
    ]


def test_progress_bar_on_a_terminal_and_silence_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with Progress("render", 2, console=Console(file=stream, width=120, force_terminal=True)) as bar:
        bar.advance(2, text="two")
    assert "render" in stream.getvalue() and "2/2" in stream.getvalue()
    assert list(track([1, 2], "quiet", enabled=False)) == [1, 2]
    assert capsys.readouterr().err == ""
    assert list(track((n for n in range(3)), "counted", total=3)) == [0, 1, 2]
    assert "counted: 3/3" in capsys.readouterr().err


def test_logging_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    logger = get_logger("megavila.somewhere")
    assert get_logger("elsewhere").name == "megavila.elsewhere"
    configure_logging(is_main=True)
    logger.info("hello [red]text[/red]")
    assert "hello [red]text[/red]" in capsys.readouterr().err
    configure_logging(is_main=False, rank=3)
    logger.info("unheard")
    logger.warning("heard")
    err = capsys.readouterr().err
    assert "unheard" not in err and "[rank 3] heard" in err
    configure_logging(is_main=True)
    assert len(logging.getLogger("megavila").handlers) == 1


def test_platform() -> None:
    cpu = get_platform("cpu")
    assert (cpu.name, cpu.device, cpu.backend, cpu.default_dtype()) == (
        "cpu",
        torch.device("cpu"),
        "gloo",
        torch.float32,
    )
    before = cpu.peak_memory_gib()
    # What this process once used and gave back must be used again before the peak can rise.
    given_back = max(0, int(before * 2**30) - psutil.Process().memory_info().rss)
    block = torch.ones((given_back + 384 * 2**20) // 4)
    assert cpu.peak_memory_gib() > before and 0.1 < cpu.peak_memory_gib() < 64
    del block
    with pytest.raises(MegavilaError, match="device is 'tpu'; use auto, cpu or cuda"):
        get_platform("tpu")
    if torch.cuda.is_available():
        assert (get_platform("auto").backend, get_platform("auto").default_dtype()) == (
            "nccl",
            torch.bfloat16,
        )
    else:
        assert get_platform("auto") == cpu
        with pytest.raises(MegavilaError, match=r"device is cuda but .* use run.device=cpu"):
            get_platform("cuda")
