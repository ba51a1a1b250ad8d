"""Rotary embedding on the CPU against Megatron's own, and what is left to it."""

from types import SimpleNamespace

import pytest

CONFIG = SimpleNamespace(
    rotary_interleaved=False, apply_rope_fusion=False, multi_latent_attention=False, mrope_section=None
)


@pytest.fixture
def both():
    """(ours, Megatron's own), as attention calls them."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    from models.rope import on_cpu

    return on_cpu(apply_rotary_pos_emb), apply_rotary_pos_emb


def angles_and_signal(num_heads=4, dim=8):
    import torch

    generator = torch.Generator().manual_seed(0)
    half = torch.randn(9, 1, 1, dim // 2, generator=generator)
    signal = torch.randn(9, 2, num_heads, dim, generator=generator)
    return torch.cat((half, half), dim=-1), signal


@pytest.mark.parametrize("is_permuted", [False, True])
def test_values_and_gradients_are_megatrons_to_the_last_bit(world, both, is_permuted):
    """Gradients as they come out of attention, too: in another order in memory."""
    import torch

    angles, signal = angles_and_signal()
    weight = torch.randn(2, 4, 9, 8).permute(2, 0, 1, 3) if is_permuted else torch.randn(9, 2, 4, 8)
    results = []
    for apply in both:
        x = signal.clone().requires_grad_()
        rotated = apply(x * 1.0, angles, CONFIG)
        results.append([rotated.detach(), *torch.autograd.grad(rotated, x, weight)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_angles_are_turned_into_sines_once():
    import torch

    from models.rope import on_cpu

    def never(*arguments, **options):
        raise AssertionError("not for Megatron")

    angles, signal = angles_and_signal()
    before = on_cpu(never)(signal, angles, CONFIG)
    angles.zero_()
    assert torch.equal(on_cpu(never)(signal, angles, CONFIG), before)


def test_other_cases_are_megatrons(both):
    ours, _ = both
    from models.rope import on_cpu

    angles, signal = angles_and_signal()
    given_away = on_cpu(lambda *arguments, **options: "Megatron's")
    assert given_away(signal, angles[..., :4], CONFIG) == "Megatron's"
    assert given_away(signal, angles, CONFIG, mscale=0.5) == "Megatron's"
    assert given_away(signal, angles, CONFIG, cu_seqlens=signal) == "Megatron's"
    interleaved = SimpleNamespace(**{**vars(CONFIG), "rotary_interleaved": True})
    assert given_away(signal, angles, interleaved) == "Megatron's"
    assert ours(signal, angles, CONFIG).shape == signal.shape


def test_the_patched_attention_calls_it(world):
    from megatron.core.transformer import attention

    assert attention.apply_rotary_pos_emb.__module__ == "models.rope"
