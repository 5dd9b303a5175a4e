"""Which kind of model a config is for, and what is found in each: blocks, matrices, and why the rest stays dense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig
from zoo import CLASSIFIERS, FUSED_FFN, ZOO, Zoo, pixel_batches, token_batches

from obsprune.errors import InputError
from obsprune.models.kinds import CausalLM, ImageClassifier, Kind, kind_of
from obsprune.models.load import load

DEPTHWISE = "depthwise convolution; --set model.depthwise=true prunes them, too"


def config(name: str, *architectures: str) -> Any:
    made = getattr(transformers, name)()
    made.architectures = list(architectures) or None
    return made


def test_the_kind_of_every_family_of_the_zoo(zoo: Zoo) -> None:
    for name in (*ZOO, *CLASSIFIERS):
        kind = CausalLM if name in ZOO else ImageClassifier
        assert isinstance(kind_of(transformers.AutoConfig.from_pretrained(zoo(name))), kind)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (config("ViTConfig"), ImageClassifier),  # no architecture told: the only kind there is
        (config("LlamaConfig"), CausalLM),
        (config("LlamaConfig", "LlamaForCausalLM"), CausalLM),
        (config("GPT2Config", "GPT2LMHeadModel"), CausalLM),
        (config("DeiTConfig", "DeiTForImageClassificationWithTeacher"), ImageClassifier),
        (config("DeiTConfig", "DeiTForMaskedImageModeling", "DeiTForImageClassification"), ImageClassifier),
        (config("BeitConfig", "BeitForImageClassification"), ImageClassifier),
        (PretrainedConfig(auto_map={"AutoModelForCausalLM": "code.Model"}), CausalLM),
        (PretrainedConfig(auto_map={"AutoModelForImageClassification": "code.Model"}), ImageClassifier),
    ],
)
def test_the_kind_of_a_config(config: Any, kind: type[Kind]) -> None:
    assert isinstance(kind_of(config), kind)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (config("DetrConfig"), "a detr model is neither a causal language model nor an image classifier, nor"),
        (config("CLIPVisionConfig"), "a clip_vision_model model is neither"),
        (config("T5Config", "T5ForConditionalGeneration"), "a t5 model is neither"),
        (PretrainedConfig(auto_map={"AutoModelForTokenClassification": "code.Model"}), "neither"),
        (config("ViTConfig", "ViTModel"), "the checkpoint holds a ViTModel, which is no image classifier"),
        (config("ViTConfig", "ViTForMaskedImageModeling"), "ViTForMaskedImageModeling, which is no image classifier"),
        (config("ResNetConfig", "ResNetBackbone"), "ResNetBackbone, which is no image classifier"),
        (config("LlamaConfig", "LlamaForSequenceClassification"), "which is no causal language model: it has no head"),
        (config("LlamaConfig", "LlamaModel"), "the checkpoint holds a LlamaModel, which is no causal language model"),
    ],
)
def test_what_is_refused(config: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        kind_of(config)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_blocks_matrices_and_reasons_of_every_classifier(zoo: Zoo, name: str) -> None:
    family, model = CLASSIFIERS[name], load(str(zoo(name)))
    assert type(model.network).__name__ == family.architecture
    assert model.classes == 10
    assert [block.name for block in model.blocks] == list(family.blocks)
    assert list(dict.fromkeys(matrix.layer for matrix in model.matrices)) == family.layers
    assert all(
        matrix.name.removeprefix(matrix.layer) in ("", *(f"[{i}]" for i in range(4))) for matrix in model.matrices
    )
    assert len({matrix.name for matrix in model.matrices}) == len(model.matrices)
    for matrix in model.matrices:
        rows, columns = matrix.shape
        assert columns % 4 == 0 and rows > 0
    weights = {key.removesuffix(".weight") for key, p in model.network.named_parameters() if p.dim() > 1}
    assert set(model.skipped) == weights - set(family.layers)
    tables = {weight for weight in weights if weight.endswith("relative_position_bias_table")}
    for weight, reason in model.skipped.items():
        inside = DEPTHWISE if weight in family.depthwise else "not a linear layer" if weight in tables else None
        assert reason == (inside or "outside the blocks")
    assert len(tables) == (3 if name == "swin" else 0)


@pytest.mark.parametrize("name", [name for name, family in CLASSIFIERS.items() if family.depthwise])
def test_depthwise_filters_one_by_one_where_they_are_asked_for(zoo: Zoo, name: str) -> None:
    family, model = CLASSIFIERS[name], load(str(zoo(name)), depthwise=True)
    channels = {layer: len(model.network.get_parameter(f"{layer}.weight")) for layer in family.depthwise}
    filters = [matrix for matrix in model.matrices if matrix.layer in family.depthwise]
    assert [matrix.name for matrix in filters] == [f"{layer}[{i}]" for layer, n in channels.items() for i in range(n)]
    side = 7 if name == "convnext" else 3
    assert {matrix.shape for matrix in filters} == {(1, side * side)}
    assert sorted({matrix.layer for matrix in model.matrices}) == sorted((*family.layers, *family.depthwise))
    assert set(model.skipped.values()) <= {"outside the blocks"}


def test_skipping_a_layer_of_a_classifier(zoo: Zoo) -> None:
    model = load(str(zoo("resnet-basic")), skip=["shortcut", r"stages\.0"])
    dense = {"stages.0.layers.0.layer.0": r"stages\.0", "stages.0.layers.0.layer.1": r"stages\.0"}
    for layer, pattern in (dense | {"stages.1.layers.0.shortcut": "shortcut"}).items():
        assert model.skipped[f"resnet.encoder.{layer}.convolution"] == f"matches --skip {pattern}"
    assert [matrix.name for matrix in model.matrices] == [
        f"resnet.encoder.stages.1.layers.{index}.layer.{place}.convolution" for index in (0, 1) for place in (0, 1)
    ]


def test_blocks_by_name(zoo: Zoo) -> None:
    """Whole stages of a Swin: its downsampling lies inside one of them, and is pruned with it."""
    model = load(str(zoo("swin")), blocks=r"swin\.encoder\.layers\.\d")
    assert [block.name for block in model.blocks] == ["swin.encoder.layers.0", "swin.encoder.layers.1"]
    names = [matrix.name for matrix in model.matrices]
    assert "swin.encoder.layers.0.downsample.reduction" in names
    assert set(CLASSIFIERS["swin"].layers) < set(names)
    with pytest.raises(InputError, match=r"no module's name matches model.blocks = 'layer'"):
        load(str(zoo("swin")), blocks="layer")


def test_blocks_inside_blocks_are_refused(zoo: Zoo) -> None:
    with pytest.raises(
        InputError, match=r"resnet\.encoder\.stages\.1\.layers\.0 lies inside resnet\.encoder\.stages\.1"
    ):
        load(str(zoo("resnet-basic")), blocks=r"resnet\.encoder\.stages\.1(\.layers\.0)?")


def test_a_fused_feed_forward_is_taken_apart_and_put_together_again(zoo: Zoo) -> None:
    """DINOv2's largest model stores gate and up in one tensor, which transformers takes apart."""
    model = load(str(zoo.classifier("dinov2-fused", FUSED_FFN)))
    block = model.blocks[0]
    up = next(matrix for matrix in block.matrices if matrix.name.endswith("up_proj"))
    (key,) = model.names.sources[up.parameter]
    assert model.names.sources[up.parameter.replace("up_proj", "gate_proj")] == (key,)
    with block.loaded(model.device):
        before = block.tensors()
        up.write(torch.zeros(up.shape))
        after = block.tensors()
    assert torch.equal(before[key], model.checkpoint.read([key])[key])
    assert int((after[key] == 0).sum()) == up.weight.numel() and len(after[key]) == 2 * up.shape[0]
    assert all(torch.equal(after[other], before[other]) for other in before if other != key)


def test_the_architecture_decides_between_two_heads(zoo: Zoo, tmp_path: Path) -> None:
    """A checkpoint with a distillation head beside the other, loaded as the model without one."""
    path = Path(shutil.copytree(zoo("deit-distilled"), tmp_path / "model"))
    told = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(told | {"architectures": ["DeiTForImageClassification"]}))
    with pytest.raises(InputError, match=r"no weight for classifier\."):
        load(str(path))


def test_what_a_kind_says_about_batches() -> None:
    text, images = CausalLM(), ImageClassifier()
    tokens, pixels = token_batches(1, size=3, length=70)[0], pixel_batches(1, size=3)[0]
    assert text.predictions(tokens) == 210 and images.predictions(pixels) == 3
    assert text.small(tokens)["input_ids"].shape == (1, 64)
    assert torch.equal(images.small(pixels)["pixel_values"], pixels["pixel_values"][:1])
    s, t = torch.randn(2, 3, 10).log_softmax(-1)
    loss, count = images.loss(s, t, pixels)
    assert count == 3
    torch.testing.assert_close(loss, -(t.exp() * s).sum())
    assert images.told(0.5, 0.25) == {"agreement": 0.25} and set(text.told(0.5, 0.25)) == {"perplexity", "agreement"}
