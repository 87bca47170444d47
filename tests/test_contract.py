"""What every operator promises, on every backend: one suite, no list to edit.

Each test takes an operator, a fused backend that can run here, and the operator's awkward cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from segkernels import fused
from tests.contract import (
    DTYPES,
    LAYOUTS,
    Recorded,
    assert_lawful,
    call,
    case_of,
    cases,
    check,
    cotangents_like,
    leaves,
    map_of,
    typical,
    usable,
    with_gradients,
)
from tests.views import VIEWS

FUSED = tuple(b for b in fused.BACKENDS if b != "reference")


OPERATORS = tuple(fused.OPERATORS)
CASES = [pytest.param(op, case, id=f"{op}-{case.name}") for op in OPERATORS for case in cases(op)]


@pytest.fixture(params=FUSED)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    return usable(request, OPERATORS[0], device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "case"), CASES)
def test_no_worse_than_the_reference(
    op: str, case: Any, dtype: torch.dtype, layout: str, backend: str, device: str
) -> None:
    """Result and gradients obey the law of tolerance in every type and layout."""
    inputs = case.inputs(dtype, LAYOUTS[layout], device, kinks=dtype.itemsize > 2)
    check(op, case, inputs, backend, cotangents_like(op, inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(19, 1), (1, 130)], ids=["long", "wide"])
@pytest.mark.parametrize("op", OPERATORS)
def test_many_maps(op: str, size: tuple[int, int], layout: str, backend: str, device: str) -> None:
    """As many as fill a GPU: its threads are then given more than a few pixels each."""
    case = dataclasses.replace(case_of(op, "odd_channels"), shape=(32, 33, *size))
    inputs = case.inputs(torch.float32, LAYOUTS[layout], device)
    check(op, case, inputs, backend, cotangents_like(op, inputs))


@pytest.mark.parametrize(("op", "case"), CASES)
def test_every_output(op: str, case: Any, backend: str, device: str) -> None:
    """Outputs beside the result (moments) obey the law of tolerance as well."""
    inputs = case.inputs(torch.float32, torch.channels_last, device)
    operator = fused.OPERATORS[op]
    with Recorded() as recorded:
        call(op, inputs, backend)
    (args,) = [args for f, args in recorded.calls if f == operator.raw(backend)]
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]

    def outputs(args: Any, backend: str) -> dict[str, Tensor]:
        made = operator(*args, backend=backend)
        return dict(
            zip(operator.outputs, made if len(operator.outputs) > 1 else [made], strict=True)
        )

    truth = {n: t for n, t in outputs(wide, "reference").items() if t.shape != (0,)}
    assert_lawful(outputs(args, backend), outputs(args, "reference"), truth, case, torch.float32)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_gradcheck(op: str, case: Any, backend: str, device: str) -> None:
    """Against central differences in float64, every argument at once along random directions."""
    inputs = case.inputs(torch.float64, torch.channels_last, device)
    named = {n: v.requires_grad_() for n, v in leaves(inputs).items()}
    if inputs[map_of(inputs)].numel() == 0:
        pytest.skip("nothing to differentiate")
    if getattr(case, "truncated", False):
        pytest.skip(
            "not the gradient of the function, on purpose: the operator's own tests have it"
        )

    def f(*values: Tensor) -> tuple[Tensor, ...]:
        return call(op, inputs | dict(zip(named, values, strict=True)), backend)

    assert torch.autograd.gradcheck(f, tuple(named.values()), fast_mode=True)


# one with odd numbers of channels; one that is moved by vectors wherever strides and address allow
VIEWED = {"typical": torch.float64, "vectors": torch.bfloat16}


def viewed(op: str, name: str) -> Any:
    return typical(op) if name == "typical" else case_of(op, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("name", "dtype"), VIEWED.items(), ids=VIEWED)
@pytest.mark.parametrize("op", OPERATORS)
def test_strided_cotangents(
    op: str, name: str, dtype: torch.dtype, view: str, layout: str, backend: str, device: str
) -> None:
    """A backward that assumes a contiguous cotangent passes gradcheck and opcheck; not this."""
    case = viewed(op, name)
    inputs = case.inputs(dtype, LAYOUTS[layout], device, kinks=dtype.itemsize > 2)
    dy = tuple(
        VIEWS[view](d) if d.dim() == 4 else VIEWS[view](d[..., None])[..., 0]
        for d in cotangents_like(op, inputs)
    )
    check(op, case, inputs, backend, dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("name", "dtype"), VIEWED.items(), ids=VIEWED)
@pytest.mark.parametrize("op", OPERATORS)
def test_strided_inputs(
    op: str, name: str, dtype: torch.dtype, view: str, layout: str, backend: str, device: str
) -> None:
    case = viewed(op, name)
    inputs = case.inputs(dtype, LAYOUTS[layout], device, kinks=dtype.itemsize > 2)
    x = map_of(inputs)
    inputs[x] = VIEWS[view](inputs[x])
    check(op, case, inputs, backend, cotangents_like(op, inputs))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_every_element_is_written(
    op: str, case: Any, layout: str, backend: str, device: str
) -> None:
    """With outputs and workspaces full of NaN, none is left."""
    inputs = case.inputs(torch.float32, LAYOUTS[layout], device)
    dy = cotangents_like(op, inputs)
    with poisoned_memory():
        got = with_gradients(op, inputs, backend, dy)
    for name, value in got.items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_bitwise_reproducible(
    op: str, case: Any, dtype: torch.dtype, layout: str, backend: str, device: str
) -> None:
    """Two runs, and runs with other numbers of threads, agree to the last bit. On the executor, the
    threads of a kernel come in another order each time."""
    inputs = case.inputs(dtype, LAYOUTS[layout], device)
    dy = cotangents_like(op, inputs)
    first = with_gradients(op, inputs, backend, dy)
    for threads in (2, 1, 3) if torch.get_num_threads() > 1 else (1,):
        torch.set_num_threads(threads)
        again = with_gradients(op, inputs, backend, dy)
        for name, value in first.items():
            assert torch.equal(again[name], value), f"{name} with {threads} threads"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_independent_of_the_batch(
    op: str, case: Any, layout: str, backend: str, device: str
) -> None:
    """The result of an image does not depend on its companions (unless its moments are theirs)."""
    if case.shape[0] < 2 or any(getattr(case, "eps", ())):
        pytest.skip("one image, or the batch's own moments")
    inputs = case.inputs(torch.float32, LAYOUTS[layout], device)
    more = leaves(dataclasses.replace(case, shape=(7, *case.shape[1:])).inputs(device=device))
    images = {
        n: v[-1:].contiguous(memory_format=fused.memory_format(v))
        for n, v in leaves(inputs).items()
        if v.shape != more[n].shape
    }
    for alone, together in zip(
        call(op, inputs | images, backend), call(op, inputs, backend), strict=True
    ):
        assert torch.equal(alone, together[-1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op", OPERATORS)
def test_nan_and_inf_propagate(
    op: str, dtype: torch.dtype, layout: str, value: float, backend: str, device: str
) -> None:
    """One bad pixel spoils exactly what it spoils in the reference, gradients too."""
    for case in (case_of(op, "odd_channels"), typical(op), case_of(op, "vectors")):
        inputs = case.inputs(dtype, LAYOUTS[layout], device, kinks=dtype.itemsize > 2)
        inputs[map_of(inputs)][0, 1, 3, 4] = value
        dy = cotangents_like(op, inputs)
        expected = with_gradients(op, inputs, "reference", dy)
        for name, got in with_gradients(op, inputs, backend, dy).items():
            assert torch.equal(got.isnan(), expected[name].isnan()), name
            assert torch.equal(got.isinf(), expected[name].isinf()), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATORS)
def test_memory_format_is_kept(op: str, layout: str, backend: str, device: str) -> None:
    inputs = typical(op).inputs(torch.float32, LAYOUTS[layout], device)
    got = with_gradients(op, inputs, backend, cotangents_like(op, inputs))
    x = map_of(inputs)
    maps = {n: t for n, t in got.items() if t.shape[2:] == inputs[x].shape[2:] or n == f"d{x}"}
    assert f"d{x}" in maps
    for name, t in maps.items():
        assert t.is_contiguous(memory_format=LAYOUTS[layout]), name


@pytest.mark.parametrize(("op", "case"), CASES)
def test_partial_gradients(op: str, case: Any, backend: str, device: str) -> None:
    """A gradient is the same whether or not the others are asked for."""
    inputs = case.inputs(torch.float32, torch.channels_last, device)
    dy = cotangents_like(op, inputs)
    full = with_gradients(op, inputs, backend, dy)
    for name in leaves(inputs):
        leaf = inputs[name].detach().requires_grad_()
        y = call(op, inputs | {name: leaf}, backend)
        (alone,) = torch.autograd.grad(y, leaf, dy)
        assert torch.equal(alone, full[f"d{name}"]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_opcheck(op: str, case: Any, layout: str, backend: str, device: str) -> None:
    """PyTorch's own checks of the raw operators: schema, shapes and strides of the fake kernels."""
    inputs = case.inputs(torch.float32, LAYOUTS[layout], device)
    operator = fused.OPERATORS[op]
    dy = cotangents_like(op, inputs)
    with Recorded() as recorded:
        with_gradients(op, inputs, backend, dy)
    seen = [(f, args) for f, args in recorded.calls if f.namespace.startswith("segkernels")]
    assert [f for f, _ in seen] == [operator.raw(backend), operator.raw(backend, backward=True)]
    for func, args in seen:
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", OPERATORS)
def test_a_second_derivative_is_refused(op: str, backend: str, device: str) -> None:
    inputs = cases(op)[1].inputs(torch.float32, torch.channels_last, device)
    x = inputs[map_of(inputs)].requires_grad_()
    y = call(op, inputs, backend)[0]
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("op", OPERATORS)
def test_other_derivatives_are_refused(op: str, backend: str, device: str) -> None:
    """Forward mode and torch.func: an error that says what to do; the reference knows them."""
    inputs = cases(op)[1].inputs(torch.float64, torch.channels_last, device)
    name = map_of(inputs)
    x = inputs[name]

    def f(x: Tensor, backend: str) -> Tensor:
        return call(op, inputs | {name: x}, backend)[0]

    transforms: tuple[Callable[[str], Any], ...] = (
        lambda b: torch.func.jvp(lambda x: f(x, b), (x,), (x,)),
        lambda b: torch.func.grad(lambda x: f(x, b).sum())(x),
    )
    for transform in transforms:
        with pytest.raises(RuntimeError, match="backend='reference'"):
            transform(backend)
        transform("reference")


