"""mmseg.models.decode_heads: ``ASPPHead``, ``DepthwiseSeparableASPPHead``, ``EncHead``,
``EncModule``, ``EMAHead``, ``EMAModule``; mmseg.models.utils: ``Encoding``.

``forward(inputs)`` with a list of feature maps returns logits, as published (EncHead: and those of
the classes' presence). The losses and
predictions of mmseg's heads (``loss``, ``predict``) belong to mmengine's data structures and are
not here: their options are kept as attributes. A rate of 1 is a 1x1 convolution; the concatenation
begins with the image pool.

Source: Chen et al., "Rethinking Atrous Convolution", 2017; "Encoder-Decoder with Atrous Separable
Convolution", ECCV 2018; Zhang et al., "Context Encoding for Semantic Segmentation", CVPR 2018; Li
et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.compat.mmcv import (
    RELU,
    Config,
    ConvModule,
    DepthwiseSeparableConvModule,
    build_norm,
)
from segkernels.nn.arguments import check_positive, several
from segkernels.nn.aspp import pyramid
from segkernels.nn.chain import leaves, run
from segkernels.nn.emau import attend
from segkernels.nn.enc_module import emphasised
from segkernels.nn.encoding import Encoding as _Encoding
from segkernels.nn.laterals import with_laterals
from segkernels.nn.pair import has_hooks
from segkernels.nn.running_bases import unit_bases

CROSS_ENTROPY: Config = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
SE_LOSS: Config = {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 0.2}


class BaseDecodeHead(nn.Module):
    """Selection of the inputs, dropout and classifier of every mmseg head."""

    TRANSFORMS: ClassVar[tuple[str | None, ...]] = (None, "resize_concat")
    backend: str | None

    def __init__(
        self,
        in_channels: int | Sequence[int],
        channels: int,
        *,
        num_classes: int,
        out_channels: int | None = None,
        threshold: float | None = None,
        dropout_ratio: float = 0.1,
        conv_cfg: Config | None = None,
        norm_cfg: Config | None = None,
        act_cfg: Config | None = RELU,
        in_index: int | Sequence[int] = -1,
        input_transform: str | None = None,
        loss_decode: Config | Sequence[Config] = CROSS_ENTROPY,
        ignore_index: int | None = 255,
        sampler: Config | None = None,
        align_corners: bool = False,
        init_cfg: Config | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if input_transform not in self.TRANSFORMS:
            raise ValueError(
                f"input_transform is {' or '.join(map(repr, self.TRANSFORMS))} for this head"
                f"\n  input_transform: {input_transform!r}"
            )
        _check_inputs(in_channels, in_index, input_transform)
        out_channels = num_classes if out_channels is None else out_channels
        if out_channels not in (num_classes, 1):
            raise ValueError(
                "out_channels is num_classes, or 1 for two classes"
                f"\n  out_channels: {out_channels}\n  num_classes: {num_classes}"
            )
        self.backend = backend
        joined = input_transform == "resize_concat"
        self.in_channels: Any = sum(in_channels) if joined else in_channels  # type: ignore[arg-type]
        self.dropout_ratio = dropout_ratio
        self.channels, self.num_classes, self.out_channels = channels, num_classes, out_channels
        self.conv_cfg, self.norm_cfg, self.act_cfg = conv_cfg, norm_cfg, act_cfg
        self.in_index, self.input_transform, self.align_corners = (
            in_index,
            input_transform,
            align_corners,
        )
        self.threshold = 0.3 if out_channels == 1 and threshold is None else threshold
        self.loss_decode, self.ignore_index, self.sampler, self.init_cfg = (
            loss_decode,
            ignore_index,
            sampler,
            init_cfg,
        )
        self.conv_seg = nn.Conv2d(channels, out_channels, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]
        self.dropout = nn.Dropout2d(dropout_ratio) if dropout_ratio > 0 else None

    def _conv(
        self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1
    ) -> ConvModule:
        return ConvModule(
            in_channels, out_channels, kernel_size, **self._options(kernel_size, dilation)
        )

    def _separable(self, in_channels: int, dilation: int = 1) -> DepthwiseSeparableConvModule:
        options = self._options(3, dilation) | {"conv_cfg": None}  # as published: it gets none
        return DepthwiseSeparableConvModule(in_channels, self.channels, 3, **options)

    def _options(self, kernel_size: int, dilation: int) -> dict[str, Any]:
        return {
            "padding": dilation * (kernel_size // 2),
            "dilation": dilation,
            "conv_cfg": self.conv_cfg,
            "norm_cfg": self.norm_cfg,
            "act_cfg": self.act_cfg,
            "backend": self.backend,
        }

    def _transform_inputs(self, inputs: Sequence[Tensor]) -> Any:
        """The map that the head works on; the list of maps for "multiple_select"."""
        if self.input_transform is None:
            return inputs[self.in_index]  # type: ignore[index]
        chosen = [inputs[i] for i in self.in_index]  # type: ignore[union-attr]
        if self.input_transform == "multiple_select":
            return chosen
        size, align = chosen[0].shape[-2:], self.align_corners
        return torch.cat(
            [F.interpolate(x, size, mode="bilinear", align_corners=align) for x in chosen], 1
        )

    def cls_seg(self, feat: Tensor) -> Tensor:
        """Dropout and classifier."""
        return self.conv_seg(feat if self.dropout is None else self.dropout(feat))

    def extra_repr(self) -> str:
        return f"align_corners={self.align_corners}, backend={self.backend!r}"


class ASPPHead(BaseDecodeHead):
    """``image_pool``, ``aspp_modules``, 3x3 ``bottleneck``, ``conv_seg``."""

    def __init__(self, dilations: Iterable[int] = (1, 6, 12, 18), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dilations = several("mmseg.ASPPHead", dilations=dilations)
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), self._conv(self.in_channels, self.channels, 1)
        )
        self.aspp_modules = nn.ModuleList([self._branch(rate) for rate in self.dilations])
        self.bottleneck = self._conv((len(self.dilations) + 1) * self.channels, self.channels, 3)

    def _branch(self, rate: int) -> nn.Module:
        return self._conv(self.in_channels, self.channels, 1 if rate == 1 else 3, rate)

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        return _context(self, inputs)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return self.cls_seg(_context(self, inputs))


class DepthwiseSeparableASPPHead(ASPPHead):
    """The DeepLabv3+ head: separable branches (but for rate 1), low-level features from
    ``inputs[0]``, two separable convolutions.
    """

    def __init__(self, c1_in_channels: int, c1_channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if c1_in_channels < 0:
            raise ValueError(
                "c1_in_channels is 0 (no low-level features) or more"
                f"\n  c1_in_channels: {c1_in_channels}"
            )
        self.c1_bottleneck = self._conv(c1_in_channels, c1_channels, 1) if c1_in_channels else None
        self.sep_bottleneck = nn.Sequential(
            self._separable(self.channels + c1_channels), self._separable(self.channels)
        )

    def _branch(self, rate: int) -> nn.Module:
        return self._separable(self.in_channels, rate) if rate > 1 else super()._branch(rate)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        x = _context(self, inputs)
        if self.c1_bottleneck is not None:
            low_level = self.c1_bottleneck(inputs[0])
            x = F.interpolate(
                x, low_level.shape[-2:], mode="bilinear", align_corners=self.align_corners
            )
            x = torch.cat([x, low_level], 1)
        return self.cls_seg(run(x, [self.sep_bottleneck], backend=self.backend))


class Encoding(_Encoding):
    """[B, channels, H, W] to [B, num_codes, channels]. Keys: ``codewords``, ``scale``."""

    def __init__(self, channels: int, num_codes: int, *, backend: str | None = None) -> None:
        super().__init__(channels, num_codes, backend=backend)
        self.channels, self.num_codes = channels, num_codes


class EncModule(nn.Module):
    """x [B, C, H, W] to the pooled encoding [B, C] and the map with its channels weighted, in this
    order. ``encoding_project``, ``encoding``, ``fc``.
    """

    def __init__(
        self,
        in_channels: int,
        num_codes: int,
        conv_cfg: Config | None,
        norm_cfg: Config | None,
        act_cfg: Config | None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.encoding_project = ConvModule(
            in_channels,
            in_channels,
            1,
            conv_cfg=conv_cfg,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            backend=backend,
        )
        encoding: list[nn.Module] = [Encoding(in_channels, num_codes, backend=backend)]
        if norm_cfg is not None:
            encoding.append(build_norm(_along_a_line(norm_cfg), num_codes)[1])
        self.encoding = nn.Sequential(*encoding, nn.ReLU(inplace=True))
        self.fc = nn.Sequential(nn.Linear(in_channels, in_channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = self.encoding(self.encoding_project(x)).mean(1)
        return v, emphasised(x, self.fc(v))


class EncHead(BaseDecodeHead):
    """``bottleneck`` on the last of the inputs, fused with ``lateral_convs`` of the others where
    ``add_lateral``, ``enc_module``, ``conv_seg``.

    Returns logits or, with ``use_se_loss``, logits and those of the classes' presence.
    """

    TRANSFORMS = ("multiple_select",)

    def __init__(
        self,
        num_codes: int = 32,
        use_se_loss: bool = True,
        add_lateral: bool = False,
        loss_se_decode: Config = SE_LOSS,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_transform="multiple_select", **kwargs)
        self.use_se_loss, self.add_lateral, self.num_codes = use_se_loss, add_lateral, num_codes
        self.loss_se_decode = loss_se_decode
        *others, last = self.in_channels
        self.bottleneck = self._conv(last, self.channels, 3)
        if add_lateral:
            self.lateral_convs = nn.ModuleList([self._conv(c, self.channels, 1) for c in others])
            self.fusion = self._conv(len(self.in_channels) * self.channels, self.channels, 3)
        self.enc_module = EncModule(
            self.channels,
            num_codes,
            self.conv_cfg,
            self.norm_cfg,
            self.act_cfg,
            backend=self.backend,
        )
        if use_se_loss:
            self.se_layer = nn.Linear(self.channels, self.num_classes)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        *others, last = self._transform_inputs(inputs)
        feat = self.bottleneck(last)
        if self.add_lateral:
            feat = with_laterals(
                feat, others, self.lateral_convs, self.fusion, align_corners=self.align_corners
            )
        encoded, feat = self.enc_module(feat)
        logits = self.cls_seg(feat)
        return (logits, self.se_layer(encoded)) if self.use_se_loss else logits


class EMAModule(nn.Module):
    """x [B, channels, H, W] reconstructed from bases that EM fits to it; without a gradient. In
    training the bases move. Key: ``bases`` [1, channels, num_bases].
    """

    backend: str | None = None
    bases: Tensor

    def __init__(
        self,
        channels: int,
        num_bases: int,
        num_stages: int,
        momentum: float,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive(
            "mmseg.EMAModule", channels=channels, num_bases=num_bases, num_stages=num_stages
        )
        self.num_stages, self.momentum, self.backend = num_stages, momentum, backend
        self.register_buffer("bases", unit_bases(channels, num_bases)[None])

    def forward(self, feats: Tensor) -> Tensor:
        return _reconstruct(self, feats)

    def extra_repr(self) -> str:
        return f"num_stages={self.num_stages}, momentum={self.momentum}, backend={self.backend!r}"


class EMAHead(BaseDecodeHead):
    """``ema_in_conv``, ``ema_mid_conv`` (which is not trained), ``ema_module``, ``ema_out_conv``,
    ``bottleneck``, ``conv_cat`` with the input where ``concat_input``, ``conv_seg``.

    The middle convolution is folded into the bases and does not run.
    """

    def __init__(
        self,
        ema_channels: int,
        num_bases: int,
        num_stages: int,
        concat_input: bool = True,
        momentum: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ema_channels, self.num_bases, self.num_stages = ema_channels, num_bases, num_stages
        self.concat_input, self.momentum = concat_input, momentum
        self.ema_module = EMAModule(
            ema_channels, num_bases, num_stages, momentum, backend=self.backend
        )
        self.ema_in_conv = self._conv(self.in_channels, ema_channels, 3)
        bare: dict[str, Any] = {
            "act_cfg": None,
            "backend": self.backend,
            "conv_cfg": self.conv_cfg,
        }
        self.ema_mid_conv = ConvModule(ema_channels, ema_channels, 1, norm_cfg=None, **bare)
        self.ema_mid_conv.requires_grad_(False)
        self.ema_out_conv = ConvModule(
            ema_channels, ema_channels, 1, norm_cfg=self.norm_cfg, **bare
        )
        self.bottleneck = self._conv(ema_channels, self.channels, 3)
        if concat_input:
            self.conv_cat = self._conv(self.in_channels + self.channels, self.channels, 3)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        x = self._transform_inputs(inputs)
        feats = self.ema_in_conv(x)
        if _is_ours(self.ema_module):
            reconstruction = _reconstruct(self.ema_module, feats, self.ema_mid_conv)
        else:
            reconstruction = self.ema_module(self.ema_mid_conv(feats))
        y = (feats + self.ema_out_conv(reconstruction.relu_())).relu_()
        y = self.bottleneck(y)
        if self.concat_input:
            y = self.conv_cat(torch.cat([x, y], 1))
        return self.cls_seg(y)


def _reconstruct(module: Any, x: Tensor, before: nn.Module | None = None) -> Tensor:
    """The reconstruction of before(x) by an EMAModule."""
    if before is not None:
        stages, _ = leaves([before])
        before = stages[0] if len(stages) == 1 and isinstance(stages[0], nn.Module) else before
    y, _ = attend(
        x,
        module,
        module.bases,
        before,
        iterations=module.num_stages,
        momentum=module.momentum,
        renormalise=True,
        norm="clamp",
        backend=module.backend,
    )
    return y


def _is_ours(module: nn.Module) -> bool:
    """Whether a call of the module is a call of :class:`EMAModule`'s forward, and nothing else."""
    forward = getattr(module.forward, "func", None) or getattr(module.forward, "__func__", None)
    return forward is EMAModule.forward and not has_hooks(module)


