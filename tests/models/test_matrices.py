"""Every layer as a matrix: what enters and leaves it is what the layer itself computes, whatever its shape."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from obsprune.core.statistics import Gram
from obsprune.errors import InputError
from obsprune.models import matrices
from obsprune.models.matrices import Matrix, differentiated, exchanged, find_matrices, take_gradients

CONVS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "1x1 stride 2": {"kernel_size": 1, "stride": 2},
    "1x1 padded": {"kernel_size": 1, "padding": 1},
    "3x3": {"kernel_size": 3},
    "3x3 stride 2 padding 1": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x5": {"kernel_size": (3, 5), "padding": (1, 2)},
    "3x5, strides, paddings and dilations": {
        "kernel_size": (3, 5), "stride": (2, 3), "padding": (0, 3), "dilation": (3, 2),
    },
    "patches": {"kernel_size": 4, "stride": 4},
    "same": {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    "valid": {"kernel_size": 3, "padding": "valid", "dilation": 2},
    "2 groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "2 groups 1x1": {"kernel_size": 1, "groups": 2, "stride": (1, 2)},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    "depthwise, two filters each": {"kernel_size": (5, 3), "padding": 2, "groups": 4, "out_channels": 8},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"kernel_size": (5, 3), "padding": (1, 2), "padding_mode": "circular", "groups": 2},
    "circular same": {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
    "no bias": {"kernel_size": 3, "bias": False},
}  # fmt: skip


def conv(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Conv2d, list[Matrix]]:
    """A convolution of 4 channels, random in every weight, and its matrices."""
    torch.manual_seed(0)
    module = nn.Conv2d(**({"in_channels": 4, "out_channels": 6 if options.get("groups") != 4 else 4} | options))
    module.requires_grad_(False).to(dtype)
    return module, find_matrices("conv", module, lambda name: dtype)


def images(count: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: sums of their products are exact in any order."""
    return torch.randint(-4, 5, (count, 4, 11, 14), generator=torch.Generator().manual_seed(1)).to(dtype)