@pytest.mark.parametrize("op", OPERATORS)
def test_the_backward_makes_no_cotangent_nobody_has(op: str, backend: str, device: str) -> None:
    """Outputs beside the result (o, moments) get no maps of zeros."""
    case = max(cases(op), key=lambda case: "train" in case.name)
    inputs = case.inputs(torch.float32, torch.channels_last, device)
    x = inputs[map_of(inputs)].requires_grad_()
    y = call(op, inputs, backend)[0]
    dy = torch.ones_like(y)
    with Recorded() as recorded:
        torch.autograd.grad(y, x, dy)
    assert torch.ops.aten.zeros.default not in [f for f, _ in recorded.calls]


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", OPERATORS)
def test_compiles_whole(op: str, dynamic: bool, backend: str, device: str) -> None:
    """Compiled as one graph, forward and backward; with dynamic shapes, without recompiling."""
    from torch._dynamo.testing import CompileCounterWithBackend  # takes seconds

    whole = typical(op).inputs(torch.float32, torch.channels_last, device)
    size = whole[map_of(whole)].shape[2:]
    dy = cotangents_like(op, whole)
    counter = CompileCounterWithBackend("aot_eager")

    def f(**arguments: Any) -> tuple[Tensor, ...]:
        return tuple(y * 2 for y in call(op, arguments, backend))

    def upper(t: Any, rows: int) -> Any:
        if not isinstance(t, Tensor) or t.shape[2:] != size:
            return t
        return t[:, :, :rows].clone(memory_format=torch.channels_last)

    torch._dynamo.reset()
    compiled_once = 0
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=counter)
    for rows in (size[0], size[0] - 2, size[0] - 4) if dynamic else (size[0], size[0]):
        inputs = {n: upper(v, rows) for n, v in whole.items()}
        part = tuple(upper(d, rows) for d in dy)
        named = {n: v.detach().requires_grad_() for n, v in leaves(inputs).items()}
        y = compiled(**(inputs | named))
        got = torch.autograd.grad(y, list(named.values()), part)
        expected = with_gradients(op, inputs, backend, tuple(2 * d for d in part))
        for i, result in enumerate(y):
            assert torch.equal(result, 2 * expected.pop(f"y{i}"))
        for (name, e), g in zip(expected.items(), got, strict=True):
            torch.testing.assert_close(g, e, msg=name)
        compiled_once = (
            compiled_once or counter.frame_count
        )  # a dynamic float may restart the first
    assert counter.frame_count == compiled_once


