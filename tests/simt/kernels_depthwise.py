"""depthwise_conv2d's CUDA kernels on the executor; test_simt.py runs this under the sanitizers."""

import itertools

import pytest
import torch

from tests.simt import law
from tests.simt.executor import ops, some_slow

# B, C, H, W, kernel, stride, rates, same padding
CASES = {
    "channels in vectors": (2, 16, 7, 9, (3, 3), 1, [(1, 1)], True),
    "odd channels": (1, 5, 6, 5, (3, 3), 1, [(2, 2)], True),
    "rates beyond the map": (1, 8, 5, 4, (3, 3), 1, [(7, 3)], True),
    "several rates": (2, 8, 9, 7, (3, 3), 1, [(1, 1), (2, 3), (9, 2)], True),
    "5x5": (1, 8, 9, 8, (5, 5), 1, [(2, 1)], True),
    "5x5, odd channels": (1, 3, 8, 9, (5, 5), 1, [(1, 2)], True),
    "stride 2": (2, 8, 9, 8, (3, 3), 2, [(1, 1)], True),
    "stride 2, several rates": (1, 3, 9, 8, (3, 3), 2, [(2, 1), (1, 2)], True),
    "1x7": (1, 8, 5, 9, (1, 7), 1, [(1, 1)], True),
    "1x1": (1, 3, 4, 5, (1, 1), 1, [(1, 1)], True),
    "7x7": (1, 8, 7, 8, (7, 7), 1, [(1, 1)], True),
    "no padding": (2, 8, 8, 9, (3, 3), 1, [(2, 3)], False),
    "one pixel": (1, 8, 1, 1, (3, 3), 1, [(1, 1)], True),
    "more channels than a tile": (1, 72, 3, 3, (3, 3), 1, [(1, 1)], True),
    "wide": (1, 8, 3, 140, (3, 3), 1, [(1, 1)], True),
    "long walks": (1, 2, 140, 3, (3, 3), 1, [(1, 1)], True),
    "empty batch": (0, 8, 5, 5, (3, 3), 1, [(1, 1)], True),
}
LAYOUTS = ("nchw", "channels_last")


def inputs(case, dtype, layout, seed=0):
    B, C, H, W, (kh, kw), s, rates, same = CASES[case]
    g = torch.Generator().manual_seed(seed)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(B, C, H, W, generator=g).to(dtype).to(memory_format=memory)
    w = torch.randn(len(rates), C, kh, kw, generator=g).to(dtype)
    b = torch.randn(len(rates), C, generator=g).to(dtype)
    dilation = [r for pair in rates for r in pair]
    padding = [
        r * (k - 1) // 2 if same else 0
        for pair in rates
        for r, k in zip(pair, (kh, kw), strict=True)
    ]
    return x, w, b, [s, s], padding, dilation


def compare(x, w, b, dy, geometry, need=(1, 1, 1)):
    """Forward and backward against float64."""
    y = ops().depthwise_conv2d(x, w, b, *geometry)
    grads = ops().depthwise_conv2d_backward(dy, x, w, *geometry, list(need))
    for grad, wanted in zip(grads, need, strict=True):
        assert wanted or grad.shape == (0,)
    got = dict(zip(("y", "dx", "dw", "db"), (y, *grads), strict=True))

    def function(x, w, b):
        return law.depthwise(x, w, b, *geometry)

    yardstick = law.results(function, [x, w, b], dy)
    truth = law.results(function, law.widened([x, w, b]), dy.double())
    law.check(got, yardstick, truth, x.dtype, max(x[:, 0].numel(), w[0, 0].numel() * len(w)))
    return y, grads


def cotangent(y_shape, dtype, layout, seed=1):
    g = torch.Generator().manual_seed(seed)
    dy = torch.randn(y_shape, generator=g).to(dtype)
    return dy.to(memory_format=torch.channels_last) if layout == "channels_last" else dy


def out_shape(x, w, geometry):
    return law.depthwise(x.double(), w.double(), None, *geometry).shape


# every case in both layouts in float64, whose rounding hides nothing; the other types in one
COMBINATIONS = [
    (case, dtype, layout)
    for case, dtype, layout in itertools.product(CASES, law.DTYPES, LAYOUTS)
    if dtype == torch.float64
    or (layout == "channels_last" and dtype != torch.float16)
    or case in ("channels in vectors", "stride 2")
]


