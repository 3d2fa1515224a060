"""Each section refuses what cannot work, and says what would."""

from typing import Any

import pytest

from megavila.config import (
    ConfigError,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunSettings,
    VisionConfig,
    check_split,
    resolve_parallel,
)

LANGUAGE: dict[str, Any] = {"hidden_size": 64, "num_layers": 2, "num_heads": 8, "ffn_hidden_size": 96}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 48,
    "image_size": 30,
    "patch_size": 14,
}


def test_language_defaults_are_resolved() -> None:
    language = LanguageConfig(**LANGUAGE)
    assert (language.num_kv_heads, language.head_dim, language.qkv_bias) == (8, 8, True)
    wide = LanguageConfig(**LANGUAGE, head_dim=32, num_kv_heads=2, mrope_section=(4, 6, 6))
    assert (wide.head_dim, wide.num_kv_heads) == (32, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, r"8 query heads cannot be shared by 3 .* \[1, 2, 4, 8\]"),
        ({"hidden_size": 60}, "hidden_size 60 does not divide by num_heads 8; set head_dim"),
        ({"head_dim": 7}, "head_dim is 7, must be even"),
        ({"mrope_section": (1, 2)}, "sum head_dim / 2 = 4"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0, must be greater than 0"),
        ({"num_layers": 0}, "num_layers is 0, must be at least 1"),
    ],
)
def test_language_mistakes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanguageConfig(**(LANGUAGE | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "hidden_size 24 does not divide by num_heads 5"),
        ({"patch_size": 31}, "patch_size 31 is larger than image_size 30"),
        ({"feature_layer": -4}, "must be from -3 to -1 for 2 layers"),
        ({"feature_layer": 0}, "must be from -3 to -1"),
        ({"post_norm": True}, "post_norm needs feature_layer -1"),
    ],
)
def test_vision_mistakes(change: dict[str, Any], message: str) -> None:
    assert VisionConfig(**VISION).patches_per_side == 2
    with pytest.raises(ConfigError, match=message):
        VisionConfig(**(VISION | change))


def test_model_needs_a_source_and_something_to_train() -> None:
    with pytest.raises(ConfigError, match="neither path nor language"):
        ModelConfig()
    with pytest.raises(ConfigError, match="nothing would train"):
        ModelConfig(path="x", train_projector=False, train_language=False)


def test_ulysses_and_ring() -> None:
    assert (ParallelConfig(context_parallel=8).ulysses, ParallelConfig(context_parallel=8).ring) == (1, 8)
    a2a = ParallelConfig(context_parallel=8, cp_comm_type="a2a")
    assert (a2a.ulysses, a2a.ring) == (8, 1)
    auto = ParallelConfig(context_parallel=8, cp_ulysses=4)
    assert (auto.cp_comm_type, auto.ulysses, auto.ring) == ("auto", 4, 2)
    both = ParallelConfig(context_parallel=8, cp_comm_type="a2a+p2p", cp_ulysses=2)
    assert (both.ulysses, both.ring) == (2, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_parallel": 8, "cp_comm_type": "a2a+p2p"}, r"needs cp_ulysses; use one of \[1, 2, 4, 8\]"),
        (
            {"context_parallel": 6, "cp_comm_type": "a2a+p2p", "cp_ulysses": 4},
            r"4 does not divide .* \[1, 2, 3, 6\]",
        ),
        ({"context_parallel": 4, "cp_comm_type": "a2a", "cp_ulysses": 2}, "contradicts cp_comm_type a2a"),
        (
            {"context_parallel": 4, "cp_comm_type": "p2p", "cp_ulysses": 4},
            "contradicts cp_comm_type p2p",
        ),
        ({"context_parallel": 6, "cp_ulysses": 4}, r"4 does not divide .* \[1, 2, 3, 6\]"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0, must be at least 1"),
    ],
)
def test_parallel_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**settings)