@pytest.mark.compile
@pytest.mark.parametrize("op", OPERATORS)
def test_exports(op: str, backend: str, device: str) -> None:
    inputs = cases(op)[1].inputs(torch.float32, torch.channels_last, device)

    name = map_of(inputs)
    x = inputs[name]

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return call(op, inputs | {name: x}, backend)

    program = torch.export.export(Layer(), (x,))
    for got, expected in zip(program.module()(x), Layer()(x), strict=True):
        assert torch.equal(got, expected)
    assert fused.OPERATORS[op].raw(backend) in {n.target for n in program.graph.nodes}


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("op", OPERATORS)
def test_autocast(op: str, low: torch.dtype, backend: str, device: str) -> None:
    """Under autocast a float32 call equals the call on maps and weights cast by hand."""
    case = case_of(op, "odd_channels")
    inputs = case.inputs(torch.float32, torch.channels_last, device)
    dy = cotangents_like(op, inputs)
    with torch.autocast(device, low):
        got = with_gradients(op, inputs, backend, dy)
    assert got["y0"].dtype == low
    types = {n: v.dtype for n, v in leaves(case.inputs(low, device=device)).items()}  # wide or low
    cast = {n: v.to(types[n]) if n in types else v for n, v in inputs.items()}
    by_hand = with_gradients(op, cast, backend, dy)
    for name, value in by_hand.items():
        assert torch.equal(got[name].to(value.dtype), value), name
        assert name[0] == "y" or got[name].dtype == torch.float32, name
