"""Experts run and are seen one by one: equal to transformers' own, to the bit, and to what a person would write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import FLAT, MIXTURES, UNWATCHED, Zoo, logits, reference, token_batches

from obsprune.errors import InputError
from obsprune.models.experts import ExpertMatrix, Experts, following, routes
from obsprune.models.load import Model, load
from obsprune.models.matrices import Matrix, fused_parameters, observed

WEIGHTS = "model.safetensors"
FEW_TOKENS = {"input_ids": torch.tensor([[5, 9]])}
"""Two tokens, two experts each: some experts get none."""


def layers(model: Model) -> list[Experts]:
    return [experts for block in model.blocks for experts in block.experts]


def of_experts(model: Model) -> list[ExpertMatrix]:
    return [matrix for matrix in model.matrices if isinstance(matrix, ExpertMatrix)]


def seen(model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What enters each matrix of an expert in one forward."""
    found: dict[str, Tensor] = {}

    def note(matrix: Matrix, x: Tensor) -> None:
        assert matrix.name not in found
        found[matrix.name] = x.clone()

    with model.loaded(), observed(list(of_experts(model)), note):
        logits(model.network, batch)
    return found


@pytest.mark.parametrize("batch", [token_batches(1)[0], FEW_TOKENS], ids=["many", "few"])
@pytest.mark.parametrize("family", MIXTURES)
def test_logits_are_those_of_eager_to_the_bit(zoo: Zoo, family: str, batch: dict[str, Tensor]) -> None:
    model, expected = load(str(zoo(family))), logits(reference(zoo(family)), batch)
    with model.loaded():
        assert torch.equal(logits(model.network, batch), expected)
        with observed(list(of_experts(model)), lambda matrix, x: None):
            assert torch.equal(logits(model.network, batch), expected)


@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_are_those_of_eager_to_the_bit(zoo: Zoo, family: str) -> None:
    model, other, batch = load(str(zoo(family))), reference(zoo(family)), token_batches(1)[0]
    names = {matrix.parameter for matrix in of_experts(model)}
    with model.loaded():
        for network in (model.network, other):
            for name in names:
                network.get_parameter(name).requires_grad_(True)
            network(**batch).logits.float().square().mean().backward()
        for name in names:
            found, expected = model.network.get_parameter(name).grad, other.get_parameter(name).grad
            assert found is not None and bool(found.any()) and torch.equal(found, expected)


def entering(module: nn.Module) -> Callable[[], tuple[Tensor, Tensor]]:
    """(hidden states, chosen experts) of the last forward."""
    last: list[Any] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: last.__setitem__(slice(None), [*args, *kwargs.values()]), with_kwargs=True
    )
    return lambda: (last[0], last[1])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_every_expert_is_shown_its_own_tokens(zoo: Zoo, family: str) -> None:
    """Gate and up: the hidden states that are sent there, place by place; down: what eager gives to it."""
    model, batch = load(str(zoo(family))), token_batches(1)[0]
    (experts, *_) = layers(model)
    told = entering(experts.module)
    found = seen(model, batch)
    hidden_TH, chosen_TK = told()
    with model.loaded():
        for expert in range(experts.count):
            tokens = [t for place in chosen_TK.T.tolist() for t, who in enumerate(place) if who == expert]
            x_TH = hidden_TH[tokens]
            first = "up_proj" if family == "nemotron_h" else "gate_proj"
            assert torch.equal(found[f"{experts.layer}.{expert}.{first}"], x_TH)
            assert torch.equal(found[f"{experts.layer}.{expert}.up_proj"], x_TH)
            torch.testing.assert_close(
                found[f"{experts.layer}.{expert}.down_proj"], inner(experts.module, expert, x_TH, family)
            )