def _along_a_line(norm_cfg: Config) -> Config:
    """The configuration of the norm for [B, K, C] that belongs to one for maps."""
    kind = norm_cfg["type"]
    if kind in ("BN", "IN"):
        kind += "1d"
    elif isinstance(kind, str):
        kind = kind.replace("2d", "1d")
    return {**norm_cfg, "type": kind}


def _context(head: Any, inputs: Sequence[Tensor]) -> Tensor:
    """The pyramid and its bottleneck: [B, channels, H, W]."""
    x = head._transform_inputs(inputs)
    branches = [[branch] for branch in head.aspp_modules]
    return head.bottleneck(
        pyramid(x, branches, [head.image_pool], pool_first=True, backend=head.backend)
    )


def _check_inputs(
    in_channels: int | Sequence[int], in_index: int | Sequence[int], input_transform: str | None
) -> None:
    """Numbers for one input, sequences of one length for several."""
    given = f"\n  in_channels: {in_channels}\n  in_index: {in_index}"
    if input_transform is None:
        if not (isinstance(in_channels, int) and isinstance(in_index, int)):
            raise ValueError(f"without input_transform, in_channels and in_index are ints{given}")
    elif (
        isinstance(in_channels, int)
        or isinstance(in_index, int)
        or len(in_channels) != len(in_index)
    ):
        raise ValueError(f"in_channels and in_index are sequences of one length{given}")
