"""Published architectures: their outlines are true and cost nothing, their tiny ones are alike and work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from zoo import logits, shards

from obsprune.errors import InputError
from obsprune.models.kinds import Wish
from obsprune.models.load import Model, load, outline
from obsprune.models.shapes import SHAPES, Shape, find_shape
from obsprune.plan import uniform_patterns
from obsprune.progress import Silent
from obsprune.recipe import make_recipe

PARAMETERS = {
    "deit-tiny": 5_717_416,
    "deit-small": 22_050_664,
    "deit-base": 86_567_656,
    "mobilenet-v1": 4_233_001,  # 4,231,976 with 1,000 classes
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "phi-1.5": 1_418_270_720,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
}
"""As published; a tied head counts once."""
MATRICES = {"vit": 6, "opt": 6, "phi": 6, "llama": 7, "mobilenet_v1": 0.5}
"""Of a block; every other one of MobileNet's is depthwise and stays dense."""
NO_PARAMETER = re.compile(r"running_(mean|var)$|num_batches_tracked$")
FAMILIES = ("deit-tiny", "mobilenet-v1", "opt-125m", "opt-350m", "phi-1.5", "llama-2-7b", "llama-3-8b")
"""One of each architecture."""


def inside(shape: Shape) -> tuple[int, int]:
    """Blocks, and matrices in all of them."""
    depth = shape.values.get("num_hidden_layers", 26)
    return depth, round(MATRICES[shape.model_type] * depth)


def biases(model: Model) -> list[bool]:
    """Whether each matrix of a block has one."""
    return [matrix.bias is not None for matrix in model.blocks[-1].matrices]


@pytest.mark.parametrize("name", SHAPES)
def test_an_outline_is_true_takes_no_room_and_can_be_planned_by(name: str, tmp_path: Path) -> None:
    SHAPES[name].outline(tmp_path)
    model = outline(str(tmp_path))
    headers = model.checkpoint.headers
    parameters = {key: torch.Size(header.shape).numel() for key, header in headers.items()}
    assert sum(count for key, count in parameters.items() if not NO_PARAMETER.search(key)) == PARAMETERS[name]
    stored = {header.dtype for key, header in headers.items() if not key.endswith("num_batches_tracked")}
    assert stored == {getattr(torch, SHAPES[name].dtype)}
    assert sum(512 * path.stat().st_blocks for path in tmp_path.iterdir()) < 1e6
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) > model.checkpoint.bytes
    assert (len(model.blocks), len(model.matrices)) == inside(SHAPES[name])
    for pattern in ("unstructured", "4:8", "2:4"):
        patterns = uniform_patterns(make_recipe({"pattern": pattern}), model)
        zeros = sum(patterns[matrix.name].pruned(*matrix.shape) for matrix in model.matrices)
        assert 2 * zeros == sum(rows * columns for rows, columns in (matrix.shape for matrix in model.matrices))


def test_of_mobilenet_the_pointwise_convolutions_are_pruned(tmp_path: Path) -> None:
    SHAPES["mobilenet-v1"].outline(tmp_path)
    assert [matrix.shape for matrix in outline(str(tmp_path)).matrices] == [
        (64, 32), (128, 64), (128, 128), (256, 128), (256, 256), (512, 256), *[(512, 512)] * 5, (1024, 512),
        (1024, 1024),
    ]  # fmt: skip


def test_an_outline_loads_as_zeros(tmp_path: Path) -> None:
    SHAPES["opt-125m"].reduced.outline(tmp_path)
    model = load(str(tmp_path))
    with model.loaded():
        assert not any(parameter.count_nonzero() for parameter in model.network.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_one_is_alike_and_reads_what_it_brings(name: str, tmp_path: Path) -> None:
    full, small = tmp_path / "full", tmp_path / "small"
    full.mkdir()
    small.mkdir()
    SHAPES[name].outline(full)
    dataset = SHAPES[name].tiny(small)
    true, model = outline(str(full)), load(str(small))
    config, values = model.config, SHAPES[name].values
    assert type(model.network) is type(true.network)
    assert biases(model) == biases(true)
    if "num_key_value_heads" in values:
        sharing = values["num_attention_heads"] // values["num_key_value_heads"]
        assert config.num_attention_heads == sharing * config.num_key_value_heads
    source, _ = model.open(Wish(dataset, 16))
    batches = model.batches(source.sample(10, torch.Generator().manual_seed(0)).take(range(10)), 5)
    with model.loaded():
        first, second = (logits(model.network, batch) for batch in batches)
    assert first.isfinite().all()
    assert not torch.equal(first, second)


def test_opt_350m_keeps_its_own_ways(tmp_path: Path) -> None:
    SHAPES["opt-350m"].tiny(tmp_path)
    config = load(str(tmp_path)).config
    assert not config.do_layer_norm_before
    assert 2 * config.word_embed_proj_dim == config.hidden_size


@pytest.mark.parametrize("name", FAMILIES)
def test_a_filled_one_has_what_its_outline_says_and_works(name: str, tmp_path: Path) -> None:
    shape, outlined, filled = SHAPES[name].reduced, tmp_path / "outline", tmp_path / "filled"
    outlined.mkdir()
    filled.mkdir()
    shape.outline(outlined)
    shape.filled(filled, torch.device("cpu"), Silent())
    dataset = shape.samples(filled, 5)
    model = load(str(filled))
    assert {key: (x.dtype, x.shape) for key, x in model.checkpoint.headers.items()} == {
        key: (x.dtype, x.shape) for key, x in outline(str(outlined)).checkpoint.headers.items()
    }
    source, _ = model.open(Wish(dataset, 16))
    batch = model.batches(source.sample(5, torch.Generator().manual_seed(0)).take(range(5)), 5)[0]
    with model.loaded():
        found = logits(model.network, batch)
        assert all(matrix.read().count_nonzero() > 0.9 * matrix.read().numel() for matrix in model.matrices)
    assert found.isfinite().all()
    assert not torch.equal(found[0], found[1])


def test_a_shape_of_fewer_blocks() -> None:
    shape = SHAPES["llama-2-7b"]
    assert shape.deep(None) == shape.deep(32) == shape
    assert shape.deep(2).values == {**shape.values, "num_hidden_layers": 2}
    with pytest.raises(InputError, match="33 blocks of meta-llama/Llama-2-7b-hf cannot be had; 1 to 32 can"):
        shape.deep(33)
    with pytest.raises(InputError, match="all can"):
        SHAPES["mobilenet-v1"].deep(3)


@pytest.mark.parametrize("name", ["deit-tiny", "opt-125m"])
def test_the_same_seed_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    made = [tmp_path / label for label in ("one", "again", "other")]
    for folder, seed in zip(made, (1, 1, 2), strict=True):
        folder.mkdir()
        SHAPES[name].tiny(folder, seed)
    one, again, other = (
        shards(folder) | {path.name: path.read_bytes() for path in folder.glob("images/*")} for folder in made
    )
    assert one == again
    assert all(one[file] != other[file] for file in one)


def test_the_caller_s_random_numbers_stay_as_they_were(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    SHAPES["phi-1.5"].tiny(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean opt-125m"):
        find_shape("opt-125")