def gram(pieces: list[Tensor], columns: int) -> Gram:
    total = Gram(columns, "conv", torch.device("cpu"))
    for x_TC in pieces:
        total.add(x_TC)
    return total


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_a_product_with_its_patches(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """In bfloat16 the patches are the input's own numbers: the product is compared in float32."""
    module, found = conv(dtype, **CONVS[name])
    x = images(dtype=dtype).to(memory_format=layout)
    expected = deepcopy(module).float()(x.float())
    assert len(found) == module.groups
    for matrix in found:
        (whole,) = matrix.tokens(x)
        assert whole.dtype == dtype and whole.shape[1] == matrix.shape[1]
        outputs = matrix.outputs(expected)
        bias = 0 if module.bias is None else module.bias[matrix.rows].float()
        torch.testing.assert_close(whole.float() @ matrix.read().float().T + bias, outputs, rtol=1e-4, atol=1e-5)
        for size, pieces in ((1, 5), (2, 3)):
            with monkeypatch.context() as patch:
                patch.setattr(matrices, "UNFOLDED_BYTES", size * 4 * whole.numel() // 5)
                parts = list(matrix.tokens(x))
            assert len(parts) == pieces
            assert torch.equal(torch.cat(parts), whole)
            one, several = gram([whole], whole.shape[1]), gram(parts, whole.shape[1])
            assert one.count == several.count == len(whole)
            assert torch.equal(several.H_CC, one.H_CC)


@pytest.mark.parametrize("name", [name for name, options in CONVS.items() if "padding_mode" not in options])
def test_patches_are_those_of_unfold(name: str) -> None:
    module, found = conv(**CONVS[name])
    x, (height, width) = images(), module.kernel_size
    left, right, top, bottom = module._reversed_padding_repeated_twice
    padded = functional.pad(x, (left, right, top, bottom))
    patches = functional.unfold(padded, module.kernel_size, module.dilation, 0, module.stride).transpose(1, 2)
    each = module.in_channels // module.groups * height * width
    for group, matrix in enumerate(found):
        ours = torch.cat(list(matrix.tokens(x)))
        assert torch.equal(ours, patches[..., group * each : (group + 1) * each].reshape(-1, each))


def test_an_image_larger_than_the_bound_is_a_piece_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (matrix,) = conv(kernel_size=3)
    monkeypatch.setattr(matrices, "UNFOLDED_BYTES", 1)
    assert [len(part) for part in matrix.tokens(images(3))] == [9 * 12] * 3


@pytest.mark.parametrize("name", ["3x5", "2 groups", "depthwise, two filters each"])
def test_reading_and_writing(name: str) -> None:
    module, found = conv(**CONVS[name])
    before, each = module.weight.clone(), module.out_channels // module.groups
    for group, matrix in enumerate(found):
        assert matrix.shape == (each, before[0].numel())
        weight = matrix.read().clone()  # it may be a view
        assert weight.shape == matrix.shape
        matrix.write(weight)
        assert torch.equal(module.weight, before)
        matrix.write(weight + 1)
        changed = (module.weight != before).flatten(1).all(1)
        assert changed.tolist() == [row // each == group for row in range(module.out_channels)]
        assert torch.equal(module.weight[~changed], before[~changed])
        assert torch.equal(matrix.read(), weight + 1)
        matrix.write(weight)


def test_reading_gives_the_stored_dtype_and_writing_keeps_the_computed_one() -> None:
    module, _ = conv(torch.bfloat16, kernel_size=3)
    (matrix,) = find_matrices("conv", module, lambda name: torch.float32)
    weight = matrix.read()
    assert weight.dtype == torch.float32 and torch.equal(weight, module.weight.flatten(1).float())
    matrix.write(weight + 2**-12)
    assert module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["3x3 stride 2 padding 1", "2 groups", "depthwise"])
def test_the_gradient_is_that_of_autograd(name: str) -> None:
    module, found = conv(**CONVS[name])
    x = images()
    with differentiated([module.weight]):
        (module(x).tanh() ** 2).sum().backward()
        gradients = dict(take_gradients(found))
        assert module.weight.grad is None
    weight = module.weight.clone().requires_grad_()
    own = functional.conv2d(x, weight, module.bias, module.stride, module.padding, module.dilation, module.groups)
    (expected,) = torch.autograd.grad((own.tanh() ** 2).sum(), weight)
    assert torch.equal(torch.cat([gradients[matrix] for matrix in found]), expected.flatten(1))
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_no_gradient_is_an_error_with_the_layers_name() -> None:
    _, found = conv(kernel_size=3, groups=2)
    with pytest.raises(InputError, match=r"no gradient reaches conv\[1\]; leave it dense with --skip 'conv'"):
        found[1].gradient()


def test_geometry_keeps_apart_what_looks_differently_at_one_input() -> None:
    looks = [
        {"kernel_size": 1}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 3}, {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same"}, {"kernel_size": 3, "dilation": 2}, {"kernel_size": (3, 1)},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, {"kernel_size": 3, "groups": 2},
        {"kernel_size": 3, "groups": 4},
    ]  # fmt: skip
    seen = [matrix.geometry for options in looks for matrix in conv(**options)[1]]
    assert len(set(seen)) == len(seen) == 8 + 2 + 4
    assert conv(kernel_size=3)[1][0].geometry == conv(kernel_size=(3, 3), out_channels=9, bias=False)[1][0].geometry
    linear = find_matrices("linear", nn.Linear(4, 3), lambda name: torch.float32)[0]
    assert linear.geometry is None


def test_names_and_the_depthwise_flag() -> None:
    expected = {1: (["conv"], False), 2: (["conv[0]", "conv[1]"], False), 4: ([f"conv[{i}]" for i in range(4)], True)}
    for groups, (names, depthwise) in expected.items():
        _, found = conv(kernel_size=3, groups=groups)
        assert [matrix.name for matrix in found] == names
        assert {matrix.layer for matrix in found} == {"conv"}
        assert {matrix.parameter for matrix in found} == {"conv.weight"}
        assert {matrix.depthwise for matrix in found} == {depthwise}
    (single,) = find_matrices("conv", nn.Conv2d(1, 3, 3), lambda name: torch.float32)
    assert not single.depthwise  # one grey channel: every filter sees all there is


@pytest.mark.parametrize("module", [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), Conv1D(3, 5)])
def test_linear_layers(module: Any) -> None:
    module.requires_grad_(False)
    (matrix,) = find_matrices("layer", module, lambda name: torch.float32)
    x = torch.randn(2, 7, 5)
    (x_TC,) = matrix.tokens(x)
    assert matrix.name == matrix.layer == "layer" and matrix.shape == (3, 5) and x_TC.shape == (14, 5)
    bias = 0 if matrix.bias is None else matrix.bias
    torch.testing.assert_close(x_TC @ matrix.read().T + bias, matrix.outputs(module(x)))
    with differentiated([module.weight]):
        module(x).square().sum().backward()
        ((_, gradient),) = take_gradients([matrix])
    error_TR = 2 * matrix.outputs(module(x))
    torch.testing.assert_close(gradient, error_TR.T @ x_TC, rtol=1e-4, atol=1e-4)
    matrix.write(matrix.read() * 2)
    torch.testing.assert_close(matrix.outputs(module(x)), 2 * x_TC @ (matrix.read() / 2).T + bias)
    assert matrix.rows == slice(None) and matrix.geometry is None and not matrix.depthwise


def test_layers_are_found_in_module_order_and_nothing_else() -> None:
    block = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Linear(4, 4)),
            "b": nn.ConvTranspose2d(4, 4, 3),
            "c": nn.Conv1d(4, 4, 3),
            "d": Conv1D(4, 4),
            "e": nn.Embedding(4, 4),
        }
    )
    asked: list[str] = []
    found = find_matrices("block", block, lambda name: asked.append(name) or torch.float16)
    assert [matrix.name for matrix in found] == ["block.a.0[0]", "block.a.0[1]", "block.a.2", "block.d"]
    assert {matrix.stored for matrix in found} == {torch.float16}
    assert asked == ["block.a.0.weight", "block.a.2.weight", "block.d.weight"]


def test_a_convolution_that_changes_its_weight_on_the_way_is_left_out() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    class Renamed(nn.Conv2d):
        pass

    block = nn.ModuleDict({"a": Standardised(4, 4, 3), "b": Renamed(4, 4, 3)})
    assert [matrix.name for matrix in find_matrices("block", block, lambda name: torch.float32)] == ["block.b"]


def test_observers_see_inputs_by_place_and_by_name_until_they_are_closed() -> None:
    module, found = conv(kernel_size=3, groups=2)
    seen: list[tuple[str, Tensor]] = []
    x = images()
    with matrices.observed(found, lambda matrix, inputs: seen.append((matrix.name, inputs))):
        module(x)
        module(input=x)
    module(x)
    assert [name for name, _ in seen] == ["conv[0]", "conv[1]"] * 2
    assert all(inputs is x for _, inputs in seen)


def test_exchanged_weights_come_back() -> None:
    module, (matrix,) = conv(kernel_size=3)
    before, x = module(images()), images()
    with pytest.raises(RuntimeError, match="inside"), exchanged({module.weight: torch.zeros_like(module.weight)}):
        assert torch.equal(module(x), module.bias[None, :, None, None].expand_as(before))
        assert not matrix.read().any()
        raise RuntimeError("inside")
    assert torch.equal(module(x), before)
