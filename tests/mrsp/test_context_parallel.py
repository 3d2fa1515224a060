"""Context parallelism on gloo ranks against one rank with G independent sequences in fp64."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megavila.config import ParallelConfig
from megavila.models import VisionLanguageModel, export_hf, load_hf
from megavila.mrsp.context_parallel import take_shard
from megavila.mrsp.layout import LayoutKind, build_layout
from megavila.mrsp.logprobs import join_media_rows, response_logprobs_and_entropy
from megavila.runtime.errors import MegavilaError
from megavila.runtime.platform import get_platform
from megavila.runtime.seeds import seed_everything
from megavila.runtime.topology import Topology, initialize
from tests.distributed import run_ranks
from tests.mrsp.steps import GRID, TEMPERATURE, build, encode, gradients, make_step, one_by_one, run

DEGREES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ring 2": {"context_parallel": 2, "cp_comm_type": "p2p"},
        "whole groups 2": {"context_parallel": 2, "cp_split": "auto"},
        "ulysses 2": {"context_parallel": 2, "cp_comm_type": "a2a"},
    },
    4: {
        "ring 4": {"context_parallel": 4, "cp_comm_type": "p2p"},
        "ulysses 4": {"context_parallel": 4, "cp_comm_type": "a2a"},  # of 2 key/value heads
        "hybrid 2x2": {"context_parallel": 4, "cp_comm_type": "a2a+p2p", "cp_ulysses": 2},
        # The long case has 99 tokens a rank and goes by a ring, the others by Ulysses within a ring.
        "by length 4": {"context_parallel": 4, "cp_ulysses": 2, "cp_ring_tokens": 40},
        "ring 2 x tensor 2": {"context_parallel": 2, "tensor_parallel": 2},
        "ulysses 2 x tensor 2": {"context_parallel": 2, "tensor_parallel": 2, "cp_comm_type": "a2a"},
    },
}
# (case, layout, dtype)
Variant = tuple[str, LayoutKind, str]
LARGER: list[Variant] = [
    ("mixed", "repeated", "float64"),
    ("long", "shared_prefix", "float32"),
    ("long", "shared_prefix", "bfloat16"),
]
# Four processes on a core or two are slow: they take the cases with the most corners.
VARIANTS: dict[int, list[Variant]] = {
    2: [*((case, "shared_prefix", "float64") for case in GRID), *LARGER],
    4: [*((case, "shared_prefix", "float64") for case in ("short text", "mixed")), *LARGER],
}
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def on_ranks(rank: int, world: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    """All results of a world's degrees: log-probs and gradients by degree and variant, and special cases."""
    results: dict[str, Any] = {}
    for name, settings in DEGREES[world].items():
        topology = initialize(ParallelConfig(**{"cp_split": "always", **settings}), get_platform("cpu"))
        seed_everything(0, topology)
        found = {}
        for case, kind, dtype in VARIANTS[world]:
            model = build(topology, dtype)
            load_hf(model, weights)
            logprobs, grads = run(model, make_step(case), kind)
            # Ranks hold the same after the reduction: one copy is enough to send.
            found[case, kind, dtype] = (logprobs, grads if rank == 0 else {})
        model = build(topology, "float64")
        load_hf(model, weights)
        results[name] = {
            "found": found,
            "entropy": entropies(model),
            "padding": padding_gradients(model, topology),
            "projector": projector_alone(model),
            "refused": refused(model),
            "recompute": kept_attention(topology, weights),
        }
        parallel_state.destroy_model_parallel()
    return results


