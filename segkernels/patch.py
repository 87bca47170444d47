"""``patch(model)``: the fused layers inside a model that was built with a published package.

Only the ``forward`` of the layers changes (and comes back with :func:`unpatch`): classes,
parameters, buffers, hooks and the references that optimisers hold stay as they are. Layers are
known by the qualified name of their class, so nothing is imported; the forward is that of the class
of the same name in :mod:`segkernels.compat`, which reads the layer's own children.

Order of wrapping: patch, then SyncBatchNorm conversion, then DDP or FSDP, then ``torch.compile``. A
copied or unpickled model stays patched. (``nn.DataParallel`` copies modules in a way that a forward
of one instance does not survive: use DDP.)
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from segkernels.fused import check_backend
from segkernels.ops.nodes import too_many_nodes

MARK = "_segkernels_patch"
Limit = Callable[[nn.Module], str | None]


def _no_depthwise(module: nn.Module) -> str | None:
    """Why there is nothing to fuse in a layer of convolutions; None if there is."""
    from segkernels.nn.pair import depthwise_obstacle  # here: importing segkernels stays quick

    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels]
    obstacles = [depthwise_obstacle(conv) for conv in convs]
    if None in obstacles:
        return None
    return obstacles[0] if obstacles else "no depthwise convolution in it"


@dataclass(frozen=True)
class Layer:
    """A published class: where its forward is, the children it reads, what it cannot do, and when
    there is nothing in it to fuse.
    """

    face: str
    children: tuple[str, ...] = ()
    limit: Limit = lambda module: None
    idle: Limit = _no_depthwise

    def load(self) -> type[nn.Module]:
        package, _, name = self.face.rpartition(".")
        found: type[nn.Module] = getattr(
            importlib.import_module(f"segkernels.compat.{package}"), name
        )
        return found


def _one_input(head: nn.Module) -> str | None:
    transform = getattr(head, "input_transform", None)
    return None if transform in (None, "resize_concat") else f"input_transform={transform!r}"


def _over_nodes(face: str, nodes: str, *children: str) -> Layer:
    """A layer of an operator over nodes, whose parameter ``nodes`` has one a row."""
    return Layer(
        face,
        (nodes, *children),
        lambda module: too_many_nodes(len(getattr(module, nodes))),
        lambda module: None,
    )


def _over_bases(face: str, bases: str, *children: str, limit: Limit = lambda module: None) -> Layer:
    """A layer of EM attention, whose buffer ``bases`` is [1, C, K]."""
    return Layer(
        face,
        (bases.partition(".")[0], *children),
        lambda module: limit(module) or too_many_nodes(attrgetter(bases)(module).shape[2]),
        lambda module: None,
    )


_SMP = "segmentation_models_pytorch.decoders.deeplabv3.decoder"
_EMA = "mmseg.models.decode_heads.ema_head"
_ASPP = ("convs", "project")
_HEAD = ("image_pool", "aspp_modules", "bottleneck", "conv_seg")

LAYERS = {
    "mmcv.cnn.bricks.depthwise_separable_conv_module.DepthwiseSeparableConvModule": Layer(
        "mmcv.DepthwiseSeparableConvModule", ("depthwise_conv", "pointwise_conv")
    ),
    "mmseg.models.decode_heads.aspp_head.ASPPHead": Layer("mmseg.ASPPHead", _HEAD, _one_input),
    "mmseg.models.decode_heads.sep_aspp_head.DepthwiseSeparableASPPHead": Layer(
        "mmseg.DepthwiseSeparableASPPHead", (*_HEAD, "c1_bottleneck", "sep_bottleneck"), _one_input
    ),
    f"{_SMP}.SeparableConv2d": Layer("smp.SeparableConv2d"),
    f"{_SMP}.ASPP": Layer("smp.ASPP", _ASPP),
    f"{_SMP}.DeepLabV3PlusDecoder": Layer(
        "smp.DeepLabV3PlusDecoder", ("aspp", "up", "block1", "block2")
    ),
    "torchvision.models.segmentation.deeplabv3.ASPP": Layer("torchvision.ASPP", _ASPP),
    "network._deeplab.AtrousSeparableConvolution": Layer(
        "vainf.AtrousSeparableConvolution", ("body",)
    ),
    "network._deeplab.ASPP": Layer("vainf.ASPP", _ASPP),
    "network._deeplab.DeepLabHead": Layer("vainf.DeepLabHead", ("classifier",)),
    "network._deeplab.DeepLabHeadV3Plus": Layer(
        "vainf.DeepLabHeadV3Plus", ("project", "aspp", "classifier")
    ),
    "modeling.backbone.xception.SeparableConv2d": Layer(
        "jfzhang.SeparableConv2d", ("conv1", "bn", "pointwise")
    ),
    "mmseg.models.utils.encoding.Encoding": _over_nodes("mmseg.Encoding", "codewords", "scale"),
    "encoding.nn.encoding.Encoding": _over_nodes("encoding.Encoding", "codewords", "scale"),
    "model.basicnet.GraphNet": _over_nodes("mgl.GraphNet", "anchor", "sigma", "normalize_input"),
    "network.EMAU": _over_bases("emanet.EMAU", "mu", "conv1", "conv2", "stage_num"),
    f"{_EMA}.EMAModule": _over_bases("mmseg.EMAModule", "bases", "num_stages", "momentum"),
    f"{_EMA}.EMAHead": _over_bases(
        "mmseg.EMAHead",
        "ema_module.bases",
        "ema_in_conv",
        "ema_mid_conv",
        "ema_out_conv",
        "bottleneck",
        "concat_input",
        "conv_seg",
        limit=_one_input,
    ),
}

# Containers inside those layers: they keep their forward, but a fused layer may open them.
CONTAINERS = {
    "mmcv.cnn.bricks.conv_module.ConvModule": Layer("mmcv.ConvModule", ("conv", "order")),
}


@dataclass(frozen=True)
class Entry:
    """One layer of the model: its name there, its class, and what became of it."""

    name: str
    kind: str
    note: str


@dataclass
class Report:
    """What :func:`patch` did. ``difference``: largest relative difference by kind, with a sample
    only.
    """

    replaced: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    difference: dict[str, float] | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layers replaced, {len(self.skipped)} skipped"]
        lines += [f"  replaced  {e.name or '(model)'}: {e.kind} -> {e.note}" for e in self.replaced]
        lines += [f"  skipped   {e.name or '(model)'}: {e.kind}: {e.note}" for e in self.skipped]
        if self.difference is not None:
            parts = (f"{kind} {value:.1e}" for kind, value in self.difference.items())
            lines.append(f"  largest relative difference: {', '.join(parts)}")
        return "\n".join(lines)


def patch(
    model: nn.Module,
    sample: Any = None,
    *,
    backend: str | None = None,
    strict: bool = False,
    dry_run: bool = False,
) -> Report:
    """Replaces the forward of every known layer in ``model`` that holds what the kernels take: a
    depthwise convolution, an assignment to nodes.

    sample: arguments for ``model(...)`` (a tensor, a tuple, or a dict of keywords): the model then
    runs before and after, forward and backward, and the report has the largest differences;
    buffers, gradients and random state are left as they were. backend: for the replaced layers.
    dry_run: report only. strict: raise ValueError, and change nothing, when a known layer is
    skipped.

    Applying it again changes nothing. Returns the :class:`Report`.
    """
    _check_model("patch", model)
    check_backend("patch", backend)
    report = Report()
    found: list[tuple[nn.Module, Layer]] = []
    for name, module, published, layer in _known(model, LAYERS):
        kind = f"{published.__module__}.{published.__qualname__}"
        why = _obstacle(module, published, layer) or layer.idle(module)
        if why is not None:
            report.skipped.append(Entry(name, kind, why))
        else:
            report.replaced.append(Entry(name, kind, f"segkernels.compat.{layer.face}"))
            found.append((module, layer))
    if strict and report.skipped:
        raise ValueError(f"patch(strict=True): nothing changed\n{report}")
    if dry_run:
        return report
    before = _measure(model, sample) if sample is not None else None
    for module, layer in found:
        for _, part, published, container in _known(module, CONTAINERS):
            if _obstacle(part, published, container) is None:
                _bind(part, container.load(), ("layers_in_order",))
        _bind(module, layer.load(), ("forward", "layers_in_order"), backend=backend)
    if before is not None:
        report.difference = _difference(before, _measure(model, sample))
    return report


def unpatch(model: nn.Module) -> int:
    """Undoes :func:`patch`; returns the number of layers restored."""
    _check_model("unpatch", model)
    patched = [module for module in model.modules() if MARK in module.__dict__]
    for module in patched:
        for name in module.__dict__[MARK]:
            del module.__dict__[name]
        del module.__dict__[MARK]
    return len(patched)


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module\n  model: {model!r}")


def _known(
    model: nn.Module, table: Mapping[str, Layer]
) -> Iterator[tuple[str, nn.Module, type, Layer]]:
    """(name, module, published class, entry) of the model's modules that the table knows."""
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            layer = table.get(f"{base.__module__}.{base.__qualname__}")
            if layer is not None:
                yield name, module, base, layer
                break


