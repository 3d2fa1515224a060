"""The canonical prompt: tokens, positions and media rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from megavila.config import DataConfig
from megavila.data import (
    MediaSpan,
    Prompt,
    PromptBuilder,
    PromptTemplate,
    Row,
    Tokenizer,
    build_word_tokenizer,
    load_tokenizer,
)
from megavila.media import MediaError
from megavila.runtime.errors import MegavilaError

PROBLEM = "Where is it?\nA: left\nB: right"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    times = " ".join(f"t{i}" for i in range(100))
    return load_tokenizer(
        build_word_tokenizer([PROBLEM, times, "first then"], tmp_path_factory.mktemp("words"))
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """10 frames and 7 frames, one a second."""
    paths = []
    for number, frames in enumerate((10, 7)):
        path = tmp_path_factory.mktemp("videos") / f"{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=1)
            stream.width, stream.height = 32, 32
            for value in range(frames):
                image = np.full((32, 32, 3), 20 * value + number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
            container.mux(stream.encode())
        paths.append(str(path))
    return paths[0], paths[1]


def make(tokenizer: Tokenizer, row: Row, tokens: int = 3, template: str = "plain", **settings: Any) -> Prompt:
    keys = ("num_frames", "fps", "max_frames", "frame_template", "on_bad_media")
    data = {"num_frames": 4} | {key: settings.pop(key) for key in keys if key in settings}
    return PromptBuilder(tokenizer, PromptTemplate(template), DataConfig(**data), tokens, **settings).build(
        row
    )


def test_every_token_is_accounted_for(tokenizer: Tokenizer, videos: tuple[str, str]) -> None:
    row = Row("1", PROBLEM, videos=videos[:1], answer="A", problem_type="multiple choice")
    prompt = make(tokenizer, row, frame_template="t{time} {media}")
    media = tokenizer.token_id("<media>")
    assert prompt.videos[0].timestamps == (0.0, 3.0, 6.0, 9.0)
    expected: list[int | None] = []
    for time in (0, 3, 6, 9):
        expected += [tokenizer.token_id(f"t{time}"), media, media, media]
    expected += [tokenizer.token_id(w) for w in "Where is it ? A : left B : right".split()]
    assert prompt.token_ids.tolist() == expected
    rows = [i if token == media else None for i, token in enumerate(expected)]
    assert prompt.media_index[prompt.token_ids == media].tolist() == list(range(12))
    assert (prompt.media_index[prompt.token_ids != media] == -1).all() and None in rows
    assert prompt.position_ids.tolist() == list(range(len(expected))) and prompt.next_position == len(
        expected
    )
    assert prompt.num_media_rows == 12 and prompt.tokens_per_frame == 3 and prompt.row is row
    for tensor in (prompt.token_ids, prompt.position_ids, prompt.media_index):
        assert tensor.dtype == torch.int64


def test_several_videos_in_any_order(tokenizer: Tokenizer, videos: tuple[str, str], tmp_path: Path) -> None:
    """Rows are concatenated in the row's order, so what the encoder returns needs no reordering."""
    (tmp_path / "swapped.jinja").write_text("first {{ videos[1] }} then {{ videos[0] }} {{ problem }}")
    row = Row("1", PROBLEM, videos=videos)
    straight = make(tokenizer, row, tokens=2)
    swapped = make(tokenizer, row, tokens=2, template=str(tmp_path / "swapped.jinja"))
    assert straight.media_index[straight.media_index >= 0].tolist() == list(range(16))
    assert swapped.media_index[swapped.media_index >= 0].tolist() == [*range(8, 16), *range(8)]
    assert [video.path for video in swapped.videos] == list(videos)
    assert straight.fingerprint != swapped.fingerprint


def test_temporal_pooling_counts_groups(tokenizer: Tokenizer, videos: tuple[str, str]) -> None:
    row = Row("1", PROBLEM, videos=videos)
    prompt = make(tokenizer, row, num_frames=5, temporal_pooling=2, frame_template="t{time} {media}")
    assert prompt.num_media_rows == (3 + 3) * 3 and [v.num_frames for v in prompt.videos] == [5, 5]
    text = prompt.token_ids[prompt.media_index < 0].tolist()[:6]
    times = [prompt.videos[v].timestamps[g] for v in (0, 1) for g in (0, 2, 4)]
    assert text == [tokenizer.token_id(f"t{int(t + 0.5)}") for t in times]


def test_sampling_by_rate_and_by_row(tokenizer: Tokenizer, videos: tuple[str, str]) -> None:
    def frames(extra: dict[str, Any], **settings: Any) -> tuple[int, ...]:
        return (
            make(tokenizer, Row("1", PROBLEM, videos=videos[:1], extra=extra), **settings).videos[0].frame_ids
        )

    assert frames({}, num_frames=None, fps=0.5) == (0, 2, 4, 6, 8)
    assert frames({}, num_frames=None, fps=1.0, max_frames=2) == (0, 9)
    assert frames({"num_frames": 2}) == (0, 9)
    assert frames({"num_frames": 2}, num_frames=None, fps=1.0) == (0, 9)
    assert frames({"fps": 0.25}) == (0, 4, 8)
    assert frames({"fps": 1, "max_frames": 3}) == (0, 4, 9)
    assert frames({"max_frames": 2}, num_frames=None, fps=1.0) == (0, 9)
    with pytest.raises(MegavilaError, match="'num_frames': '7' is not a number"):
        frames({"num_frames": "7"})


def test_text_only_row(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, Row("1", PROBLEM, data_type="text"))
    assert prompt.num_media_rows == 0 and prompt.videos == () and (prompt.media_index == -1).all()


