"""What is measured: one operator on one case, and the ways to do it on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

import segkernels
from benchmarks import baselines
from segkernels.timing import Call

MODES = ("forward", "backward", "forward+backward")
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
OURS = "segkernels"
EAGER = "eager"
OTHER_FORMAT = "eager, other format"
FOLDED = "folded"
FOLDED_OTHER = "folded, other format"
COMPILED = "compile"
BEST = (EAGER, OTHER_FORMAT, FOLDED, FOLDED_OTHER)  # the candidates for "best eager"

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to do the work on one set of inputs."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()
    parameters: tuple[Tensor, ...] = ()

    def call(self, mode: str, dy: Tensor | None = None) -> Call:
        """What is timed. The backward alone is repeated over one recorded forward."""
        if mode == "forward":
            return self.forward
        if mode == "backward":
            y = self.forward()
            return lambda: torch.autograd.grad(y, self.leaves, dy, retain_graph=True)
        return lambda: torch.autograd.grad(self.forward(), self.leaves, dy)


@dataclass(frozen=True)
class Work:
    """An operator's case in one type and layout, to be done by one backend and by the baselines."""

    modes: ClassVar[tuple[str, ...]] = MODES
    op: str
    case: Any
    dtype: str
    layout: str
    backend: str
    device: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.op, self.case.name, self.dtype, self.layout)

    @property
    def names(self) -> str:
        return f"{self.op} {self.case.name} {self.dtype} {self.layout} {self.backend}"

    def arguments(self) -> Arguments:
        """The public function's arguments, drawn from a fixed seed, away from activations' kinks:
        a rounding that flips a gradient there would be no error of a kernel."""
        layout = LAYOUTS[self.layout]
        return self.case.inputs(DTYPES[self.dtype], layout, self.device, kinks=False)

    def ways(
        self, arguments: Arguments, grad: bool, compiled: Callable[..., Any] | None
    ) -> dict[str, Way]:
        """Every way by name. `compiled` is the compiled baseline, or None to leave it out."""
        eager = self.baseline()
        other = in_other_format(arguments)
        functions = {OURS: (self._ours(self.backend), arguments), EAGER: (eager, arguments)}
        functions[OTHER_FORMAT] = (eager, other)
        if compiled is not None:
            functions[COMPILED] = (compiled, arguments)
        ways = {name: _way(f, a, grad) for name, (f, a) in functions.items()}
        fold = baselines.FOLDED.get(self.op)
        if fold is not None and not grad:
            for name, a in ((FOLDED, arguments), (FOLDED_OTHER, other)):
                folded = fold(**a)
                if folded is not None:
                    ways[name] = Way(folded)
        return ways

    def baseline(self) -> Callable[..., Any]:
        return getattr(baselines, self.op)

    def truth(self, arguments: Arguments) -> Way:
        """The reference on the same numbers, widened to float64."""
        return _way(self._ours("reference"), _widened(arguments), grad=True)

    def yardstick(self, arguments: Arguments) -> Way:
        """The reference in the type itself: its error is what the type costs anyone."""
        return _way(self._ours("reference"), arguments, grad=True)

    def compiled(self) -> Callable[..., Any]:
        """torch.compile of the baseline, so that its backward may be repeated."""
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False
        return torch.compile(self.baseline(), dynamic=False)

    def cost(self, mode: str) -> tuple[int, int]:
        """(operations, fewest bytes that must move)."""
        costs = self.case.cost(DTYPES[self.dtype])
        parts = [costs[part] for part in mode.split("+")]
        return sum(flops for flops, _ in parts), sum(nbytes for _, nbytes in parts)

    def _ours(self, backend: str) -> Callable[..., Tensor]:
        return partial(getattr(segkernels, self.op), backend=backend)


def operators() -> tuple[str, ...]:
    return tuple(segkernels.fused.OPERATORS)


def cases(op: str) -> Sequence[Any]:
    return tuple(import_module(f"segkernels.ops.{op}.cases").PAPER)


def cotangent(y: Tensor) -> Tensor:
    """A fixed random dy with the type and layout of y."""
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float32)
    return torch.empty_like(y).copy_(dy)


def usable_backends(op: str, arguments: Arguments) -> list[str]:
    """The fused backends that can run these arguments, the reference where there is none."""
    table = segkernels.explain(op, **arguments)
    fused = [name for name, why_not in table.items() if why_not is None and name != "reference"]
    return fused or ["reference"]


def input_sets(arguments: Arguments, count: int) -> Iterator[Arguments]:
    """The arguments and copies of them, at other addresses."""
    yield arguments
    for _ in range(count - 1):
        yield {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def forward_and_backward(op: str, arguments: Arguments) -> Iterator[str]:
    """Calls the public function, then its backward for every tensor; each when it is asked for."""
    tensors = {k: v.detach().requires_grad_() for k, v in _tensors(arguments).items()}
    y = getattr(segkernels, op)(**(arguments | tensors))
    y = y if isinstance(y, tuple) else (y,)
    yield "forward"
    torch.autograd.grad(y, list(tensors.values()), [torch.empty_like(t) for t in y])
    yield "backward"


def in_other_format(arguments: Arguments) -> Arguments:
    """x in the other memory format, the rest as it is."""
    x = arguments["x"]
    nchw = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    other = torch.contiguous_format if nchw else torch.channels_last
    return arguments | {"x": x.contiguous(memory_format=other)}


def _way(function: Callable[..., Any], arguments: Arguments, grad: bool) -> Way:
    tensors = {k: v.detach().requires_grad_(grad) for k, v in _tensors(arguments).items()}
    parameters = tuple(t for name, t in tensors.items() if name != "x")
    return Way(partial(function, **(arguments | tensors)), tuple(tensors.values()), parameters)


def _tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor)}


def _widened(arguments: Arguments) -> Arguments:
    return arguments | {k: v.double() for k, v in _tensors(arguments).items()}
