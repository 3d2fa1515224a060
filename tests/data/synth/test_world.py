import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from megavila.data.synth import (
    CATEGORIES,
    Difficulty,
    DifficultyRange,
    SplitConfig,
    WorldConfig,
    goal,
    make_scene,
    plot,
    row_scene,
    spatial,
    synthesize,
    temporal,
    trace,
)
from megavila.data.synth.encode import encode, render
from megavila.data.synth.rows import LETTERS, to_row
from megavila.data.synth.scene import GOAL, PLOT, SPATIAL, TEMPORAL, Scene, timeline

LEVELS = (
    Difficulty(events=1),
    Difficulty(events=4, decoys=2),
    Difficulty(events=12, decoys=3, slack_seconds=20.0),
)


def scenes(category: str, count: int = 60) -> list[Scene]:
    rng = np.random.default_rng(7)
    return [make_scene(category, LEVELS[index % 3], rng) for index in range(count)]


@pytest.mark.parametrize("category", CATEGORIES)
def test_answer_follows_from_events(category: str) -> None:
    for scene in scenes(category):
        events = list(scene.events)
        match category:
            case "Spatial":
                found = spatial.PLACES[spatial.derive(events)]
            case "Temporal":
                found = temporal.derive(events, scene.facts)
            case "Goal and Purpose":
                found = goal.LANES[goal.derive(events)]
            case _:
                found = plot.PEOPLE[plot.derive(events)]
        assert scene.options[scene.answer] == found
        assert scene.conclusion == f"so {found}"


@pytest.mark.parametrize("category", CATEGORIES)
def test_events_are_ordered_and_inside_the_video(category: str) -> None:
    for scene in scenes(category):
        ends = [0.0]
        for event in scene.events:
            assert ends[-1] <= event.start < event.end <= scene.duration
            ends.append(event.end)
        told = [event for event in scene.events if event.kind == "event"]
        minimum = {TEMPORAL: 2}.get(category, scene.difficulty.events)
        assert len(told) >= minimum
        assert all(bool(event.words) == (event.kind != "decoy") for event in scene.events)


def test_reasoning_tells_times_and_answer() -> None:
    scene = make_scene(SPATIAL, Difficulty(events=2), np.random.default_rng(0))
    row = to_row(scene, "x-0", "videos/x/0.mp4")
    for event in scene.events:
        assert f"At {event.start:.1f} s {event.sentence}." in row["reasoning"]
    assert row["reasoning"].endswith(f"so the answer is {LETTERS[scene.answer]}.")
    assert row["answer"] == f"<answer>{LETTERS[scene.answer]}</answer>"
    assert row["problem"].splitlines()[1:] == ["A: left", "B: middle", "C: right"]


def test_letters_balance_within_category_and_split(tmp_path: Path) -> None:
    split = SplitConfig("train", 120, DifficultyRange(events=(1, 4)))
    config = WorldConfig(tmp_path, (split,), seed=3)
    letters = Counter(
        (scene.category, scene.answer) for scene in (row_scene(config, split, i) for i in range(120))
    )
    assert letters == Counter({(category, answer): 10 for category in CATEGORIES for answer in range(3)})


def test_shuffled_options_keep_the_truth() -> None:
    rng = np.random.default_rng(0)
    orders = set()
    for _ in range(40):
        scene = make_scene(SPATIAL, Difficulty(events=3), rng, answer=1, shuffle=True)
        orders.add(scene.options)
        assert scene.answer == 1
        assert scene.options[1] == spatial.PLACES[spatial.derive(list(scene.events))]
    assert len(orders) == 6


def test_splits_share_no_scene(tmp_path: Path) -> None:
    splits = tuple(SplitConfig(name, 24, DifficultyRange(events=(4, 6))) for name in ("train", "test"))
    config = WorldConfig(tmp_path, splits, seed=0)
    rows = [[to_row(row_scene(config, s, i), "", "")["events"] for i in range(24)] for s in splits]
    assert all(mine != theirs for mine in rows[0] for theirs in rows[1])
    other = WorldConfig(tmp_path, splits, seed=1)
    assert to_row(row_scene(other, splits[0], 0), "", "")["events"] != rows[0][0]


def test_timeline_spends_slack_and_keeps_gaps() -> None:
    rng = np.random.default_rng(1)
    short, _ = timeline(Difficulty(events=5), rng)
    for before, after in zip(short, short[1:], strict=False):
        assert after.start % 1 == 0.5
        assert after.start - before.end in (1.0, 1.5, 2.0)
    lengths = [timeline(Difficulty(events=2, slack_seconds=60.0), rng)[1] for _ in range(5)]
    assert min(lengths) > 65


