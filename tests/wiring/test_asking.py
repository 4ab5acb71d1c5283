"""Putting inputs to a program: many at once, a few at a time where it is bound, and with no weights but its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightspace as ws
from weightspace.errors import WiringError
from weightspace.wiring.asking import ask, complete, told
from weightspace.wiring.program import Program


def _program(run: Any, count: int = 3) -> Program:
    return Program({"w": torch.randn(4, 2)}, run, (torch.randn(count, 4),), origin="test")


def _inputs(total: int) -> Tensor:
    return torch.arange(4.0 * total).view(total, 4)


def _free(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x @ tensors["w"]


def _refuses_others(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x.view(3, 4) @ tensors["w"]


def _merges_all(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return (x @ tensors["w"]).view(3, -1)


def _several_rows(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return (x.view(3, 4) @ tensors["w"]).view(6, 1)


@pytest.mark.parametrize("run", [_free, _refuses_others, _merges_all])
@pytest.mark.parametrize("total", [3, 7, 12])
def test_a_program_bound_to_its_number_of_examples_answers_the_same(run: Any, total: int) -> None:
    program = _program(run)
    found = ask(program, program.tensors, total, lambda x: _inputs(total), torch.float64)
    expected = _inputs(total).double() @ program.tensors["w"].double()
    assert torch.equal(found, expected)


def test_several_rows_to_an_example_stay_together() -> None:
    program = _program(_several_rows)
    found = ask(program, program.tensors, 5, lambda x: _inputs(5), torch.float64)
    assert torch.equal(found.view(5, 2), _inputs(5).double() @ program.tensors["w"].double())


def test_fewer_questions_than_a_program_takes_at_once_are_refused() -> None:
    program = _program(_refuses_others)
    with pytest.raises(WiringError, match="takes 3 inputs at a time"):
        ask(program, program.tensors, 2, lambda x: _inputs(2), torch.float64)


@pytest.mark.parametrize("width", [2, 3, 7, 21])
def test_answers_that_are_of_all_inputs_together_are_refused(width: int) -> None:
    """However many rows there are: as many as inputs, or as many as are asked."""
    summed = Program({"w": torch.randn(4, width)}, lambda tensors, x: (x @ tensors["w"]).sum(0), (torch.randn(3, 4),))
    with pytest.raises(WiringError, match=r"cannot be told apart|3 inputs got"):
        ask(summed, summed.tensors, 7, lambda x: _inputs(7), torch.float64)


def test_what_does_not_answer_each_is_refused() -> None:
    summed = _program(lambda tensors, x: (x @ tensors["w"]).sum(0))
    with pytest.raises(WiringError, match="3 inputs got 2 answers"):
        ask(summed, summed.tensors, 7, lambda x: _inputs(7), torch.float64)
    broken = _program(lambda tensors, x: x @ tensors["w"].T)
    with pytest.raises(WiringError, match="does not run on other inputs"):
        ask(broken, broken.tensors, 7, lambda x: _inputs(7), torch.float64)


def test_masks_are_repeated_and_other_arguments_stay() -> None:
    seen = []

    def run(tensors: Mapping[str, Tensor], x: Tensor, mask: Tensor, table: Tensor, flag: bool) -> Tensor:
        seen.append((mask.shape[0], table.shape[0], flag))
        return (x * mask) @ tensors["w"] @ table

    mask, table = torch.tensor([[True], [False], [True]]), torch.randn(2, 2)
    program = Program({"w": torch.randn(4, 2)}, run, (torch.randn(3, 4), mask, table, True))
    found = ask(program, program.tensors, 4, lambda x: _inputs(4), torch.float32)
    assert seen[-1] == (4, 2, True)
    assert torch.equal(found[1], torch.zeros(2))


def test_only_counters_are_the_example_s() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    wiring = ws.wiring(network, torch.randn(2, 1, 8, 8))
    state = {n: t + 1 for n, t in network.state_dict().items()}
    held = complete(wiring, {n: t for n, t in state.items() if "batches" not in n})
    assert all(held[n] is state[n] for n in state if "batches" not in n)
    with pytest.raises(WiringError, match=r"'1\.running_var', which is not among the 8 given"):
        complete(wiring, {n: t for n, t in state.items() if n != "1.running_var"})


def test_a_tied_weight_is_found_under_its_other_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.output.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            found: Tensor = self.output(self.embedding(tokens).relu())
            return found

    wiring = ws.wiring(Tied(), torch.arange(6).view(2, 3))
    own = torch.randn(7, 4)
    held = complete(wiring, {"embedding.weight": own})
    assert held["output.weight"] is own


def test_told_are_differences_between_classes() -> None:
    out = torch.randn(6, 5)
    table = told(out, 3, 64, 256)
    assert table.shape == (3, 2, 5)
    assert torch.allclose(table.sum(2), torch.zeros(3, 2, dtype=torch.float64), atol=1e-6)
    assert told(torch.full((4, 1), torch.inf), 4, 64, 256).tolist() == [[[1e6]]] * 4
    assert told(torch.randn(4, 300, 1000), 4, 64, 256).shape == (4, 60, 250)
