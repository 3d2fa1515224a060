"""One shared prompt against G independent sequences: log-probs and every gradient, tower and projector included."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megavila.models import export_hf, load_hf
from megavila.mrsp.layout import build_layout
from megavila.mrsp.logprobs import response_logprobs, response_logprobs_and_entropy
from megavila.runtime.topology import Topology
from tests.models.hf_reference import randomize
from tests.mrsp.steps import GRID, TEMPERATURE, assert_equal, build, encode, make_step, one_by_one, run


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-10), ("float32", 1e-5)])
def test_shared_prefix_equals_independent_sequences(
    name: str, dtype: str, tolerance: float, topology: Topology
) -> None:
    model = build(topology, dtype)
    step = make_step(name)
    expected = one_by_one(model, step)
    reached = [n for n, grad in expected[1].items() if grad.norm() > 0]
    assert any(n.startswith("llm.") for n in reached)
    assert any("vision" in n for n in reached) == any(frames is not None for frames in step.frames)
    assert_equal(run(model, step, "shared_prefix"), expected, tolerance)
    assert_equal(run(model, step, "repeated"), expected, tolerance)


@pytest.mark.parametrize("name", GRID)
# transformers computes its norms in fp32 whatever the dtype, so fp64 agrees only to 1e-6.
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_shared_prefix_equals_transformers_on_independent_sequences(
    name: str,
    dtype: torch.dtype,
    tolerance: float,
    topology: Topology,
) -> None:
    model = build(topology, str(dtype).removeprefix("torch."))
    hf = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=61,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            rms_norm_eps=1e-6,
            attn_implementation="eager",
        )
    ).to(dtype)
    randomize(hf, 1)
    state = {n: p for n, p in export_hf(model) if not n.startswith("llm.")}
    load_hf(model, state | {f"llm.{n}": p for n, p in hf.state_dict().items()})

    step = make_step(name)
    actual, grads = run(model, step, "shared_prefix")
    expected, start = [], 0
    for group, frames in zip(step.groups, step.frames, strict=True):
        for response in group.responses:
            if not len(response):
                continue
            prompt = group.prompt
            rows = hf.model.embed_tokens(torch.cat([prompt.token_ids, response]))
            if frames is not None:
                media = model.encode_frames(frames).flatten(0, 1).detach()
                is_media = (prompt.media_index >= 0).nonzero().squeeze(1)
                rows = rows.index_copy(0, is_media, media[prompt.media_index[is_media]])
            logits = hf(inputs_embeds=rows[None], use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]
            logprobs = torch.log_softmax(logits / TEMPERATURE, -1).gather(1, response[:, None]).squeeze(1)
            (logprobs * step.upstream[start : start + len(response)]).sum().backward()
            expected.append(logprobs.detach())
            start += len(response)
    theirs = {f"llm.{n}": p.grad for n, p in hf.named_parameters()}
    ours = {n: grad for n, grad in grads.items() if n.startswith("llm.")}
    assert_equal((actual, ours), (torch.cat(expected), theirs), tolerance)


def test_entropy_comes_with_the_same_logprobs(topology: Topology) -> None:
    model = build(topology, "float64")
    step = make_step("mixed")
    layout = build_layout(step.groups)
    rows = encode(model, step)
    logprobs, entropy = response_logprobs_and_entropy(model, layout, rows, temperature=TEMPERATURE)
    torch.testing.assert_close(logprobs, response_logprobs(model, layout, rows, temperature=TEMPERATURE))
    hidden = model(
        model.embed(layout.token_ids, layout.media_index, torch.cat([r for r in rows if r is not None])),
        layout.context(),
    )
    logits = hidden[layout.predictor_rows] @ model.language.output_weight().T / TEMPERATURE
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
