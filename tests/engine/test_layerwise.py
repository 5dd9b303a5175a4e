"""What is measured at a block, and who shares it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO, Zoo, reference, token_batches

from obsprune.core.linalg import LOSS_COLUMNS, layer_loss
from obsprune.core.patterns import NofM, Unstructured
from obsprune.core.statistics import Gram
from obsprune.engine.dealing import Deal
from obsprune.engine.inputs import measure, shared_inputs
from obsprune.engine.layerwise import Projection, prune_blocks, solve
from obsprune.engine.rundir import RunDir
from obsprune.engine.streams import Measured, OneStream, Point, Stage
from obsprune.errors import InputError
from obsprune.models.load import load
from obsprune.models.matrices import LinearMatrix, Matrix
from obsprune.models.walk import Stop, Walk
from obsprune.progress import Silent
from obsprune.ranks import ALONE
from obsprune.solvers import build


def hooked_grams(model: Any, batches: list[dict[str, Tensor]], names: list[str]) -> dict[str, Tensor]:
    """Σ xxᵀ in float64 by plain forward hooks, in order of the first call."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon-parallel"])
def test_grams_of_the_dense_model(zoo: Zoo, family: str) -> None:
    batches = token_batches(3)
    model = load(str(zoo(family)))
    expected = hooked_grams(reference(zoo(family)), batches, ZOO[family].matrices)
    with Walk(model.network, [block.module for block in model.blocks], batches) as walk:
        for stop in walk:
            block = model.blocks[stop.index]
            with block.loaded(model.device):
                for gram, group in measure(stop, shared_inputs(stop, block.matrices), ALONE):
                    assert gram.count == 3 * 2 * 24
                    for matrix in group:
                        torch.testing.assert_close(gram.H_CC.double(), expected.pop(matrix.name), rtol=1e-5, atol=1e-4)
                stop.hand_on()
    assert not expected  # every matrix was measured once


def sparse_by_hand(
    directory: Path, batches: list[dict[str, Tensor]], blocks: list[list[list[str]]]
) -> dict[str, Tensor]:
    """SparseGPT on a plain model: for each part of each block, measure in the model as it is by now, then overwrite."""
    model, solver, pattern = reference(directory), build("sparsegpt", {}), Unstructured(0.5)
    answers: dict[str, Tensor] = {}
    for parts in blocks:
        for names in parts:
            for name, H_CC in hooked_grams(model, batches, names).items():
                weight = model.get_submodule(name).weight
                state = solver.prepare(Gram.of(H_CC.float(), 1, name))
                answers[f"{name}.weight"] = solver.solve(weight.detach(), state, pattern).weight
            for name in names:
                model.get_submodule(name).weight.data.copy_(answers[f"{name}.weight"])
    return answers


def sparse_by_engine(
    directory: Path, batches: list[dict[str, Tensor]], output: Path, true_sequential: bool
) -> dict[str, Tensor]:
    model, run = load(str(directory)), RunDir.open(output, directory)
    run.start({}, {}, [block.name for block in model.blocks], 0)
    patterns = {matrix.name: Unstructured(0.5) for matrix in model.matrices}
    prune_blocks(
        model, OneStream(batches, true_sequential), Projection(build("sparsegpt", {}), patterns), run, Silent()
    )
    answers: dict[str, Tensor] = {}
    for path in output.glob("*.safetensors"):
        answers |= load_file(path)
    return {matrix.parameter: answers[matrix.parameter] for matrix in model.matrices}


