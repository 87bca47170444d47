"""The hall: every operator is declared, sent to a backend and differentiated here, and nowhere
else.

An operator is two functions of the maths, written as PyTorch schemas whose *names* are the whole
declaration::

    forward  (Tensor x, Tensor w, ...) -> Tensor y
    backward (Tensor dy, Tensor x, Tensor w, ..., int[] need) -> (Tensor dx, Tensor dw)

``dy`` is the cotangent of the output ``y``; a tensor the backward names is saved for it, whether
input or output; ``dx`` is the gradient of the input ``x``; ``need`` says which gradients are wanted
(one that is not comes back with shape [0]).

Three backends implement an operator, each a file in the operator's folder or in ``csrc``, each with
the schema's name and arguments: ``reference`` (plain PyTorch, differentiated by PyTorch),
``triton`` and ``native`` (C++ on the CPU, CUDA C++ on the GPU; PyTorch's dispatcher picks). The
backend is an argument that travels with the data, else the environment variable SEGKERNELS_BACKEND,
else the first of the automatic order that can run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from segkernels import native

BACKENDS = ("native", "triton", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SUPPORTED = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)

OPERATORS: dict[str, Operator] = {}

# All that the choice of a backend may depend on: package, device and type of the map, limit.
_Kind = tuple[str, torch.device, torch.dtype, str | None]

_EXPLAIN: Any = object()  # the backend of a call that only asks which backends could run it
_WAY_OUT = "\n  PyTorch can differentiate the reference in every way: pass backend='reference'"

_LIBRARIES = {
    "native": torch.library.Library("segkernels", "DEF"),
    "triton": torch.library.Library("segkernels_triton", "DEF"),
}


class SegkernelsError(Exception):
    """Base of every error raised on purpose by this package."""


class UnsupportedInputError(SegkernelsError, ValueError):
    """The arguments do not describe a computation that exists; nothing was computed."""


class BackendUnavailableError(SegkernelsError, RuntimeError):
    """The backend that was asked for cannot run here; the message lists why, for every backend."""


class SegkernelsPerformanceWarning(UserWarning):
    """The plain PyTorch reference is used although a fused backend was expected."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums over elements of ``dtype``: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of the maps that an operator returns for ``x``: PyTorch's own rule of strides."""
    if x.dim() != 4 or x.stride(1) == 0:
        return torch.contiguous_format
    expected = 0
    for d in (1, 3, 2, 0):
        if x.shape[d] == 0 or x.stride(d) < expected:
            return torch.contiguous_format
        if d == 0 and expected == x.stride(1):  # N111 and NC11 are both layouts: call them NCHW
            return torch.contiguous_format
        expected = x.stride(d)
        if x.shape[d] > 1:
            expected *= x.shape[d]
    return torch.channels_last


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is; there are devices, such as meta, that it does not know."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


