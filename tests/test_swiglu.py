"""The FFN's activation in one step against Megatron's own form."""

import pytest


def theirs(both):
    """As Megatron's MLP writes it, the offset of its linear half included."""
    import torch
    from torch.nn import functional

    gate, up = torch.chunk(both, 2, dim=-1)
    return functional.silu(gate) * (up + 0.0)


@pytest.mark.parametrize("shape", [(5, 2, 24), (0, 24), (7, 24)])
def test_values_and_gradients_are_megatrons_to_the_last_bit(shape):
    import torch

    from models.swiglu import swiglu

    generator = torch.Generator().manual_seed(0)
    both = (4 * torch.randn(shape, generator=generator)).requires_grad_()
    weight = torch.randn((*shape[:-1], 12), generator=generator)
    results = []
    for form in (swiglu, theirs):
        activated = form(both)
        results.append([activated.detach(), *torch.autograd.grad((activated * weight).sum(), both)])
    assert all(torch.equal(ours, other) for ours, other in zip(*results, strict=True))


def test_every_ffn_of_a_built_model_has_it(world):
    from megatron.core.transformer.mlp import MLP
    from small_trials import build, shape_of

    from models.swiglu import swiglu

    for preset, number in (("cpu-tiny", 2), ("cpu-moe-tiny", 16)):
        model = build(shape_of(preset, None))
        found = [module for module in model.modules() if isinstance(module, MLP)]
        assert len(found) == number
        assert all(module.activation_func is swiglu for module in found)
        assert not model.config.use_te_activation_func
