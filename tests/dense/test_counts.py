"""The published tables' parameters and operations, to the last digit they print."""

import pytest
import torch

from l2vit.dense.count import count_detector, count_segmentor
from l2vit.dense.detectors import mask_rcnn, retinanet
from l2vit.dense.levels import make_levels
from l2vit.dense.segmentor import Segmentor

NAMES = ("l2vit_tiny", "l2vit_small", "l2vit_base")
BACKBONE = (27_826_245, 49_428_621, 87_550_140)

# model: (parameters, products, with norms, the paper's M and G) for T, S, B
DETECTORS = {
    "retinanet": (
        (38_767_033, 249.694, 250.236, 39, 250),
        (60_369_409, 339.933, 340.724, 60, 341),
        (99_196_336, 483.345, 484.400, 99, 484),
    ),
    "mask_rcnn": (
        (48_107_386, 268.644, 269.217, 48, 269),
        (69_709_762, 358.883, 359.705, 70, 360),
        (107_955_121, 502.666, 503.762, 108, 504),
    ),
}
# parameters, products, attention's, products - attention + conv biases, the paper's M and G
SEGMENTOR = (
    (60_250_289, 945.932, 2.597, 943.444, 60, 943),
    (81_852_665, 1037.727, 4.261, 1033.622, 82, 1034),
    (122_088_680, 1187.017, 5.682, 1181.540, 122, 1182),
)
CONV_BIASES = (0.109, 0.156, 0.205)


def sums(count, key):
    return sum(part[key] for part in count.parts.values())


def giga(operations):
    return round(operations / 1e9, 3)


def detector(head, name):
    with torch.device("meta"):
        if head == "retinanet":
            return retinanet(make_levels(name, stages=(1, 2, 3)), classes=80)
        return mask_rcnn(make_levels(name, stages=(0, 1, 2, 3)), classes=80)


@pytest.mark.parametrize("head", DETECTORS)
@pytest.mark.parametrize("size", range(3), ids=NAMES)
def test_detectors_are_the_published_ones(head, size):
    parameters, products, with_norms, paper_m, paper_g = DETECTORS[head][size]
    count = count_detector(detector(head, NAMES[size]))
    assert count.parameters == parameters == sums(count, "parameters")
    assert (giga(sums(count, "products")), giga(count.multiply_adds)) == (products, with_norms)
    assert round(count.parameters / 1e6) == paper_m
    assert round(count.multiply_adds / 1e9) == paper_g
    norms = {"retinanet": 2 * (2 + 4 + 8), "mask_rcnn": 2 * (1 + 2 + 4 + 8)}[head]
    width = {"l2vit_base": 128}.get(NAMES[size], 96)
    assert count.parts["backbone"]["parameters"] == BACKBONE[size] + norms * width


@pytest.mark.parametrize("size", range(3), ids=NAMES)
def test_segmentors_are_the_published_ones(size):
    """Table 5 counts no products of the attention itself, but the biases of convolutions.

    Only so do all three printed figures come out; Table 4 counts the attention.
    """
    parameters, products, attention, published, paper_m, paper_g = SEGMENTOR[size]
    with torch.device("meta"):
        levels = make_levels(NAMES[size], stages=(0, 1, 2, 3), norms=False)
        count = count_segmentor(Segmentor(levels, classes=150))
    assert count.parameters == parameters == sums(count, "parameters")
    found = (giga(sums(count, key)) for key in ("products", "attention", "conv_biases"))
    assert tuple(found) == (products, attention, CONV_BIASES[size])
    assert giga(count.multiply_adds) == published
    assert round(count.multiply_adds / 1e9) == paper_g
    assert round(count.parameters / 1e6) == paper_m


def test_parts_are_the_specified_ones():
    parts = {
        head: {name: part["parameters"] for name, part in counted.parts.items()}
        for head in DETECTORS
        for counted in [count_detector(detector(head, "l2vit_tiny"))]
    }
    assert parts["retinanet"]["fpn"] == 4_474_880
    assert parts["retinanet"]["head"] == 6_463_220
    assert parts["mask_rcnn"]["fpn"] == 2_729_984
    assert parts["mask_rcnn"]["rpn"] == 593_935
    assert parts["mask_rcnn"]["box_head"] + parts["mask_rcnn"]["mask_head"] == 16_954_342


def test_other_classes_give_other_counts():
    """91 classes, as torchvision's detectors have, would not be the published 60 M."""
    with torch.device("meta"):
        model = retinanet(make_levels("l2vit_small", stages=(1, 2, 3)), classes=91)
    assert round(count_detector(model).parameters / 1e6) == 61