class Operator:
    """One declared operator: its raw functions by backend, its reasons, its call."""

    def __init__(
        self,
        package: str,
        forward: str,
        backward: str,
        shapes: Callable[..., Tensor | tuple[Tensor, ...]],
        wide: Iterable[str] = (),
        added: Iterable[str] = (),
        unsaved: Callable[..., Iterable[str]] = lambda: (),
        limits: Callable[..., str | None] = lambda: None,
        sizes: dict[str, Callable[..., Sequence[int]]] | None = None,
    ) -> None:
        self.package = package
        self.name = package.rsplit(".", 1)[-1]
        self._shapes = shapes
        self._wide = frozenset(wide)
        self._reference = getattr(importlib.import_module(f"{package}.reference"), self.name)
        for backend, library in _LIBRARIES.items():
            library.define(self.name + forward)
            library.define(f"{self.name}_backward{backward}")
            self._register(backend, library)
        self._raw = {b: getattr(torch.ops, lib.ns) for b, lib in _LIBRARIES.items()}
        schema = self.raw("native")._schema
        self.arguments = [a.name for a in schema.arguments]
        self.outputs = [r.name for r in schema.returns]
        schema = self.raw("native", backward=True)._schema
        self._backward_arguments = [a.name for a in schema.arguments]
        self._gradients = [r.name for r in schema.returns]
        self._unsaved = _of_named(self.arguments, unsaved)
        self._limits = _of_named(self.arguments, limits)
        self._added = [self.arguments.index(name) for name in added]
        self._sizes = {g: _of_named(self._backward_arguments, f) for g, f in (sizes or {}).items()}
        self._read_names()

    def _read_names(self) -> None:
        """What the names of the schemas declare, as places in the lists of arguments."""
        named = [*self.arguments, *self.outputs]
        places = {name: place for place, name in enumerate(self._backward_arguments)}
        self._known = [(place, named.index(n)) for n, place in places.items() if n in named]
        self._cotangents = [
            (places[f"d{n}"], i) for i, n in enumerate(self.outputs) if f"d{n}" in places
        ]
        self._constant = [
            len(self.arguments) + i for i, n in enumerate(self.outputs) if f"d{n}" not in places
        ]
        self._need = places["need"]
        self._differentiated = [self.arguments.index(n[1:]) for n in self._gradients]

    def raw(self, backend: str, backward: bool = False) -> Any:
        """The registered PyTorch operator of a fused backend."""
        return getattr(self._raw[backend], self.name + "_backward" * backward).default

    def _register(self, backend: str, library: torch.library.Library) -> None:
        """Shape functions for both fused backends, and the lazy body of the Triton one."""
        torch.library.register_fake(f"{library.ns}::{self.name}", self._shapes, lib=library)
        torch.library.register_fake(
            f"{library.ns}::{self.name}_backward", self._gradient_shapes, lib=library
        )
        if backend == "triton":
            for name in (self.name, f"{self.name}_backward"):
                library.impl(name, self._lazy(name), "CompositeExplicitAutograd")

    def _lazy(self, name: str) -> Callable[..., Any]:
        """A Triton function, imported at its first call: importing the package needs no Triton."""

        def body(*args: Any) -> Any:
            function = getattr(importlib.import_module(f"{self.package}.triton"), name)
            with torch.cuda.device_of(next(filter(torch.is_tensor, args))):  # there it launches
                return function(*args)

        return body

    def _gradient_shapes(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        """A gradient has its input's shape, type and memory format; [0] when not needed."""
        named = dict(zip(self._backward_arguments, args, strict=True))
        x = named[self.arguments[0]]

        def empty(name: str, need: int) -> Tensor:
            like = named.get(name[1:])
            if like is not None and need:
                return torch.empty_like(like, memory_format=memory_format(like))
            wide = name[1:] in self._wide
            size = self._sizes[name](*args) if need else [0]
            return x.new_empty(size, dtype=accumulation_dtype(x.dtype) if wide else x.dtype)

        made = tuple(empty(g, n) for g, n in zip(self._gradients, named["need"], strict=True))
        return made[0] if len(made) == 1 else made

    def reasons(self, *args: Any) -> dict[str, str | None]:
        """For raw arguments: backend -> None when it can run them, else the reason why not."""
        return _reasons(self._kind(args))

    def _kind(self, args: tuple[Any, ...]) -> _Kind:
        return self.package, args[0].device, args[0].dtype, self._limits(*args)

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Run on raw arguments, which the door has checked; returns the schema's outputs."""
        args = self._cast(args)
        if backend is _EXPLAIN:
            raise _Explained(self.reasons(*args))
        chosen = _choose(self._kind(args), backend)
        if chosen == "reference":
            with _without_autocast(args[0]):  # the arguments are cast already
                return self._reference(*args)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise RuntimeError(f"{self.name}: no forward-mode derivative (jvp){_WAY_OUT}")
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
                raise RuntimeError(f"{self.name}: no derivative under torch.func{_WAY_OUT}")
            return _Fused.apply(self.name, chosen, *args)  # type: ignore[no-untyped-call]
        return self.raw(chosen)(*args)

    def _cast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Autocast casts maps and weights; "wide" arguments are taken in the accumulation type."""
        x = args[0]
        dtype = x.dtype
        if autocasts(x) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        elif not self._wide:
            return args
        wide = accumulation_dtype(dtype)
        return tuple(
            a.to(wide if n in self._wide else dtype) if isinstance(a, Tensor) else a
            for n, a in zip(self.arguments, args, strict=True)
        )


def _of_named(names: list[str], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which names the few raw arguments that it reads, as one of all of them."""
    places = [names.index(name) for name in inspect.signature(function).parameters]
    return lambda *args: function(*[args[place] for place in places])


class _Fused(torch.autograd.Function):
    """The only autograd function of the package: saves what the backward schema names."""

    @staticmethod
    def forward(ctx: Any, name: str, backend: str, *args: Any) -> Any:
        op = OPERATORS[name]
        outputs = op.raw(backend)(*args)
        named = (*args, *(outputs if len(op.outputs) > 1 else (outputs,)))
        unsaved = op._unsaved(*args)
        ctx.name, ctx.backend = name, backend
        ctx.constants = [None] * len(op._backward_arguments)  # the backward's arguments so far
        ctx.saved = []  # the places among them of the saved tensors
        for place, i in op._known:
            if not isinstance(named[i], Tensor):
                ctx.constants[place] = named[i]
            elif op._backward_arguments[place] not in unsaved:
                ctx.saved.append((place, i))
        ctx.save_for_backward(*(named[i] for _, i in ctx.saved))
        ctx.set_materialize_grads(False)  # no map of zeros for an output such as o
        if op._constant:
            ctx.mark_non_differentiable(*(named[i] for i in op._constant))
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        op = OPERATORS[ctx.name]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                f"{op.name}: the fused backward cannot be differentiated again (create_graph=True)"
                f"{_WAY_OUT}"
            )
        needs = ctx.needs_input_grad[2:]
        if all(cotangents[i] is None for _, i in op._cotangents):
            return (None,) * (2 + len(needs))
        args = list(ctx.constants)
        for (place, _), tensor in zip(ctx.saved, ctx.saved_tensors, strict=True):
            args[place] = tensor
        for place, i in op._cotangents:
            args[place] = cotangents[i]
        gradients: list[Tensor | None] = [None] * len(needs)
        for i in op._added:
            gradients[i] = cotangents[0] if needs[i] else None
        args[op._need] = [int(needs[i]) for i in op._differentiated]
        if not any(args[op._need]):
            return (None, None, *gradients)
        made = op.raw(ctx.backend, backward=True)(*args)
        made = made if len(op._gradients) > 1 else (made,)
        for i, gradient in zip(op._differentiated, made, strict=True):
            if needs[i]:
                gradients[i] = gradient
        return (None, None, *gradients)


