"""Two tensor-parallel ranks against one: initial weights, log-probs, gradients, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megavila.models import build_model, export_hf, load_hf_directory
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology
from tests.distributed import run_ranks
from tests.models.hf_reference import check_errors, relative_error
from tests.models.tensor_parallel_cases import (
    logprob_inputs,
    logprob_reference,
    on_two_ranks,
    vlm_config,
    vlm_single_token,
    vlm_step,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensor_parallel")


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, str(directory))


def test_decoder_equals_transformers(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for errors in rank["decoder"]:
            check_errors(errors)


def test_logprobs_equal_full_softmax(ranks: list[dict[str, Any]]) -> None:
    expected = logprob_reference(logprob_inputs(), 0.7)
    for rank in ranks:
        for ours, theirs in zip(rank["logprobs"], expected, strict=True):
            assert relative_error(ours.double(), theirs) < 1e-5


def test_initial_weights_do_not_depend_on_the_degree(ranks: list[dict[str, Any]], topology: Topology) -> None:
    model = build_model(vlm_config(), topology, get_platform("cpu"), seed=3)
    single = dict(export_hf(model))
    assert len(single) > 50
    for rank in ranks:
        assert rank["weights"].keys() == single.keys()
        assert all(torch.equal(rank["weights"][name], tensor) for name, tensor in single.items())


def test_logprobs_and_gradients_equal_one_rank(ranks: list[dict[str, Any]], topology: Topology) -> None:
    model = build_model(vlm_config(), topology, get_platform("cpu"), seed=3)
    single = vlm_step(model)
    for rank in ranks:
        assert rank["step"].keys() == single.keys()
        for name, expected in single.items():
            if "vision" in name and "k_proj.bias" in name:
                continue  # zero but for rounding
            assert relative_error(rank["step"][name], expected) < 1e-5, name
        assert relative_error(rank["single token"], vlm_single_token(model)) < 1e-5


def test_sharded_parameters_are_marked(ranks: list[dict[str, Any]]) -> None:
    layer = "language.gpt.decoder.layers.{}."
    names = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")
    expected = [layer.format(index) + f"{name}.weight" for index in range(2) for name in names]
    expected += ["language.gpt.embedding.word_embeddings.weight", "language.gpt.output_layer.weight"]
    assert ranks[0]["sharded"] == sorted(expected)


def test_checkpoint_is_bitwise_and_loads_on_one_rank(
    ranks: list[dict[str, Any]], directory: Path, topology: Topology
) -> None:
    for rank in ranks:
        assert all(torch.equal(rank["reloaded"][name], tensor) for name, tensor in rank["weights"].items())
    model = build_model(vlm_config(), topology, get_platform("cpu"), seed=5)
    load_hf_directory(model, directory / "saved")
    loaded = dict(export_hf(model))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in ranks[0]["weights"].items())


def test_impossible_degrees_name_the_numbers(ranks: list[dict[str, Any]]) -> None:
    heads, ffn, vocab = ranks[0]["errors"]
    assert "num_heads=3 cannot be split over tensor_parallel=2; use one of [1]" in heads
    assert "ffn_hidden_size=49" in ffn
    assert "vocab_size is not set" in vocab
