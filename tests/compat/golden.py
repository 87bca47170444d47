"""Golden cases: numbers that published implementations produced, and the way from a case to our
class.

Two folders hold them, in one format (``README.md`` there): the choice committed under
``tests/golden`` (every class once; float64 results rounded to float32, files compressed) and, where
it exists, the full folder beside the checkout.
"""

from __future__ import annotations

import importlib
import inspect
import json
import lzma
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn

from tests.compat.compositions import COMPOSITIONS

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "tests" / "golden"
FULL = ROOT.parent / "shared" / "golden"

# The published repository of a case names the module of segkernels.compat; class and arguments
# are the published ones.
PACKAGES = {
    "AlexHex7/Non-local_pytorch": "nonlocal_pytorch",
    "CSAILVision/semantic-segmentation-pytorch": "mit_semseg",
    "Gaoyiminggithub/Graphonomy": "graphonomy",
    "NoamRosenberg/autodeeplab": "autodeeplab",
    "VainF/DeepLabV3Plus-Pytorch": "vainf",
    "XiaLiPKU/EMANet": "emanet",
    "facebookresearch/GloRe": "glore",
    "fanyang587/MGL": "mgl",
    "hszhao/semseg": "semseg",
    "jfzhang95/pytorch-deeplab-xception": "jfzhang",
    "kazuto1011/deeplab-pytorch": "deeplab_pytorch",
    "milesial/Pytorch-UNet": "unet",
    "nageshgurram12/generic-semantic-segmentation": "mfnet",
    "nguyenvo09/Double-Attention-Network": "double_attention",
    "open-mmlab/mmcv": "mmcv",
    "open-mmlab/mmsegmentation": "mmseg",
    "pytorch/vision": "torchvision",
    "qubvel-org/segmentation_models.pytorch": "smp",
    "vidit98/graphconv": "graphconv",
    "wkentaro/pytorch-fcn": "torchfcn",
    "xmu-xiaoma666/External-Attention-pytorch": "double_attention",
    "zhanghang1989/PyTorch-Encoding": "encoding",
}
CONVERTED = "convert_to_separable_conv"
# An argument that the manifest describes in words.
WORDS = {"batch norm over dim 1 of 3-D or 4-D input": nn.BatchNorm2d}


def manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return (
        json.loads(path.read_text()) if path.exists() else {"cases": {}, "state_dict_schemas": {}}
    )


def our_class(case: dict[str, Any]) -> Any | None:
    """The class of segkernels.compat for a case (or schema), or None where there is none yet.

    ``package.module.Class`` is ``compat.<package>.Class``, or ``compat.<package>.module.Class``
    where a package has several of that name; of several classes, the chain in
    :mod:`tests.compat.compositions`.
    """
    name = case["class"].removesuffix(")").split("(")[-1].rsplit(".", 2)
    package = PACKAGES.get(case["repository"])
    if package is None or "{" in case["class"]:
        return COMPOSITIONS.get(case["class"])
    for path in (
        f"segkernels.compat.{package}",
        f"segkernels.compat.{package}.{name[-2] if len(name) > 1 else ''}",
    ):
        try:
            found = getattr(importlib.import_module(path), name[-1], None)
        except ImportError:
            continue
        if isinstance(found, type):
            return found
    return None


def construct(case: dict[str, Any], **options: Any) -> nn.Module:
    """The published constructor call on the meta device: no memory yet."""
    found = our_class(case)
    assert found is not None
    arguments = {name: _resolve(value) for name, value in case["ctor"].items()}
    if not _takes_backend(found):
        options.pop("backend", None)
    with torch.device("meta"):
        module = found(**arguments, **options)
        if CONVERTED in case["class"] + case.get("modified", ""):
            convert = getattr(importlib.import_module(found.__module__), CONVERTED)
            module = convert(module, **options)
    return module


def _takes_backend(found: Any) -> bool:
    """Whether there is an operator in the class (or may be in what it passes keywords on to)."""
    parameters = inspect.signature(found).parameters.values()
    return any(p.name == "backend" or p.kind is p.VAR_KEYWORD for p in parameters)


def narrow(module: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """Replaces convolutions and norms whose parameters have other sizes in the file (``modified``
    cases) by ones of the same kind.
    """
    for name, part in list(module.named_modules()):
        shape = shapes.get(f"{name}.weight")
        if shape is None or shape == part.weight.shape:
            continue
        parent = module.get_submodule(name.rpartition(".")[0])
        with torch.device("meta"):
            if isinstance(part, nn.Conv2d):
                groups = shape[0] if part.groups > 1 else 1
                where = (part.kernel_size, part.stride, part.padding, part.dilation)
                new: nn.Module = nn.Conv2d(
                    shape[1] * groups, shape[0], *where, groups, part.bias is not None
                )
            else:
                assert isinstance(part, nn.BatchNorm2d), part
                new = nn.BatchNorm2d(shape[0], part.eps, part.momentum)
        setattr(parent, name.rpartition(".")[2], new)


def load_tensors(folder: Path, case: dict[str, Any]) -> dict[str, Tensor]:
    data = (folder / case["file"]).read_bytes()
    return load(lzma.decompress(data) if case["file"].endswith(".xz") else data)


def state(case: dict[str, Any], tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The complete state_dict of a case, from the file or from the formula."""
    if case["weights"]["kind"] == "stored":
        return {
            key.split(".", 1)[1]: t
            for key, t in tensors.items()
            if key.startswith(("param.", "buffer."))
        }
    shapes = {
        key: (tuple(t.shape), t.dtype.is_floating_point) for key, t in module.state_dict().items()
    }
    return {
        key: _formula(key, shape, case["weights"]["seed"])
        if floating
        else torch.zeros(shape, dtype=torch.long)
        for key, (shape, floating) in shapes.items()
    }


@lru_cache(maxsize=64)
def _formula(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The formula weights of the README, exact in bfloat16."""
    count = int(np.prod(shape))
    u = np.arange(count, dtype=np.uint32)
    u *= np.uint32(0x9E3779B1)
    u += np.uint32(zlib.crc32(key.encode()) ^ seed)
    u ^= u >> np.uint32(16)
    u *= np.uint32(0x85EBCA6B)
    u ^= u >> np.uint32(13)
    u *= np.uint32(0xC2B2AE35)
    u ^= u >> np.uint32(16)
    b = (u >> np.uint32(24)).astype(np.float32)
    last = key.rpartition(".")[2]
    if last == "running_var" or (last == "weight" and len(shape) == 1):
        values = (64 + np.floor(b / 2)) / 128
    elif len(shape) <= 1:
        values = (2 * b - 255) / 1024
    else:
        fan = count // shape[0]
        e = 4
        while fan * 2.0 ** (2 * e - 1) > 6:
            e -= 1
        values = (2 * b - 255) * np.float32(2.0**e / 256)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def _resolve(value: Any) -> Any:
    if isinstance(value, str) and value in WORDS:
        return WORDS[value]
    if isinstance(value, str) and value.startswith("torch.nn."):
        return getattr(nn, value.rpartition(".")[2])
    if isinstance(value, list) and len(value) == 2:
        return tuple(value)
    return value
