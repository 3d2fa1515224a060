"""What `mrsp.reuse` and `mrsp.store_dir` promise, by counting frames."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megavila.config.section import ConfigError
from megavila.media import MediaError
from megavila.training.session import Session, open_session
from megavila.training.tally import Tally
from tests.end_to_end.tiny import sft_config, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of 3 frames each; the third asks about the first's video."""
    directory = tmp_path_factory.mktemp("media")
    rows = [json.loads(line) for line in write_world(directory, rows=3).read_text().splitlines()]
    rows[2]["videos"] = rows[0]["videos"]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def config(world: Path, name: str, trains: str, **mrsp: Any) -> Any:
    model = {"train_vision": trains == "tower", "train_projector": trains != "language"}
    return sft_config(world, name, model=model, mrsp=mrsp)


def counts(session: Session) -> dict[str, float]:
    tally = Tally()
    session.encoder.report(4, session.work, tally)
    return tally.reduce(session.topology)


def passes(session: Session) -> list[int]:
    """Frames that went through the tower in a rollout, a pass without and a pass with gradient."""
    prompts = [session.prompts.builder.build(row) for row in session.rows]
    rows: list[Any] = session.encoder.rows(prompts)
    found = [int(counts(session)["frames/encoded"])]
    for grad in (False, True):
        again = session.encoder.rows_for_training(prompts, rows, grad=grad)
        for ours, first in zip(again, rows, strict=True):
            assert ours is not None and torch.allclose(ours.rows, first.rows, rtol=1e-5, atol=1e-6)
        found.append(int(counts(session)["frames/encoded"]))
    return found


@pytest.mark.parametrize(
    ("reuse", "trains", "expected"),
    [
        ("step", "language", [6, 0, 0]),
        ("rollout", "language", [6, 6, 6]),
        ("none", "language", [9, 9, 9]),
        ("step", "projector", [6, 0, 0]),
        ("rollout", "projector", [6, 6, 6]),
        ("step", "tower", [6, 0, 6]),
    ],
)
def test_reuse(world: Path, reuse: str, trains: str, expected: list[int]) -> None:
    with open_session(config(world, "reuse", trains, reuse=reuse), max_prompt_tokens=50) as session:
        assert passes(session) == expected
        assert counts(session)["frames/decoded"] == 0
        assert session.encoder.frames.misses == 6


def test_second_run_finds_the_first_ones_frames(world: Path, tmp_path: Path) -> None:
    settings = config(world, "disk", "projector", store_dir=str(tmp_path / "store"))
    for expected in (6, 0):
        with open_session(settings, max_prompt_tokens=50) as session:
            assert passes(session) == [expected, 0, 0]
            assert session.encoder.frames.misses == expected
    files = sorted((tmp_path / "store").rglob("*.safetensors"))
    assert len(files) == 2
    damaged = bytearray(files[0].read_bytes())
    damaged[-3] ^= 1
    files[0].write_bytes(damaged)
    with open_session(settings, max_prompt_tokens=50) as session:
        prompts = [session.prompts.builder.build(row) for row in session.rows]
        session.encoder.rows(prompts)
        found = counts(session)
    assert (found["frames/encoded"], found["frames/from_disk"], found["store/corrupt"]) == (3, 3, 1)


@pytest.mark.parametrize("policy", ["skip", "error"])
def test_damaged_video_is_skipped_or_raised(world: Path, policy: str) -> None:
    settings = sft_config(world, policy, data={"on_bad_media": policy})
    with open_session(settings, max_prompt_tokens=50) as session:
        prompts = [session.prompts.builder.build(row) for row in session.rows]

        def load(video: Any, *arguments: Any) -> Any:
            if video == prompts[1].videos[0]:
                raise MediaError(video.path, "damaged")
            return session.encoder.frames.load(video, *arguments)

        session.encoder.videos.loader = load
        for look in (session.encoder.rows, session.encoder.decode):
            if policy == "error":
                with pytest.raises(MediaError, match="damaged"):
                    look(prompts)
            else:
                found = look(prompts)
                assert [isinstance(entry, MediaError) for entry in found] == [False, True, False]


def test_store_dir_without_reuse_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set reuse to step"):
        config(world, "refused", "language", reuse="rollout", store_dir=str(tmp_path))
