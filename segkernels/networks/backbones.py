"""Backbones by name, and their weights from a local file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segkernels.networks.resnet import RESNETS, ResNet
from segkernels.networks.xception import Xception65
from segkernels.nn.arguments import NormClass

NAMES = [*RESNETS, "xception65"]


def build_backbone(
    name: str,
    *,
    output_stride: int = 16,
    in_channels: int = 3,
    multigrid: Sequence[int] | None = None,
    width: int | None = None,
    weights: str | Path | None = None,
    norm: NormClass = nn.BatchNorm2d,
    backend: str | None = None,
) -> ResNet | Xception65:
    """A backbone: image [B, in_channels, H, W] to Features. See :func:`assemble`."""
    if name not in NAMES:
        raise ValueError(f"no such backbone\n  backbone: {name!r}\n  known: {', '.join(NAMES)}")
    if not isinstance(output_stride, Integral) or output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride is 8, 16 or 32\n  output_stride: {output_stride!r}")
    options: dict[str, Any] = {"in_channels": in_channels, "multigrid": multigrid, "norm": norm}
    if name in RESNETS:
        options["width"] = 64 if width is None else width
        backbone: ResNet | Xception65 = ResNet(name, output_stride, **options)
    elif width is not None:
        raise ValueError(f"only ResNets have a width\n  backbone: {name!r}\n  width: {width}")
    else:
        backbone = Xception65(output_stride, backend=backend, **options)
    if weights is not None:
        load_weights(backbone, weights)
    return backbone


def load_weights(backbone: nn.Module, path: str | Path) -> None:
    """Loads a backbone's state_dict from a .pth or .safetensors file.

    Wrappers ("state_dict", "model", "module.", "backbone.") are taken off: of a whole network's
    file, what is under "backbone." is loaded. A classifier ("fc.", "classifier.",
    "aux_classifier.") is left out. Anything else that is missing, unknown or of another size raises
    RuntimeError, as ``load_state_dict`` does; so does a file without a state_dict.
    """
    if not isinstance(path, str | Path) or not Path(path).is_file():
        raise FileNotFoundError(
            f"weights must be the path of a local file (.pth or .safetensors)\n  weights: {path!r}"
        )
    state = _read(Path(path))
    for wrapper in ("state_dict", "model"):
        inner = state.get(wrapper)
        state = inner if isinstance(inner, dict) else state
    for prefix in ("module.", "backbone."):
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = inside or state
    heads = ("fc.", "classifier.", "aux_classifier.")
    backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith(heads)})


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        load: Callable[[Path], Any] = load_file
    else:
        load = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        state = load(path)
    except Exception as error:  # what a file of another kind raises depends on its first bytes
        raise RuntimeError(f"not a file of tensors\n  weights: {path}\n  {error!r}") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise RuntimeError(
            f"the file holds no state_dict\n  weights: {path}\n  it holds: {type(state).__name__}"
        )
    return state