def test_placeholder_in_a_question_is_text(tokenizer: Tokenizer, videos: tuple[str, str]) -> None:
    media = tokenizer.token_id("<media>")
    prompt = make(tokenizer, Row("1", "Where is <media> left? <|im_end|>", videos=videos[:1]))
    assert (prompt.token_ids == media).sum() == prompt.num_media_rows == 12
    assert not (prompt.token_ids == tokenizer.eos_id).any()


def test_prompt_is_read_as_one_text(tokenizer: Tokenizer) -> None:
    """Neighbouring pieces are tokenized together, as the whole text would be."""
    prompt = make(tokenizer, Row("1", PROBLEM, data_type="text"), template="longvideo_reason")
    text = "".join(part.text for part in PromptTemplate("longvideo_reason").render(prompt.row))
    assert prompt.token_ids.tolist() == tokenizer.encode(text)


def test_media_token(tokenizer: Tokenizer, videos: tuple[str, str]) -> None:
    row = Row("1", PROBLEM, videos=videos[:1])
    prompt = make(tokenizer, row, media_token="left")
    assert (prompt.token_ids[prompt.media_index >= 0] == tokenizer.token_id("left")).all()
    with pytest.raises(MegavilaError, match="'<frame>' is not in the tokenizer's vocabulary"):
        make(tokenizer, row, media_token="<frame>")


def test_too_long_names_numbers_and_fix(tokenizer: Tokenizer, videos: tuple[str, str]) -> None:
    row = Row("1", PROBLEM, videos=videos[:1], source="rows.jsonl:9")
    assert len(make(tokenizer, row, max_prompt_tokens=22).token_ids) == 22
    message = r"rows.jsonl:9: its prompt has 22 tokens \(12 for 4 frames\), more than max_prompt_tokens=21; use at most about 3"
    with pytest.raises(MegavilaError, match=message):
        make(tokenizer, row, max_prompt_tokens=21)
    make(tokenizer, row, max_prompt_tokens=21, num_frames=3)
    with pytest.raises(MegavilaError, match="raise the limit"):
        make(tokenizer, row, max_prompt_tokens=5)


def test_bad_rows(tokenizer: Tokenizer) -> None:
    with pytest.raises(MediaError, match="missing.mp4: no such file"):
        make(tokenizer, Row("1", PROBLEM, videos=("missing.mp4",)))
    with pytest.raises(MegavilaError, match="rows.jsonl:4: audio"):
        make(tokenizer, Row("1", PROBLEM, videos=("a.wav",), data_type="audio", source="rows.jsonl:4"))


def test_position_rule_sees_where_media_lie(tokenizer: Tokenizer, videos: tuple[str, str]) -> None:
    seen: list[MediaSpan] = []

    def three_axes(tokens: int, spans: Any) -> tuple[torch.Tensor, int]:
        seen.extend(spans)
        return torch.arange(tokens).expand(3, tokens).contiguous() * 2, 2 * tokens

    prompt = make(tokenizer, Row("1", PROBLEM, videos=videos), num_frames=2, positions=three_axes)
    assert prompt.position_ids.shape == (3, len(prompt.token_ids))
    assert prompt.next_position == 2 * len(prompt.token_ids)
    assert [(s.video, s.group, s.tokens, s.time) for s in seen] == [
        (0, 0, 3, 0),
        (0, 1, 3, 9),
        (1, 0, 3, 0),
        (1, 1, 3, 6),
    ]
    for span in seen:
        assert (prompt.media_index[span.start : span.start + span.tokens] >= 0).all()


def test_fingerprint_follows_content(tokenizer: Tokenizer, videos: tuple[str, str], tmp_path: Path) -> None:
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(Path(videos[0]).read_bytes())
    first = make(tokenizer, Row("1", PROBLEM, videos=videos[:1]))
    assert make(tokenizer, Row("2", PROBLEM, videos=(str(copy),))).fingerprint == first.fingerprint
    others = (
        make(tokenizer, Row("1", PROBLEM + " it", videos=videos[:1])),
        make(tokenizer, Row("1", PROBLEM, videos=videos[1:])),
        make(tokenizer, Row("1", PROBLEM, videos=videos[:1]), num_frames=5),
    )
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_response_ends_with_the_end_token(tokenizer: Tokenizer) -> None:
    builder = PromptBuilder(tokenizer, PromptTemplate("plain"), DataConfig(), 1)
    ids = builder.encode_response("<think> left </think> <answer>A</answer>")
    assert ids.dtype == torch.int64 and int(ids[-1]) == tokenizer.eos_id
    assert tokenizer.decode(ids.tolist()) == "<think> left </think> <answer> A </answer>"
    assert builder.encode_response("<|im_end|> left").tolist().count(tokenizer.eos_id) == 1


class CountingTokenizer:
    """Another tokenizer, counting what it is asked to encode."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner = inner
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return self.inner.encode(text)


@pytest.mark.parametrize("frame_template", ["first {media} then", "t{time} {media}"])
def test_texts_between_frames_are_tokenized_once(
    tokenizer: Tokenizer, videos: tuple[str, str], frame_template: str
) -> None:
    counting: Any = CountingTokenizer(tokenizer)
    data = DataConfig(num_frames=7, frame_template=frame_template)
    builder = PromptBuilder(counting, PromptTemplate("plain"), data, 3)
    row = Row("1", PROBLEM, videos=videos[1:])
    prompt = builder.build(row)
    # Before the first frame, after the last, and between them: always the same text, or one for each time.
    assert counting.calls == 2 + (1 if "then" in frame_template else 6)
    again = builder.build(row)
    assert counting.calls == 2 + (1 if "then" in frame_template else 6)
    fresh = make(tokenizer, row, num_frames=7, frame_template=frame_template)
    assert torch.equal(prompt.token_ids, fresh.token_ids) and torch.equal(again.token_ids, fresh.token_ids)