def inner(module: Any, expert: int, x_TH: Tensor, family: str) -> Tensor:
    """What enters the last matrix of an expert, by each family's own formula."""
    with torch.no_grad():
        if family == "nemotron_h":
            return torch.relu(x_TH @ module.up_proj[expert].T).square()
        if family == "gpt_oss":
            both = x_TH @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
            gate, up = both[:, ::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
            return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
        gate, up = (x_TH @ module.gate_up_proj[expert].T).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


def test_an_expert_without_tokens_is_shown_none_and_is_like_no_other(zoo: Zoo) -> None:
    model = load(str(zoo("mixtral")))
    found = seen(model, FEW_TOKENS)
    empty = [name for name, x in found.items() if not len(x)]
    assert len(found) == len(of_experts(model)) and empty
    of = {matrix.name: matrix for matrix in of_experts(model)}
    gates = [name for name in empty if name.endswith("gate_proj")]
    assert len({of[name].geometry for name in gates}) == len(gates)
    assert all(of[name].geometry == of[name.replace("gate", "up")].geometry for name in gates)


def test_experts_that_are_to_see_everything_see_the_same_tensor(zoo: Zoo) -> None:
    model, batch = load(str(zoo("mixtral"))), token_batches(1)[0]
    (experts, *_) = layers(model)
    own = seen(model, batch)
    told = entering(experts.module)
    experts.everywhere = frozenset({1, 4})
    found = seen(model, batch)
    hidden_TH, _ = told()
    changed = {name for name in own if own[name].shape != found[name].shape or not torch.equal(own[name], found[name])}
    assert changed == {f"{experts.layer}.{e}.{name}" for e in (1, 4) for name in ("gate_proj", "up_proj", "down_proj")}
    assert torch.equal(found[f"{experts.layer}.1.up_proj"], hidden_TH)
    with model.loaded():
        expected = inner(experts.module, 4, hidden_TH, "mixtral")
    torch.testing.assert_close(found[f"{experts.layer}.4.down_proj"], expected)
    of = {matrix.name: matrix.geometry for matrix in of_experts(model)}
    assert of[f"{experts.layer}.1.up_proj"] == of[f"{experts.layer}.4.gate_proj"]
    assert of[f"{experts.layer}.1.down_proj"] != of[f"{experts.layer}.4.down_proj"]


def test_following_another_stream_shows_its_tokens(zoo: Zoo) -> None:
    """The choice of other inputs decides which tokens are shown; what the layer gives is its own."""
    model, (one, other) = load(str(zoo("mixtral"))), token_batches(2)
    with routes(layers(model)) as chosen:
        seen(model, one)
    told = entering(layers(model)[0].module)
    own = seen(model, other)
    with following(chosen):
        found = seen(model, other)
        with model.loaded():
            assert torch.equal(logits(model.network, other), logits(reference(zoo("mixtral")), other))
    hidden_TH, routed_TK = told()
    (experts, *_) = layers(model)
    followed_TK = chosen[experts]
    assert not torch.equal(routed_TK, followed_TK)
    for expert in range(experts.count):
        tokens = [t for place in followed_TK.T.tolist() for t, who in enumerate(place) if who == expert]
        assert torch.equal(found[f"{experts.layer}.{expert}.gate_proj"], hidden_TH[tokens])
    assert all(experts.followed is None for experts in layers(model))
    assert any(own[name].shape != found[name].shape for name in own)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "granitemoe"])
def test_matrices_lie_apart_and_fill_the_parameters(zoo: Zoo, family: str) -> None:
    model = load(str(zoo(family)))
    with model.loaded():
        for number, matrix in enumerate(of_experts(model), 1):
            assert matrix.read().shape == matrix.shape
            matrix.write(torch.full(matrix.shape, float(number)))
        for number, matrix in enumerate(of_experts(model), 1):
            assert bool((matrix.read() == number).all())
        for experts in layers(model):
            for name in (experts.first, "down_proj"):
                assert bool((experts.module.get_parameter(name) >= 1).all())


