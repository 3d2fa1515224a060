from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megavila.training.gradients import GradientBuffer, GradientError
from megavila.training.optimizer import MasterAdamW, OptimizerStateError


class OneRank:
    def size(self):
        return 1


ALONE = SimpleNamespace(tensor_group=OneRank(), data_context_group=OneRank())


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 5, bias=False))
    return model.to(dtype)


def batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(11, 7, generator=generator).to(dtype) for _ in range(count)]


def build(model, **options):
    gradients = GradientBuffer(model.named_parameters(), ALONE)
    return gradients, MasterAdamW(gradients, **options)


def train(model, gradients, optimizer, data, clip=1.0):
    for x in data:
        for micro in x.split(4):
            (model(micro).float().square().sum() / 10).backward()
        gradients.reduce()
        gradients.clip(clip)
        optimizer.step(1e-2)
        gradients.zero()


def test_equals_torch_adamw_with_clipping_and_decay():
    ours, reference = make_model(), make_model()
    gradients, optimizer = build(ours, weight_decay=0.1, betas=(0.9, 0.95))
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for x in batches(5):
        peer.zero_grad()
        (reference(x).square().sum() / 10).backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        peer.step()
        for micro in x.split(4):
            (ours(micro).square().sum() / 10).backward()
        gradients.reduce()
        assert gradients.clip(1.0) == pytest.approx(expected.item(), rel=1e-5)
        assert gradients.norm() == pytest.approx(1.0, rel=1e-4)
        optimizer.step(1e-2)
        gradients.zero()
    for (name, a), b in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
        assert a.grad is None


def test_bf16_parameters_follow_their_fp32_masters():
    model, exact = make_model(torch.bfloat16), make_model(torch.bfloat16).float()
    gradients, optimizer = build(model)
    peer = torch.optim.AdamW(exact.parameters(), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.95))
    start = [p.detach().clone() for p in model.parameters()]
    for x in batches(60, torch.bfloat16):
        model(x).float().square().sum().backward()
        for (_, gradient), parameter in zip(
            gradients.named_gradients(), _ordered(gradients, exact), strict=True
        ):
            parameter.grad = gradient.clone()
        optimizer.step(1e-4)
        peer.step()
        gradients.zero()
    for slot, parameter in zip(gradients.slots, _ordered(gradients, exact), strict=True):
        torch.testing.assert_close(slot.view(optimizer.master), parameter, rtol=1e-6, atol=1e-7)
        assert slot.parameter.dtype == torch.bfloat16
        assert torch.equal(slot.parameter, slot.view(optimizer.master).bfloat16())
    # Steps of 1e-4 are below half a bf16 unit of weights near one: without masters these would not have
    # moved.
    norm_weight = model[1].weight
    assert not torch.equal(norm_weight, start[2])


def _ordered(gradients, model):
    named = dict(model.named_parameters())
    return [named[slot.name] for slot in gradients.slots]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continues_bit_for_bit_from_a_saved_state(dtype):
    data = batches(6, dtype)
    straight = make_model(dtype)
    train(straight, *build(straight, weight_decay=0.1), data)

    first = make_model(dtype)
    parts = build(first, weight_decay=0.1)
    train(first, *parts, data[:3])
    saved = {name: {k: v.clone() for k, v in entry.items()} for name, entry in parts[1].state_dict().items()}

    second = make_model(dtype, seed=77)
    second.load_state_dict(first.state_dict())
    parts = build(second, weight_decay=0.1)
    parts[1].load_state_dict(saved)
    train(second, *parts, data[3:])
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_loaded_after_construction_need_a_refresh_only_when_copied():
    model = make_model(torch.bfloat16)
    gradients, optimizer = build(model)
    model.load_state_dict(make_model(torch.bfloat16, seed=5).state_dict())
    optimizer.refresh_masters()
    for slot in gradients.slots:
        assert torch.equal(slot.view(optimizer.master), slot.parameter.float())


def test_frozen_and_tied_parameters():
    model = make_model()
    model[0].requires_grad_(False)
    named = [*model.named_parameters(), ("tied.weight", model[3].weight)]
    gradients = GradientBuffer(named, ALONE)
    assert [slot.name for slot in gradients.slots] == ["1.bias", "1.weight", "3.weight"]
    frozen = model[0].weight.detach().clone()
    train(model, gradients, MasterAdamW(gradients), batches(2))
    assert torch.equal(model[0].weight, frozen)


def test_nothing_trainable_is_an_error():
    model = make_model().requires_grad_(False)
    with pytest.raises(GradientError, match="unfreeze"):
        GradientBuffer(model.named_parameters(), ALONE)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    model = make_model()
    gradients, _ = build(model)
    x = batches(1)[0]
    x[3, 2] = float("nan")
    model(x).sum().backward()
    with pytest.raises(GradientError, match=r"nan.*0\.weight|nan.*0\.bias"):
        gradients.clip(1.0)


def test_state_of_another_model_is_rejected():
    small, other = make_model(), nn.Sequential(nn.Linear(7, 13))
    _, optimizer = build(small)
    _, foreign = build(other)
    with pytest.raises(OptimizerStateError, match="missing"):
        optimizer.load_state_dict(foreign.state_dict())
    wide = nn.Sequential(nn.Linear(7, 14))
    _, widened = build(wide)
    with pytest.raises(OptimizerStateError, match=r"\(14,\)"):
        foreign.load_state_dict(widened.state_dict())
