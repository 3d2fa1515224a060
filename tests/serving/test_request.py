"""What a chat request may hold, and what a client is told about one that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavila.rollout.protocol import Response
from megavila.runtime.errors import MegavilaError
from megavila.serving.errors import ApiError
from megavila.serving.media_root import MediaRoot
from megavila.serving.request import Sampling, parse_chat_request
from megavila.serving.response import Metric, cut_stop, exposition


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Why?"}]} | fields


def content(*parts: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def test_every_field_is_read() -> None:
    video = {"type": "video_url", "video_url": {"url": "a.mp4"}}
    asked = parse_chat_request(
        body(
            **content({"type": "text", "text": "Why"}, video, {"type": "text", "text": "so?"}),
            temperature=0.5,
            top_p=0.9,
            max_completion_tokens=7,
            n=3,
            seed=-5,
            stop="x",
            logprobs=True,
            include_stop_str_in_output=True,
            fps=2,
            max_frames=9,
            start=1,
            end=2.5,
            stream=False,
            presence_penalty=0.0,
            user="somebody",
            response_format=None,
        ),
        temperature=0,
    )
    assert (asked.model, asked.text, asked.videos) == ("m", "Why\nso?", ("a.mp4",))
    assert asked.sampling == Sampling(0.5, 0.9, 7, 3, ("x",))
    assert (asked.seed, asked.logprobs, asked.keep_stop) == (-5, True, True)
    assert asked.columns == {"fps": 2.0, "max_frames": 9, "start": 1.0, "end": 2.5}


def test_what_is_left_out_or_null_has_a_default() -> None:
    asked = parse_chat_request(body(top_p=None, max_tokens=None, stop=None, seed=None), temperature=0.25)
    assert asked.sampling == Sampling(0.25) and asked.text == "Why?" and asked.videos == ()
    assert (asked.seed, asked.logprobs, asked.keep_stop, dict(asked.columns)) == (None, False, False, {})


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ([], None, "the body is a list, not a JSON object"),
        ({"messages": []}, "messages", r"has the roles \[\]"),
        (body(model=None), "model", "model: is missing"),
        (body(model=3), "model", "is int, must be text"),
        ({"model": "m"}, "messages", "messages: is missing"),
        (body(messages="Why?"), "messages", "must be a list of objects"),
        (
            body(messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]),
            "messages",
            r"roles \['system', 'user'\]; give one message, of the user",
        ),
        (body(messages=[{"role": "user"}]), "messages[0].content", "is missing; give a text or a list"),
        (body(**content()), "messages[0].content", "has no text"),
        (body(**content("Why?")), "messages[0].content[0]", "has type None; parts are of type"),
        (body(**content({"type": "image_url"})), "messages[0].content[0]", "type 'image_url'"),
        (
            body(**content({"type": "text", "text": "x"}, {"type": "video_url", "video_url": {}})),
            "messages[0].content[1].video_url.url",
            "is missing, must be text",
        ),
        (body(**content({"type": "text", "text": "half \ud800"})), None, "half a character at 5"),
        (body(stream=True), "stream", "True is not supported; answers come whole"),
        (body(top_logprobs=5), "top_logprobs", "those of the sampled tokens alone"),
        (body(presence_penalty=0.5), "presence_penalty", "0.5 is not supported; leave it out"),
        (body(tools=[]), "tools", "'tools' is no field of this endpoint; it takes model, messages"),
        (body(temperature=2.5), "temperature", "is 2.5, must be from 0 to 2"),
        (body(temperature=float("nan")), "temperature", "is nan, must be from 0"),
        (body(temperature=1e-30), "temperature", r"use 0 \(greedy\) or at least 0.01"),
        (body(temperature="hot"), "temperature", "is 'hot', must be a number"),
        (body(top_p=0), "top_p", "is 0, must be greater"),
        (body(top_p=True), "top_p", "is True, must be a number"),
        (body(max_tokens=0), "max_tokens", "is 0, must be from 1"),
        (body(max_tokens=1.5), "max_tokens", "is 1.5, must be a whole number"),
        (body(max_tokens=5, max_completion_tokens=6), "max_tokens", "differs from max_completion_tokens"),
        (body(n=129), "n", "is 129, must be from 1 to 128"),
        (body(seed=10**400), "seed", "must be from"),
        (body(stop=["a"] * 5), "stop", "a list of at most 4"),
        (body(stop=["a", ""]), "stop", "holds an empty text"),
        (body(stop={}), "stop", "must be a text or a list"),
        (body(logprobs=2), "logprobs", "is 2, must be true or false"),
        (body(num_frames=0), "num_frames", "is 0, must be from 1 to 8192"),
        (body(fps=1e12), "fps", "must be from 1e-06 to 1000"),
        (body(start=-1), "start", "is -1, must be from 0"),
    ],
)
def test_wrong_requests_are_named(given: object, param: str | None, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        parse_chat_request(given, temperature=0)
    error = caught.value.body()["error"]
    assert caught.value.status == 400 and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "videos"
    (directory / "inner").mkdir(parents=True)
    for name in ("a.mp4", "inner/b c.mp4", "100%25.mp4"):
        (directory / name).write_bytes(b"x")
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (directory / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (directory / "alias.mp4").symlink_to(directory / "a.mp4")
    (directory / "loop.mp4").symlink_to(directory / "loop.mp4")
    return directory


def test_videos_under_the_root_are_found(root: Path) -> None:
    media = MediaRoot(str(root))
    for url, name in {
        "a.mp4": "a.mp4",
        "inner/../a.mp4": "a.mp4",
        "alias.mp4": "a.mp4",
        str(root / "a.mp4"): "a.mp4",
        f"file://{root}/inner/b%20c.mp4": "inner/b c.mp4",
        "100%25.mp4": "100%25.mp4",  # a path is taken as it is
    }.items():
        assert media.find(url) == str((root / name).resolve())


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("../secret.mp4", 400, r"'../secret.mp4' lies outside of the server's media_root"),
        ("../no-such-file.mp4", 400, "lies outside"),
        ("/etc/passwd", 400, "lies outside"),
        ("file:///etc/passwd", 400, "lies outside"),
        ("link.mp4", 400, "lies outside"),
        ("file:///%2e%2e/secret.mp4", 400, "lies outside"),
        ("", 404, "no such file"),
        ("inner", 404, "no such file"),
        ("gone.mp4", 404, "video 'gone.mp4': no such file under the server's media_root"),
        ("loop.mp4", 404, "no such file"),
        ("a\0b", 400, "not a path that can be read"),
        ("x" * 5000, 400, "not a path that can be read"),
        ("http://[", 400, "not a path that can be read"),
        ("https://example.com/a.mp4", 400, "https URLs are not fetched"),
        ("data:video/mp4;base64,AAAA", 400, "data URLs are not fetched"),
    ],
)
def test_no_other_file_is_read(root: Path, url: str, status: int, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        MediaRoot(str(root)).find(url)
    assert caught.value.status == status and str(root) not in caught.value.message


def test_without_a_root_there_are_no_videos(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="was started without media_root"):
        MediaRoot(None).find("a.mp4")
    with pytest.raises(MegavilaError, match="gone is not a directory"):
        MediaRoot(str(tmp_path / "gone"))


def test_the_stop_string_is_cut_off() -> None:
    import torch

    def response(text: str, reason: Any = "stop") -> Response:
        return Response(torch.zeros(0, dtype=torch.long), torch.zeros(0), text, reason)

    assert cut_stop(response("so be it"), ("it", "be it")) == "so "
    assert cut_stop(response("so be it", "length"), ("it",)) == "so be it"
    assert cut_stop(response("so be it"), ("so",)) == "so be it"


def test_exposition_format() -> None:
    text = exposition(
        [
            Metric("requests_total", "Requests.", 12345678, '{status="200"}'),
            Metric("requests_total", "Requests.", 1, '{status="404"}'),
            Metric("waiting", "Queue.", 0),
        ]
    )
    assert text.splitlines() == [
        "# HELP megavila_requests_total Requests.",
        "# TYPE megavila_requests_total counter",
        'megavila_requests_total{status="200"} 12345678',
        'megavila_requests_total{status="404"} 1',
        "# HELP megavila_waiting Queue.",
        "# TYPE megavila_waiting gauge",
        "megavila_waiting 0",
    ]
