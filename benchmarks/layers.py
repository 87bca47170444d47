"""A training step of a layer: segkernels.nn against the same torch.nn modules in a row."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.work import (
    COMPILED,
    DTYPES,
    EAGER,
    OTHER_FORMAT,
    OURS,
    Arguments,
    Way,
    Work,
    in_other_format,
)
from segkernels.nn import SeparableConv2d

STEP = "training step"


class SeparableStep(Work):
    """Forward and backward of SeparableConv2d with BatchNorm in training, running statistics too.

    For the cases of separable_conv2d that standardise both stages and have one rate.
    """

    modes = (STEP,)

    @staticmethod
    def fits(op: str, case: Any) -> bool:
        return op == "separable_conv2d" and None not in case.eps and len(case.rates) == 1

    def arguments(self) -> Arguments:
        inputs = super().arguments()
        plain = _plain(self.case, DTYPES[self.dtype]).to(self.device)
        _load(plain, inputs)
        ours = _ours(self.case, self.backend, plain)
        return {"x": inputs["x"], "plain": plain, "ours": ours}

    def ways(
        self, arguments: Arguments, grad: bool, compiled: Mapping[str, Callable[..., Any]]
    ) -> dict[str, Way]:
        x, other = arguments["x"], in_other_format(arguments)["x"]
        plain = arguments["plain"]
        ways = {OURS: _way(arguments["ours"], x), EAGER: _way(plain, x)}
        ways[OTHER_FORMAT] = _way(plain, other)
        for name, call in compiled.items():
            ways[name] = _way(plain, x if name == COMPILED else other, call)
        return ways

    def baseline(self) -> Callable[..., Any]:
        return _call

    def truth(self, arguments: Arguments) -> Way:
        return _way(copy.deepcopy(arguments["plain"]).double(), arguments["x"].double())

    def yardstick(self, arguments: Arguments) -> Way:
        return _way(arguments["plain"], arguments["x"])

    def cost(self, mode: str) -> tuple[int, int]:
        return super().cost("forward+backward")


def _call(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def _way(module: nn.Module, x: Tensor, call: Callable[..., Any] = _call) -> Way:
    leaf, parameters = x.detach().requires_grad_(), tuple(module.parameters())
    return Way(partial(call, module, leaf), (leaf, *parameters), parameters)


def _plain(case: Any, dtype: torch.dtype) -> nn.Sequential:
    """Convolutions in the maps' type, norms in float32 (float64), as in mixed training."""
    channels, stride, rate = case.shape[1], case.stride, case.rates[0]
    padding = tuple(r * (k - 1) // 2 for r, k in zip(rate, case.kernel, strict=True))
    depthwise = nn.Conv2d(
        channels, channels, case.kernel, stride, padding, rate, groups=channels, bias=False
    )
    layers = OrderedDict(
        depthwise=depthwise.to(dtype),
        inner_norm=nn.BatchNorm2d(channels, case.eps[0]),
        inner_activation=nn.ReLU(),
        pointwise=nn.Conv2d(channels, case.outputs, 1, bias=False).to(dtype),
        outer_norm=nn.BatchNorm2d(case.outputs, case.eps[1]),
        outer_activation=nn.ReLU(),
    )
    module = nn.Sequential(layers)
    return module.double() if dtype == torch.float64 else module


def _ours(case: Any, backend: str, plain: nn.Sequential) -> SeparableConv2d:
    """Our layer with the parameters of the plain one; its norms are plain modules as well."""
    ours = SeparableConv2d(
        case.shape[1],
        case.outputs,
        case.kernel,
        case.stride,
        dilation=case.rates[0],
        inner_norm=partial(nn.BatchNorm2d, eps=case.eps[0]),
        outer_norm=partial(nn.BatchNorm2d, eps=case.eps[1]),
        backend=backend,
    )
    for name, child in plain.named_children():
        like = next(child.parameters(), None)
        if like is not None:
            getattr(ours, name).to(like.device, like.dtype)
    ours.load_state_dict(plain.state_dict())
    return ours


def _load(plain: nn.Sequential, inputs: Arguments) -> None:
    names = {
        "depthwise.weight": "depthwise_weight",
        "pointwise.weight": "pointwise_weight",
        "inner_norm.weight": "inner_scale",
        "inner_norm.bias": "inner_shift",
        "outer_norm.weight": "outer_scale",
        "outer_norm.bias": "outer_shift",
    }
    plain.load_state_dict({ours: inputs[name] for ours, name in names.items()}, strict=False)
