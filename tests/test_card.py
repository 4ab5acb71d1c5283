from __future__ import annotations

import json

import torch

from weightspace.card import architecture, oddities, record_of


def test_oddities_are_named() -> None:
    tensors = {
        "w": torch.randn(4, 3),
        "copy": torch.empty(0),
        "nan": torch.tensor([1.0, float("nan"), float("inf")]),
        "dead": torch.randn(5, 4, 3, 3),
        "flat": torch.full((3, 3), 0.5),
        "ones": torch.ones(4),
        "count": torch.tensor([0, 0, 0]),
    }
    tensors["copy"] = tensors["w"].clone()
    tensors["dead"][1] = 0
    tensors["dead"][:, [0, 2]] = 0
    found = oddities(tensors)
    assert found == [
        "nan: 1 NaN and 1 infinite of 3 values",
        "dead: 1 of 5 slices along dimension 0 are all zero",
        "dead: 2 of 4 slices along dimension 1 are all zero",
        "flat: constant, every value is 0.5",
        "w = copy: the same values",
    ]


def test_half_precision_is_read_too() -> None:
    assert oddities({"w": torch.randn(3, 3).bfloat16(), "s": torch.randn(8).half()[::2]}) == []


def test_architecture_falls_back_to_shapes() -> None:
    shapes = {"a": (3, 3), "b": (3,), "c": (2, 2, 3, 3), "d": (3, 4)}
    assert architecture(shapes, "not recognised", None) == "1 2-d kernel, 2 matrices, 1 vector"
    assert architecture(shapes, "catalogue:resnet", None) == "resnet"
    assert architecture(shapes, "catalogue:resnet", None, ("recognised as ResNet-18",)) == "ResNet-18"
    assert architecture(shapes, "catalogue:resnet", {"architectures": ["BertModel"]}) == "BertModel"


def test_a_record_is_json_in_the_metadata() -> None:
    assert record_of({"weightspace": json.dumps({"seed": 1})}) == {"seed": 1}
    assert record_of({"weightspace": "not json"}) == record_of({}) == {}
