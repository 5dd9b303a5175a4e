"""LoRA adapters of peft on a sparse model, and TRL's trainer: merged with care, zeros stay zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from zoo import Zoo, token_rows

import obsprune


def sparse(source: Path) -> tuple[Any, dict[str, Tensor]]:
    """A model with half of its layers' weights zero, and where."""
    model, generator = AutoModelForCausalLM.from_pretrained(source), torch.Generator().manual_seed(1)
    inside = {name: p for name, p in model.named_parameters() if p.dim() > 1 and ".layers." in name}
    zero = {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in inside.items()}
    with torch.no_grad():
        for name, parameter in inside.items():
            parameter.masked_fill_(zero[name], 0)
    return model, zero


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    rows = token_rows(4, 16)
    for _ in range(3):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def lost(model: Any, zero: dict[str, Tensor]) -> int:
    return sum(int((p[zero[name]] != 0).sum()) for name, p in model.named_parameters() if name in zero)


def test_adapters_of_peft_are_merged_inside_keep_sparse_and_by_merge_lora(zoo: Zoo) -> None:
    model, zero = sparse(zoo("llama"))
    tuned = adapted(model)
    with obsprune.keep_sparse(tuned):
        train(tuned)
        layers = {name: layer for name, layer in tuned.base_model.model.named_modules() if hasattr(layer, "lora_A")}
        expected = {
            f"{name}.weight": obsprune.merge_lora(
                layer.base_layer.weight, *(ab["default"].weight for ab in (layer.lora_B, layer.lora_A)),
                layer.scaling["default"],
            )
            for name, layer in layers.items()
        }  # fmt: skip
        merged = tuned.merge_and_unload()
    assert lost(merged, zero) == 0 and expected.keys() == zero.keys()
    now = dict(merged.named_parameters())
    assert all(torch.allclose(now[name], weight, atol=1e-6) for name, weight in expected.items())
    dense, zero = sparse(zoo("llama"))
    careless = adapted(dense)
    train(careless)
    assert lost(careless.merge_and_unload(), zero) > 10_000


def test_trl_trains_with_the_callback(zoo: Zoo, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl)")
    from datasets import Dataset

    model, zero = sparse(zoo("llama"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = Dataset.from_dict({"input_ids": token_rows(8, 16).tolist()})
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, learning_rate=1e-2, weight_decay=0.1, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    given = {"processing_class": tokenizer(), "callbacks": [obsprune.SparsityCallback()]}
    trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, **given).train()
    assert lost(model, zero) == 0
    assert all((p != before[name]).any() for name, p in model.named_parameters() if name in zero)


def tokenizer() -> Any:
    """One word a number: TRL wants to have one, and asks it nothing of rows of ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(number): number for number in range(128)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0")
