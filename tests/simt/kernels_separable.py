"""separable_conv2d's CUDA kernels on the executor; test_simt.py runs this under the sanitizers."""

import itertools

import pytest
import torch

from segkernels.fused import accumulation_dtype
from tests.simt import law
from tests.simt.executor import ops, some_slow
from tests.simt.kernels_depthwise import LAYOUTS, cotangent

# B, C, D, H, W, kernel, stride, rates
CASES = {
    "vectors": (2, 16, 24, 7, 9, (3, 3), 1, [(1, 1)]),
    "odd channels": (1, 5, 7, 6, 5, (3, 3), 1, [(2, 1)]),
    "several rates": (1, 8, 16, 9, 7, (3, 3), 1, [(1, 1), (2, 3), (9, 2)]),
    "many channels": (1, 72, 136, 3, 5, (3, 3), 1, [(1, 1)]),
    "stride 2, 5x5": (1, 8, 8, 9, 8, (5, 5), 2, [(1, 1)]),
    "several tiles of pixels": (2, 8, 8, 11, 13, (1, 3), 1, [(1, 1)]),
}
# gamma, beta, activation, eps, inner and outer
MODES = {
    "plain": ((False, "none", None), (False, "none", None)),
    "folded": ((True, "relu", None), (True, "relu6", None)),
    "training": ((True, "relu", 1e-5), (True, "relu", 1e-3)),
    "inner training": ((False, "none", 1e-5), (True, "relu", None)),
    "outer training": ((True, "relu6", None), (False, "none", 1e-5)),
}


