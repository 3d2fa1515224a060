"""YAML and overrides to dataclasses and back; every mistake names its place and the fix."""

import dataclasses
from pathlib import Path

import pytest

from megavila.config import (
    ConfigError,
    EvalConfig,
    GrpoRunConfig,
    SftRunConfig,
    build,
    describe,
    describe_text,
    load_config,
    save_config,
)
from megavila.config.load import read_yaml

YAML = """
run: {name: first, steps: 10}
model:
  language: {hidden_size: 32, num_layers: 2, num_heads: 8, num_kv_heads: 2, ffn_hidden_size: 64}
  vision: {hidden_size: 24, num_layers: 2, num_heads: 3, intermediate_size: 48, image_size: 28, patch_size: 14}
data: {train: [rows.jsonl], num_frames: 8}
optimizer: {lr: 1e-3}
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def test_file_defaults_and_overrides(yaml_file: Path) -> None:
    config = load_config(
        GrpoRunConfig,
        yaml_file,
        [
            "optimizer.betas=[0.9,0.95]",
            "rollout.stop=</answer>",
            "run.seed=3",
            "optimizer.lr=2e-5",
            "data.fps=null",
        ],
    )
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.lr == 2e-5
    assert config.rollout.stop == ("</answer>",)
    assert config.run.seed == 3
    assert config.rollout.group_size == 8
    assert config.model.language is not None and config.model.language.head_dim == 4
    assert config.run.directory == Path("runs/first")


def test_interpolation_sees_defaults(yaml_file: Path) -> None:
    config = load_config(SftRunConfig, yaml_file, ["run.name=seed-${run.seed}-${run.device}"])
    assert config.run.name == "seed-0-auto"


def test_round_trip_is_equal(yaml_file: Path, tmp_path: Path) -> None:
    config = load_config(
        GrpoRunConfig, yaml_file, ["data.frame_template='{time} s: {media}'", "rollout.stop=['a: b','#']"]
    )
    saved = tmp_path / "deep" / "config.yaml"
    save_config(config, saved)
    assert load_config(GrpoRunConfig, saved) == config
    assert [p.name for p in saved.parent.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=3", ["override 'optimizer.lrr=3'", "unknown key", "did you mean optimizer.lr?"]),
        ("grpo.kl_betta=0", ["did you mean grpo.kl_beta?"]),
        ("lr=3", ["did you mean optimizer.lr?"]),
        ("model.num_layers=3", ["did you mean model.language.num_layers or model.vision.num_layers?"]),
        ("parallel.qqq=2", ["valid keys are", "parallel.tensor_parallel"]),
        ("steps", ["key=value"]),
        ("run.steps=many", ["run.yaml", "run: steps is 'many' (str), must be int"]),
        ("run.steps=true", ["must be int"]),
        ("run.steps=2.5", ["must be int"]),
        ("run.steps=0", ["steps is 0, must be at least 1"]),
        ("run.name=7", ["name is 7 (int), must be str"]),
        ("run.steps=null", ["must be int"]),
        ("optimizer=3", ["optimizer is 3", "section"]),
        ("optimizer.betas=[0.9]", ["list of 2 float"]),
        ("optimizer.schedule=cosin", ["one of constant, linear, cosine"]),
        ("data.fps=1", ["num_frames 8 and fps 1.0 are both set"]),
        ("data.num_frames=8193", ["8193", "at most 8192"]),
        ("rollout.group_size=1", ["group_size is 1", "at least 2"]),
        ("rollout.temperature=0", ["temperature is 0"]),
        ("parallel.tensor_parallel=3", ["8 query heads and 2 key/value heads", "3", "[1, 2, 4, 8]"]),
        ("model.language.num_kv_heads=3", ["8 query heads", "[1, 2, 4, 8]"]),
        ("run.eval_every=5", ["data.eval is empty"]),
        ("data.train=[]", ["data.train is empty"]),
        ("optimizer.warmup_steps=10", ["below the run's 10 updates"]),
        ("run.name=${run.nmae}", ["run.nmae"]),
        ("run.steps=[1", ["override 'run.steps=[1'"]),
    ],
)
def test_mistakes_in_overrides(yaml_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(GrpoRunConfig, yaml_file, [override])
    for word in words:
        assert word in str(caught.value)


def test_mistakes_in_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(YAML.replace("steps: 10", "stepps: 10"))
    with pytest.raises(ConfigError, match=r"bad\.yaml: unknown key 'run.stepps'; did you mean run\.steps"):
        load_config(SftRunConfig, path)
    path.write_text(YAML.replace(", steps: 10", ""))
    with pytest.raises(ConfigError, match=r"bad\.yaml: run\.steps is not set"):
        load_config(SftRunConfig, path)
    path.write_text("run: [unclosed")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not valid YAML"):
        load_config(SftRunConfig, path)
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="must hold keys and values"):
        load_config(SftRunConfig, path)
    with pytest.raises(ConfigError, match=r"does not exist; did you mean bad\.yaml"):
        load_config(SftRunConfig, tmp_path / "bed.yaml")


def test_read_yaml_resolves_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "saved.yaml"
    path.write_text("a: 3\nb: {c: '${a}', d: [1, x]}\n")
    assert read_yaml(path) == {"a": 3, "b": {"c": 3, "d": [1, "x"]}}
    path.write_text("b: ${missing}\n")
    with pytest.raises(ConfigError, match=r"saved\.yaml: .*missing"):
        read_yaml(path)


def test_section_of_another_algorithm_is_unknown(yaml_file: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'grpo.clip_low'"):
        load_config(SftRunConfig, yaml_file, ["grpo.clip_low=0.1"])


def test_updates_of_a_grpo_run(yaml_file: Path) -> None:
    config = load_config(GrpoRunConfig, yaml_file, ["grpo.updates_per_batch=4", "grpo.epochs_per_batch=2"])
    assert config.total_updates == 80
    with pytest.raises(ConfigError, match="exceeds prompts_per_step 16"):
        load_config(GrpoRunConfig, yaml_file, ["grpo.updates_per_batch=17"])


def test_eval_config(yaml_file: Path) -> None:
    values = {
        "model": {"path": "somewhere"},
        "data": {"eval": "rows.jsonl"},
        "num_frames": [4, 8],
    }
    config = build(EvalConfig, values)
    assert (config.data.eval, config.num_frames, config.temperature) == (("rows.jsonl",), (4, 8), 0.0)
    with pytest.raises(ConfigError, match="data.eval is empty"):
        build(EvalConfig, values | {"data": {}})


def test_describe_documents_every_key() -> None:
    knobs = {k.key: k for root in (GrpoRunConfig, SftRunConfig, EvalConfig) for k in describe(root)}
    assert all(k.doc.endswith(".") for k in knobs.values())
    assert knobs["run.steps"].default == "required"
    assert knobs["optimizer.betas"].default == "[0.9, 0.999]"
    assert knobs["model.language.mrope_section"].type == "list of int | null"
    assert "rollout.group_size: int = 8" in describe_text(GrpoRunConfig)


def test_sections_are_frozen_and_hashable(yaml_file: Path) -> None:
    config = load_config(GrpoRunConfig, yaml_file)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 1  # type: ignore[misc]
    assert len({config, load_config(GrpoRunConfig, yaml_file)}) == 1
