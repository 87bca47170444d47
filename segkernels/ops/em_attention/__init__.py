r"""Expectation-maximisation attention: pixels reconstructed from a few bases that T iterations fit
to them.

.. math::
    z^t_{ik} = \mathrm{softmax}_k \left( \lambda \langle x_i, \mu^{t-1}_k \rangle \right)
    \qquad s^t_k = \sum_i z^t_{ik} \qquad a^t_k = \sum_i z^t_{ik} \, x_i

    \mu^t_k = a^t_k / d^t_k \qquad y_i = \sum_k z^T_{ik} \, \mu^T_k

The responsibilities of y are those of the last E-step, made with the bases before the last M-step,
as published. T = 0 has one E-step and no M-step: z and y are made with the bases given. The M-step
is published as a mean over the pixels followed by a division by its length, each with an ε of its
own; both are in one divisor, so that no tensor of pixels and bases is divided. With r = ‖a‖:

.. math::
    d = r + \varepsilon (\varepsilon + s), \; \varepsilon = 10^{-6} \; \text{(additive, EMANet)}
    \qquad
    d = \max(r, \delta \max(s, \delta)), \; \delta = 10^{-12} \; \text{(clamp, F.normalize)}

**Gradients.** The published unit computes z, μ and with them y under ``no_grad``: its bases are
learned by a running mean, and no gradient passes through the iterations to the features or to what
made them (the convolution in front of it stays as it was initialised). That is ``gradient="none"``,
the default. It saves a backward over T products with all pixels, and costs the features one of
their paths. The other modes differentiate

=================  =================================================================================
``"last"``         z of the last E-step, by the features and the temperature; all bases are
                   constants. One pass over the pixels.
``"last+bases"``   the last iteration whole: z, μ and y, by the features, the temperature and the
                   bases that it begins from, whose gradient is handed to ``bases`` as it is. For
                   T = 1 this is ``"full"``.
``"full"``         all T iterations, by the features, the temperature and ``bases``.
=================  =================================================================================

With g = dy, in the order of computation:

.. math::
    dz^T_i = \mu^T g_i + dz_i \qquad d\mu^T = \sum_i z^T_i g_i^\top + d\mu

    p = \langle a, d\mu \rangle \quad
    da = \frac{d\mu}{d} - \frac{p}{d^2} \frac{\partial d}{\partial r} \frac{a}{r} \quad
    ds = -\frac{p}{d^2} \frac{\partial d}{\partial s}

    dz^t_{ik} \mathrel{+}= \langle x_i, da^t_k \rangle + ds^t_k \qquad
    dl^t_{ik} = z^t_{ik} (dz^t_{ik} - \textstyle\sum_k z^t_{ik} \, dz^t_{ik})

    u^t_k = \sum_i dl^t_{ik} \, x_i \qquad d\mu^{t-1} = \lambda u^t \qquad
    d\lambda = \sum_{t,k} \langle \mu^{t-1}_k, u^t_k \rangle

    dx_i = \sum_{t,k} z^t_{ik} \, da^t_k + \lambda \, dl^t_{ik} \, \mu^{t-1}_k

Saved: the bases before each iteration, s and r. Nothing of the size of pixels by bases.

**A 1x1 convolution in front** of the unit, x = W f + b, is read by products with bases and by sums
only, so it folds into them: λ⟨x, μ⟩ = λ⟨f, Wᵀμ⟩ + λ⟨b, μ⟩ and a = W Σ z f + s b. It then never runs
over the pixels, which saves 2NC² operations (without gradients only).

========  =====================  ===================================================================
symbol    argument               shape
========  =====================  ===================================================================
x         ``features``           [B, C, H, W], pixels i
mu        ``bases``              [C, K] or [B, C, K]; [B, K, D] inside
lam       ``temperature``        one number
w, b      ``weight``, ``bias``   [D, C], [D], of a 1x1 convolution; the bases are then over D
                                 channels (D = C without)
y         reconstruction         [B, D, H, W]
z         assignment             [B, K, H, W]
m         bases                  [B, K, D], μ^T
h         bases before           [B, E, K, D], of the last E = max(1, depth) E-steps
s, r      masses, lengths        [B, depth, K], of the last `depth` M-steps
========  =====================  ===================================================================

Source: Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV
2019, section 3; the gradients are ours.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal, NoReturn

import torch
from torch import Tensor

from segkernels import fused
from segkernels.fused import UnsupportedInputError, accumulation_dtype
from segkernels.ops.arguments import check_tensors
from segkernels.ops.nodes import too_many_nodes
from segkernels.overrides import overridable

__all__ = ["GRADIENTS", "NORMS", "Gradient", "Norm", "em_attention"]

Gradient = Literal["none", "last", "last+bases", "full"]
Norm = Literal["additive", "clamp"]
GRADIENTS: tuple[Gradient, ...] = ("none", "last", "last+bases", "full")
NORMS: tuple[Norm, ...] = ("additive", "clamp")

OP = "em_attention"


@overridable
def em_attention(
    features: Tensor,
    bases: Tensor,
    iterations: int = 3,
    *,
    temperature: float | Tensor = 1.0,
    gradient: Gradient = "none",
    norm: Norm = "additive",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    return_assignment: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Fit the bases to the pixels of each image by EM, and reconstruct the pixels from them.

    features: [B, C, H, W], any strides. bases: [C, K], or [B, C, K] for bases of each image's own,
    any floating type, of unit length as a rule. iterations: T, 0 or more. temperature: λ, a number,
    or a tensor of one, which may want a gradient. gradient: what is differentiated, see above; with
    "none" no result has a gradient. norm: "additive" (EMANet) or "clamp" (mmsegmentation), where
    the ε stand. weight, bias: [D, C] or [D, C, 1, 1] and [D] of a 1x1 convolution in front, which
    is folded into the bases, [D, K] or [B, D, K] then; for gradient="none" only. backend: "native",
    "triton", "reference" or None (automatic).

    Returns the reconstruction [B, D, H, W] in the type and memory format of the features and the
    bases [B, D, K] after T iterations in float32 (float64 for float64); with return_assignment also
    the responsibilities of the last E-step, [B, K, H, W], in the bases' type, which sum to one over
    K. Raises UnsupportedInputError for arguments that do not fit and BackendUnavailableError when
    the backend asked for cannot run.
    """
    given = {"weight": weight, "bias": bias}
    wide = {"bases": bases} | {n: t for n, t in given.items() if t is not None}
    if isinstance(temperature, Tensor):
        wide["temperature"] = temperature
    check_tensors(OP, wide, features=features)
    _check(features, bases, iterations, temperature, gradient, norm)
    if weight is not None or bias is not None:
        weight = _checked_weight(features, bases, weight, bias, gradient)
    elif features.shape[1] != bases.shape[-2]:
        _refuse("bases must have a row for each channel of features", features, bases)
    mu = bases.mT.expand(features.shape[0], -1, -1)  # [B, K, D]
    lam = _as_tensor(temperature, bases)
    depths = {"none": -1, "last": 0, "last+bases": min(1, iterations), "full": iterations}
    if gradient in ("none", "last"):
        mu = mu.detach()
    if gradient == "none":
        features, lam = features.detach(), None if lam is None else lam.detach()
        weight, bias = (None if t is None else t.detach() for t in (weight, bias))
    y, z, m, _, _, _ = _OPERATOR(
        features,
        mu,
        lam,
        weight,
        bias,
        int(iterations),
        int(depths[gradient]),
        norm == "clamp",
        bool(return_assignment),
        backend=backend,
    )
    m = m.detach() if gradient == "last" else m
    return (y, m.mT, z) if return_assignment else (y, m.mT)


