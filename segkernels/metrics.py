"""Scores of semantic segmentation, all from one confusion matrix over the whole data set.

With n[i, j] the number of pixels of class i predicted as j, t[i] = Σⱼ n[i, j] and p[j] = Σᵢ n[i, j]
(Long, Shelhamer, Darrell, "Fully convolutional networks for semantic segmentation", 2015, section 5):

    pixel accuracy        Σᵢ n[i, i] / Σᵢ t[i]
    class accuracy        n[i, i] / t[i]                             its mean over i: mean accuracy
    class IoU             n[i, i] / (t[i] + p[i] − n[i, i])          its mean over i: mean IoU (mIoU)
    frequency-weighted    Σᵢ t[i]·IoU[i] / Σᵢ t[i]

Published code disagrees about a class whose denominator is zero; `absent` and `epsilon` of `scores` name the conventions:

    absent="skip"           the class is left out of the mean: FCN, torchfcn, jfzhang95, VainF, EMANet, mmseg
    absent="zero"           the class counts as 0: semseg (epsilon=1e-10), PyTorch-Encoding (epsilon=2**-52)
    absent="unlabelled"     left out of the mean IoU if it is never labelled, even where it is predicted: deeplab-pytorch
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Absent = Literal["skip", "zero", "unlabelled"]


class Scores(NamedTuple):
    """Fractions between 0 and 1; NaN where there was nothing to measure."""

    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float
    frequency_weighted_iou: float
    class_accuracy: Tensor  # [C] float64
    class_iou: Tensor  # [C] float64


def confusion_matrix(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = 255
) -> Tensor:
    """Counts n[i, j] of pixels of class i predicted as j: [C, C] int64. Add the matrices of all batches, then score.

    Args:
        prediction: class indices in [0, C), integers of any shape (`logits.argmax(1)`; ties go to the lowest class).
        target: class indices, same shape. A pixel whose target is `ignore_index` or outside [0, C) is not counted.

    Raises:
        ValueError: shapes differ, a tensor is not of integers, or a counted pixel is predicted outside [0, C).
    """
    if prediction.shape != target.shape:
        raise ValueError(
            "confusion_matrix needs one prediction per target\n"
            f"  prediction: {list(prediction.shape)}\n  target:     {list(target.shape)}"
        )
    if prediction.is_floating_point() or target.is_floating_point():
        raise ValueError(
            "confusion_matrix needs class indices, not scores: pass logits.argmax(1)\n"
            f"  prediction: {prediction.dtype}\n  target:     {target.dtype}"
        )
    counted = (target >= 0) & (target < num_classes)
    if ignore_index is not None:
        counted &= target != ignore_index
    i, j = target[counted].long(), prediction[counted].long()
    if i.numel() and not 0 <= int(j.min()) <= int(j.max()) < num_classes:
        raise ValueError(
            f"predictions must lie in [0, {num_classes}), found {int(j.min())} to {int(j.max())}"
        )
    return torch.bincount(num_classes * i + j, minlength=num_classes**2).view(num_classes, -1)


def scores(confusion: Tensor, absent: Absent = "skip", epsilon: float = 0.0) -> Scores:
    """Scores of a confusion matrix n [C, C] (rows: target, columns: prediction), computed in float64.

    Args:
        absent: what a class with a zero denominator does to a mean, see above.
        epsilon: added to every denominator, as some published code does.
    """
    if absent not in ("skip", "zero", "unlabelled"):
        raise ValueError(f"absent must be 'skip', 'zero' or 'unlabelled', got {absent!r}")
    n = confusion.double().cpu()
    correct, t, p = n.diag(), n.sum(1), n.sum(0)
    total = t.sum()

    def ratio(a: Tensor, b: Tensor) -> Tensor:  # 0/0 is NaN, or 0 for absent="zero"
        quotient = a / (b + epsilon)
        return quotient.where(b > 0, 0.0 if absent == "zero" else torch.nan)

    accuracy, iou = ratio(correct, t), ratio(correct, t + p - correct)
    in_mean = iou.where(t > 0, torch.nan) if absent == "unlabelled" else iou
    return Scores(
        pixel_accuracy=float(ratio(correct.sum(), total)),
        mean_accuracy=float(accuracy.nanmean()),
        mean_iou=float(in_mean.nanmean()),
        frequency_weighted_iou=float(ratio((t * iou)[t > 0].sum(), total)),
        class_accuracy=accuracy,
        class_iou=iou,
    )
