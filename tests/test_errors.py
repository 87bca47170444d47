"""Bad input: nothing is computed; the message says what was asked and what is possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import segkernels
from segkernels import fused, native

X = torch.zeros(2, 4, 6, 5)
W = torch.zeros(4, 1, 3, 3)
V = torch.zeros(3, 4, 1, 1)


def depthwise(**changed: Any) -> torch.Tensor:
    return segkernels.depthwise_conv2d(**({"x": X, "weight": W} | changed))


def separable(**changed: Any) -> Any:
    call = {"x": X, "depthwise_weight": W, "pointwise_weight": V}
    return segkernels.separable_conv2d(**(call | changed))


NODES = torch.ones(3, 4)


def soft_assign(**changed: Any) -> Any:
    call = {"features": X, "anchors": NODES, "scales": NODES}
    return segkernels.soft_assign(**(call | changed))


def encode(**changed: Any) -> torch.Tensor:
    call = {"features": X, "codewords": NODES, "scale": NODES[:, 0]}
    return segkernels.encode(**(call | changed))


def reproject(**changed: Any) -> torch.Tensor:
    call = {"nodes": torch.zeros(2, 3, 4), "assignment": torch.zeros(2, 3, 6, 5)}
    return segkernels.reproject(**(call | changed))


def em_attention(**changed: Any) -> Any:
    call = {"features": X, "bases": NODES.T}
    return segkernels.em_attention(**(call | changed))


FOLDED = {"weight": torch.zeros(4, 4, 1, 1), "bias": torch.zeros(4)}
SEVERAL = torch.zeros(2, 4, 1, 3, 3)

BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "map of rank 3": (depthwise, {"x": X[0]}, r"4 dimensions.*\n.*x: \[4, 6, 5\]"),
    "weight of rank 3": (depthwise, {"weight": W[0]}, r"\[C, 1, k_h, k_w\].*\n.*\[1, 3, 3\]"),
    "other channels": (
        depthwise,
        {"weight": W[:3]},
        r"one window a channel.*\n.*\n.*\[3, 1, 3, 3\]",
    ),
    "grouped weight": (depthwise, {"weight": torch.zeros(4, 2, 3, 3)}, "one window a channel"),
    "even kernel": (depthwise, {"weight": torch.zeros(4, 1, 2, 3)}, "odd sides"),
    "rate zero": (depthwise, {"dilation": 0}, r"dilation must be at least 1\n.*dilation: 0"),
    "negative rate": (depthwise, {"dilation": (2, -1)}, r"at least 1\n.*\(2, -1\)"),
    "fractional rate": (depthwise, {"dilation": 1.5}, "int or a pair"),
    "stride zero": (depthwise, {"stride": 0}, "stride must be at least 1"),
    "negative padding": (depthwise, {"padding": -1}, "padding must be at least 0"),
    "unknown padding": (depthwise, {"padding": "valid"}, r"'same', an int or a pair\n.*'valid'"),
    "three numbers": (depthwise, {"dilation": (1, 2, 3)}, "int or a pair"),
    "window beyond the map": (depthwise, {"padding": 0, "dilation": 9}, "does not fit"),
    "integers": (depthwise, {"x": X.long(), "weight": W.long()}, r"floating point.*\n.*int64"),
    "complex": (depthwise, {"x": X.cfloat(), "weight": W.cfloat()}, "floating point"),
    "two types": (depthwise, {"weight": W.bfloat16()}, r"different types\n.*float32.*\n.*bfloat16"),
    "two devices": (depthwise, {"weight": W.to("meta")}, r"one device\n.*cpu\n.*meta"),
    "no map": (depthwise, {"x": None}, r"x must be a tensor\n.*NoneType"),
    "sparse map": (depthwise, {"x": X.to_sparse()}, r"only dense.*\n.*sparse.*\n.*to_dense"),
    "not a tensor": (depthwise, {"weight": [1.0]}, r"weight must be a tensor\n.*list"),
    "bias of other length": (depthwise, {"bias": torch.zeros(3)}, r"one value a channel"),
    "bias of the other order": (
        depthwise,
        {"weight": SEVERAL, "dilation": [1, 2], "bias": torch.zeros(4, 2)},
        r"one value a channel.*\n.*\[4, 2\]",
    ),
    "several rates, no dilation": (
        depthwise,
        {"weight": SEVERAL, "dilation": None},
        "needs a list of 2 dilations",
    ),
    "several rates, padding 1.5": (
        depthwise,
        {"weight": SEVERAL, "dilation": [1, 2], "padding": 1.5},
        r"a list of 2\n.*1\.5",
    ),
    "several rates, one dilation": (depthwise, {"weight": SEVERAL}, "needs a list of 2 dilations"),
    "no rates": (depthwise, {"weight": SEVERAL[:0], "dilation": []}, "no rates"),
    "rates of other sizes": (
        depthwise,
        {"weight": SEVERAL, "dilation": [1, 2], "padding": 2},
        "one output size",
    ),
    "unknown backend": (depthwise, {"backend": "cuda"}, r"no backend named 'cuda'\n.*native"),
    "a list of backends": (depthwise, {"backend": ["native"]}, "no backend named"),
    "the word of explain": (depthwise, {"backend": "explain"}, "no backend named 'explain'"),
    "pointwise of other channels": (separable, {"pointwise_weight": V[:, :3]}, "must be 1x1"),
    "pointwise of rank 0": (separable, {"pointwise_weight": torch.tensor(1.0)}, "must be 1x1"),
    "pointwise 3x3": (separable, {"pointwise_weight": torch.zeros(3, 4, 3, 3)}, "must be 1x1"),
    "pointwise without rates": (
        separable,
        {"depthwise_weight": SEVERAL, "dilation": [1, 2]},
        "one a rate",
    ),
    "scale of other length": (separable, {"inner_scale": torch.ones(3)}, "inner scale must have 4"),
    "shift of other length": (separable, {"outer_shift": torch.ones(4)}, "outer shift must have 3"),
    "scale of the other order": (
        separable,
        {
            "depthwise_weight": SEVERAL,
            "pointwise_weight": torch.zeros(2, 3, 4, 1, 1),
            "dilation": [1, 2],
            "inner_scale": torch.ones(4, 2),
        },
        r"\[4, 2\].*\n.*expected \[8\] or \[2, 4\]",
    ),
    "negative eps": (separable, {"outer_eps": -1e-5}, r"positive number\n.*-1e-05"),
    "eps of another kind": (separable, {"inner_eps": "1e-5"}, r"positive number\n.*'1e-5'"),
    "unknown activation": (separable, {"outer_activation": "gelu"}, r"'relu' or 'relu6'\n.*'gelu'"),
    "bias under standardisation": (
        separable,
        {"depthwise_bias": torch.zeros(4), "inner_eps": 1e-5},
        "has no effect",
    ),
    "features of rank 3": (soft_assign, {"features": X[0]}, r"4 dimensions.*\n.*\[4, 6, 5\]"),
    "anchors of other channels": (
        soft_assign,
        {"anchors": NODES[:, :3]},
        r"anchors must be \[K, C\].*\n.*\[3, 3\]\n.*\[2, 4, 6, 5\]",
    ),
    "anchors of rank 1": (soft_assign, {"anchors": NODES[0]}, r"anchors must be \[K, C\]"),
    "no anchors": (soft_assign, {"anchors": NODES[:0]}, r"anchors must be \[K, C\].*\n.*\[0, 4\]"),
    "features without channels": (
        soft_assign,
        {"features": X[:, :0], "anchors": NODES[:, :0]},
        r"anchors must be \[K, C\]",
    ),
    "one scale a node": (
        soft_assign,
        {"scales": NODES[:, 0]},
        r"the shape of anchors\n.*\[3, 4\]\n.*\[3\]",
    ),
    "eps below zero": (soft_assign, {"eps": -1e-9}, r"0 or more\n.*-1e-09"),
    "eps no number": (soft_assign, {"eps": None}, r"0 or more\n.*None"),
    "integer features": (soft_assign, {"features": X.long()}, r"floating point.*\n.*int64"),
    "integer anchors": (soft_assign, {"anchors": NODES.long()}, r"floating point.*\n"),
    "no tensor of anchors": (soft_assign, {"anchors": [1.0]}, r"anchors must be a tensor\n.*list"),
    "None for anchors": (soft_assign, {"anchors": None}, r"anchors must be a tensor\n.*NoneType"),
    "anchors elsewhere": (soft_assign, {"anchors": NODES.to("meta")}, r"one device\n.*\n.*meta"),
    "maps of rank 3": (encode, {"features": X[0]}, "4 dimensions"),
    "codewords of other channels": (
        encode,
        {"codewords": NODES[:, :3]},
        r"codewords must be \[K, C\].*\n.*\[3, 3\]",
    ),
    "no codewords": (encode, {"codewords": NODES[:0]}, r"codewords must be \[K, C\]"),
    "a scale a channel": (
        encode,
        {"scale": NODES},
        r"one value a codeword\n.*\[3, 4\]\n.*\[3, 4\]",
    ),
    "scales of other length": (encode, {"scale": NODES[:2, 0]}, r"one value a codeword\n.*\[2\]"),
    "no scale": (encode, {"scale": None}, r"scale must be a tensor\n.*NoneType"),
    "None for assignment": (reproject, {"assignment": None}, "assignment must be a tensor"),
    "nodes of rank 2": (reproject, {"nodes": torch.zeros(3, 4)}, r"nodes must be \[B, K, D\]"),
    "assignment of rank 3": (
        reproject,
        {"assignment": torch.zeros(2, 3, 30)},
        r"assignment \[B, K, H, W\]\n.*\[2, 3, 4\]\n.*\[2, 3, 30\]",
    ),
    "assignment to other nodes": (
        reproject,
        {"assignment": torch.zeros(2, 4, 6, 5)},
        r"nodes must be \[B, K, D\]",
    ),
    "assignment of other images": (
        reproject,
        {"assignment": torch.zeros(1, 3, 6, 5)},
        r"nodes must be \[B, K, D\]",
    ),
    "no nodes": (
        reproject,
        {"nodes": torch.zeros(2, 0, 4), "assignment": torch.zeros(2, 0, 6, 5)},
        r"no nodes.*\n.*\[2, 0, 4\]",
    ),
    "residual of other channels": (
        reproject,
        {"residual": torch.zeros(2, 3, 6, 5)},
        r"residual must be \[2, 4, 6, 5\]\n(.*\n)*.*\[2, 3, 6, 5\]",
    ),
    "residual of another type": (
        reproject,
        {"residual": torch.zeros(2, 4, 6, 5).bfloat16()},
        r"different types\n",
    ),
    "a map of rank 3": (em_attention, {"features": X[0]}, r"4 dimensions.*\n.*\[4, 6, 5\]"),
    "bases of other channels": (
        em_attention,
        {"bases": NODES},
        r"a row for each channel.*\n.*\[2, 4, 6, 5\]\n.*bases: \[3, 4\]",
    ),
    "bases of rank 1": (em_attention, {"bases": NODES[0]}, r"\[C, K\] or \[B, C, K\]"),
    "bases of rank 4": (em_attention, {"bases": X}, r"\[C, K\] or \[B, C, K\]"),
    "no bases": (em_attention, {"bases": torch.zeros(4, 0)}, r"with channels.*\n.*\n.*\[4, 0\]"),
    "bases of three images": (
        em_attention,
        {"bases": torch.zeros(3, 4, 3)},
        r"as many images as features, or of one\n.*\n.*\[3, 4, 3\]",
    ),
    "iterations below zero": (em_attention, {"iterations": -1}, r"0 or more\n.*iterations: -1"),
    "half an iteration": (em_attention, {"iterations": 2.5}, r"0 or more\n.*iterations: 2\.5"),
    "iterations yes": (em_attention, {"iterations": True}, r"an int, 0 or more\n.*True"),
    "unknown gradient": (em_attention, {"gradient": "all"}, r"'last\+bases', 'full'\n.*'all'"),
    "gradient of another kind": (em_attention, {"gradient": ["full"]}, r"one of.*\n.*\['full'\]"),
    "unknown norm": (em_attention, {"norm": "l2"}, r"'additive', 'clamp'\n.*norm: 'l2'"),
    "several temperatures": (
        em_attention,
        {"temperature": torch.ones(3)},
        r"one number\n.*temperature: \[3\]",
    ),
    "temperature no number": (em_attention, {"temperature": "1"}, r"finite number.*\n.*'1'"),
    "endless temperature": (em_attention, {"temperature": float("inf")}, r"finite number.*\n.*inf"),
    "temperature of integers": (em_attention, {"temperature": torch.tensor(2)}, "floating point"),
    "temperature elsewhere": (
        em_attention,
        {"temperature": torch.tensor(1.0, device="meta")},
        r"one device\n(.*\n)*.*temperature .*meta",
    ),
    "None for bases": (em_attention, {"bases": None}, r"bases must be a tensor\n.*NoneType"),
    "integer bases": (em_attention, {"bases": NODES.T.long()}, r"floating point.*\n"),
    "a bias without a weight": (em_attention, {"bias": FOLDED["bias"]}, "bias without a weight"),
    "a folded convolution that learns": (
        em_attention,
        FOLDED | {"gradient": "full"},
        r"no gradient\n.*'full'\n.*in front of the operator",
    ),
    "weight to other channels": (
        em_attention,
        {"weight": torch.zeros(5, 4)},
        r"weight must be \[4, 4\]\n(.*\n)*.*weight: \[5, 4\]",
    ),
    "weight 3x3": (
        em_attention,
        {"weight": torch.zeros(4, 4, 3, 3)},
        r"weight must be \[4, 4\]\n(.*\n)*.*\[4, 4, 3, 3\]",
    ),
    "weight of fewer channels": (
        em_attention,
        {"weight": torch.zeros(4, 3, 1, 1)},
        r"weight must be \[4, 4\]\n(.*\n)*.*\[4, 3, 1, 1\]",
    ),
    "bias of other channels": (
        em_attention,
        FOLDED | {"bias": torch.zeros(4, 1)},
        r"bias must be \[4\]\n(.*\n)*.*bias: \[4, 1\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    function, changed, message = BAD[name]
    with pytest.raises(
        segkernels.UnsupportedInputError, match=rf"(?s)^{function.__name__}(_conv2d)?: .*{message}"
    ):
        function(**changed)


@pytest.mark.parametrize("double", ["x", "weight", "both"])
def test_autocast_leaves_float64_alone(double: str) -> None:
    """As torch's own convolution: float64 is neither cast nor mixed with what is."""
    with torch.autocast("cpu", torch.bfloat16):
        if double == "both":
            assert depthwise(x=X.double(), weight=W.double()).dtype == torch.float64
            return
        changed = {double: {"x": X, "weight": W}[double].double()}
        with pytest.raises(RuntimeError):
            torch.conv2d(**({"input": X, "weight": W} | _torchs(changed)), groups=4)
        with pytest.raises(segkernels.UnsupportedInputError, match="different types"):
            depthwise(**changed)


