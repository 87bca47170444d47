"""EMAU on two processes: one running mean, that of one process on the joint batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segkernels.nn import EMAU
from tests.nn.composition import close, trained

SHARES = {"equal": (2, 2), "unequal": (3, 1), "one empty": (4, 0)}
GRADIENTS = ("none", "full")
STEPS = 2


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 9, 7, generator=generator).double()


class Network(nn.Module):
    """Checkpointed in its middle, so that a backward runs the unit once more."""

    def __init__(self, gradient: str, update: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Conv2d(3, 6, 1)
        self.unit = EMAU(
            6,
            4,
            gradient=gradient,
            update=update,
            momentum=0.5,
            norm_layer=lambda channels: nn.GroupNorm(2, channels),
            backend="reference",
        )
        self.after = nn.Conv2d(6, 2, 1)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = checkpoint(self.unit, self.before(x), use_reentrant=False)
        y, bases = y if self.unit.external else (y, None)
        return self.after(y), bases


def ddp(model: Network) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: Network) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPED: dict[str, Any] = {"DDP": ddp, "FSDP": fsdp}
RUNS = [
    (wrapper, gradient, update, shares)
    for wrapper in WRAPPED
    for gradient in GRADIENTS
    for update in ("module", "external")
    for shares in SHARES
]


def steps(network: Network, model: nn.Module, shares: str, rank: int | None) -> dict[str, Tensor]:
    """The bases after some steps and the gradients of the last one: of the sum over the images,
    which is twice what DDP and FSDP, who average, make of two processes.
    """
    for step in range(STEPS):
        x = batch(step)
        x = x if rank is None else x.split(SHARES[shares])[rank]
        model.zero_grad()
        y, bases = model(x)
        if bases is not None:
            network.unit.update(bases)
        (y.square().sum() * (1 if rank is None else 2)).backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    found = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    return {**found, "bases": network.unit.running.bases}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=rendezvous)
    found = {}
    for wrapper, gradient, update, shares in RUNS:
        network = Network(gradient, update)
        model = WRAPPED[wrapper](network)
        found[wrapper, gradient, update, shares] = steps(network, model, shares, rank)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")
def test_bases_and_gradients_of_two_processes(tmp_path: Path) -> None:
    """Equal on both, and to those of one process, whatever share of the batch each has."""
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert set(ranks[0]) == set(ranks[1]) == set(RUNS)
    for gradient in GRADIENTS:
        network = Network(gradient, "module")
        start = network.unit.running.bases.clone()
        expected = steps(network, network, "", None)
        assert len(expected) == len(trained(network)) + 1
        assert (expected["bases"] - start).abs().max() > 0.1
        for run in (run for run in RUNS if run[1] == gradient):
            for name, value in expected.items():
                one, other = (rank[run][name] for rank in ranks)
                assert torch.equal(one, other), (run, name)
                close(one, value, 1e-11)