def check_backend(op: str, backend: Any) -> None:
    """Raise UnsupportedInputError for a name that no backend has; None is the automatic choice."""
    if backend is not None and backend not in (*BACKENDS, "auto"):
        raise UnsupportedInputError(
            f"{op}: no backend named {backend!r}\n  backends: {', '.join(BACKENDS)}, auto"
        )


def declare(package: str, **declaration: Any) -> Operator:
    """Declare the operator of the folder ``package`` (the door passes ``__name__``); see
    :class:`Operator`.

    forward, backward: schemas without the name. shapes: the shape function (fake kernel) of the
    forward. wide: arguments in the accumulation type. added: arguments added to the first output,
    whose gradient is its cotangent. unsaved: names the backward can do without. sizes: sizes of the
    gradients of inputs that the backward does not see. limits: reason why the fused kernels cannot,
    or None. The last three are functions of raw arguments, read by name.
    """
    op = Operator(package, **declaration)
    OPERATORS[op.name] = op
    return op


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Which backend can run ``op(*args, **kwargs)``: a table backend -> None (usable) or the reason
    why not.

    ``op`` is a public function such as ``segkernels.depthwise_conv2d``, or its name. Without
    further arguments the table is for a float32 map on the CPU, or on the GPU where there is one.
    Nothing is computed; a ``backend=`` among the arguments must exist and changes nothing.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", type(op).__name__)
    if name not in OPERATORS:
        raise UnsupportedInputError(
            f"explain: no operator named {name!r}\n  operators: {', '.join(OPERATORS)}"
        )
    operator = OPERATORS[name]
    check_backend(name, kwargs.pop("backend", None))
    if not args and not kwargs:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return _reasons((operator.package, device, torch.float32, None))
    public = getattr(importlib.import_module(operator.package), name)
    try:
        public(*args, **kwargs, backend=_EXPLAIN)
    except _Explained as table:
        return table.args[0]
    raise AssertionError(f"{name} did not reach its operator")


