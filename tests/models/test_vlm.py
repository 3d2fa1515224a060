"""Text and media rows joined, frozen parts, initial weights."""

import pytest
import torch

from megavila.models import AttentionContext, build_model, export_hf
from megavila.runtime.errors import MegavilaError
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology
from tests.models.hf_reference import causal
from tests.models.tensor_parallel_cases import vlm_config, vlm_step


def test_embed_scatters_rows_with_gradients_to_both(topology: Topology) -> None:
    model = build_model(vlm_config(), topology, get_platform("cpu"))
    ids = torch.tensor([7, 10**6, 3, 10**6, 7, 10**6])  # what stands at media positions is not looked up
    media_index = torch.tensor([-1, 1, -1, 0, -1, 1])
    rows = torch.randn(2, 32, requires_grad=True)
    embeddings = model.embed(ids, media_index, rows)
    table = model.language.gpt.embedding.word_embeddings.weight
    expected = torch.stack([table[7], rows[1], table[3], rows[0], table[7], rows[1]])
    assert torch.equal(embeddings, expected)
    upstream = torch.randn(6, 32)
    ours = torch.autograd.grad(embeddings, (rows, table), upstream)
    theirs = torch.autograd.grad(expected, (rows, table), upstream)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("given", [None, 0, 1, 3])
def test_wrong_number_of_media_rows_raises(given: int | None, topology: Topology) -> None:
    model = build_model(vlm_config(), topology, get_platform("cpu"))
    rows = None if given is None else torch.zeros(given, 32)
    with pytest.raises(MegavilaError, match=f"names 2 media rows but {given or 0} were given"):
        model.embed(torch.zeros(3, dtype=torch.long), torch.tensor([-1, 0, 1]), rows)
    with pytest.raises(MegavilaError, match="media indices"):
        model.embed(torch.zeros(3, dtype=torch.long), torch.tensor([-1, 0]), rows)
    with pytest.raises(MegavilaError, match="3 embedding rows but 4 position ids"):
        model(torch.zeros(3, 32), AttentionContext(torch.arange(4), causal))


def test_text_only_model_refuses_frames(topology: Topology) -> None:
    model = build_model(vlm_config(vision=None), topology, get_platform("cpu"))
    ids = torch.tensor([1, 2])
    assert torch.equal(model.embed(ids, torch.full((2,), -1), None), model.language.embed(ids))
    with pytest.raises(MegavilaError, match="no vision tower"):
        model.encode_frames(torch.zeros(1, 3, 21, 21, dtype=torch.uint8))


@pytest.mark.parametrize("frozen", ["language", "vision", "projector"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen: str, topology: Topology) -> None:
    def gradients(**changes: bool) -> dict[str, torch.Tensor]:
        model = build_model(vlm_config(**changes), topology, get_platform("cpu"))
        ids, index = torch.arange(9), torch.full((9,), -1)
        index[2:6] = torch.arange(4)
        frames = torch.randint(
            0, 256, (1, 3, 21, 21), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        rows = model.media_rows(model.encode_frames(frames))
        hidden = model(model.embed(ids, index, rows), AttentionContext(torch.arange(9), causal))
        model.token_logprobs(hidden, ids)[0].sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    everything = gradients()
    without = gradients(**{f"train_{frozen}": False})
    assert without.keys() == {name for name in everything if not name.startswith(f"{frozen}.")}
    for name, gradient in without.items():
        torch.testing.assert_close(gradient, everything[name])


def test_double_precision_model_runs(topology: Topology) -> None:
    model = build_model(vlm_config(dtype="float64"), topology, get_platform("cpu"))
    results = vlm_step(model)
    single = vlm_step(build_model(vlm_config(), topology, get_platform("cpu")))
    assert results["logprobs"].dtype == torch.float64
    torch.testing.assert_close(results["logprobs"].float(), single["logprobs"], rtol=1e-4, atol=1e-5)


def test_bf16_model_runs(topology: Topology) -> None:
    model = build_model(vlm_config(dtype="bfloat16"), topology, get_platform("cpu"))
    results = vlm_step(model)
    single = vlm_step(build_model(vlm_config(), topology, get_platform("cpu")))
    assert results["logprobs"].dtype == torch.float32
    torch.testing.assert_close(results["logprobs"], single["logprobs"], rtol=0.05, atol=0.05)


def test_initial_weights_follow_the_seed_and_the_name(topology: Topology) -> None:
    first, again, other = (
        dict(export_hf(build_model(vlm_config(), topology, get_platform("cpu"), seed=seed)))
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].dim() > 1]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    q, k = (first[f"llm.model.layers.0.self_attn.{x}_proj.weight"] for x in "qk")
    assert q.std().item() == pytest.approx(0.02, rel=0.1) and not torch.equal(q[: k.shape[0]], k)
    assert first["llm.model.layers.0.self_attn.o_proj.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert first["llm.model.norm.weight"].eq(1).all()
