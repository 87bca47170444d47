"""mmcv.cnn: ``ConvModule``, ``DepthwiseSeparableConvModule``.

Configuration dictionaries are mmcv's: ``norm_cfg`` of type BN, SyncBN, GN, IN or LN, ``act_cfg`` of
any torch activation (and HSwish, HSigmoid, Swish).

Source: Howard et al., "MobileNets", 2017; the composition is mmcv's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from segkernels.nn.chain import run

Config = Mapping[str, Any]
Size = int | tuple[int, int]

RELU: Config = {"type": "ReLU"}
NORMS = {
    "BN": nn.BatchNorm2d,
    "BN2d": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": nn.GroupNorm,
    "LN": nn.LayerNorm,
    "IN": nn.InstanceNorm2d,
    "IN2d": nn.InstanceNorm2d,
}
ABBREVIATIONS = {_InstanceNorm: "in", _BatchNorm: "bn", nn.GroupNorm: "gn", nn.LayerNorm: "ln"}
ACTIVATIONS = {"HSwish": nn.Hardswish, "HSigmoid": nn.Hardsigmoid, "Swish": nn.SiLU}
PADDINGS = {"zero": nn.ZeroPad2d, "reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}


class ConvModule(nn.Module):
    """Convolution, norm and activation in a given order. Keys: ``conv``, the norm under its short
    name (``bn``, ``gn``, ...), ``activate``.
    """

    backend: str | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool | str = "auto",
        conv_cfg: Config | None = None,
        norm_cfg: Config | None = None,
        act_cfg: Config | None = RELU,
        inplace: bool = True,
        with_spectral_norm: bool = False,
        padding_mode: str = "zeros",
        order: tuple[str, ...] = ("conv", "norm", "act"),
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, config in (("conv_cfg", conv_cfg), ("norm_cfg", norm_cfg), ("act_cfg", act_cfg)):
            if config is not None and not (isinstance(config, Mapping) and "type" in config):
                raise TypeError(
                    f"ConvModule: {name} must be a dict with a 'type', or None"
                    f"\n  {name}: {config!r}"
                )
        if conv_cfg is not None and conv_cfg.get("type") not in ("Conv", "Conv2d"):
            raise ValueError(f"ConvModule: only plain 2-d convolutions\n  conv_cfg: {conv_cfg}")
        if sorted(order) != ["act", "conv", "norm"]:
            raise ValueError(
                f"ConvModule: order is an arrangement of conv, norm, act\n  order: {order}"
            )
        self.backend = backend
        self.order = order
        self.with_norm = norm_cfg is not None
        self.with_activation = act_cfg is not None
        self.with_explicit_padding = padding_mode not in ("zeros", "circular")
        if self.with_explicit_padding:
            if padding_mode not in PADDINGS:
                raise ValueError(
                    f"ConvModule: padding_mode is zeros, circular, {', '.join(PADDINGS)}"
                    f"\n  padding_mode: {padding_mode!r}"
                )
            self.padding_layer = PADDINGS[padding_mode](_four(padding))
            padding, padding_mode = 0, "zeros"
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=norm_cfg is None if bias == "auto" else bool(bias),
            padding_mode=padding_mode,  # type: ignore[arg-type]
        )
        _initialise(self.conv, act_cfg)
        if with_spectral_norm:
            self.conv = nn.utils.spectral_norm(self.conv)
        self.norm_name: str | None = None
        if norm_cfg is not None:
            channels = out_channels if order.index("norm") > order.index("conv") else in_channels
            self.norm_name, norm = build_norm(norm_cfg, channels)
            self.add_module(self.norm_name, norm)
        if act_cfg is not None:
            self.activate = build_activation(act_cfg, inplace)

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self, self.norm_name) if self.norm_name else None

    def layers_in_order(self) -> list[nn.Module | None]:
        pad = self.padding_layer if self.with_explicit_padding else None
        layers = {
            "conv": [pad, self.conv],
            "norm": [self.norm if self.with_norm else None],
            "act": [self.activate if self.with_activation else None],
        }
        return [layer for name in self.order for layer in layers[name]]

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        skipped = {
            id(self.norm) if not norm else None,
            id(self.activate) if self.with_activation and not activate else None,
        }
        return run(
            x,
            [layer for layer in self.layers_in_order() if id(layer) not in skipped],
            backend=self.backend,
        )


class DepthwiseSeparableConvModule(nn.Module):
    """``depthwise_conv`` and ``pointwise_conv``, each a :class:`ConvModule`; "default" norms and
    activations are ``norm_cfg``, ``act_cfg``.

    Further keyword arguments go to both. Input [B, C, H, W], output [B, D, H', W'].
    """

    backend: str | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        norm_cfg: Config | None = None,
        act_cfg: Config | None = RELU,
        dw_norm_cfg: Config | str | None = "default",
        dw_act_cfg: Config | str | None = "default",
        pw_norm_cfg: Config | str | None = "default",
        pw_act_cfg: Config | str | None = "default",
        *,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if "groups" in kwargs:
            raise ValueError("DepthwiseSeparableConvModule: groups follows from the channels")
        self.backend = backend

        def chosen(config: Config | str | None, default: Config | None) -> Config | None:
            return default if config == "default" else config  # type: ignore[return-value]

        self.depthwise_conv = ConvModule(
            in_channels,
            in_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            norm_cfg=chosen(dw_norm_cfg, norm_cfg),
            act_cfg=chosen(dw_act_cfg, act_cfg),
            backend=backend,
            **kwargs,
        )
        self.pointwise_conv = ConvModule(
            in_channels,
            out_channels,
            1,
            norm_cfg=chosen(pw_norm_cfg, norm_cfg),
            act_cfg=chosen(pw_act_cfg, act_cfg),
            backend=backend,
            **kwargs,
        )

    def layers_in_order(self) -> list[nn.Module]:
        return [self.depthwise_conv, self.pointwise_conv]

    def forward(self, x: Tensor) -> Tensor:
        return run(x, self.layers_in_order(), backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


def build_norm(config: Config, channels: int) -> tuple[str, nn.Module]:
    """(short name, norm) of a ``norm_cfg``. ``requires_grad=False`` freezes its parameters."""
    options = {"eps": 1e-5, **config}
    kind, trainable = options.pop("type"), options.pop("requires_grad", True)
    if kind not in NORMS:
        raise ValueError(f"norm_cfg: type is one of {sorted(NORMS)}\n  norm_cfg: {dict(config)}")
    if kind == "GN" and "num_groups" not in options:
        raise ValueError(f"norm_cfg: GN needs num_groups\n  norm_cfg: {dict(config)}")
    width = (
        {"num_groups": options.pop("num_groups"), "num_channels": channels}
        if kind == "GN"
        else None
    )
    norm = NORMS[kind](**width, **options) if width else NORMS[kind](channels, **options)
    norm.requires_grad_(trainable)
    return next(name for base, name in ABBREVIATIONS.items() if isinstance(norm, base)), norm


def build_activation(config: Config, inplace: bool) -> nn.Module:
    """The activation of an ``act_cfg``; ``inplace`` where the class has it."""
    options = dict(config)
    kind = options.pop("type")
    activation = ACTIVATIONS.get(kind) or getattr(nn, kind, None)
    if activation is None:
        raise ValueError(f"act_cfg: no such activation\n  act_cfg: {dict(config)}")
    if "inplace" in inspect.signature(activation).parameters:
        options.setdefault("inplace", inplace)
    return activation(**options)


def _initialise(conv: nn.Conv2d, activation: Config | None) -> None:
    leaky = activation is not None and activation["type"] == "LeakyReLU"
    slope = activation.get("negative_slope", 0.01) if leaky and activation is not None else 0
    nn.init.kaiming_normal_(conv.weight, slope, "fan_out", "leaky_relu" if leaky else "relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _four(padding: Size) -> tuple[int, int, int, int]:
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    return columns, columns, rows, rows
