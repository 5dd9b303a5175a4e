"""Every image classifier of the zoo, from checkpoint to sparse checkpoint, against transformers and torch alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from zoo import CLASSIFIERS, SIDE, Zoo, logits, pixel_batches, reference_classifier, shards, tensors

from obsprune.core.patterns import Unstructured
from obsprune.core.statistics import Gram
from obsprune.engine.gradients import Sums, gradients, gradients_and_grams, whole_gradients
from obsprune.engine.inputs import shared_inputs
from obsprune.engine.layerwise import Projection
from obsprune.engine.place import Dense, OnDevice
from obsprune.engine.rundir import RunDir
from obsprune.engine.steps import Newton
from obsprune.engine.teacher import teach
from obsprune.errors import InputError
from obsprune.eval_pipeline import evaluate_checkpoint
from obsprune.models import matrices
from obsprune.models.backward import backward_of, reverse_walk
from obsprune.models.blocks import Block
from obsprune.models.data import Draw, draw
from obsprune.models.images import ImageSamples
from obsprune.models.kinds import Wish
from obsprune.models.load import Model, load
from obsprune.models.matrices import Matrix, differentiated, find_matrices
from obsprune.models.residual import find_junctions, watched
from obsprune.models.samples import Samples
from obsprune.models.walk import Walk
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe
from obsprune.solvers import build

ROUNDS = {"target": "stream", "iters": 2, "matching": {"passes": 2, "steps": 2}, "rounds": {"steps": 4}}


def pruned(source: Path, pictures: Path, output: Path, depthwise: bool = False, **settings: Any) -> dict[str, Any]:
    """Pruned with 8 calibration and 8 other pictures, and 8 more for a second round."""
    data = {"dataset": f"imagenet={pictures}", "nsamples": 8, "heldout": 8}
    tree = {"model": {"name": str(source), "depthwise": depthwise}, "data": data, "evaluation": ["none"]} | settings
    return prune(make_recipe(tree), output, Silent())


def drawn(report: dict[str, Any], source: Path) -> Draw:
    """The pictures of a run, drawn again and recognised by their hashes."""
    recipe = make_recipe(report["recipe"])
    found = draw(load(str(source)).open(Wish(str(recipe.data.dataset), 1))[0], 8, 8, recipe.seed, recipe.iters)
    for samples, name in ((found.calibration, "sha256"), (found.heldout, "heldout_sha256")):
        assert samples.content_hash() == report["data"][name]
    return found


def answers(directory: Path, samples: Samples) -> Tensor:
    """Log-probabilities of 8 pictures, by plain transformers."""
    (batch,) = samples.batches(8, torch.device("cpu"))
    return logits(reference_classifier(directory), batch).log_softmax(-1)


def stored_keys(model: Model) -> dict[str, str]:
    """{parameter: its key in the checkpoint} of all blocks."""
    return {name: key for block in model.blocks for name, (key,) in block.names.sources.items()}


def raw(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def in_place(model: Any) -> Any:
    """The same weights where torch puts them: how a convolution sums depends on where in a mapped file they lie."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def check_result(source: Path, output: Path, report: dict[str, Any], weights: set[str]) -> dict[str, Tensor]:
    """Only these weights have changed, by a bit or more, and plain transformers loads the result; the new tensors."""
    before, after, model = tensors(source), tensors(output), load(str(source))
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    keys = stored_keys(model)
    assert {key for key in before if raw(before[key]) != raw(after[key])} == {keys[name] for name in weights}
    for matrix in report["matrices"]:
        assert matrix["zeros"] == round(0.5 * matrix["shape"][0] * matrix["shape"][1])
    for name in weights:
        told = sum(m["zeros"] for m in report["matrices"] if m["name"].split("[")[0] == name.removesuffix(".weight"))
        assert int((after[keys[name]] == 0).sum()) == told
    overwritten = in_place(reference_classifier(source))
    batch = {"pixel_values": pixel_batches(1, 4)[0]["pixel_values"].to(overwritten.dtype)}
    for name in weights:
        overwritten.get_parameter(name).data.copy_(after[keys[name]])
    expected = logits(overwritten, batch)
    assert torch.equal(logits(in_place(reference_classifier(output)), batch), expected)
    assert not torch.equal(logits(in_place(reference_classifier(source)), batch), expected)
    return {name: after[keys[name]] for name in weights}


