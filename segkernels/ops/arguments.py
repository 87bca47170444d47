"""What every operator asks of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from segkernels.fused import DTYPES, SUPPORTED, UnsupportedInputError, autocasts


def check_tensors(op: str, wide: dict[str, Tensor] | None = None, /, **tensors: Tensor) -> None:
    """Raise UnsupportedInputError unless all are dense floating point tensors on one device and
    ``tensors`` share one type.

    The ``wide`` ones may have any floating type (they are taken in the accumulation type); autocast
    lifts the condition of one type where it casts: never from or to float64.
    """
    given = tensors | (wide or {})
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise UnsupportedInputError(
                f"{op}: {name} must be a tensor\n  {name}: {type(t).__name__}"
            )
    first, x = next(iter(given.items()))
    kind = x.device, x.dtype, torch.strided
    if x.dtype in DTYPES and all((t.device, t.dtype, t.layout) == kind for t in given.values()):
        return
    listing = "".join(
        f"\n  {n:<18}{str(t.dtype).removeprefix('torch.'):<10} {t.device}" for n, t in given.items()
    )
    if any(t.device != x.device for t in given.values()):
        raise UnsupportedInputError(
            f"{op}: all tensors must be on one device{listing}"
            f"\n  move them with .to({first}.device)"
        )
    if not all(t.dtype in DTYPES for t in given.values()):
        raise UnsupportedInputError(
            f"{op}: only floating point tensors are supported ({SUPPORTED}){listing}"
        )
    for name, t in given.items():
        if t.layout != torch.strided:
            raise UnsupportedInputError(
                f"{op}: only dense tensors are supported\n  {name}: {t.layout}\n  use .to_dense()"
            )
    types = {t.dtype for t in tensors.values()}
    if len(types) > 1 and (torch.float64 in types or not autocasts(x)):
        raise UnsupportedInputError(
            f"{op}: tensors of different types{listing}"
            f"\n  convert them with .to({first}.dtype), or use torch.autocast"
        )