def test_trace_snaps_times_to_sampled_frames() -> None:
    scene = make_scene(GOAL, Difficulty(events=2, gap_seconds=(1.0, 1.0)), np.random.default_rng(0))
    row = json.loads(json.dumps(to_row(scene, "", "")))
    first, second = scene.events[1:]
    full = trace(row, list(range(scene.duration)))
    assert full is not None
    assert full.split(" ; ") == [
        f"t0 {scene.events[0].words}",
        f"t5 {first.words}",
        f"t9 {second.words}",
        scene.conclusion,
    ]
    every_third = trace(row, [1, 5.6, 10.4])
    assert every_third is not None
    assert [clause.split()[0] for clause in every_third.split(" ; ")] == ["t1", "t6", "t10", "so"]
    assert trace(row, [1, 9]) is None


def _lit(picture: np.ndarray, column: int, row: int) -> np.ndarray:
    cell = picture.shape[0] // 3
    centre = picture[
        row * cell + cell // 4 : (row + 1) * cell - cell // 4, column * cell + 7 : (column + 1) * cell - 7
    ]
    return centre.reshape(-1, 3).mean(0)


def test_temporal_answer_from_pixels() -> None:
    rng = np.random.default_rng(5)
    for _ in range(6):
        scene = make_scene(TEMPORAL, Difficulty(events=4, drift=3, noise=10), rng)
        seen: list[str] = []
        previous = "off"
        for index, picture in enumerate(render(scene, rng, fps=2)):
            if index % 2:
                continue
            r, g, b = _lit(picture, 1, 1)
            state = "off"
            if max(r, g, b) > 110:
                spread = max(r, g, b) - min(r, g, b)
                state = "red green blue".split()[int(np.argmax([r, g, b]))] if spread > 60 else "star"
            if state != previous and state != "off":
                seen.append(state)
            previous = state
        answer = scene.options[scene.answer]
        if scene.facts["kind"] == "count":
            assert str(seen.count(scene.facts["asked"])) == answer
        else:
            assert seen[seen.index("star") - 1] == answer


def test_goal_answer_from_pixels() -> None:
    rng = np.random.default_rng(6)
    for _ in range(6):
        scene = make_scene(GOAL, Difficulty(events=5, distractors=0, decoys=1), rng)
        lane, previous = -1, 0
        for index, picture in enumerate(render(scene, rng, fps=1)):
            if index == 0:
                lane = int(np.argmax([_lit(picture, column, 2) @ [-1, -1, 2] for column in range(3)]))
            elif index >= 3:
                left, right = _lit(picture, 0, 1), _lit(picture, 2, 1)
                turn = -1 if left[1] - left[0] > 90 else int(right[0] - right[2] > 110)
                lane = (lane + turn) % 3 if turn != previous else lane
                previous = turn
        assert scene.options[scene.answer] == goal.LANES[lane]


def test_spatial_and_plot_pixels_show_the_start() -> None:
    rng = np.random.default_rng(8)
    for _ in range(6):
        scene = make_scene(SPATIAL, Difficulty(events=1, distractors=0), rng)
        picture = next(iter(render(scene, rng)))
        red = (picture[..., 0] > 170) & (picture[..., 1] < 90) & (picture[..., 2] < 90)
        ball = int(np.argmax([red[:, 28 * column : 28 * column + 28].sum() for column in range(3)]))
        assert ball == scene.events[0].args["ball"]
        scene = make_scene(PLOT, Difficulty(events=1, distractors=0), rng)
        picture = next(iter(render(scene, rng)))
        assert int(np.argmax(_lit(picture, 1, 2))) == scene.events[0].args["owner"]


def test_files_decode_with_right_count_and_times(tmp_path: Path) -> None:
    config = WorldConfig(
        tmp_path, (SplitConfig("a", 4, DifficultyRange(events=(1, 2))),), fps=3, size=60, workers=1
    )
    rows = [json.loads(line) for line in synthesize(config, lambda *_: None)["a"].read_text().splitlines()]
    assert [row["problem_id"] for row in rows] == [f"a-{index:06d}" for index in range(4)]
    for row in rows:
        with av.open(str(tmp_path / row["videos"])) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            frames = list(container.decode(stream))
        assert len(frames) == row["duration"] * 3
        assert (frames[0].width, frames[0].height) == (60, 60)
        assert [frame.time for frame in frames] == pytest.approx([index / 3 for index in range(len(frames))])


