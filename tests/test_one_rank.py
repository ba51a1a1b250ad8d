"""Megatron's steps for many ranks, shortened where there is one: the same bits, and the rest left to Megatron."""

import pytest


def original(path, name):
    """Megatron's own, whether ``device.prepare`` has put ours in its place or not."""
    import importlib

    found = getattr(importlib.import_module(path), name)
    return getattr(found, "__wrapped__", found)


def test_a_product_and_its_gradients_are_megatrons_to_the_last_bit(world):
    import torch

    from models import one_rank

    theirs = original("megatron.core.tensor_parallel.layers", "linear_with_grad_accumulation_and_async_allreduce")
    generator = torch.Generator().manual_seed(0)
    x, weight, d_y = (torch.randn(shape, generator=generator) for shape in ((7, 2, 24), (33, 24), (7, 2, 33)))
    results = []
    for linear in (one_rank.linear(theirs), theirs):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = linear(*leaves, None, False, False, False)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, d_y)])
    assert all(torch.equal(ours, other) for ours, other in zip(*results, strict=True))


@pytest.mark.parametrize("width", [32, 34])
def test_an_ffn_of_any_width_has_rows_at_whole_cache_lines_and_megatrons_bits(world, width):
    import torch

    from models import one_rank

    theirs = original("megatron.core.tensor_parallel.layers", "linear_with_grad_accumulation_and_async_allreduce")
    others = dict.fromkeys(("gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel"), False)
    generator = torch.Generator().manual_seed(0)
    x, weight, d_y = (torch.randn(shape, generator=generator) for shape in ((7, 2, 24), (width, 24), (7, 2, width)))
    results = []
    for linear in (one_rank.aligned(theirs), theirs):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = linear(input=leaves[0], weight=leaves[1], bias=None, **others)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, d_y)])
    assert all(torch.equal(ours, other) for ours, other in zip(*results, strict=True))
    assert results[0][0].stride(1) % one_rank.CACHE_LINE == 0


@pytest.mark.parametrize("place", range(2, 7))
def test_what_is_gathered_reduced_deferred_or_fused_is_left_to_megatron(place):
    import torch

    from models import one_rank

    arguments = [torch.ones(2, 3), torch.ones(4, 3), None, False, False, False, None]
    arguments[place] = {2: torch.ones(4), 6: []}.get(place, True)
    seen = []
    one_rank.linear(lambda *given, **_: seen.append(given))(*arguments, tp_group=None)
    assert len(seen) == 1
    assert seen[0][place] is arguments[place]


def test_a_reduction_over_one_rank_leaves_the_tensor_and_gives_a_handle_if_asked(world):
    import torch

    from models import one_rank

    def never(*_):
        raise AssertionError("gloo was asked")

    tensor = torch.arange(3.0)
    assert one_rank.all_reduce(never)(tensor) is None
    handle = one_rank.all_reduce(never)(tensor, async_op=True)
    assert handle.wait()
    assert handle.is_completed()
    assert tensor.tolist() == [0, 1, 2]


def test_an_object_gathered_from_one_rank_is_a_copy_of_it(world):
    import torch

    from models import one_rank

    def never(*_):
        raise AssertionError("gloo was asked")

    own, found = {"plan": [torch.arange(3.0)]}, [None]
    one_rank.all_gather_object(never)(found, own)
    assert torch.equal(found[0]["plan"][0], own["plan"][0])
    assert found[0]["plan"][0] is not own["plan"][0]


def test_the_largest_logits_are_megatrons(world):
    import torch

    from models import one_rank

    logits = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    same, largest = one_rank.largest_logits(logits)
    assert torch.equal(same, logits.float())
    assert torch.equal(largest, torch.max(logits.float(), dim=-1)[0])
    assert one_rank.largest_logits(torch.tensor([1.0, float("nan"), 2.0]))[1].isnan()


def test_only_around_the_passes_and_the_update_do_factories_ask_for_cuda_in_vain(world):
    import torch

    from models import device

    with device.on("cpu"):
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        with device.as_it_is():
            assert torch.zeros(1).cpu().type() == "torch.FloatTensor"
            with device._as_on():
                assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
