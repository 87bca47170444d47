"""The layers under what PyTorch wraps around modules: torch.fx, checkpointing, DDP, FSDP."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import segkernels
from segkernels import networks
from segkernels.compat import jfzhang, mmcv
from segkernels.nn import ASPP, EMAU, DeepLabV3PlusHead, DepthwiseConv2d, SeparableConv2d
from tests.nn.composition import close, composed


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).double()


LAYERS: dict[str, tuple[Any, list[tuple[int, ...]], set[str]]] = {
    "DepthwiseConv2d": (lambda: DepthwiseConv2d(6), [(2, 6, 9, 7)], {"depthwise_conv2d"}),
    "SeparableConv2d": (lambda: SeparableConv2d(6, 4), [(2, 6, 9, 7)], {"run"}),
    "ASPP": (lambda: ASPP(6, 4, dropout=0.0), [(2, 6, 9, 7)], {"pyramid"}),
    "DeepLabV3PlusHead": (
        lambda: DeepLabV3PlusHead(6, 5, 3, channels=8, dropout=0.0),
        [(2, 5, 17, 13), (2, 6, 5, 4)],
        {"pyramid", "run"},
    ),
    "EMAU": (lambda: EMAU(6, 3, gradient="full"), [(2, 6, 9, 7)], {"attend"}),
    "a network": (
        lambda: networks.build(
            "deeplabv3plus", num_classes=3, backbone="resnet18", width=4, channels=8, dropout=0.0
        ),
        [(2, 3, 33, 47)],
        {"pyramid", "run"},
    ),
    "padded by hand": (lambda: jfzhang.SeparableConv2d(6, 4), [(2, 6, 9, 7)], {"run"}),
    "mmcv": (
        lambda: mmcv.DepthwiseSeparableConvModule(6, 4, 3, padding=1, norm_cfg={"type": "BN"}),
        [(2, 6, 9, 7)],
        {"run"},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_symbolic_trace_keeps_the_fused_calls(name: str) -> None:
    """One node a call; the traced module trains as the layer does."""
    make, shapes, calls = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    traced = fx.symbolic_trace(copy.deepcopy(layer))
    traced.graph.lint()
    named = {getattr(n.target, "__name__", "") for n in traced.graph.nodes}
    assert named & {"run", "pyramid", "depthwise_conv2d", "attend"} == calls
    inputs = [image(*shape) for shape in shapes]
    for _ in range(2):  # a training step, then in eval with the statistics of that step
        got, expected = traced(*inputs), layer(*inputs)
        close(got, expected, 1e-12)
        got.sum().backward()
        expected.sum().backward()
        gradients = {key: p.grad for key, p in traced.named_parameters()}
        for key, p in layer.named_parameters():
            close(gradients[key], p.grad, 1e-12)
        traced.eval(), layer.eval()


def test_symbolic_trace_of_the_functions() -> None:
    w, v = image(4, 1, 3, 3), image(3, 4, 1, 1)

    def f(x: Tensor) -> Tensor:
        d = segkernels.depthwise_conv2d(x, w, dilation=2)
        return segkernels.separable_conv2d(x=d, depthwise_weight=w, pointwise_weight=v)

    x = image(2, 4, 9, 7)
    assert torch.equal(fx.symbolic_trace(f)(x), f(x))


@pytest.mark.parametrize("kind", ["reentrant", "whole", "early stop"])
def test_checkpointing(kind: str) -> None:
    """The gradients stay. The forward runs twice, and so the running statistics move twice, fused
    or not; where torch stops the second run early, which it does inside our operator, once.
    """
    torch.manual_seed(0)
    layer = SeparableConv2d(6, 4).double()
    other, once = composed(layer), copy.deepcopy(layer)
    a, b, c = (image(2, 6, 9, 7).requires_grad_() for _ in range(3))
    with set_checkpoint_early_stop(kind == "early stop"):
        for module, x in ((layer, a), (other, b)):
            checkpoint(module, x, use_reentrant=kind == "reentrant").square().sum().backward()
    once(c).square().sum().backward()
    assert torch.equal(a.grad, c.grad)
    close(a.grad, b.grad, 1e-12)
    for p, q, r in zip(layer.parameters(), other.parameters(), once.parameters(), strict=True):
        close(p.grad, q.grad, 1e-12)
        assert torch.equal(p.grad, r.grad)
    assert once.inner_norm.num_batches_tracked == 1
    for p, q in zip(layer.buffers(), (once if "early" in kind else other).buffers(), strict=True):
        close(p, q, 1e-12)


# ---- two processes -------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = SeparableConv2d(3, 4, bias=True), ASPP(4, 4, rates=(1, 2), dropout=0.0)
    return nn.Sequential(*layers, nn.Conv2d(4, 2, 1)).double()


def freeze(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return model


def gradients(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Of the mean of a loss over the batch."""
    model(batch).square().mean().backward()
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in named.items()}


def fsdp(model: nn.Sequential) -> nn.Module:
    """Every layer sharded over the two processes, and then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPED: dict[str, Any] = {"DDP": nn.parallel.DistributedDataParallel, "FSDP": fsdp}


def work(rank: int, folder: str) -> None:
    """One of two processes: the gradients it has of its half of the batch, wrapped."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=rendezvous)
    half = image(4, 3, 9, 7).chunk(2)[rank]
    found = {
        (wrapper, frozen): gradients(wrap(freeze(network()) if frozen else network()), half)
        for wrapper, wrap in WRAPPED.items()
        for frozen in (True, False)
    }
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")
def test_gradients_of_two_processes(tmp_path: Path) -> None:
    """Equal on both; with frozen statistics those of the joint batch, and with moments, which every
    process takes of its own half, the mean of the two halves'.

    (SyncBatchNorm, whose moments are the joint batch's, has no CPU implementation in torch.)
    """
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    joint = image(4, 3, 9, 7)
    first, second = (gradients(network(), half) for half in joint.chunk(2))
    expected = {
        True: gradients(freeze(network()), joint),
        False: {name: (g + second[name]) / 2 for name, g in first.items()},
    }
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert set(ranks[0]) == set(ranks[1]) == {(w, f) for w in WRAPPED for f in (True, False)}
    for wrapper, frozen in ranks[0]:
        for name, e in expected[frozen].items():
            one, other = (rank[wrapper, frozen][name] for rank in ranks)
            assert torch.equal(one, other), (wrapper, frozen, name)
            close(one, e, 1e-12)