# ------------------------------------------------------------------------------------------------ the walk


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_walk_is_the_model(zoo: Zoo, family: str) -> None:
    """Blocks are run once more before they are left: nothing that a block does stays behind."""
    model, batches, found = load(str(zoo(family))), pixel_batches(3), {}
    modules = [block.module for block in model.blocks]
    with Walk(model.network, modules, batches, lambda key, out: found.update({key: out.logits})) as walk:
        for stop in walk:
            with model.blocks[stop.index].loaded(model.device):
                for key in stop.keys:
                    stop.run(key)
                stop.hand_on()
    plain = reference_classifier(zoo(family))
    for key, batch in enumerate(batches):
        assert torch.equal(found[key], logits(plain, batch))
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_gradients_of_the_reverse_walk_are_those_of_autograd(zoo: Zoo, family: str) -> None:
    """Bit for bit those of matrices. Vectors are sums, which an order of their own rounds otherwise; and the true
    gradient of a key's bias is 0.
    """
    model, batches, found = load(str(zoo(family)), depthwise=True), pixel_batches(3), {}

    def loss(key: int, output: Any) -> Tensor:
        return (output.logits * (key + 1)).tanh().square().sum()

    @contextmanager
    def backward_at(index: int) -> Iterator[Callable[[Callable[[], None]], None]]:
        block = model.blocks[index]
        with block.loaded(model.device), differentiated(block.tunable.values()):
            yield lambda run: run()
            found.update({name: parameter.grad for name, parameter in block.tunable.items()})

    walk = Walk(model.network, [block.module for block in model.blocks], batches, backward_of(loss), record=True)
    reverse_walk(walk, lambda index: model.blocks[index].loaded(model.device), backward_at)
    plain = reference_classifier(zoo(family)).requires_grad_(False)
    for name in found:
        plain.get_parameter(name).requires_grad_(True)
    for key, batch in enumerate(batches):
        loss(key, plain(**batch)).backward()
    assert {
        f"{layer}.weight" for layer in (*CLASSIFIERS[family].layers, *CLASSIFIERS[family].depthwise)
    } <= found.keys()
    for name, gradient in found.items():
        expected = plain.get_parameter(name).grad
        if name.endswith("k_proj.bias"):
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5)
        else:
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
            assert gradient.dim() == 1 or torch.equal(gradient, expected), name


# ------------------------------------------------------------------------------------------------ one shot


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_every_classifier(zoo: Zoo, pictures: Path, tmp_path: Path, family: str, pattern: str) -> None:
    source, output = zoo(family), tmp_path / "out"
    files = shards(source)
    report = pruned(source, pictures, output, pattern=pattern)
    assert shards(source) == files
    assert report["data"]["images"] == 8 and report["data"]["size"] == [SIDE, SIDE]
    weights = check_result(source, output, report, {f"{layer}.weight" for layer in CLASSIFIERS[family].layers})
    if pattern == "2:4":
        for weight in weights.values():
            assert bool(((weight.flatten(1).unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all())


def test_depthwise_filters(zoo: Zoo, pictures: Path, tmp_path: Path) -> None:
    """Each of nine weights: round(4.5) = 4 of them are zero."""
    source, family = zoo("mobilenet_v1"), CLASSIFIERS["mobilenet_v1"]
    report = pruned(source, pictures, tmp_path / "out", depthwise=True)
    layers = (*family.layers, *family.depthwise)
    weights = check_result(source, tmp_path / "out", report, {f"{layer}.weight" for layer in layers})
    for layer in family.depthwise:
        assert (weights[f"{layer}.weight"].flatten(1) == 0).sum(1).unique().tolist() == [4]
    filters = [matrix for matrix in report["matrices"] if matrix["name"].endswith("[7]")]
    assert {tuple(matrix["shape"]) for matrix in filters} == {(1, 9)}
    assert len(filters) == 13
    assert set(report["skipped"].values()) == {"outside the blocks"}


def test_a_pattern_that_filters_cannot_have_is_refused_by_name(zoo: Zoo, pictures: Path, tmp_path: Path) -> None:
    says = r"layer\.0\.convolution\[0\]: 2:4 needs an input width that 4 divides, and this one has 9 columns; skip it"
    with pytest.raises(InputError, match=says):
        pruned(zoo("mobilenet_v1"), pictures, tmp_path / "out", depthwise=True, pattern="2:4")
    assert not (tmp_path / "out").exists()
    report = pruned(
        zoo("mobilenet_v1"), pictures, tmp_path / "out", depthwise=True, pattern="2:4",
        skip=[r"layer\.\d*[02468]\.convolution\["],
    )  # fmt: skip
    assert [m["name"] for m in report["matrices"]] == CLASSIFIERS["mobilenet_v1"].layers


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.bfloat16) for family in ("vit", "swin", "convnext", "resnet-basic", "mobilenet_v2-tf")]
    + [(family, torch.float16) for family in ("vit", "resnet-basic")],
)
def test_the_stored_dtype_is_kept(zoo: Zoo, pictures: Path, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    source = zoo(family, dtype)
    report = pruned(source, pictures, tmp_path / "out", evaluation=["heldout"])
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} <= {dtype, torch.int64}
    assert report["model"]["compute_dtype"] == ("bfloat16" if dtype == torch.bfloat16 else "float32")
    check_result(source, tmp_path / "out", report, {f"{layer}.weight" for layer in CLASSIFIERS[family].layers})


