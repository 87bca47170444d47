"""What is measured: one operator on one case, and the ways to do it on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

import segkernels
from benchmarks import baselines
from segkernels.fused import memory_format
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
EXPANDED = "expanded"
EXPANDED_OTHER = "expanded, other format"
COMPILED = "compile"
COMPILED_OTHER = "compile, other format"
EAGERS = (EAGER, OTHER_FORMAT, FOLDED, FOLDED_OTHER, EXPANDED, EXPANDED_OTHER)
BEST_EAGER = "best eager"  # the fastest of these in the run
BEST_RIVAL = "best rival"  # and of both compiled forms, where the run has both

Arguments = dict[str, Any]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Way:
    """One way to do the work on one set of inputs: a tensor, or a tuple of them."""

    forward: Callable[[], Any]
    leaves: tuple[Tensor, ...] = ()
    parameters: tuple[Tensor, ...] = ()

    def results(self) -> Tensors:
        return as_tuple(self.forward())

    def call(self, mode: str, dy: Tensors = ()) -> Call:
        """What is timed. The backward alone is repeated over one recorded forward."""
        if mode == "forward":
            return self.forward
        if mode == "backward":
            y = self.results()
            return lambda: gradients(y, self.leaves, dy, retain_graph=True)
        return lambda: gradients(self.results(), self.leaves, dy)


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
        self, arguments: Arguments, grad: bool, compiled: Mapping[str, Callable[..., Any]]
    ) -> dict[str, Way]:
        """Every way by name. `compiled`: the compiled baseline by the names of its ways."""
        eager, expanded = getattr(baselines, self.op), baselines.EXPANDED.get(self.op)
        other = in_other_format(arguments)
        functions = {OURS: (self._ours(self.backend), arguments), EAGER: (eager, arguments)}
        if expanded is None:
            functions[OTHER_FORMAT] = (eager, other)
        else:  # the published form is no rival in any format
            functions |= {EXPANDED: (expanded, arguments), EXPANDED_OTHER: (expanded, other)}
        for name, function in compiled.items():
            functions[name] = (function, arguments if name == COMPILED else other)
        own = self.parameters(arguments)
        ways = {name: _way(f, a, grad, own) for name, (f, a) in functions.items()}
        fold = baselines.FOLDED.get(self.op)
        if fold is not None and not grad:
            for name, a in ((FOLDED, arguments), (FOLDED_OTHER, other)):
                folded = fold(**a)
                if folded is not None:
                    ways[name] = Way(folded)
        return ways

    def baseline(self) -> Callable[..., Any]:
        """What is compiled: the better of the forms in plain PyTorch."""
        return baselines.EXPANDED.get(self.op) or getattr(baselines, self.op)

    def products(self, mode: str, arguments: Arguments) -> Call | None:
        """The matrix products that the work cannot do without, alone."""
        products = baselines.PRODUCTS.get(self.op)
        return None if products is None else products(mode, **arguments)

    def parameters(self, arguments: Arguments) -> frozenset[str]:
        """Arguments that do not grow with the batch."""
        larger = replace(self.case, shape=(self.case.shape[0] + 1, *self.case.shape[1:]))
        sizes = {k: v.shape for k, v in _tensors(larger.inputs()).items()}
        return frozenset(k for k, v in _tensors(arguments).items() if v.shape == sizes[k])

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

    def _ours(self, backend: str) -> Callable[..., Any]:
        return partial(getattr(segkernels, self.op), backend=backend)


def operators() -> tuple[str, ...]:
    return tuple(segkernels.fused.OPERATORS)


def cases(op: str) -> Sequence[Any]:
    return tuple(import_module(f"segkernels.ops.{op}.cases").PAPER)


def as_tuple(y: Any) -> Tensors:
    return y if isinstance(y, tuple) else (y,)


def gradients(
    results: Tensors, leaves: Sequence[Tensor], dy: Sequence[Tensor], retain_graph: bool = False
) -> Tensors:
    """Of the results that have any; zeros for a leaf that none of them depends on."""
    pairs = [(y, d) for y, d in zip(results, dy, strict=True) if y.requires_grad]
    y, dy = zip(*pairs, strict=True)
    return torch.autograd.grad(
        y, leaves, dy, retain_graph, allow_unused=True, materialize_grads=True
    )


def cotangents(results: Tensors) -> Tensors:
    """Fixed random ones with the types and layouts of the results."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator)) for y in results
    )


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
    y = as_tuple(getattr(segkernels, op)(**(arguments | tensors)))
    yield "forward"
    gradients(y, list(tensors.values()), [torch.empty_like(t) for t in y])
    yield "backward"


def in_other_format(arguments: Arguments) -> Arguments:
    """The maps in the other memory format, the rest as it is."""
    maps = [v for v in arguments.values() if isinstance(v, Tensor) and v.dim() == 4]
    size, last = maps[0].shape[2:], memory_format(maps[0]) == torch.channels_last
    other = torch.contiguous_format if last else torch.channels_last
    turned = {
        k: v.contiguous(memory_format=other)
        for k, v in _tensors(arguments).items()
        if v.shape[2:] == size
    }
    return arguments | turned


def _way(
    function: Callable[..., Any],
    arguments: Arguments,
    grad: bool,
    parameters: Container[str] = (),
) -> Way:
    tensors = {k: v.detach().requires_grad_(grad) for k, v in _tensors(arguments).items()}
    own = tuple(t for name, t in tensors.items() if name in parameters)
    return Way(partial(function, **(arguments | tensors)), tuple(tensors.values()), own)


def _tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in arguments.items() if isinstance(v, Tensor)}


def _widened(arguments: Arguments) -> Arguments:
    return arguments | {k: v.double() for k, v in _tensors(arguments).items()}