def entropies(model: VisionLanguageModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Entropies, and gradients of a random combination of them."""
    step = make_step("mixed")
    _, entropy = response_logprobs_and_entropy(
        model, build_layout(step.groups), encode(model, step), temperature=TEMPERATURE
    )
    (entropy * step.upstream).sum().backward()
    return entropy.detach(), gradients(model)


def padding_gradients(model: VisionLanguageModel, topology: Topology) -> list[tuple[int, bool, bool]]:
    """For two cases: padding rows of this rank, whether their gradients are all zero, and whether those of
    other rows are not."""
    results = []
    for case in ("mixed", "short text"):
        step = make_step(case)
        shard = take_shard(build_layout(step.groups), topology)
        embeddings = shard.embed(model, join_media_rows(encode(model, step))).detach().requires_grad_()
        hidden = model(embeddings, shard.context)
        logprobs, _ = model.token_logprobs(hidden[shard.predictor_rows], shard.targets)
        (shard.collect(logprobs) * step.upstream).sum().backward()
        padding = shard.sharding.padded_tokens() < 0
        assert embeddings.grad is not None
        rows = embeddings.grad.abs().amax(dim=1)
        results.append((int(padding.sum()), not rows[padding].any(), bool((rows[~padding] > 0).any())))
    model.zero_grad(set_to_none=True)
    return results


def projector_alone(model: VisionLanguageModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Only the projector trains, and some ranks hold no video at all: they must take part in the backward pass."""
    model.requires_grad_(False)
    assert model.projector is not None
    model.projector.requires_grad_(True)
    result = run(model, make_step("one response"), "shared_prefix")
    model.requires_grad_(True)
    return result


def kept_attention(topology: Topology, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A step whose layers are recomputed, but not their attention."""
    model = build(topology, "float64", recompute="keep_attention")
    load_hf(model, weights)
    return run(model, make_step("mixed"), "shared_prefix")


def refused(model: VisionLanguageModel) -> str:
    """A media row too few is an error on every rank, before any of them communicates."""
    step = make_step("one response")
    rows = join_media_rows(encode(model, step))
    assert rows is not None
    try:
        response_logprobs_and_entropy(model, build_layout(step.groups), rows[1:])
    except MegavilaError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def model(topology: Topology) -> VisionLanguageModel:
    return build(topology, "float64")


@pytest.fixture(scope="module")
def weights(model: VisionLanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in export_hf(model)}


@pytest.fixture(scope="module")
def expected(model: VisionLanguageModel) -> dict[str, Any]:
    found: dict[str, Any] = {case: one_by_one(model, make_step(case)) for case in GRID}
    return found | {"entropy": entropies(model), "projector": projector_alone(model)}


@pytest.fixture(scope="module", params=list(DEGREES))
def world(request: pytest.FixtureRequest, weights: dict[str, Tensor]) -> tuple[int, list[dict[str, Any]]]:
    return request.param, run_ranks(on_ranks, request.param, request.param, weights)


@pytest.fixture(scope="module")
def single_bf16(topology: Topology, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model = build(topology, "bfloat16")
    load_hf(model, weights)
    return run(model, make_step("long"), "shared_prefix")


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative to each gradient's norm, or to a small part of the whole for those that are zero but for
    rounding: a key bias, which softmax does not feel."""
    assert actual.keys() == expected.keys()
    whole = float(torch.stack([grad.norm() for grad in expected.values()]).norm())
    return {
        name: float((actual[name].double() - grad).norm()) / max(float(grad.norm()), 1e-3 * whole)
        for name, grad in expected.items()
    }


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def test_logprobs_and_gradients_equal_independent_sequences(
    world: tuple[int, list[dict[str, Any]]], expected: dict[str, Any]
) -> None:
    size, ranks = world
    for name in DEGREES[size]:
        for variant in VARIANTS[size]:
            case, _, dtype = variant
            if dtype == "bfloat16":  # has a test of its own
                continue
            logprobs, grads = expected[case]
            for result in ranks:
                assert relative(result[name]["found"][variant][0], logprobs) < TOLERANCE[dtype], (
                    name,
                    variant,
                )
            worst = max(errors(ranks[0][name]["found"][variant][1], grads).items(), key=lambda item: item[1])
            assert worst[1] < TOLERANCE[dtype], (name, variant, worst)


def test_error_in_bf16_is_that_of_one_rank(
    world: tuple[int, list[dict[str, Any]]],
    expected: dict[str, Any],
    single_bf16: tuple[Tensor, dict[str, Tensor]],
) -> None:
    size, ranks = world
    logprobs, grads = expected["long"]

    def whole(actual: dict[str, Tensor]) -> float:
        difference = [(actual[name].double() - grad).norm() for name, grad in grads.items()]
        return float(torch.stack(difference).norm() / torch.stack([g.norm() for g in grads.values()]).norm())

    alone = relative(single_bf16[0], logprobs), whole(single_bf16[1])
    assert 1e-4 < alone[0] < 1e-2 and 1e-3 < alone[1] < 0.1
    for name, settings in DEGREES[size].items():
        if "tensor_parallel" in settings:
            continue  # rounds the partial sums of row-parallel layers too, which is not context parallelism's
        found = ranks[0][name]["found"]["long", "shared_prefix", "bfloat16"]
        ours = relative(found[0], logprobs), whole(found[1])
        assert ours[0] < 1.1 * alone[0] and ours[1] < 1.1 * alone[1], (name, ours, alone)


def test_entropies_and_their_gradients(
    world: tuple[int, list[dict[str, Any]]], expected: dict[str, Any]
) -> None:
    size, ranks = world
    for name in DEGREES[size]:
        for result in ranks:
            values, grads = result[name]["entropy"]
            assert relative(values, expected["entropy"][0]) < 1e-9
            assert max(errors(grads, expected["entropy"][1]).values()) < 1e-9


def test_padding_has_no_gradient(world: tuple[int, list[dict[str, Any]]]) -> None:
    size, ranks = world
    for name in DEGREES[size]:
        for case in range(2):
            results = [rank[name]["padding"][case] for rank in ranks]
            assert all(zero for _, zero, _ in results)
            assert any(rows > 0 for rows, _, _ in results)  # else nothing was tested
            assert any(other for _, _, other in results)


def test_a_rank_without_video_serves_the_projectors_gradient(
    world: tuple[int, list[dict[str, Any]]], expected: dict[str, Any]
) -> None:
    size, ranks = world
    reached = [name for name, grad in expected["projector"][1].items() if grad.norm() > 0]
    assert reached and all("projector" in name for name in reached)
    for name in DEGREES[size]:
        logprobs, grads = ranks[0][name]["projector"]
        assert relative(logprobs, expected["projector"][0]) < 1e-9
        assert max(errors(grads, expected["projector"][1]).values()) < 1e-9


def test_recomputation_with_kept_attention_gives_the_same(world: tuple[int, list[dict[str, Any]]]) -> None:
    size, ranks = world
    for name in DEGREES[size]:
        logprobs, grads = ranks[0][name]["recompute"]
        plain, plain_grads = ranks[0][name]["found"]["mixed", "shared_prefix", "float64"]
        assert torch.equal(logprobs, plain)
        assert max(errors(grads, plain_grads).values()) < 1e-12


def test_media_rows_that_do_not_fit_are_refused_everywhere(world: tuple[int, list[dict[str, Any]]]) -> None:
    size, ranks = world
    for name in DEGREES[size]:
        assert all("layout has 8 media rows but 7 were given" in rank[name]["refused"] for rank in ranks)