class _Explained(Exception):
    """Carries the table from the operator to :func:`explain`, before anything is computed."""


def _reasons(kind: _Kind) -> dict[str, str | None]:
    package, device, dtype, limit = kind
    other = None if dtype in DTYPES else f"{dtype} is not supported (supported: {SUPPORTED})"
    return {
        "native": other or limit or _why_not_native(package, device),
        "triton": other or limit or _why_not_triton(package, device),
        "reference": None,
    }


def _why_not_native(package: str, device: torch.device) -> str | None:
    name = package.rsplit(".", 1)[-1]
    if reason := native.why_not(device):
        return reason
    kind = device.type
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"segkernels::{name}", kind.upper()):
        return None
    return f"the native library for {kind} was built without {name}: python -m segkernels build"


def _why_not_triton(package: str, device: torch.device) -> str | None:
    if importlib.util.find_spec(f"{package}.triton") is None:
        return "this operator has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on the CPU Triton is only interpreted: set TRITON_INTERPRET=1 before Python starts"
    if device.type not in ("cpu", "cuda"):
        return f"no Triton kernels for device {device.type!r}"
    return None


def _choose(kind: _Kind, requested: str | None) -> str:
    """The backend for one call; it depends on types and environment only, so graphs may fix it."""
    requested = str(requested or os.environ.get("SEGKERNELS_BACKEND") or "auto")
    strict = os.environ.get("SEGKERNELS_STRICT") == "1"
    return _decide(kind, requested, strict)


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo (and Triton).
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache  # decided, and warned about, once
def _decide(kind: _Kind, requested: str, strict: bool) -> str:
    name, device = kind[0].rsplit(".", 1)[-1], kind[1].type
    reasons = _reasons(kind)
    if requested in reasons:
        if reasons[requested] is None:
            return requested
        raise BackendUnavailableError(_refusal(name, f"backend {requested!r} cannot run", reasons))
    check_backend(name, requested)
    # On the CPU Triton means its interpreter, thousands of times slower: only on request.
    order = [b for b in BACKENDS if not (b == "triton" and device == "cpu")]
    chosen = next(b for b in order if reasons[b] is None)
    if chosen == "reference" and device in ("cpu", "cuda"):
        message = _refusal(name, "no fused backend can run; plain PyTorch is used", reasons)
        if strict:
            raise BackendUnavailableError(f"{message}\n  SEGKERNELS_STRICT=1 makes this an error")
        warnings.warn(message, SegkernelsPerformanceWarning, stacklevel=5)
    return chosen


def _refusal(name: str, headline: str, reasons: dict[str, str | None]) -> str:
    lines = [f"{name}: {headline}"]
    lines += [f"  {backend:<10}{reason or 'usable'}" for backend, reason in reasons.items()]
    return "\n".join([*lines, "  more: python -m segkernels doctor"])
