"""The CPU's RMSNorm against torch's: the same bits, also where gradients meet at the residual."""

import pytest


@pytest.mark.parametrize("shape", [(6, 2, 40), (6, 2, 4, 8), (3, 1)])
@pytest.mark.parametrize("is_strided", [False, True])
def test_values_and_gradients_are_torchs_to_the_last_bit(shape, is_strided):
    import torch
    from torch.nn import functional

    from models.norms import rms_norm

    generator = torch.Generator().manual_seed(0)
    source = torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator).requires_grad_()
    weight = torch.randn(shape[-1], generator=generator).requires_grad_()
    scale = torch.randn(shape, generator=generator)

    def found(form):
        x = source[..., : shape[-1]] if is_strided else source[..., : shape[-1]].contiguous()
        out = (x + form(x) * scale).exp()  # the residual's gradient and the norm's own meet at x
        return [out.detach(), *torch.autograd.grad(out.sum(), (source, weight))]

    ours = found(lambda x: rms_norm(x, weight, 1e-6))
    theirs = found(lambda x: functional.rms_norm(x, (shape[-1],), weight, 1e-6))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_half_as_much_is_kept_for_the_backward_pass():
    import torch
    from torch.nn import functional

    from models.norms import rms_norm

    x, weight = torch.randn(64, 128, requires_grad=True), torch.ones(128, requires_grad=True)
    kept = []
    for form in (rms_norm, lambda x, weight, epsilon: functional.rms_norm(x, (128,), weight, epsilon)):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, held=storages: held.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            form(x, weight, 1e-6)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
    assert kept[0] < 0.52 * kept[1]
