"""mmcv.cnn: ``ConvModule``, ``DepthwiseSeparableConvModule``.

Configuration dictionaries are mmcv's: ``norm_cfg`` of type BN, SyncBN, GN, IN or LN, ``act_cfg`` of
any torch activation (and HSwish, HSigmoid, Swish), ``conv_cfg`` of type Conv1d, Conv2d or Conv3d;
each type may be a class instead of a name, and what else a dictionary holds goes to its
constructor.

Source: Howard et al., "MobileNets", 2017; the composition is mmcv's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from segkernels.nn.chain import run

Config = Mapping[str, Any]
Size = int | tuple[int, int]

RELU: Config = {"type": "ReLU"}
CONVOLUTIONS = {
    "Conv": nn.Conv2d,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
}
NORMS = {
    "BN": nn.BatchNorm2d,
    "BN1d": nn.BatchNorm1d,
    "BN2d": nn.BatchNorm2d,
    "BN3d": nn.BatchNorm3d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": nn.GroupNorm,
    "LN": nn.LayerNorm,
    "IN": nn.InstanceNorm2d,
    "IN1d": nn.InstanceNorm1d,
    "IN2d": nn.InstanceNorm2d,
    "IN3d": nn.InstanceNorm3d,
}
ABBREVIATIONS = {
    "in": (_InstanceNorm, "instance"),
    "bn": (_BatchNorm, "batch"),
    "gn": (nn.GroupNorm, "group"),
    "ln": (nn.LayerNorm, "layer"),
}
PADDINGS = {"zero": nn.ZeroPad2d, "reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}


class HSigmoid(nn.Module):
    """(x + bias) / divisor, kept between min_value and max_value."""

    def __init__(
        self,
        bias: float = 3.0,
        divisor: float = 6.0,
        min_value: float = 0.0,
        max_value: float = 1.0,
    ) -> None:
        super().__init__()
        self.bias, self.divisor = bias, divisor
        self.min_value, self.max_value = min_value, max_value

    def forward(self, x: Tensor) -> Tensor:
        return ((x + self.bias) / self.divisor).clamp(self.min_value, self.max_value)


ACTIVATIONS = {
    **{name: getattr(activation, name) for name in activation.__all__},
    "HSwish": nn.Hardswish,
    "HSigmoid": HSigmoid,
    "Swish": nn.SiLU,
}


class ConvModule(nn.Module):
    """Convolution, norm and activation in a given order. Keys: ``conv``, the norm under its short
    name (``bn``, ``gn``, ...), ``activate``.

    As published: ``padding_mode="circular"`` pads with zeros, and a padding layer ("zero",
    "reflect", "replicate") takes ``padding`` as torch's own does (an int, or left, right, top,
    bottom). ``efficient_conv_bn_eval`` chooses there how a frozen norm is computed, and changes no
    result: here it has no effect.
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
        efficient_conv_bn_eval: bool = False,
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
        if sorted(order) != ["act", "conv", "norm"]:
            raise ValueError(
                f"ConvModule: order is an arrangement of conv, norm, act\n  order: {order}"
            )
        self.backend = backend
        self.conv_cfg, self.norm_cfg, self.act_cfg = conv_cfg, norm_cfg, act_cfg
        self.inplace, self.order = inplace, order
        self.with_spectral_norm = with_spectral_norm
        self.with_norm = norm_cfg is not None
        self.with_activation = act_cfg is not None
        self.with_bias = norm_cfg is None if bias == "auto" else bool(bias)
        self.with_explicit_padding = padding_mode not in ("zeros", "circular")
        if self.with_explicit_padding:
            if padding_mode not in PADDINGS:
                raise ValueError(
                    f"ConvModule: padding_mode is zeros, circular, {', '.join(PADDINGS)}"
                    f"\n  padding_mode: {padding_mode!r}"
                )
            self.padding_layer = PADDINGS[padding_mode](padding)  # type: ignore[arg-type]
        self.conv = build_conv(
            conv_cfg,
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=0 if self.with_explicit_padding else padding,
            dilation=dilation,
            groups=groups,
            bias=self.with_bias,
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = self.conv.kernel_size, self.conv.stride
        self.padding, self.dilation = padding, self.conv.dilation
        self.transposed, self.output_padding = self.conv.transposed, self.conv.output_padding
        self.groups = groups
        if with_spectral_norm:
            self.conv = nn.utils.spectral_norm(self.conv)
        self.norm_name: str | None = None
        if norm_cfg is not None:
            channels = out_channels if order.index("norm") > order.index("conv") else in_channels
            self.norm_name, norm = build_norm(norm_cfg, channels)
            self.add_module(self.norm_name, norm)
        if act_cfg is not None:
            self.activate = build_activation(act_cfg, inplace)
        self.init_weights()

    def init_weights(self) -> None:
        """The initial values again."""
        slope = 0.0
        if leaky := self.act_cfg is not None and self.act_cfg["type"] == "LeakyReLU":
            slope = self.act_cfg.get("negative_slope", 0.01)
        kind: Literal["leaky_relu", "relu"] = "leaky_relu" if leaky else "relu"
        nn.init.kaiming_normal_(self.conv.weight, slope, "fan_out", kind)
        scale, shift = (getattr(self.norm, name, None) for name in ("weight", "bias"))
        for parameter, value in ((self.conv.bias, 0.0), (scale, 1.0), (shift, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

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


def build_conv(config: Config | None, *args: Any, **options: Any) -> Any:
    """The convolution of a ``conv_cfg``."""
    kind, own = _kind_and_options("conv_cfg", config or {"type": "Conv2d"}, CONVOLUTIONS)
    return kind(*args, **options, **own)


def build_norm(config: Config, channels: int) -> tuple[str, nn.Module]:
    """(short name, norm) of a ``norm_cfg``. ``requires_grad=False`` freezes its parameters."""
    kind, options = _kind_and_options("norm_cfg", {"eps": 1e-5, **config}, NORMS)
    trainable = options.pop("requires_grad", True)
    if kind is nn.GroupNorm:
        if "num_groups" not in options:
            raise ValueError(f"norm_cfg: GN needs num_groups\n  norm_cfg: {dict(config)}")
        norm: nn.Module = nn.GroupNorm(num_channels=channels, **options)
    else:
        norm = kind(channels, **options)
    norm.requires_grad_(trainable)
    return _abbreviation(kind), norm


def build_activation(config: Config, inplace: bool) -> nn.Module:
    """The activation of an ``act_cfg``; ``inplace`` where the class has it."""
    kind, options = _kind_and_options("act_cfg", config, ACTIVATIONS)
    if "inplace" in inspect.signature(kind).parameters:
        options.setdefault("inplace", inplace)
    made: nn.Module = kind(**options)
    return made


def _kind_and_options(
    name: str, config: Config, known: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The class that a configuration names (or is given), and the rest of the configuration."""
    options = dict(config)
    kind = options.pop("type")
    kind = known.get(kind, kind)
    if not isinstance(kind, type):
        kinds = sorted(key for key, value in known.items() if isinstance(value, type))
        raise ValueError(f"{name}: type is one of {', '.join(kinds)}\n  {name}: {dict(config)}")
    return kind, options


def _abbreviation(norm: type) -> str:
    """By what the class says itself, then by its base, then by its name."""
    own: str | None = getattr(norm, "_abbr_", None)
    bases = (short for short, (base, _) in ABBREVIATIONS.items() if issubclass(norm, base))
    names = (short for short, (_, word) in ABBREVIATIONS.items() if word in norm.__name__.lower())
    return own or next(bases, None) or next(names, "norm_layer")
