"""Networks: backbones, one Segmenter, one short file a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from segkernels.networks.deeplabv3plus import deeplabv3plus
from segkernels.networks.emanet import emanet
from segkernels.networks.encnet import encnet
from segkernels.networks.gcunet import gcunet
from segkernels.networks.segmenter import Logits as Logits
from segkernels.networks.segmenter import Segmenter as Segmenter
from segkernels.networks.segmenter import Weighted as Weighted

NETWORKS: dict[str, Callable[..., Segmenter]] = {
    "deeplabv3plus": deeplabv3plus,
    "emanet": emanet,
    "encnet": encnet,
    "gcunet": gcunet,
}


def build(name: str, num_classes: int, **options: Any) -> Segmenter:
    """A network by name: ``build("deeplabv3plus", num_classes=21, backbone="resnet50")``.

    The options are those of the function of that name, of its head, and what every network can be
    told (:func:`segkernels.networks.segmenter.assemble`: backbone, weights, auxiliary head, norm,
    …); unknown ones raise TypeError, an unknown name ValueError.
    """
    if name not in list(NETWORKS):  # which takes a name of any kind
        raise ValueError(
            f"no such network\n  name: {name!r}\n  known: {', '.join(sorted(NETWORKS))}"
        )
    return NETWORKS[name](num_classes, **options)
