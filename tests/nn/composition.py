"""The same layer in plain torch modules, and the comparison of the two over training steps."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from segkernels.nn import DepthwiseConv2d, SeparableConv2d


def composed(layer: SeparableConv2d) -> nn.Sequential:
    """Copies of the layer's parts in a row; the depthwise one as plain ``nn.Conv2d``."""
    parts = [part for part in copy.deepcopy(layer).layers_in_order() if part is not None]
    return nn.Sequential(*(plain(part) for part in parts))


def plain(module: nn.Module) -> nn.Module:
    if not isinstance(module, DepthwiseConv2d):
        return module
    where = (module.kernel_size, module.stride, module.padding, module.dilation)
    channels = module.in_channels
    conv = nn.Conv2d(channels, channels, *where, groups=channels, bias=module.bias is not None)
    conv.load_state_dict(module.state_dict())
    return conv.to(module.weight.dtype).train(module.training)


def scramble(module: nn.Module) -> None:
    """Norms with weights, biases and running statistics that are not their initial ones."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in (
                (part.weight, -1.0, 1.5),
                (part.bias, -0.5, 0.5),
                (part.running_mean, -0.5, 0.5),
                (part.running_var, 0.5, 1.5),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def agree(
    ours: nn.Module,
    theirs: nn.Module,
    x: Tensor,
    *,
    steps: int = 2,
    tolerance: float = 1e-10,
) -> None:
    """Outputs, gradients and buffers are equal over some training steps, and in eval after them."""
    torch.manual_seed(1)
    for step in range(steps + 1):
        if step == steps:
            ours.eval(), theirs.eval()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, expected = ours(a), theirs(b)
        dy = torch.randn_like(expected)
        got.backward(dy)
        expected.backward(dy)
        close(got, expected, tolerance)
        close(a.grad, b.grad, tolerance)
        floor = max(p.grad.abs().max().item() for p in trained(theirs))
        for p, q in zip(trained(ours), trained(theirs), strict=True):
            close(p.grad, q.grad, tolerance, floor)
            p.grad = q.grad = None
        for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
            close(p, q, tolerance)


def close(
    got: Tensor | None, expected: Tensor | None, tolerance: float, floor: float = 1e-3
) -> None:
    assert got is not None and expected is not None
    assert got.shape == expected.shape
    scale = max(expected.detach().abs().max().item(), floor)
    error = (got.detach().double() - expected.detach().double()).abs().max().item()
    assert error <= tolerance * scale, f"{error:.2e} of {scale:.2e}"
