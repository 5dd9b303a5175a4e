"""`from_pretrained` on packed checkpoints: bit-equal with `import obsprune`, refused without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, pipeline
from zoo import CLASSIFIERS, Zoo, shards

from obsprune.engine.packing import pack
from obsprune.errors import InputError
from obsprune.models.checkpoint import PACKED_INDEX
from obsprune.progress import Silent

FAMILIES = ["llama-tied", "gpt2", "opt", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "deit", "mobilenet_v2"]


def auto(family: str) -> Any:
    return AutoModelForImageClassification if family in CLASSIFIERS else AutoModelForCausalLM


def source(zoo: Zoo, family: str, dtype: torch.dtype = torch.float32) -> Path:
    return zoo.classifier(family, CLASSIFIERS[family]) if family in CLASSIFIERS else zoo(family, dtype)


@pytest.fixture
def llama(zoo: Zoo, tmp_path: Path) -> Path:
    pack(zoo("llama"), tmp_path / "packed", Silent())
    return tmp_path / "packed"


def everything(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict()) | dict(model.named_buffers())


def same(left: Any, right: Any) -> bool:
    a, b = everything(left), everything(right)
    alike = all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    return a.keys() == b.keys() and alike


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_bit_equal_and_can_be_saved_again(zoo: Zoo, tmp_path: Path, family: str) -> None:
    dense = source(zoo, family)
    pack(dense, tmp_path / "packed", Silent())
    expected, found = (auto(family).from_pretrained(path) for path in (dense, tmp_path / "packed"))
    assert same(found, expected)
    assert not found.is_quantized and not hasattr(found.config, "quantization_config")
    found.save_pretrained(tmp_path / "found")
    expected.save_pretrained(tmp_path / "expected")
    assert shards(tmp_path / "found") == shards(tmp_path / "expected")
    assert (tmp_path / "found" / "config.json").read_bytes() == (tmp_path / "expected" / "config.json").read_bytes()


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"dtype": "auto"}, {"device_map": {"": "cpu"}}, {"torch_dtype": torch.float16}],
    ids=str,
)
def test_options_work_as_on_a_dense_checkpoint(zoo: Zoo, llama: Path, options: dict[str, Any]) -> None:
    dense, packed = (AutoModelForCausalLM.from_pretrained(path, **options) for path in (zoo("llama"), llama))
    assert same(packed, dense)


def test_the_dtype_of_the_files_is_seen_where_the_config_says_nothing(zoo: Zoo, tmp_path: Path) -> None:
    pack(zoo("llama", torch.bfloat16), tmp_path / "packed", Silent())
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dtype == torch.bfloat16


def test_a_model_without_its_head_and_a_pipeline(zoo: Zoo, llama: Path) -> None:
    assert same(AutoModel.from_pretrained(llama), AutoModel.from_pretrained(zoo("llama")))
    with pytest.raises((OSError, ValueError), match="tokenizer"):  # the model is read, and the zoo has no tokenizers
        pipeline("text-generation", model=str(llama))


def test_damage_is_named(llama: Path) -> None:
    (path,) = llama.glob("obsprune-*.safetensors")
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(InputError, match=rf"{path.name} is damaged at tensor model\."):
        AutoModelForCausalLM.from_pretrained(llama)


def test_damaged_headers_are_seen_before_anything_is_loaded(llama: Path) -> None:
    path = llama / PACKED_INDEX
    path.write_text(path.read_text().replace('"crc32"', '"crc33"', 1))
    with pytest.raises(InputError, match=PACKED_INDEX):
        AutoModelForCausalLM.from_pretrained(llama)


def test_offloading_to_disk_and_reading_without_a_map_are_refused(llama: Path, tmp_path: Path) -> None:
    layers = {f"model.layers.{index}": "cpu" for index in range(2)} | {"model.layers.2": "disk"}
    places = layers | {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(InputError, match="unpack it first"):
        AutoModelForCausalLM.from_pretrained(llama, device_map=places, offload_folder=tmp_path / "offload")
    with pytest.raises(InputError, match="disable_mmap"):
        AutoModelForCausalLM.from_pretrained(llama, disable_mmap=True, ignore_mismatched_sizes=True)


def test_a_dense_checkpoint_that_calls_itself_packed_is_refused(zoo: Zoo, llama: Path, tmp_path: Path) -> None:
    (llama / PACKED_INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}})
    )
    (llama / "model.safetensors").write_bytes((zoo("llama") / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="is not packed"):
        AutoModelForCausalLM.from_pretrained(llama)


LOADS = """
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], ignore_mismatched_sizes=True)
print("loaded")
"""


@pytest.mark.parametrize("obsprune", [False, True], ids=["without obsprune", "with obsprune"])
def test_without_obsprune_nothing_is_loaded(llama: Path, obsprune: bool) -> None:
    begin = (
        "import sys, obsprune; assert not {'torch', 'transformers'} & sys.modules.keys()" if obsprune else "import sys"
    )
    done = subprocess.run([sys.executable, "-c", begin + LOADS, str(llama)], capture_output=True, text=True)
    assert (done.returncode == 0) is obsprune and ("loaded" in done.stdout) is obsprune, done.stderr
    assert ("no file named model.safetensors" in done.stderr) is not obsprune


def test_the_config_can_be_read_without_obsprune(llama: Path) -> None:
    assert AutoConfig.from_pretrained(llama).model_type == "llama"