def _check(
    features: Tensor,
    bases: Tensor,
    iterations: object,
    temperature: object,
    gradient: object,
    norm: object,
) -> None:
    if features.dim() != 4:
        raise UnsupportedInputError(
            f"{OP}: features must have 4 dimensions [B, C, H, W]"
            f"\n  features: {list(features.shape)}"
        )
    if bases.dim() not in (2, 3) or 0 in bases.shape[-2:]:
        _refuse("bases must be [C, K] or [B, C, K], with channels and bases", features, bases)
    if bases.dim() == 3 and bases.shape[0] not in (1, features.shape[0]):
        _refuse("bases [B, C, K] must be of as many images as features, or of one", features, bases)
    if not isinstance(iterations, Integral) or isinstance(iterations, bool) or iterations < 0:
        raise UnsupportedInputError(
            f"{OP}: iterations must be an int, 0 or more\n  iterations: {iterations!r}"
        )
    if gradient not in GRADIENTS:
        raise UnsupportedInputError(
            f"{OP}: gradient must be one of {', '.join(map(repr, GRADIENTS))}"
            f"\n  gradient: {gradient!r}"
        )
    if norm not in NORMS:
        raise UnsupportedInputError(
            f"{OP}: norm must be one of {', '.join(map(repr, NORMS))}\n  norm: {norm!r}"
        )
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise UnsupportedInputError(
                f"{OP}: temperature must be one number\n  temperature: {list(temperature.shape)}"
            )
    elif not (isinstance(temperature, int | float) and abs(temperature) < math.inf):
        raise UnsupportedInputError(
            f"{OP}: temperature must be a finite number, or a tensor of one"
            f"\n  temperature: {temperature!r}"
        )


