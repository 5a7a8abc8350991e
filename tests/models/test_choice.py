"""Tables of forms: what operations take with one, without one, and under the compiler."""

import pytest
import torch

from l2vit.models import ops
from l2vit.models.ops import choice


@pytest.fixture
def table():
    """A setter, undone at the end."""
    yield choice.use_table
    choice.use_table(None)


@pytest.fixture
def used(monkeypatch):
    """The forms of depthwise convolution that ran."""
    names = []

    def noting(name, compute):
        def form(*inputs):
            names.append(name)
            return compute(*inputs)

        return form

    forms = {name: noting(name, f) for name, f in ops.FORMS["depthwise_conv"].items()}
    monkeypatch.setitem(ops.FORMS, "depthwise_conv", forms)
    return names


def inputs(size=8):
    torch.manual_seed(0)
    x = torch.randn(2, 4, size, size, requires_grad=True)
    return x, torch.randn(4, 1, 7, 7, requires_grad=True), None


def test_calls_are_recorded_and_take_the_reference(used):
    with choice.recorded_calls() as calls:
        for size in (8, 8, 9):
            ops.depthwise_conv(*inputs(size))
        ops.window_attention(torch.randn(1, 14, 14, 96), 1, 7)
        ops.linear_attention(torch.randn(1, 5, 40, 96), None, 1, 1.0)
    assert used == ["reference"] * 3
    assert list(calls) == [
        "depthwise_conv 2x4x8x8 7,0 float32",
        "depthwise_conv 2x4x9x9 7,0 float32",
        "window_attention 1x14x14x96 1,7 float32",
        "linear_attention 1x200x96 1,0 float32",
    ]


def test_a_table_decides_and_what_it_lacks_takes_the_reference(used, table):
    ops.depthwise_conv(*inputs())
    table({"depthwise_conv 2x4x8x8 7,0 float32": "columns"})
    ops.depthwise_conv(*inputs())
    ops.depthwise_conv(*inputs(9))
    table({})
    ops.depthwise_conv(*inputs())
    table(None)
    ops.depthwise_conv(*inputs())
    assert used == ["columns", "columns", "reference", "reference", "columns"]


def test_a_form_that_cannot_run_here_gives_way(used, table):
    table({"depthwise_conv 2x4x8x8 7,0 float32": "triton"})
    ops.depthwise_conv(*inputs())
    table({"depthwise_conv 2x4x8x8 7,0 float32": "columns"})
    with torch.no_grad():  # columns are for backward passes
        ops.depthwise_conv(*inputs())
    assert used == ["reference"] * 2


def test_the_compiler_keeps_the_answer_in_one_graph(table):
    torch.compiler.reset()
    x, weight, _ = inputs()
    table({"depthwise_conv 2x4x8x8 7,0 float32": "columns"})
    compiled = torch.compile(ops.depthwise_conv, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(
        compiled(x, weight, None), torch.nn.functional.conv2d(x, weight, padding=3, groups=4)
    )
