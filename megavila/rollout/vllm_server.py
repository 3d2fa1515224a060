"""A vLLM in a process of its own: nothing that happens to it can harm the trainer, and it can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch
from torch import Tensor

from megavila.rollout.vllm_host import Completion, LocalHost, pack_weights
from megavila.rollout.vllm_process import HostSettings, import_vllm
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger

# Imports and the building of the model; nothing tells how far it is.
START_SECONDS = 600.0
CLOSE_SECONDS = 20.0
# Small weights travel together in a block of this size, large ones alone.
BLOCK_BYTES = 64 * 2**20

_log = get_logger(__name__)


class ServerDied(RuntimeError):
    """The process has ended, or was ended because it did not answer."""


class ServerHost:
    """A `Host` whose vLLM runs in a process that this one starts. Prompts go there through a pipe, weights through a
    block of shared memory and vLLM's weight-transfer API.

    Args:
        settings: as of a vLLM in this process.
        largest_weight: bytes of the largest tensor that `load` will bring.
        timeout_seconds: for any answer; a process that gives none is killed. None: it may take its time.
    """

    restartable = True

    def __init__(self, settings: HostSettings, largest_weight: int, timeout_seconds: float | None) -> None:
        self._timeout = timeout_seconds
        self._killed_because: str | None = None
        self._memory = SharedMemory(create=True, size=max(BLOCK_BYTES, largest_weight))
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_main,
            args=(theirs, replace(settings, processes=1), self._memory.name, torch.get_num_threads()),
            name="megavila-vllm",
            daemon=True,
        )
        try:
            self.process.start()
            theirs.close()
            self._answer(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._call("start_weight_update")
        block = self._memory.buf
        assert block is not None, "the block is closed"
        for tensors in pack_weights(weights, block):
            self._call("update_weights", tensors)
        found = self._call("finish_weight_update", str(version))
        if found != str(version):
            raise RuntimeError(f"vLLM has weights of version {found}, it was sent version {version}")

    def run(
        self, embeddings: Sequence[Tensor], params: Sequence[Mapping[str, Any]], timeout_seconds: float | None
    ) -> Generator[tuple[int, list[Completion]], None, None]:
        self._send("run", [_Rows(rows) for rows in embeddings], list(params), timeout_seconds)
        # It watches itself and says so; twice the time without a word is a process that hangs.
        limit = None if timeout_seconds is None else 2 * timeout_seconds
        done = False
        try:
            while (found := self._answer(limit)) is not None:
                if found != _STILL_THERE:
                    yield found
            done = True
        except (RemoteFailure, ServerDied, MegavilaError):
            done = True
            raise
        finally:
            if not done:  # answers to what nobody waits for would be taken for answers to the next call
                self._kill("its rollout was broken off")

    def forget(self) -> None:
        self._call("forget")

    def sleep(self) -> None:
        """Nothing: it runs on a CPU."""

    def wake(self) -> None:
        """Nothing."""

    def counters(self) -> tuple[int, int]:
        return self._call("counters")

    def close(self) -> None:
        if self.process.is_alive():
            try:
                self._pipe.send(("close",))
            except OSError:
                pass
            self.process.join(CLOSE_SECONDS)
        if self.process.is_alive():
            self._kill("it did not close")
            self.process.join()
        self._pipe.close()
        self._memory.close()
        self._memory.unlink()

    def _call(self, name: str, *arguments: object) -> Any:
        self._send(name, *arguments)
        return self._answer(self._timeout)

    def _send(self, name: str, *arguments: object) -> None:
        with self._within(self._timeout):  # a long prompt fills the pipe, and waits for a process that reads
            self._pipe.send((name, *arguments))

    def _answer(self, seconds: float | None) -> Any:
        """What the process says next. Raises RemoteFailure, MegavilaError or ServerDied."""
        with self._within(seconds):
            kind, value = self._pipe.recv()
        if kind == "refused":
            raise value
        if kind == "failed":
            raise RemoteFailure(value)
        return value

    @contextmanager
    def _within(self, seconds: float | None) -> Iterator[None]:
        """Use of the pipe. A process that lets it wait for longer is killed, which ends the waiting."""
        timer = None
        if seconds is not None:
            timer = threading.Timer(seconds, self._kill, [f"it did not answer for {seconds:g} s"])
            timer.daemon = True
            timer.start()
        try:
            yield
        except (EOFError, OSError) as error:
            self.process.join(CLOSE_SECONDS)
            end = self._killed_because or f"it ended with exit code {self.process.exitcode}"
            raise ServerDied(f"the vLLM process {self.process.pid} is gone: {end}") from error
        finally:
            if timer is not None:
                timer.cancel()

    def _kill(self, why: str) -> None:
        _log.warning("killing the vLLM process %s: %s", self.process.pid, why)
        self._killed_because = f"{why} and was killed"
        self.process.kill()


class RemoteFailure(RuntimeError):
    """Something was raised in the process, which goes on."""


class _Rows:
    """A tensor as bytes: torch would send a handle to memory that its sender must keep."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __reduce__(self) -> tuple[Any, ...]:
        rows = self.rows.contiguous()
        return _rebuild, (rows.view(-1).view(torch.uint8).numpy().tobytes(), rows.dtype, tuple(rows.shape))


def _rebuild(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


_STILL_THERE = "still there"


def _main(pipe: Connection, settings: HostSettings, memory: str, threads: int) -> None:
    """The process: answers calls until the trainer is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the trainer too, which closes this process
    for name in [n for n in os.environ if n in _TORCHRUN or n.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    torch.set_num_threads(threads)
    try:
        serving = _Serving(settings, memory)
    except Exception as error:
        pipe.send(_failure(error))
        return
    try:
        pipe.send(("done", None))
        while (call := pipe.recv())[0] != "close":
            try:
                serving.handle(call, pipe)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                pipe.send(_failure(error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the trainer has ended


# Of the run that the trainer is part of, and this process is not.
_TORCHRUN = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class _Serving:
    """A vLLM of the process's own, behind the calls of a `ServerHost`."""

    def __init__(self, settings: HostSettings, memory: str) -> None:
        import_vllm(settings.device)
        from megavila.rollout import vllm_transfer

        vllm_transfer.register()
        self.host = LocalHost(settings, vllm_transfer.BACKEND)
        self.host.llm.init_weight_transfer_engine({"init_info": {"memory": memory}})

    def handle(self, call: tuple[Any, ...], pipe: Connection) -> None:
        """Answer one call."""
        name, *arguments = call
        if name == "run":
            for found in self.host.run(*arguments, heartbeat=lambda: pipe.send(("done", _STILL_THERE))):
                pipe.send(("done", found))
            pipe.send(("done", None))
        else:
            pipe.send(("done", getattr(self, name)(*arguments)))

    def start_weight_update(self) -> None:
        self.host.llm.start_weight_update()

    def update_weights(self, tensors: list[tuple[str, str, list[int], int]]) -> None:
        self.host.llm.update_weights({"update_info": {"tensors": tensors}})

    def finish_weight_update(self, version: str) -> str:
        """The version of the weights that vLLM has now."""
        self.host.llm.finish_weight_update(weight_version=version)
        self.host.forget()
        return self.host.llm.get_weight_version()

    def forget(self) -> None:
        self.host.forget()

    def counters(self) -> tuple[int, int]:
        return self.host.counters()


def _failure(error: Exception) -> tuple[str, Any]:
    if isinstance(error, MegavilaError):
        return "refused", error
    return "failed", f"{type(error).__name__}: {error}"