def test_gate_and_up_are_what_the_names_say(zoo: Zoo) -> None:
    """Zero gates make silu(0) · up = 0; zero ups do, too; and for gpt-oss up + 1 is 1."""
    for family, zeroed in (("mixtral", "gate_proj"), ("mixtral", "up_proj"), ("gpt_oss", "gate_proj")):
        model = load(str(zoo(family)))
        (experts, *_) = layers(model)
        x_TH = torch.randn(5, 32)
        with model.loaded():
            if family == "gpt_oss":
                experts.module.gate_up_proj_bias.data.zero_()
            for matrix in of_experts(model):
                if matrix.name.endswith(zeroed):
                    matrix.write(torch.zeros(matrix.shape))
            assert not bool(inner(experts.module, 2, x_TH, family).any())


@pytest.mark.parametrize(
    ("family", "dense"),
    [("mixtral", "mlp.gate"), ("qwen2_moe", "mlp.shared_expert_gate"), ("phimoe", "mlp.router")],
)
def test_routers_and_shared_gates_stay_dense(zoo: Zoo, family: str, dense: str) -> None:
    model = load(str(zoo(family)))
    assert f"model.layers.0.{dense}" in model.skipped
    assert not any(matrix.name.endswith(dense) for matrix in model.matrices)


def test_what_is_called_a_router_is_one_whatever_its_size() -> None:
    """Zaya's has layers inside; a layer of a shared expert can have as many outputs as there are experts."""
    experts = Experts("layers.0.mlp.experts", None)
    assert experts.routed_by("layers.0.mlp.gate.router_mlp.fc1", 64) and experts.routed_by("layers.0.mlp.router", 8)
    assert experts.routed_by("layers.0.mlp.shared_expert_gate", 1)
    for layer in ("layers.0.mlp.shared_expert.down_proj", "layers.0.mlp.shared_expert.gate_proj", "layers.0.gate"):
        assert not experts.routed_by(layer, 32)
    beside = Experts("layers.0.experts", None)  # Gemma 4: nothing but the block owns the experts
    assert beside.routed_by("layers.0.router.proj", 8)
    assert not beside.routed_by("layers.0.per_layer_input_gate", 32) and not beside.routed_by("layers.10.router", 8)


def test_a_shared_expert_is_pruned_like_any_layer(zoo: Zoo) -> None:
    for family, name in (("qwen2_moe", "mlp.shared_expert.up_proj"), ("deepseek_v3", "mlp.shared_experts.up_proj")):
        assert f"model.layers.1.{name}" in [matrix.name for matrix in load(str(zoo(family))).matrices]


def test_experts_that_nobody_can_watch_are_refused(zoo: Zoo) -> None:
    with pytest.raises(InputError, match=r"layers\.0\.feed_forward\.experts\.gate_up_proj .* in a layout"):
        load(str(zoo.make("llama4", UNWATCHED)))


def test_experts_that_lie_flat_in_a_matrix_are_refused(zoo: Zoo) -> None:
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.experts\.mlp\.w1 .* in a layout"):
        load(str(zoo.make("dbrx", FLAT)))


def test_one_expert_of_another_dtype_keeps_it(zoo: Zoo, tmp_path: Path) -> None:
    key = expert(3, "w1")
    model = load(str(changed(zoo, tmp_path, lambda t: t.update({key: t[key].bfloat16()}))))
    block = model.blocks[1]
    with block.loaded(model.device):
        for matrix in block.matrices:
            matrix.write(matrix.read() / 3)
        found = block.tensors()
    assert found[key].dtype == torch.bfloat16
    assert all(found[other].dtype == torch.float32 for other in found if other != key)


def test_fused_parameters_have_three_dimensions_outside_convolutions() -> None:
    block = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 3), "wide": nn.Conv1d(2, 2, 3), "linear": nn.Linear(2, 2)})
    assert fused_parameters("b", block) == []
    block["linear"].register_parameter("positions", nn.Parameter(torch.zeros(1, 4, 5)))
    assert fused_parameters("b", block) == []
    block["linear"].register_parameter("experts", nn.Parameter(torch.zeros(2, 4, 5)))
    assert fused_parameters("b", block) == ["b.linear.experts"]