PARTS = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
         ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The share of weights whose values differ by more than rounding."""
    assert one.keys() == other.keys()
    differ = sum(int(((one[key] - other[key]).abs() > 1e-3).sum()) for key in one)
    return differ / sum(tensor.numel() for tensor in one.values())


def test_pruned_blocks_are_measured_and_handed_on_as_by_hand(zoo: Zoo, tmp_path: Path) -> None:
    batches = token_batches(8)
    blocks = [[[f"model.layers.{index}.{name}" for name in part] for part in PARTS] for index in range(3)]
    one_pass = [[[name for part in parts for name in part]] for parts in blocks]
    by_hand = [sparse_by_hand(zoo("llama"), batches, order) for order in (one_pass, blocks)]
    by_engine = [
        sparse_by_engine(zoo("llama"), batches, tmp_path / str(sequential), sequential) for sequential in (False, True)
    ]
    assert apart(by_hand[0], by_hand[1]) > 0.05  # the two ways are not the same
    for ours, theirs in zip(by_engine, by_hand, strict=True):
        assert apart(ours, theirs) < 0.002  # near-ties: the sums here are float64


SHARING = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "phi": [{"q_proj", "k_proj", "v_proj", "fc1"}, {"dense"}, {"fc2"}],
    "gpt2": [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}],
    "falcon-parallel": [{"query_key_value", "dense_h_to_4h"}, {"dense"}, {"dense_4h_to_h"}],
}


@pytest.mark.parametrize("family", SHARING)
def test_who_shares_an_input(zoo: Zoo, family: str) -> None:
    model = load(str(zoo(family)))
    block = model.blocks[0]
    with Walk(model.network, [block.module for block in model.blocks], token_batches(1)) as walk:
        stop = next(iter(walk))
        with block.loaded(model.device):
            groups = [
                {matrix.name.rpartition(".")[2] for matrix in group} for group in shared_inputs(stop, block.matrices)
            ]
    assert groups == SHARING[family]


class Fickle(nn.Module):
    """Two linear layers: on even batches they share their input, on odd ones they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, even: bool) -> Tensor:
        return torch.add(self.a(x), self.b(x if even else 2 * x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Fickle()

    def forward(self, x: Tensor, even: bool) -> Any:
        return self.block(x, even)


def matrices(model: Model, *names: str) -> list[Matrix]:
    return [LinearMatrix(name, getattr(model.block, name), torch.float32) for name in names]


def toy_stop(model: Model) -> Iterator[Stop]:
    torch.manual_seed(0)
    batches: list[Any] = [{"x": torch.randn(6, 4), "even": even} for even in (True, False, True)]
    with Walk(model, [model.block], batches) as walk:
        yield next(iter(walk))


def test_sharing_that_breaks_later_is_measured_apart() -> None:
    model = Model()
    for stop in toy_stop(model):
        found = matrices(model, "a", "b")
        groups = shared_inputs(stop, found)
        assert groups == [found]  # on the first batch it looks shared
        (of_a, _), (of_b, _) = measure(stop, groups, ALONE)
        inputs = [call[1][0] if call[1] else call[2]["x"] for call in stop._walk.calls.values()]
        x = torch.cat([inputs[0], inputs[1], inputs[2]])
        y = torch.cat([inputs[0], 2 * inputs[1], inputs[2]])
        torch.testing.assert_close(of_a.H_CC, x.T @ x)
        torch.testing.assert_close(of_b.H_CC, y.T @ y)
        assert of_a.count == of_b.count == 18


def test_what_comes_after_the_last_input_is_not_computed() -> None:
    model, done = Model(), dict.fromkeys("ab", 0)
    for name in done:
        model.block.get_submodule(name).register_forward_hook(lambda *_, name=name: done.update({name: done[name] + 1}))
    for stop in toy_stop(model):
        groups = [[matrix] for matrix in matrices(model, "a", "b")]
        measure(stop, groups, ALONE)
        assert done == {"a": 3, "b": 1}  # of three batches the first one tells how many calls there are


def test_a_layer_that_is_never_called_is_named() -> None:
    model = Model()
    for stop in toy_stop(model):
        with pytest.raises(InputError, match=r"unused saw no calibration token.*--skip"):
            shared_inputs(stop, matrices(model, "a", "unused"))


def test_infinite_inputs_are_named() -> None:
    gram, found = Gram.of(torch.full((4, 4), torch.inf), 10, "model.layers.7.fc1"), matrices(Model(), "a")
    stage = Stage([Measured(gram, found)], Deal.of(found, ALONE))
    with pytest.raises(InputError, match=r"model\.layers\.7\.fc1 are not finite"):
        solve(stage, Projection(build("sparsegpt", {}), {}), lambda result: None)


class Waits(TorchDispatchMode):
    """How often the host asks for a number of a tensor: on a GPU it would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def stage_of(count: int, point: Point = lambda matrix, dense: dense) -> tuple[Stage, Projection]:
    """So many matrices with one input of more columns than a part of a loss has."""
    torch.manual_seed(0)
    layers = [nn.Linear(3 * LOSS_COLUMNS, 4, bias=False).requires_grad_(False) for _ in range(count)]
    matrices: list[Matrix] = [LinearMatrix(f"layer{n}", layer, torch.float32) for n, layer in enumerate(layers)]
    gram = Gram(3 * LOSS_COLUMNS)
    gram.add(torch.randn(50, 3 * LOSS_COLUMNS))
    patterns = {matrix.name: NofM(2, 4) for matrix in matrices}
    stage = Stage([Measured(gram, matrices, point)], Deal.of(matrices, ALONE))
    return stage, Projection(build("wanda", {}), patterns)


def test_a_matrix_is_waited_for_once() -> None:
    counts = []
    for matrices in (1, 4):
        stage, projection = stage_of(matrices)
        with Waits() as waits:
            solve(stage, projection, lambda result: None)
        counts.append(waits.count)
    assert counts[1] - counts[0] == 3


def test_losses_are_beside_the_dense_weight_whatever_was_asked() -> None:
    for point in (lambda matrix, dense: dense, lambda matrix, dense: dense + 0.1):
        stage, projection = stage_of(2, point)
        dense = [matrix.read().clone() for matrix in stage.measured[0].group]
        H_CC = stage.measured[0].gram.H_CC
        for result, matrix, weight in zip(
            solve(stage, projection, lambda result: None), stage.measured[0].group, dense, strict=True
        ):
            assert result.loss == layer_loss(weight - matrix.read(), H_CC)
            assert result.error == result.loss / layer_loss(weight, H_CC)
            assert result.zeros == int((matrix.read() == 0).sum()) == weight.numel() // 2