def test_a_narrower_dtype_rounds_what_it_changes_alone(zoo: Zoo, pictures: Path, tmp_path: Path) -> None:
    """Batch norms, and weights that no solver has moved, are as they were stored, to the bit."""
    source = zoo("resnet-basic")
    report = pruned(source, pictures, tmp_path / "out", model={"name": str(source), "dtype": "bfloat16"})
    layers = CLASSIFIERS["resnet-basic"].layers
    weights = check_result(source, tmp_path / "out", report, {f"{layer}.weight" for layer in layers})
    assert any("rounded" in warning for warning in report["warnings"])
    dense = tensors(source)
    kept = torch.cat([(weight == dense[key]).flatten() for key, weight in weights.items()])
    rounded = torch.cat([(weight == weight.bfloat16()).flatten() for weight in weights.values()])
    assert bool((kept | rounded).all()) and 0 < int((kept & ~rounded).sum()) < len(kept)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["resnet-basic", "convnext", "swin"])
def test_rounds_in_bfloat16(zoo: Zoo, pictures: Path, tmp_path: Path, family: str) -> None:
    report = pruned(zoo(family, torch.bfloat16), pictures, tmp_path / "out", **ROUNDS)
    first, second = report["rounds"]
    assert not second["kept"] or second["heldout_kl"] < first["heldout_kl"]
    assert report["sparsity"]["reached"] == 0.5


def test_reestimated_batch_norms(zoo: Zoo, pictures: Path, tmp_path: Path) -> None:
    """What leaves a norm has the mean and the variance it had before the layer was pruned."""
    source, around = zoo("resnet-basic"), "resnet.encoder.stages.0.layers.0.layer.0"
    settings = {"skip": [f"^(?!{around})"], "engine": {"reestimate_norms": True}}
    report = pruned(source, pictures, tmp_path / "out", **settings)
    moments = []
    for directory in (source, tmp_path / "out"):
        model = reference_classifier(directory)
        model.get_submodule(f"{around}.normalization").register_forward_hook(
            lambda *call: moments.append(torch.var_mean(call[2], (0, 2, 3)))
        )
        logits(model, drawn(report, source).calibration.batches(8, torch.device("cpu"))[0])
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-3, atol=1e-3)
    before, after = tensors(source), tensors(tmp_path / "out")
    own = {f"{around}.convolution.weight"} | {
        f"resnet.encoder.stages.0.layers.0.layer.{index}.normalization.running_{what}"
        for index, what in ((0, "mean"), (0, "var"), (1, "mean"), (1, "var"))
    }
    assert {key for key in before if raw(before[key]) != raw(after[key])} == own


# ------------------------------------------------------------------------------------------------ by hand


@dataclass(frozen=True)
class Case:
    """A layer, and how the module around it (which sees the unpadded input) leads to its patches."""

    family: str
    layer: str
    stride: int = 1
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, right, top, bottom
    groups: int = 1