def _checked_weight(
    features: Tensor, bases: Tensor, weight: Tensor | None, bias: Tensor | None, gradient: Gradient
) -> Tensor:
    """The weight as [D, C], or None where it does not fit."""
    if weight is None:
        raise UnsupportedInputError(f"{OP}: a bias without a weight")
    if gradient != "none":
        raise UnsupportedInputError(
            f"{OP}: a folded convolution has no gradient\n  gradient: {gradient!r}"
            "\n  run the convolution in front of the operator, or pass gradient='none'"
        )
    channels = (bases.shape[-2], features.shape[1])
    if weight.shape not in (channels, (*channels, 1, 1)):
        _refuse(f"weight must be {list(channels)}", features, bases, weight=weight)
    if bias is not None and bias.shape != channels[:1]:
        _refuse(f"bias must be {list(channels[:1])}", features, bases, bias=bias)
    return weight.flatten(1)


def _as_tensor(temperature: float | Tensor, bases: Tensor) -> Tensor | None:
    """λ as a tensor without dimensions; None for 1."""
    if isinstance(temperature, Tensor):
        return temperature.reshape(())
    wide = accumulation_dtype(bases.dtype)
    return None if temperature == 1 else bases.new_full((), temperature, dtype=wide)


def _refuse(why: str, features: Tensor, bases: Tensor, **others: Tensor) -> NoReturn:
    given = {"features": features, "bases": bases, **others}
    listing = "".join(f"\n  {name}: {list(t.shape)}" for name, t in given.items())
    raise UnsupportedInputError(f"{OP}: {why}{listing}")


def _shapes(
    x: Tensor,
    mu: Tensor,
    lam: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    iterations: int,
    depth: int,
    clamp: bool,
    assignment: bool,
) -> tuple[Tensor, ...]:
    B, K, D = mu.shape
    wide, layout = accumulation_dtype(x.dtype), fused.memory_format(x)

    def empty(*size: int) -> Tensor:
        return x.new_empty(size, dtype=wide)

    def empty_map(channels: int, dtype: torch.dtype) -> Tensor:
        made = x.new_empty(B, channels, *x.shape[2:], dtype=dtype)
        return torch.empty_like(made, memory_format=layout)

    return (
        empty_map(D, x.dtype),
        empty_map(K, wide) if assignment else empty(0),
        empty(B, K, D),
        empty(0) if depth < 0 else empty(B, max(1, depth), K, D),
        empty(B, max(0, depth), K),
        empty(B, max(0, depth), K),
    )


_OPERATOR = fused.declare(
    __name__,
    forward="(Tensor x, Tensor mu, Tensor? lam, Tensor? w, Tensor? b, int iterations, int depth,"
    " bool clamp, bool assignment)"
    " -> (Tensor y, Tensor z, Tensor m, Tensor h, Tensor s, Tensor r)",
    backward="(Tensor? dy, Tensor? dz, Tensor? dm, Tensor x, Tensor m, Tensor h, Tensor s,"
    " Tensor r, Tensor? lam, int depth, bool clamp, int[] need)"
    " -> (Tensor dx, Tensor dmu, Tensor dlam)",
    shapes=_shapes,
    wide=("mu", "lam", "w", "b"),
    sizes={"dmu": lambda m: m.shape},
    limits=lambda mu: too_many_nodes(mu.shape[1]),
)