def _torchs(changed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input" if name == "x" else name: value for name, value in changed.items()}


@pytest.mark.parametrize("function", [depthwise, separable])
def test_an_empty_batch_works(function: Any) -> None:
    x = X[:0].requires_grad_()
    function(x=x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("stage", ["inner_eps", "outer_eps"])
@pytest.mark.parametrize("backend", fused.BACKENDS)
@pytest.mark.parametrize("x", [X[:0], X[:1, :, :1, :1]], ids=["no value", "one value"])
def test_moments_of_fewer_than_two_values_are_refused(
    x: torch.Tensor, backend: str, stage: str
) -> None:
    """On every backend alike, before anything is computed (or a backend looked for)."""
    with pytest.raises(segkernels.UnsupportedInputError, match="more than 1 value per channel"):
        separable(x=x, backend=backend, **{stage: 1e-5})


def test_meta_tensors_have_shapes() -> None:
    assert separable(
        x=X.to("meta"), depthwise_weight=W.to("meta"), pointwise_weight=V.to("meta")
    ).shape == (2, 3, 6, 5)


def test_a_backend_that_cannot_run_is_refused_with_every_reason() -> None:
    with pytest.raises(segkernels.BackendUnavailableError) as refused:
        depthwise(weight=torch.zeros(4, 1, 9, 9), backend="triton")
    text = str(refused.value)
    assert "backend 'triton' cannot run" in text
    for backend in fused.BACKENDS:
        assert f"\n  {backend}" in text
    assert "9x9 is larger than 7x7" in text
    assert "segkernels doctor" in text


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda device: "it was taken away")
    fused._decide.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_decisions() -> Any:
    yield
    fused._decide.cache_clear()


def test_stepping_down_to_the_reference_warns_once(no_native: None) -> None:
    with pytest.warns(segkernels.SegkernelsPerformanceWarning, match="it was taken away") as caught:
        depthwise()
        depthwise()
    assert len(caught) == 1


def test_strict_makes_it_an_error(no_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGKERNELS_STRICT", "1")
    with pytest.raises(segkernels.BackendUnavailableError, match="STRICT"):
        depthwise()


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGKERNELS_BACKEND", "no-such")
    with pytest.raises(segkernels.UnsupportedInputError, match="no-such"):
        depthwise()
    assert depthwise(backend="reference").shape == X.shape  # the argument comes first


def test_explain_tells_without_computing() -> None:
    table = segkernels.explain(segkernels.depthwise_conv2d, X, torch.zeros(4, 1, 9, 9))
    assert list(table) == list(fused.BACKENDS)
    assert table["reference"] is None
    assert "larger than 7x7" in str(table["native"])
    assert segkernels.explain("separable_conv2d").keys() == table.keys()
    assert segkernels.explain("depthwise_conv2d", backend="native").keys() == table.keys()
    for arguments in ((X, W), ()):
        with pytest.raises(segkernels.UnsupportedInputError, match=r"'foo'\n.*native, triton"):
            segkernels.explain(segkernels.depthwise_conv2d, *arguments, backend="foo")
    for other, name in (("gcu", "gcu"), (torch.nn.ReLU(), "ReLU"), (3, "int")):
        with pytest.raises(segkernels.UnsupportedInputError, match=f"no operator named '{name}'"):
            segkernels.explain(other)  # type: ignore[arg-type]