CASES = {
    "3x3": Case("resnet-basic", "resnet.encoder.stages.0.layers.0.layer.1.convolution", pad=(1, 1, 1, 1)),
    "3x3 stride 2": Case("resnet-basic", "resnet.encoder.stages.1.layers.0.layer.0.convolution", 2, (1, 1, 1, 1)),
    "1x1 stride 2": Case("resnet-basic", "resnet.encoder.stages.1.layers.0.shortcut.convolution", 2),
    "4 groups, stride 2": Case("regnet", "regnet.encoder.stages.1.layers.0.layer.1.convolution", 2, (1, 1, 1, 1), 4),
    "depthwise 7x7": Case("convnext", "convnext.encoder.stages.1.layers.1.dwconv", 1, (3, 3, 3, 3), 16),
    "depthwise, padded as TensorFlow does": Case(
        "mobilenet_v2-tf", "mobilenet_v2.layer.0.conv_3x3.convolution", 2, (0, 1, 0, 1), 48
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sparsegpt_by_hand(zoo: Zoo, pictures: Path, tmp_path: Path, name: str) -> None:
    """H = Σ x xᵀ over the patches that torch's own unfold finds; all other layers stay dense."""
    case = CASES[name]
    source = zoo(case.family)
    report = pruned(source, pictures, tmp_path / "out", depthwise=True, skip=[f"^(?!{re.escape(case.layer)})"])
    model, inputs = reference_classifier(source), []
    around = model.get_submodule(case.layer.rpartition(".")[0])
    around.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits(model, drawn(report, source).calibration.batches(8, torch.device("cpu"))[0])
    weight = model.get_submodule(case.layer).weight.data
    padded = functional.pad(inputs[0], case.pad)
    patches = functional.unfold(padded, weight.shape[2:], stride=case.stride).transpose(1, 2).flatten(0, 1)
    solver, expected = build("sparsegpt", {}), []
    for W_RC, x_TC in zip(weight.flatten(1).chunk(case.groups), patches.chunk(case.groups, 1), strict=True):
        gram = Gram(x_TC.shape[1])
        gram.add(x_TC)
        expected.append(solver.solve(W_RC, solver.prepare(gram), Unstructured(0.5)).weight)
    assert {matrix["tokens"] for matrix in report["matrices"]} == {len(patches)}
    assert len(report["matrices"]) == case.groups
    ours = reference_classifier(tmp_path / "out").get_submodule(case.layer).weight.data.flatten(1)
    assert torch.equal(ours == 0, torch.cat(expected) == 0)
    torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_patches_in_many_pieces(zoo: Zoo, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image at a time: sums in another order, and the stream that belongs to each place."""
    for name, bound in (("whole", matrices.UNFOLDED_BYTES), ("pieces", 1)):
        monkeypatch.setattr(matrices, "UNFOLDED_BYTES", bound)
        pruned(zoo("resnet-basic"), pictures, tmp_path / name, target="stream")
    whole, pieces = tensors(tmp_path / "whole"), tensors(tmp_path / "pieces")
    different = sum(int(((whole[key] == 0) != (pieces[key] == 0)).sum()) for key in whole)
    assert different <= 10
    first = f"{next(iter(CLASSIFIERS['resnet-basic'].blocks))}.layer.1.convolution.weight"  # writes to the stream
    torch.testing.assert_close(whole[first], pieces[first], rtol=1e-3, atol=1e-4)


def test_compensated_biases_keep_the_mean_of_every_channel(zoo: Zoo, pictures: Path, tmp_path: Path) -> None:
    """Of grouped convolutions, too, where a matrix has one of the layer's biases."""
    source, layer = zoo("convnext"), "convnext.encoder.stages.0.layers.0.dwconv"
    solver = {"name": "sparsegpt", "compensate": True}
    settings = {"depthwise": True, "skip": [f"^(?!{re.escape(layer)})"]}
    report = pruned(source, pictures, tmp_path / "out", solver=solver, **settings)
    pruned(source, pictures, tmp_path / "plain", **settings)
    means = []
    for directory in (source, tmp_path / "out", tmp_path / "plain"):
        model = reference_classifier(directory)
        model.get_submodule(layer).register_forward_hook(lambda *call: means.append(call[2].mean((0, 2, 3))))
        logits(model, drawn(report, source).calibration.batches(8, torch.device("cpu"))[0])
    torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(means[2], means[0], rtol=1e-2, atol=1e-3)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert {key for key in before if raw(before[key]) != raw(after[key])} == {f"{layer}.weight", f"{layer}.bias"}


# ------------------------------------------------------------------------------------------------ the residual stream

ENCODER = {"attention.o_proj", "mlp.fc2"}
WRITERS: dict[str, list[set[str]]] = {
    "vit": [ENCODER] * 2, "deit": [ENCODER] * 2, "deit-distilled": [ENCODER] * 2, "dinov2": [ENCODER] * 2,
    "dinov2-swiglu": [{"attention.o_proj", "mlp.down_proj"}] * 2,
    "swin": [{"mlp.fc2"}, ENCODER, ENCODER],  # the second stage is one window: its order is the stream's
    "convnext": [{"pwconv2"}] * 3,
    "resnet-basic": [{"layer.1.convolution"}, {"layer.1.convolution", "shortcut.convolution"}, {"layer.1.convolution"}],
    "resnet-bottleneck": [{"layer.2.convolution", "shortcut.convolution"}] * 2 + [{"layer.2.convolution"}],
    "regnet": [{"layer.3.convolution", "shortcut.convolution"}] * 2 + [{"layer.3.convolution"}],
    "mobilenet_v1": [set()] * 26,
    **{name: [{"reduce_1x1.convolution"} if adds else set() for adds in map(int, "0101101110111110")]
       for name in ("mobilenet_v2", "mobilenet_v2-tf")},
}  # fmt: skip


def scale_of(block: nn.Module, layer: str) -> Tensor:
    """What a layer's output is multiplied with before it is added, by the architecture's own definition."""
    around = block.get_submodule(layer.rpartition(".")[0])
    norm = getattr(around, "normalization", None)
    if norm is not None:
        return norm.weight / (norm.running_var + norm.eps).sqrt()
    if hasattr(block, "layer_scale_parameter"):
        return block.layer_scale_parameter
    scale = getattr(block, "layer_scale1" if layer.startswith("attention") else "layer_scale2", None)
    return scale.lambda1 if scale is not None else torch.ones(block.get_submodule(layer).out_features)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_writers_to_the_residual_stream(zoo: Zoo, family: str) -> None:
    """In every block, with the right scales; and what is watched does not depend on the layer's own weight."""
    model, found = load(str(zoo(family))), []
    with Walk(model.network, [block.module for block in model.blocks], pixel_batches(1)) as walk:
        for stop in walk:
            block = model.blocks[stop.index]
            with block.loaded(model.device):
                junctions = find_junctions(stop.module, block.matrices, stop.call(0))
                names = {matrix: matrix.name.removeprefix(f"{block.name}.") for matrix in junctions}
                found.append(set(names.values()))
                for matrix, junction in junctions.items():
                    expected = scale_of(stop.module, names[matrix])
                    torch.testing.assert_close(junction.scale_R, expected, rtol=1e-3, atol=1e-3)
                    streams = [stream_before(stop, matrix, junction, factor) for factor in (1.0, 0.0)]
                    torch.testing.assert_close(streams[0], streams[1], rtol=1e-3, atol=1e-3)
                stop.hand_on()
    assert found == WRITERS[family]


def stream_before(stop: Any, matrix: Matrix, junction: Any, factor: float) -> Tensor:
    """The stream before a layer in units of its output, with its weight times a factor."""
    seen: list[Tensor] = []
    own = matrix.read().clone()
    matrix.write(factor * own)
    with watched(stop.module, {matrix: junction}, lambda _, h: seen.append(h)) as returned, torch.no_grad():
        returned(stop.run(0))
    matrix.write(own)
    (h_TR,) = seen
    assert h_TR.shape[1] == matrix.shape[0]
    return h_TR


class Adding(nn.Module):
    """A parallel block that adds to a layer's output in place, as Falcon does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        output = self.down(h.relu())
        output += self.attention(h.tanh())
        return h + output


def test_an_output_that_is_added_to_in_place() -> None:
    block, h = Adding().requires_grad_(False), torch.randn(3, 5, 8)
    (matrix,) = find_matrices("down", block.down, lambda name: torch.float32)
    junctions = find_junctions(block, [matrix], ((h,), {}))
    seen: list[Tensor] = []
    with watched(block, junctions, lambda _, stream: seen.append(stream)) as returned:
        returned(block(h))
    torch.testing.assert_close(seen[0], (h + block.attention(h.tanh())).flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_who_shares_an_input(zoo: Zoo) -> None:
    """A shortcut shares its input with the first layer, and its Gram only where both look at it alike."""
    for family, expected in (
        ("swin", [{"q_proj", "k_proj", "v_proj"}]),
        ("resnet-bottleneck", [{"shortcut", "layer.0"}]),
        ("resnet-basic", []),
    ):
        model = load(str(zoo(family)), skip=["fc"])
        with Walk(model.network, [block.module for block in model.blocks], pixel_batches(1)) as walk:
            for stop, block in zip(walk, model.blocks, strict=False):
                with block.loaded(model.device):
                    groups = shared_inputs(stop, block.matrices)
                    found = [{m.name.removeprefix(f"{block.name}.") for m in group} for group in groups]
                    shared = [{re.sub(r"attention\.|\.convolution", "", n) for n in g} for g in found if len(g) > 1]
                    assert shared == (expected if stop.index == 0 or family == "swin" else [])
                    stop.hand_on()


# ------------------------------------------------------------------------------------------------ rounds

SLOW = ("mobilenet_v2", "mobilenet_v2-tf", "deit-distilled", "dinov2")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CLASSIFIERS]
)
def test_rounds_with_corrected_targets_and_matching(zoo: Zoo, pictures: Path, tmp_path: Path, family: str) -> None:
    """Never above one shot on held-out images; and what was judged is what is saved."""
    source, output = zoo(family), tmp_path / "out"
    report = pruned(source, pictures, output, **ROUNDS)
    first, second = report["rounds"]
    best = second if second["kept"] else first
    assert best["heldout_kl"] <= first["heldout_kl"]
    assert second["fresh"] and not report["warnings"]
    student, teacher = (answers(path, drawn(report, source).heldout) for path in (output, source))
    divergence = float((teacher.exp() * (teacher - student)).sum() / 8)
    assert divergence == pytest.approx(best["heldout_kl"], rel=1e-3)
    assert best["told"]["agreement"] == float((student.argmax(-1) == teacher.argmax(-1)).float().mean())
    assert any(matrix["correction"] > 0 for matrix in report["matrices"])
    writers = zip(CLASSIFIERS[family].blocks, WRITERS[family], strict=True)
    named = {f"{block}.{layer}" for block, layers in writers for layer in layers}
    assert {matrix["name"] for matrix in report["matrices"] if matrix["residual"]} == named
    before, after, model = tensors(source), tensors(output), load(str(source))
    keys = stored_keys(model)
    for layer in CLASSIFIERS[family].layers:
        weight = after[keys[f"{layer}.weight"]]
        zeros, told = (
            int((weight == 0).sum()),
            [m["zeros"] for m in report["matrices"] if m["name"].split("[")[0] == layer],
        )
        assert zeros == sum(told)
        assert zeros == round(0.5 * weight.numel())  # also where no picture of the second round wakes an input
    changed = {key for key in before if raw(before[key]) != raw(after[key])}
    weights = {keys[f"{layer}.weight"] for layer in CLASSIFIERS[family].layers}
    vectors = {keys[name] for block in model.blocks for name in block.vectors}
    assert weights <= changed <= weights | vectors
    assert bool(changed & vectors) == any(block["best"] for block in report["matching"])


@pytest.mark.slow
def test_on_disk_and_in_memory_the_same_bytes(zoo: Zoo, pictures: Path, tmp_path: Path) -> None:
    for memory in ("device", "disk"):
        pruned(zoo("regnet"), pictures, tmp_path / memory, iters=2, rounds={"steps": 2, "memory": memory})
    assert shards(tmp_path / "device") == shards(tmp_path / "disk")


def test_gradients_of_the_divergence(zoo: Zoo, pictures: Path, tmp_path: Path) -> None:
    """Of every group of a convolution; by the reverse walk, with whole graphs, in chunks with Grams: the same bits."""
    source, output = zoo("regnet"), tmp_path / "out"
    samples = drawn(pruned(source, pictures, output), source).heldout
    model, sparse, found = load(str(source)), load(str(output)), []
    place = OnDevice(model)
    with place.opened():
        weights, lesson = place.store("sparse"), teach(place, samples, 4)
        for block, other in zip(model.blocks, sparse.blocks, strict=True):
            weights.put(block, other.weights())

        def done(block: Block, sums: Sums) -> None:
            found[-1].update(sums.gradients)

        for way in (gradients, whole_gradients):
            found.append({})
            way(lesson, range(2), weights, lambda block: Sums(), done)
        found.append({})
        gradients_and_grams(lesson, 1, weights, done)
    student, (batch,) = reference_classifier(output), samples.batches(8, torch.device("cpu"))
    t, s = answers(source, samples), student(**batch).logits.log_softmax(-1)
    (t.exp() * (t - s)).sum().backward()
    for matrix in model.matrices:
        expected = student.get_parameter(matrix.parameter).grad[matrix.rows].flatten(1)
        assert expected.abs().max() > 0
        torch.testing.assert_close(found[0][matrix.name], expected, rtol=1e-3, atol=1e-4)
        assert all(torch.equal(found[0][matrix.name], other[matrix.name]) for other in found[1:])


def test_compensated_biases_of_a_candidate(zoo: Zoo, pictures: Path) -> None:
    """In a round, too, every filter has its own of the layer's biases: the means are those of the dense layer."""
    source = zoo("convnext")
    model, plain = load(str(source), depthwise=True), reference_classifier(source)
    samples = model.open(Wish(str(pictures), 1))[0].sample(8, torch.Generator().manual_seed(0)).take(range(8))
    solver = build("sparsegpt", {"compensate": True})
    projection = Projection(solver, {matrix.name: Unstructured(0.5) for matrix in model.matrices})
    place = OnDevice(model)
    with place.opened():
        (candidate,) = Newton().candidates(Dense(), teach(place, samples, 8), projection, [0.0], Silent())
    (batch,) = samples.batches(8, torch.device("cpu"))
    for block, layer in zip(model.blocks, CLASSIFIERS["convnext"].depthwise, strict=True):
        conv, inputs, found = plain.get_submodule(layer), [], candidate.weights.get(block)
        handle = conv.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        logits(plain, batch)
        handle.remove()
        filters = torch.cat([found[f"{layer}[{index}]"] for index in range(conv.groups)])
        assert int((filters == 0).sum()) == conv.groups * round(0.5 * 49)
        own = functional.conv2d(
            inputs[0], filters.view_as(conv.weight), found[f"{layer}.bias"], padding=3, groups=conv.groups
        )
        with torch.no_grad():
            torch.testing.assert_close(own.mean((0, 2, 3)), conv(inputs[0]).mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ again


@pytest.mark.parametrize("family", ["swin", "mobilenet_v1"])
def test_same_seed_same_bytes_other_seed_other_bytes(zoo: Zoo, pictures: Path, tmp_path: Path, family: str) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pruned(zoo(family), pictures, tmp_path / name, seed=seed)
    assert shards(tmp_path / "a") == shards(tmp_path / "b") != shards(tmp_path / "c")


class Killed(BaseException):
    """As sudden as a signal."""


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("swin", {}),
        ("convnext", {"depthwise": True, "target": "stream"}),
        ("resnet-basic", {"target": "stream", "matching": {"passes": 1, "steps": 2}}),
        ("regnet", {"engine": {"true_sequential": True}}),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    zoo: Zoo, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, settings: dict[str, Any]
) -> None:
    """Killed in the middle of the second commit."""
    source, commit, done = zoo(family), RunDir.commit, []

    def fragile(self: RunDir, block: str, *rest: Any, **facts: Any) -> None:
        if done:
            raise Killed
        commit(self, block, *rest, **facts)
        done.append(block)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "commit", fragile)
        with pytest.raises(Killed):
            pruned(source, pictures, tmp_path / "killed", **settings)
    assert done == list(CLASSIFIERS[family].blocks)[:1]
    assert not (tmp_path / "killed/config.json").exists()
    pruned(source, pictures, tmp_path / "killed", **settings)
    pruned(source, pictures, tmp_path / "whole", **settings)
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_of_all_sizes_and_modes_become_what_the_model_reads(zoo: Zoo, pictures: Path) -> None:
    modes, sides = set(), set()
    for path in pictures.parent.iterdir():
        if path != pictures:
            with Image.open(path) as image:
                modes.add((image.format, image.mode))
                sides.add(image.size)
    assert modes == {(kind, mode) for kind in ("PNG", "JPEG") for mode in ("L", "RGB")}
    assert len(sides) > 20 and all(side % 2 for size in sides for side in size)
    for family in ("vit", "dinov2", "convnext", "mobilenet_v1"):
        samples = load(str(zoo(family))).open(Wish(str(pictures), 1))[0].sample(24, torch.Generator())
        (batch,) = samples.batches(24, torch.device("cpu"))
        assert batch["pixel_values"].shape == (24, 3, SIDE, SIDE)
        assert batch["pixel_values"].isfinite().all() and batch["pixel_values"].std() > 0.3


def test_scores_of_a_result(zoo: Zoo, pictures: Path, tmp_path: Path) -> None:
    """On the pictures that were kept apart, and on all of them by name."""
    source, output = zoo("vit"), tmp_path / "out"
    report = pruned(source, pictures, output, evaluation=["heldout", f"imagenet={pictures}"])
    held = drawn(report, source).heldout
    assert isinstance(held, ImageSamples)
    for who, path in (("dense", source), ("pruned", output)):
        right = answers(path, held).argmax(-1) == torch.tensor(held.classes)
        assert report["evaluation"]["heldout"][who]["top1"] == pytest.approx(100 * float(right.float().mean()))
        assert report["evaluation"][f"imagenet={pictures}"][who]["images"] == 24
    again = evaluate_checkpoint(str(output), [], Silent())["tasks"]
    assert again["heldout"]["model"]["top1"] == report["evaluation"]["heldout"]["pruned"]["top1"]


# ------------------------------------------------------------------------------------------------ the wrong kind


@pytest.mark.parametrize("name", ["mmlu", "mmlu=/tmp", "text=/tmp/x.txt", "wikitext2", "c4"])
def test_text_tasks_of_a_classifier(zoo: Zoo, pictures: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"task {name} .*text and a vit model reads images"):
        pruned(zoo("vit"), pictures, tmp_path / "out", evaluation=[name])
    with pytest.raises(InputError, match=f"task {name} .*text and a vit model reads images"):
        evaluate_checkpoint(str(zoo("vit")), [name], Silent())
    assert not (tmp_path / "out").exists()


def test_a_language_model_given_images(zoo: Zoo, pictures: Path, tokens: Path, tmp_path: Path) -> None:
    images = f"imagenet={pictures}"
    with pytest.raises(InputError, match=f"{images} are images and a llama model reads text; give text or token ids"):
        pruned(zoo("llama"), pictures, tmp_path / "out")
    data = {"dataset": str(tokens), "nsamples": 8, "seqlen": 32, "heldout": 8}
    with pytest.raises(InputError, match=f"task {images} .*images and a llama model reads text"):
        pruned(zoo("llama"), pictures, tmp_path / "out", data=data, evaluation=[images])
    with pytest.raises(InputError, match=f"task {images} .*images and a llama model reads text"):
        evaluate_checkpoint(str(zoo("llama")), [images], Silent())


def test_a_classifier_given_text(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time\nthere was a model.\n")
    for dataset, says in (
        (None, "a vit model is calibrated with images: --dataset imagenet=PATH"),
        (str(tokens), "is neither a folder of images nor a labels file"),
        (str(text), r"story\.txt line 1 names the image Once, which is not there .* a labels file has a path"),
        (str(tmp_path), "holds no images"),
        ("c4", "c4 is text and a vit model reads images; give --dataset imagenet=PATH"),
    ):
        with pytest.raises(InputError, match=says):
            pruned(zoo("vit"), text, tmp_path / "out", data={"dataset": dataset, "nsamples": 4, "heldout": 4})
    assert not (tmp_path / "out").exists()


def test_two_kinds_cannot_be_compared(zoo: Zoo, pictures: Path) -> None:
    with pytest.raises(InputError, match="they cannot be compared"):
        evaluate_checkpoint(str(zoo("vit")), [f"imagenet={pictures}"], Silent(), compare=str(zoo("llama")))


def test_each_model_is_compared_on_pixels_of_its_own_processor(zoo: Zoo, pictures: Path, tmp_path: Path) -> None:
    source, other, task = zoo("resnet-basic"), tmp_path / "other", f"imagenet={pictures}"
    shutil.copytree(source, other)
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.9, 0.1, 0.4]}))
    alone = evaluate_checkpoint(str(other), [task], Silent())["tasks"][task]["model"]
    beside = evaluate_checkpoint(str(source), [task], Silent(), compare=str(other))["tasks"][task]
    assert beside["compare"]["cross_entropy"] == alone["cross_entropy"] != beside["model"]["cross_entropy"]
    assert beside["paired"]["cross_entropy"]["difference"] == pytest.approx(
        beside["model"]["cross_entropy"] - alone["cross_entropy"]
    )
