"""Metrics: the definitions on small matrices, and the numbers of eight published implementations.

`tests/golden/metrics.json` holds every published case; `python -m tests.test_metrics` writes it
anew from the full golden folder, where that is found beside the checkout.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from segkernels.metrics import confusion_matrix, scores

COMMITTED = Path(__file__).parent / "golden" / "metrics.json"
FULL = Path(__file__).resolve().parents[2] / "shared" / "golden"

CASES: dict[str, dict[str, Any]] = json.loads(COMMITTED.read_text())
CLASSES_ARGUMENT = ("n_class", "num_class", "num_classes", "nclass", "n_classes", "K", "numClass")

# What each implementation does about absent classes, as options of `scores`.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "torchfcn": {},
    "jfzhang95": {},
    "vainf": {},
    "mmseg": {},
    "kazuto1011": {"absent": "unlabelled"},
    "hszhao": {"absent": "zero", "epsilon": 1e-10},
    "encoding": {"absent": "zero", "epsilon": 2.0**-52},
    "csail": {"absent": "zero", "epsilon": 1e-10},
}
NAMES = {
    "pixel_acc": "pixel_accuracy",
    "mean_acc": "mean_accuracy",
    "fw_iou": "frequency_weighted_iou",
}
NAMES |= {
    "all_acc": "pixel_accuracy",
    "aAcc": "pixel_accuracy",
    "Acc": "class_accuracy",
    "IoU": "class_iou",
}
NAMES |= {"class_acc": "class_accuracy"}


def expected(n: Tensor, images: list[Tensor], repository: str) -> dict[str, Any]:
    """All that published code returns, by its names, from the confusion matrices."""
    options = CONVENTIONS[repository]
    result = scores(n, **options)
    t, p, correct = n.sum(1), n.sum(0), n.diag()
    values = {**result._asdict(), **{short: getattr(result, long) for short, long in NAMES.items()}}
    values |= {
        "hist": n,
        "confusion": n,
        "intersection": correct,
        "union": t + p - correct,
        "target": t,
    }
    values |= {"labeled": n.sum(), "correct": correct.sum()}
    values |= {"valid_pixels": torch.stack([i.sum() for i in images])}
    values |= {
        "accuracy": torch.tensor(
            [scores(i, **options).pixel_accuracy for i in images], dtype=torch.float64
        )
    }
    values |= {
        "area_intersect": correct,
        "area_union": t + p - correct,
        "area_label": t,
        "area_pred": p,
    }
    dice, recall, precision = 2 * correct / (t + p), correct / t, correct / p
    harmonic = 2 * precision * recall / (precision + recall)  # NaN where both are 0
    values |= {"Dice": dice, "Fscore": harmonic, "Recall": recall, "Precision": precision}
    for short, value in (("aAcc", result.pixel_accuracy), ("mAcc", result.mean_accuracy)):
        values[f"summary_{short}"] = round(100 * value, 2)
    values["summary_mIoU"] = round(100 * result.mean_iou, 2)
    values["summary_mDice"] = round(100 * float(dice.nanmean()), 2)
    values["summary_mFscore"] = round(100 * float(harmonic.nanmean()), 2)
    return values


@pytest.mark.parametrize("name", CASES)
def test_published_numbers(name: str) -> None:
    case = CASES[name]
    _, repository, _ = name.split(".")
    classes = case["classes"]
    pairs = zip(case["prediction"], case["target"], strict=True)
    images = [confusion_matrix(torch.tensor(p), torch.tensor(t), classes) for p, t in pairs]
    values = expected(sum(images[1:], images[0]), images, repository)
    tolerance = 1e-6 if repository == "mmseg" else 1e-12  # mmseg computes in float32
    for output, value in case["output"].items():
        got = torch.as_tensor(values[output], dtype=torch.float64)
        want = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=0, equal_nan=True, msg=f"{name}: {output}: {got} {want}"
        )


def test_every_convention_is_in_the_golden_cases() -> None:
    assert {name.split(".")[1] for name in CASES} == set(CONVENTIONS)


@pytest.mark.skipif(
    not (FULL / "manifest.json").exists(), reason="the full golden folder is not here"
)
def test_the_committed_cases_are_the_published_ones() -> None:
    assert json.dumps(_published()) == json.dumps(CASES)


def test_by_hand() -> None:
    target = torch.tensor([[0, 0, 1], [1, 2, 255]])
    prediction = torch.tensor([[0, 1, 1], [1, 0, 2]])
    n = confusion_matrix(prediction, target, 4)
    assert n.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    s = scores(n)
    assert s.pixel_accuracy == 3 / 5
    assert s.mean_accuracy == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert s.class_iou[:3].tolist() == pytest.approx([1 / 3, 2 / 3, 0]) and s.class_iou[3].isnan()
    assert s.mean_iou == pytest.approx(1 / 3)
    assert scores(n, absent="zero").mean_iou == pytest.approx(1 / 4)
    assert s.frequency_weighted_iou == pytest.approx((2 / 3 + 4 / 3 + 0) / 5)


def test_a_class_that_is_only_predicted() -> None:
    n = confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 2)
    assert scores(n).mean_iou == 0.25
    assert scores(n, absent="unlabelled").mean_iou == 0.5
    assert scores(n).mean_accuracy == 0.5


@pytest.mark.parametrize("absent", ["skip", "zero", "unlabelled"])
def test_batches_add_up(absent: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    target, prediction = torch.randint(0, 5, (2, 6, 7, 9), generator=generator)
    whole = confusion_matrix(prediction, target, 5)
    parts = sum(confusion_matrix(p, t, 5) for p, t in zip(prediction, target, strict=True))
    assert torch.equal(whole, parts)
    assert whole.sum() == target.numel() and whole.dtype == torch.int64
    assert 0 < scores(whole, absent).mean_iou < 1
    assert scores(confusion_matrix(target, target, 5), absent).mean_iou == 1


def test_ignored_pixels_count_nowhere() -> None:
    target = torch.tensor([0, 1, 255, -1, 7])
    prediction = torch.tensor(
        [0, 0, 99, 1, 1]
    )  # what is predicted at an ignored pixel may be anything
    assert confusion_matrix(prediction, target, 2).tolist() == [[1, 0], [1, 0]]
    assert confusion_matrix(prediction, target, 2, ignore_index=1).tolist() == [[1, 0], [0, 0]]
    assert confusion_matrix(prediction[:2], target[:2], 2, ignore_index=None).sum() == 2


def test_nothing_to_measure() -> None:
    empty = confusion_matrix(
        torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3, dtype=torch.uint8), 3
    )
    assert empty.shape == (3, 3) and not empty.any()
    assert math.isnan(scores(empty).mean_iou) and math.isnan(scores(empty).pixel_accuracy)
    assert scores(empty, absent="zero").mean_iou == 0


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), "argmax"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), r"\[2, 3\]"),
        (torch.tensor([5]), torch.tensor([0]), "found 5 to 5"),
        (torch.tensor([-1]), torch.tensor([0]), "found -1"),
    ],
)
def test_bad_input(prediction: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_matrix(prediction, target, 5)


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="absent"):
        scores(torch.eye(2), absent="nan")  # type: ignore[arg-type]


def _published() -> dict[str, dict[str, Any]]:
    """The cases of the full golden folder as plain lists."""
    from safetensors.torch import load_file

    manifest = json.loads((FULL / "manifest.json").read_text())
    cases = {}
    for name, case in sorted(manifest["cases"].items()):
        if case["family"] != "metrics":
            continue
        tensors = load_file(FULL / case["file"])
        number = range(sum(key.startswith("input.gt.") for key in tensors))
        cases[name] = {
            "classes": next(case["ctor"][a] for a in CLASSES_ARGUMENT if a in case["ctor"]),
            "target": [tensors[f"input.gt.{i}"].tolist() for i in number],
            "prediction": [tensors[f"input.pred.{i}"].tolist() for i in number],
            "output": {
                key.removeprefix("output."): t.tolist()
                for key, t in sorted(tensors.items())
                if key.startswith("output.")
            },
        }
    return cases


if __name__ == "__main__":
    COMMITTED.write_text(
        "{\n"
        + ",\n".join(f"{json.dumps(n)}: {json.dumps(c)}" for n, c in _published().items())
        + "\n}\n"
    )