def default(case, dtype, layout):
    """Every case in both layouts' kernels, every type in some case."""
    if dtype == torch.float64:
        return layout == "channels_last" or case in ("odd channels", "several rates", "5x5", "wide")
    return case in ("channels in vectors", "stride 2") or (
        layout == "channels_last" and dtype == torch.bfloat16 and case == "several rates"
    )


@pytest.mark.parametrize(("case", "dtype", "layout"), some_slow(COMBINATIONS, default))
def test_against_float64(case, dtype, layout):
    x, w, b, *geometry = inputs(case, dtype, layout)
    dy = cotangent(out_shape(x, w, geometry), dtype, layout)
    y, grads = compare(x, w, b, dy, geometry)
    if layout == "channels_last" and x.shape[1] > 1 and x.numel():
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert grads[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], ids=str)
@pytest.mark.parametrize("case", ["channels in vectors", "several rates", "no padding"])
def test_only_what_is_needed(case, need):
    x, w, b, *geometry = inputs(case, torch.float32, "channels_last")
    compare(
        x,
        w,
        b,
        cotangent(out_shape(x, w, geometry), torch.float32, "channels_last"),
        geometry,
        need,
    )


STRIDED = itertools.product(
    ("channels in vectors", "stride 2", "several rates"), (torch.float32, torch.bfloat16), LAYOUTS
)


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    some_slow(
        STRIDED,
        lambda case, dtype, layout: (
            (dtype, layout)
            == {
                "channels in vectors": (torch.bfloat16, "channels_last"),
                "stride 2": (torch.float32, "nchw"),
                "several rates": (torch.bfloat16, "nchw"),
            }[case]
        ),
    ),
)
def test_any_strides(case, dtype, layout):
    x, w, b, *geometry = inputs(case, dtype, layout)
    shape = out_shape(x, w, geometry)
    dense = cotangent(shape, dtype, "nchw")
    B, C, H, W = x.shape
    room = torch.full((B, C + 8, H + 1, W + 1), float("nan"), dtype=dtype)
    if layout == "channels_last":
        room = room.to(memory_format=torch.channels_last)
    views = (
        (
            x,
            dense.to(memory_format=torch.channels_last),
        ),  # of the other memory format, in half of the runs
        (
            x.transpose(2, 3).contiguous().transpose(2, 3),
            dense.transpose(2, 3).contiguous().transpose(2, 3),
        ),
        (room[:, 8:, 1:, :W].copy_(x), dense[..., :1].expand(shape)),
        (
            room[:, 1 : C + 1, :H, 1:].copy_(x),
            dense[:1, :1, :1, :1].expand(shape),
        ),  # no vector is aligned
    )
    for view, dy in views:
        compare(view, w, b, dy, geometry)


@pytest.mark.parametrize("case", ["channels in vectors", "several rates", "stride 2", "no padding"])
def test_thread_order_does_not_matter(case, monkeypatch):
    x, w, b, *geometry = inputs(case, torch.float32, "channels_last")
    dy = cotangent(out_shape(x, w, geometry), torch.float32, "channels_last")
    runs = []
    for seed in ("1", "2"):
        monkeypatch.setenv("SEGKERNELS_SIMT_SEED", seed)
        grads = ops().depthwise_conv2d_backward(dy, x, w, *geometry, [1, 1, 1])
        runs.append([ops().depthwise_conv2d(x, w, b, *geometry), *grads])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def test_nan_stays_where_it_belongs():
    x, w, b, *geometry = inputs("rates beyond the map", torch.float32, "channels_last")
    x[0, 3, 2, 1] = float("nan")
    dy = cotangent(out_shape(x, w, geometry), torch.float32, "channels_last")
    truth = law.depthwise(x, w, b, *geometry)
    dw = law.results(lambda x, w: law.depthwise(x, w, None, *geometry), [x, w], dy)[2]
    assert torch.equal(ops().depthwise_conv2d(x, w, b, *geometry).isnan(), truth.isnan())
    got = ops().depthwise_conv2d_backward(dy, x, w, *geometry, [1, 1, 1])
    assert got[1][:, 3].isnan().any() and torch.equal(got[1].isnan(), dw.isnan())
    assert not got[0].isnan().any()