def changed(zoo: Zoo, tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A Mixtral checkpoint with other tensors."""
    path = Path(shutil.copytree(zoo("mixtral"), tmp_path / "model"))
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return path


def expert(index: int, name: str) -> str:
    return f"model.layers.1.block_sparse_moe.experts.{index}.{name}.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(expert(5, "w2")), r"down_proj is \(6, 32, 48\) by the config, and .* make \(5, 32, 48\)"),
        (lambda t: t.pop(expert(5, "w1")), r"experts\.5\.w1\.weight is missing"),
        (lambda t: t.update({expert(12, "w2"): t.pop(expert(3, "w2"))}), r"experts\.3\.w2\.weight is missing"),
        (lambda t: t.update({expert(6, "w2"): torch.ones(32, 48)}), r"make \(7, 32, 48\)"),
        (lambda t: t.update({expert(2, "w3"): torch.ones(48, 31)}), "do not fit together"),
        (lambda t: [t.pop(expert(i, "w2")) for i in range(6)], "no weight for model.layers.1.mlp.experts.down_proj"),
        (lambda t: t[expert(3, "w1")].mul_(torch.nan), "contains NaN"),
    ],
)
def test_experts_that_do_not_fit_are_one_clear_sentence(
    zoo: Zoo, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        model = load(str(changed(zoo, tmp_path, change)))
        with model.loaded():
            pass


def test_one_layer_in_two_shards_and_a_dense_round_trip(zoo: Zoo, tmp_path: Path) -> None:
    """Experts of every layer lie in both files; what is read, joined, taken apart and written is what was there."""
    path = Path(shutil.copytree(zoo("qwen3_moe"), tmp_path / "model"))
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    weight_map = {key: f"model-{1 + index % 2:05}-of-00002.safetensors" for index, key in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({k: t for k, t in tensors.items() if weight_map[k] == file}, path / file, metadata={"format": "pt"})
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = load(str(path))
    for block in model.blocks:
        with block.loaded(model.device):
            found = block.tensors()
        assert found.keys() == set(block.keys)
        assert all(torch.equal(found[key], tensors[key]) for key in block.keys)
    with model.loaded():
        assert torch.equal(logits(model.network, FEW_TOKENS), logits(reference(zoo("qwen3_moe")), FEW_TOKENS))


def test_extra_experts_beyond_the_depth_are_kept_as_they_are(zoo: Zoo, tmp_path: Path) -> None:
    """DeepSeek-V3 brings a layer for the prediction of further tokens, which no module has a place for."""
    path = Path(shutil.copytree(zoo("deepseek_v3"), tmp_path / "model"))
    tensors = load_file(path / WEIGHTS)
    more = {key.replace("layers.1.", "layers.2."): t.clone() for key, t in tensors.items() if ".layers.1." in key}
    save_file(tensors | more, path / WEIGHTS, metadata={"format": "pt"})
    model = load(str(path))
    assert more.keys() <= set(model.rest) and len(model.blocks) == 2


def test_only_what_has_changed_is_written_anew(zoo: Zoo) -> None:
    """bfloat16 computation on a float32 checkpoint: experts that are not pruned keep all their bits."""
    model = load(str(zoo("mixtral")), dtype="bfloat16")
    block = model.blocks[0]
    (pruned,) = [matrix for matrix in block.matrices if matrix.name.endswith("experts.2.up_proj")]
    with block.loaded(model.device):
        pruned.write(torch.zeros(pruned.shape))
        found = block.tensors()
    stored = model.checkpoint.read(block.keys)
    different = [key for key in stored if not torch.equal(found[key], stored[key])]
    assert different == ["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    assert not bool(found[different[0]].any())


def test_listeners_and_sinks_are_gone_when_they_are_closed(zoo: Zoo) -> None:
    model = load(str(zoo("mixtral")))
    (experts, *_) = layers(model)
    watched = experts.observed(0, "down_proj", partial(print, end=""))
    with pytest.raises(KeyError), experts.listened(lambda chosen: None), watched:
        assert experts.sinks and experts.listeners
        raise KeyError
    assert not experts.sinks and not experts.listeners