def _bind(module: nn.Module, face: type[nn.Module], methods: Sequence[str], **values: Any) -> None:
    """Gives one instance methods of its face, and notes what to take away again.

    (A partial, unlike a bound method, is copied and pickled together with its instance.)
    """
    new = {name: partial(getattr(face, name), module) for name in methods if hasattr(face, name)}
    module.__dict__.update(new | values | {MARK: (*new, *values)})


def _obstacle(module: nn.Module, published: type, layer: Layer) -> str | None:
    """Why a known layer keeps its forward; None if it can be replaced."""
    if "forward" in module.__dict__ and MARK not in module.__dict__:
        return "its forward was rebound by something else"
    if type(module) is not published:
        return f"{type(module).__qualname__} is a subclass, which may compute something else"
    missing = [name for name in layer.children if not hasattr(module, name)]
    if missing:
        return f"another version: no {', '.join(missing)}"
    ours, theirs = _signature(layer.load()), _signature(published)
    if ours != theirs:
        return f"another version: forward{theirs}, expected forward{ours}"
    return layer.limit(module)


def _signature(kind: type) -> tuple[str, ...]:
    """The parameters of forward but self; a single plain one may have any name."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    if len(parameters) == 1 and parameters[0].kind is parameters[0].POSITIONAL_OR_KEYWORD:
        return ("x",)
    return tuple(str(p.replace(annotation=p.empty, default=p.empty)) for p in parameters)


@dataclass
class Run:
    """One forward and backward of a model: named outputs, gradients and changed buffers."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def _measure(model: nn.Module, sample: Any) -> Run:
    """Runs the sample with fixed random numbers and leaves buffers and gradients as they were."""
    args: tuple[Any, ...] = () if isinstance(sample, Mapping) else _tuple(sample)
    kwargs = dict(sample) if isinstance(sample, Mapping) else {}
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)), torch.enable_grad():
        torch.manual_seed(0)
        outputs = dict(_tensors("output", model(*args, **kwargs)))
        wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
        sources = [out for out in outputs.values() if out.requires_grad]
        # in one order of memory: the layout of an output may change, not the numbers fed into it
        layout = torch.contiguous_format
        cotangents = [torch.randn_like(out, memory_format=layout) for out in sources]
        found = torch.autograd.grad(sources, list(wanted.values()), cotangents, allow_unused=True)
    gradients = {name: g for name, g in zip(wanted, found, strict=True) if g is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[name])
    return Run({name: out.detach() for name, out in outputs.items()}, gradients, buffers)


def _difference(before: Run, after: Run) -> dict[str, float]:
    """The largest difference of each kind, relative to the tensor's largest element.

    A tensor a thousand times smaller than the largest of its kind is measured against that one: a
    gradient that is zero up to rounding has no relative error.
    """

    def largest(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        sizes = {name: _largest(t) for name, t in a.items()}
        floor = 1e-3 * max(sizes.values(), default=0.0) or 1.0
        found = [_largest(t - b[n]) / max(sizes[n], floor) for n, t in a.items()]
        return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)

    return {
        "output": largest(before.outputs, after.outputs),
        "gradient": largest(before.gradients, after.gradients),
        "buffer": largest(before.buffers, after.buffers),
    }


def _largest(t: Tensor) -> float:
    return t.double().abs().max().item() if t.numel() else 0.0


def _tuple(sample: Any) -> tuple[Any, ...]:
    return sample if isinstance(sample, tuple) else (sample,)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in nested tuples, lists and dicts, with a name each."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping | tuple | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in items:
            yield from _tensors(f"{name}.{key}", part)
