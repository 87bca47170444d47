"""The EM attention unit."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.fused import UnsupportedInputError
from segkernels.nn.arguments import NormClass, check_positive, is_positive, norm_maker
from segkernels.nn.batch_norm import affine, uses_batch_moments
from segkernels.nn.pair import norm_obstacle, pointwise_obstacle
from segkernels.nn.running_bases import begin, repeated, track, unit_bases
from segkernels.ops.em_attention import GRADIENTS, NORMS, Gradient, Norm, em_attention
from segkernels.overrides import overridable

Update = Literal["module", "external"]
UPDATES = ("module", "external")


class Attended(NamedTuple):
    """What a unit returns whose bases are updated from outside."""

    features: Tensor  # [B, C, H, W]
    bases: Tensor  # [B, C, K], of every image


@overridable
def attend(
    x: Tensor,
    owner: nn.Module,
    bases: Tensor,
    before: nn.Module | None = None,
    *,
    momentum: float | None = None,
    renormalise: bool = False,
    gradient: Gradient = "none",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`segkernels.em_attention` over before(x), from running bases: reconstruction
    [B, D, H, W] and bases [B, D, K].

    owner: the module whose buffer ``bases`` is, [D, K] or [1, D, K]; it moves while the owner is in
    training, unless momentum is None. before: a layer in front; a 1x1 convolution is folded into
    the bases where no gradient passes. momentum, renormalise: of
    :func:`segkernels.nn.running_bases.track`; the rest: of em_attention.
    """
    given = begin(owner, bases, x)
    if isinstance(before, nn.Conv2d) and gradient == "none" and pointwise_obstacle(before) is None:
        options |= {"weight": before.weight, "bias": before.bias}
    elif before is not None:
        x = before(x)
    y, found = em_attention(x, given, gradient=gradient, **options)
    if momentum is not None and owner.training and not repeated():
        track(bases, found, momentum, renormalise)
    return y, found


def _restored(y: Tensor, x: Tensor, restore: nn.Conv2d, norm: nn.Module) -> Tensor:
    """φ(x + N(V φ(y))); y is lost to it. A BatchNorm in evaluation is folded into V, where nothing
    hangs on the two being called.
    """
    y = y.relu_()
    if (
        isinstance(norm, nn.BatchNorm2d)
        and norm_obstacle(norm) is None
        and not uses_batch_moments(norm)
        and pointwise_obstacle(restore) is None
        and restore.bias is None
    ):
        scale, shift, _ = affine([norm])
        assert scale is not None and shift is not None
        weight = restore.weight
        y = F.conv2d(y, (weight * scale[:, None, None, None]).to(weight), shift.to(weight))
    else:
        y = norm(restore(y))
    return (y + x).relu_()


class RunningBases(nn.Module):
    """Holds the bases [C, K], a buffer, and its momentum (see
    :mod:`segkernels.nn.running_bases`).
    """

    bases: Tensor

    def __init__(self, channels: int, number: int, momentum: float, renormalise: bool) -> None:
        super().__init__()
        self.momentum, self.renormalise = momentum, renormalise
        self.register_buffer("bases", unit_bases(channels, number))

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, renormalise={self.renormalise}"


class EMAU(nn.Module):
    """EM attention unit: y = φ(x + N(V φ(x̃))), x̃ the pixels of U x + b reconstructed from K bases.

    channels, bases: C, K. iterations: T, of EM, for every image, from running bases. temperature: λ
    of the assignment, a number; with ``learn_temperature`` a parameter that begins there. gradient:
    what of the iterations is differentiated, see :mod:`segkernels.ops.em_attention`. As published
    it is "none": x learns by the residual and what stands behind it alone, U and b stay as they
    were initialised (they want no gradient then), and the convolution is folded into the bases and
    never runs. norm: "additive" (EMANet) or "clamp" (mmsegmentation), how bases are brought to unit
    length. momentum: share of the new in the running mean of the bases. renormalise: their mean
    over a batch is brought to unit length first (mmsegmentation does, EMANet does not). update:
    "module", in every forward in training, or "external", by :meth:`update`. norm_layer: called
    with C. backend: "native", "triton", "reference" or None.

    Input [B, C, H, W]; returns a map of that size or, for "external" updates,
    ``Attended(features, bases)``. The bases are averaged over all processes, image by image, so
    that they are those of one process on the joint batch; in evaluation they rest. Activation
    checkpointing moves them once. Children: ``project`` (U, b), ``running`` (buffer ``bases``
    [C, K]), ``restore`` (V), ``norm``; with ``learn_temperature`` the parameter ``temperature``.

    Source: Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV
    2019, section 3; gradients through the iterations are ours.
    """

    def __init__(
        self,
        channels: int,
        bases: int = 64,
        iterations: int = 3,
        *,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        gradient: Gradient = "none",
        norm: Norm = "additive",
        momentum: float = 0.1,
        renormalise: bool = False,
        update: Update = "module",
        norm_layer: NormClass = nn.BatchNorm2d,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive("EMAU", channels=channels, bases=bases, iterations=iterations)
        _check_one_of("gradient", gradient, GRADIENTS)
        _check_one_of("norm", norm, NORMS)
        _check_one_of("update", update, UPDATES)
        _check_number("temperature", temperature, math.inf)
        _check_number("momentum", momentum, 1)
        if learn_temperature and gradient == "none":
            raise UnsupportedInputError("EMAU: with gradient='none' no temperature can be learned")
        self.iterations, self.gradient, self.norm_kind = iterations, gradient, norm
        self.external = update == "external"
        self.backend = backend
        self.temperature: float | nn.Parameter = (
            nn.Parameter(torch.tensor([float(temperature)])) if learn_temperature else temperature
        )
        self.project = nn.Conv2d(channels, channels, 1)
        self.running = RunningBases(channels, bases, momentum, renormalise)
        self.restore = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = norm_maker("norm_layer", norm_layer)(channels)
        for conv in (self.project, self.restore):
            nn.init.normal_(conv.weight, std=math.sqrt(2 / channels))
        self.project.requires_grad_(gradient != "none")

    def forward(self, x: Tensor) -> Tensor | Attended:
        running = self.running
        reconstruction, bases = attend(
            x,
            running,
            running.bases,
            self.project,
            iterations=self.iterations,
            momentum=None if self.external else running.momentum,
            renormalise=running.renormalise,
            temperature=self.temperature,
            gradient=self.gradient,
            norm=self.norm_kind,
            backend=self.backend,
        )
        y = _restored(reconstruction, x, self.restore, self.norm)
        return Attended(y, bases) if self.external else y

    def update(self, bases: Tensor) -> None:
        """Moves the running mean by the bases [B, C, K] that a forward returned, whatever the mode.

        Every process must call it.
        """
        track(self.running.bases, bases, self.running.momentum, self.running.renormalise)

    def extra_repr(self) -> str:
        channels, bases = self.running.bases.shape
        return (
            f"{channels}, {bases}, iterations={self.iterations}, gradient={self.gradient!r},"
            f" norm={self.norm_kind!r}, backend={self.backend!r}"
        )


def _check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnsupportedInputError(
            f"EMAU: {name} must be one of {', '.join(map(repr, known))}\n  {name}: {value!r}"
        )


def _check_number(name: str, value: object, most: float) -> None:
    if not is_positive(value, most):
        raise UnsupportedInputError(
            f"EMAU: {name} must be a number above 0"
            f"{'' if most == math.inf else f', at most {most}'}\n  {name}: {value!r}"
        )