def test_deterministic_resumable_and_parallel(tmp_path: Path) -> None:
    split = SplitConfig("a", 6, DifficultyRange(events=(1, 1)))
    told: list[tuple[str, int, int]] = []

    def config(name: str, workers: int = 1, count: int = 6) -> WorldConfig:
        return WorldConfig(
            tmp_path / name, (SplitConfig("a", count, split.difficulty),), workers=workers, fps=2
        )

    def content(name: str) -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}

    synthesize(config("one"), lambda *step: told.append(step))
    synthesize(config("two", workers=2), lambda *_: None)
    assert content("one") == content("two")
    assert told[-1] == ("a", 6, 6)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.mp4")}
    missing = tmp_path / "one/videos/a/000002.mp4"
    missing.unlink()
    synthesize(config("one", count=7), lambda *_: None)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.mp4")}
    assert {path for path in after if after[path] != before.get(path)} == {
        missing,
        tmp_path / "one/videos/a/000006.mp4",
    }
    assert missing.read_bytes() == (tmp_path / "two/videos/a/000002.mp4").read_bytes()
    with pytest.raises(ValueError, match="other settings"):
        synthesize(WorldConfig(tmp_path / "one", (split,), seed=9, fps=2), lambda *_: None)


def test_no_half_written_file(tmp_path: Path) -> None:
    def broken() -> object:
        yield np.zeros((60, 60, 3), np.uint8)
        raise RuntimeError("camera fell over")

    with pytest.raises(RuntimeError, match="camera"):
        encode(broken(), tmp_path / "x.mp4", fps=2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no frame"):
        encode([], tmp_path / "x.mp4", fps=2)
    with pytest.raises(ValueError, match="even"):
        encode([np.zeros((61, 60, 3), np.uint8)], tmp_path / "x.mp4", fps=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Difficulty(events=0), "at least 1"),
        (lambda: Difficulty(decoys=-1), "negative"),
        (lambda: Difficulty(gap_seconds=(2.0, 1.0)), "gap_seconds"),
        (lambda: Difficulty(drift=20), "limit"),
        (lambda: DifficultyRange(events=(4, 2)), "lower bound"),
        (lambda: SplitConfig("a/b", 1), "may hold only"),
        (lambda: SplitConfig("a", 0), "at least 1"),
        (lambda: SplitConfig("a", 1, categories=("Spatial", "Cooking")), "choose from"),
        (lambda: WorldConfig(Path(), (SplitConfig("a", 1), SplitConfig("a", 1))), "each name once"),
        (lambda: WorldConfig(Path(), (SplitConfig("a", 1),), size=63), "even"),
        (lambda: make_scene("Cooking", Difficulty(), np.random.default_rng(0)), "unknown category"),
    ],
)
def test_bad_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_dark_videos_show_nothing_and_keep_answers_balanced() -> None:
    split = SplitConfig("dark", 120, dark_share=0.25)
    config = WorldConfig(Path("unused"), (split,), fps=1)
    scenes = [row_scene(config, split, index) for index in range(split.count)]
    dark = [scene for scene in scenes if scene.facts.get("dark")]
    assert 15 <= len(dark) <= 45
    for scene in dark[:3]:
        frames = list(render(scene, np.random.default_rng(0), fps=1))
        assert len(frames) == scene.duration and not any(frame.any() for frame in frames)
        told = trace(to_row(scene, "x", "x.mp4"), list(range(scene.duration)))
        assert told == f"t0 dark ; {scene.conclusion}"
    answers = np.bincount([scene.answer for scene in scenes])
    assert answers.min() == answers.max() == 40


@pytest.mark.parametrize("category", (GOAL, PLOT, SPATIAL))
def test_the_last_event_alone_does_not_tell_the_answer(category: str) -> None:
    rng = np.random.default_rng(9)
    by_last: dict[str, list[int]] = {}
    for _ in range(600):
        scene = make_scene(category, Difficulty(events=4, decoys=0), rng)
        by_last.setdefault(scene.events[-1].words.split(" -> ")[0], []).append(scene.answer)
    for answers in by_last.values():
        assert (
            np.bincount(answers, minlength=3).max() / len(answers) < 0.47
        )  # chance is 1/3; the old clamped lanes gave 1/2