def inputs(case, mode, dtype, layout):
    B, C, D, H, W, (kh, kw), s, rates = CASES[case]
    g = torch.Generator().manual_seed(0)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    R = len(rates)
    x = draw(B, C, H, W).to(memory_format=memory)
    w, v = draw(R, C, kh, kw, scale=(kh * kw) ** -0.5), draw(R, D, C, scale=C**-0.5)
    affine = []
    for (present, _, _), n in zip(MODES[mode], (C, D), strict=True):
        gamma, beta = (draw(R * n).to(accumulation_dtype(dtype)) for _ in "γβ")
        if dtype.itemsize > 2:
            gamma = gamma + 1.5
        else:  # every channel lies in the middle of relu6's slope, or as far below it:
            gamma = (1 + gamma / 4) / 4  # no rounding carries a value across a kink
            beta = 3 - 6.0 * (torch.arange(R * n) % 2)
        affine += [gamma, beta] if present else [None, None]
    padding = [r * (k - 1) // 2 for pair in rates for r, k in zip(pair, (kh, kw), strict=True)]
    return [x, w, v, *affine], [[s, s], padding, [r for pair in rates for r in pair]]


ACTIVATIONS = {"none": lambda a: a, "relu": torch.relu, "relu6": lambda a: a.clamp(0, 6)}


def reference(x, w, v, gamma1, beta1, gamma2, beta2, mode, geometry, moments=None):
    """y by the equations, in the inputs' type; `moments` receives mean and variance."""

    def affine(a, gamma, beta, act, eps):
        shape = (1, -1, 1, 1)
        wide = a.to(accumulation_dtype(a.dtype))
        if eps is not None:
            var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
            if moments is not None:
                moments.append((mean, var))
            wide = (wide - mean.view(shape)) / (var.view(shape) + eps).sqrt()
        if gamma is not None:
            wide = wide * gamma.view(shape)
        if beta is not None:
            wide = wide + beta.view(shape)
        return ACTIVATIONS[act](wide).to(a.dtype)

    (_, act1, eps1), (_, act2, eps2) = MODES[mode]
    R, _, C = v.shape
    d = law.depthwise(x, w, None, *geometry)
    h = affine(d, gamma1, beta1, act1, eps1)
    o = torch.cat(
        [
            torch.nn.functional.conv2d(h[:, r * C : (r + 1) * C], v[r, :, :, None, None])
            for r in range(R)
        ],
        1,
    )
    return affine(o, gamma2, beta2, act2, eps2)


def kernels(tensors, mode, geometry, dy, need=None):
    (_, act1, eps1), (_, act2, eps2) = MODES[mode]
    x, w, v, *affine = tensors
    y, o, *moments = ops().separable_conv2d(x, w, v, *affine, act1, act2, eps1, eps2, *geometry)
    saved_y = y if eps2 is None and act2 != "none" else None
    saved_o = o if eps2 is not None else None
    need = need or [int(t is not None) for t in tensors]
    grads = ops().separable_conv2d_backward(
        dy, x, saved_y, saved_o, w, v, *affine, *moments, act1, act2, eps1, eps2, *geometry, need
    )
    assert o.shape == (y.shape if eps2 is not None else (0,))
    return y, moments, grads, need


NAMES = ("y", "dx", "dw", "dv", "dgamma1", "dbeta1", "dgamma2", "dbeta2")


def compare(tensors, mode, geometry, dy, need=None):
    """Forward, backward and moments against float64."""
    dtype = tensors[0].dtype
    y, moments, grads, need = kernels(tensors, mode, geometry, dy, need)
    for grad, wanted in zip(grads, need, strict=True):
        assert wanted or grad.shape == (0,)
    got = dict(zip(NAMES, (y, *grads), strict=True))
    longest = max(tensors[0][:, 0].numel(), *tensors[2].shape)

    def equations(inputs, dy):
        seen = []
        made = law.results(lambda *t: reference(*t, mode, geometry, seen), inputs, dy)
        return made, [m.detach() for pair in seen for m in pair]

    yardstick, rough = equations(tensors, dy)
    truth, exact = equations(law.widened(tensors), dy.double())
    law.check(got, yardstick, truth, dtype, longest)
    present = {
        f"moment {i}": m for i, m in enumerate(moments) if MODES[mode][i // 2][2] is not None
    }
    law.check(present, rough, exact, dtype, longest)
    assert sum(m.numel() > 0 for m in moments) == len(present)
    return y, grads


# every case in every mode in float64; the two full modes in the other types, one of the large case
COMBINATIONS = [
    (case, mode, dtype, layout)
    for case, mode, dtype, layout in itertools.product(CASES, MODES, law.DTYPES, LAYOUTS)
    if (dtype == torch.float64 and case != "many channels")
    or (mode == "folded" and dtype != torch.float64)
    or (mode == "training" and dtype in (torch.float32, torch.bfloat16) and case != "many channels")
]


def default(case, mode, dtype, layout):
    """Every mode and every case, every type and both layouts in some of them."""
    last = layout == "channels_last"
    if case == "vectors":
        return last == (dtype != torch.float32)
    if dtype == torch.float64:
        return mode == "training" and last
    return mode == "folded" and (dtype == (torch.bfloat16 if last else torch.float32))


@pytest.mark.parametrize(("case", "mode", "dtype", "layout"), some_slow(COMBINATIONS, default))
def test_against_float64(case, mode, dtype, layout):
    tensors, geometry = inputs(case, mode, dtype, layout)
    dy = cotangent(reference(*tensors, mode, geometry).shape, dtype, layout)
    y, grads = compare(tensors, mode, geometry, dy)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert grads[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("mode", "wanted"),
    some_slow(
        itertools.product(("folded", "training"), range(7)),
        lambda mode, wanted: mode == "training" or wanted == 2,  # without moments, dv alone
    ),
)
def test_only_what_is_needed(mode, wanted):
    tensors, geometry = inputs("odd channels", mode, torch.float32, "channels_last")
    dy = cotangent(reference(*tensors, mode, geometry).shape, torch.float32, "channels_last")
    compare(tensors, mode, geometry, dy, [int(i == wanted) for i in range(7)])


@pytest.mark.parametrize("mode", ["plain", "folded", "training"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, mode):
    (x, *others), geometry = inputs("vectors", mode, torch.bfloat16, layout)
    B, C, H, W = x.shape
    shape = reference(x, *others, mode, geometry).shape
    dense = cotangent(shape, torch.bfloat16, "nchw")
    room = torch.full((B, C + 8, H, W + 1), float("nan"), dtype=x.dtype)
    if layout == "channels_last":
        room = room.to(memory_format=torch.channels_last)
    for view, dy in (
        (x, dense.transpose(2, 3).contiguous().transpose(2, 3)),
        (room[:, 8:, :, :W].copy_(x), dense[..., :1].expand(shape)),
        (room[:, 1 : C + 1, :, 1:].copy_(x), dense.to(memory_format=torch.channels_last)),
    ):
        compare([view, *others], mode, geometry, dy)


@pytest.mark.parametrize("mode", ["folded", "training"])
def test_thread_order_does_not_matter(mode, monkeypatch):
    tensors, geometry = inputs("several rates", mode, torch.bfloat16, "channels_last")
    dy = cotangent(reference(*tensors, mode, geometry).shape, torch.bfloat16, "channels_last")
    runs = []
    for seed in ("1", "2"):
        monkeypatch.setenv("SEGKERNELS_SIMT_SEED", seed)
        y, moments, grads, _ = kernels(tensors, mode, geometry, dy)
        runs.append([y, *moments, *grads])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("mode", ["folded", "plain"])
def test_empty_batch(mode):
    (x, *others), geometry = inputs("vectors", mode, torch.float32, "channels_last")
    tensors = [x[:0], *others]
    dy = torch.empty(reference(*tensors, mode, geometry).shape)
    y, _, grads, _ = kernels(tensors, mode, geometry, dy)
    assert y.shape[0] == 0
    assert all((g == 0).all() for g in grads)