def test_heads_must_split_over_ulysses() -> None:
    model = ModelConfig(language=LanguageConfig(**(LANGUAGE | {"num_heads": 28, "hidden_size": 112})))
    check_split(model, ParallelConfig(context_parallel=14, cp_comm_type="a2a"))
    with pytest.raises(ConfigError, match=r"28 heads .* Ulysses degree 8; .* \[1, 2, 4, 7, 14, 28\]"):
        check_split(model, ParallelConfig(context_parallel=8, cp_comm_type="a2a"))
    with pytest.raises(ConfigError, match=r"7 heads on each"):
        check_split(model, ParallelConfig(tensor_parallel=4, context_parallel=2, cp_comm_type="a2a"))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor", "context", "ulysses"),
    [
        (
            28,
            4,
            1,
            2,
            1,
        ),  # each rank sends 4 heads of k and v around the ring, and Ulysses would send 16 of everything
        (28, 4, 1, 8, 1),  # 28 either way
        (32, 8, 1, 8, 8),
        (16, 16, 1, 4, 4),
        (16, 16, 4, 8, 4),  # no more than the 4 heads that are left
        (14, 2, 1, 3, 1),
    ],
)
def test_auto_takes_the_ulysses_degree_that_sends_least(
    heads: int, kv_heads: int, tensor: int, context: int, ulysses: int
) -> None:
    sizes = LANGUAGE | {"num_heads": heads, "num_kv_heads": kv_heads, "hidden_size": 4 * heads}
    model = ModelConfig(language=LanguageConfig(**sizes))
    found = resolve_parallel(model, ParallelConfig(tensor_parallel=tensor, context_parallel=context))
    assert found.ulysses == ulysses
    assert resolve_parallel(model, found) == found
    asked = ParallelConfig(tensor_parallel=tensor, context_parallel=context, cp_comm_type="p2p")
    assert resolve_parallel(model, asked) == asked


def test_few_key_value_heads_may_be_replicated_over_tensor_parallel_ranks() -> None:
    model = ModelConfig(language=LanguageConfig(**LANGUAGE, num_kv_heads=2))
    check_split(model, ParallelConfig(tensor_parallel=4))
    odd = ModelConfig(language=LanguageConfig(**(LANGUAGE | {"ffn_hidden_size": 90})))
    with pytest.raises(ConfigError, match=r"ffn_hidden_size 90 .*tensor_parallel 4; use one of \[1, 2\]"):
        check_split(odd, ParallelConfig(tensor_parallel=4))


def test_frames() -> None:
    assert DataConfig().num_frames == 32
    by_rate = DataConfig(fps=2)
    assert (by_rate.num_frames, by_rate.fps) == (None, 2.0)
    for settings, message in (
        ({"fps": 0.0}, "fps is 0.0, must be greater than 0"),
        ({"max_frames": 9000}, "max_frames is 9000, must be at most 8192"),
        ({"frame_template": "no slot"}, "must contain {media} once"),
    ):
        with pytest.raises(ConfigError, match=message):
            DataConfig(**settings)


def test_sampling_rewards_and_optimizer() -> None:
    for build, message in (
        (lambda: RolloutConfig(top_p=0.0), "top_p is 0.0"),
        (lambda: RolloutConfig(stop=("",)), "empty string"),
        (lambda: RewardConfig(functions=("a:b",)), "1 functions but 0 function_weights"),
        (lambda: RewardConfig(functions=("a.b",), function_weights=(1.0,)), "package.module:function"),
        (lambda: RewardConfig(accuracy_weight=0.0, format_weight=0.0), "all reward weights are 0"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "below 1"),
        (lambda: OptimizerConfig(lr=1e-5, min_lr=1e-4), "min_lr 0.0001 is above lr 1e-05"),
        (lambda: RunSettings(name="a/b", steps=1), "without '/'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build()


def test_lists_become_tuples_and_integers_floats() -> None:
    data = DataConfig(train=["a", "b"], fps=1)  # type: ignore[arg-type]
    assert data.train == ("a", "b")
    assert isinstance(data.fps, float)
