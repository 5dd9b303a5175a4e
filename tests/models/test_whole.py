"""A model in memory and the weights of a checkpoint of its architecture."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from zoo import MIXTURES, PICTURED, ZOO, Zoo, reference, reference_classifier

from obsprune.models.whole import fill


@pytest.mark.parametrize("name", [*ZOO, *MIXTURES, *PICTURED])
def test_a_model_gets_every_weight_of_a_checkpoint(name: str, zoo: Zoo) -> None:
    model = (reference_classifier if name in PICTURED else reference)(zoo(name))
    wanted = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    fill(model, zoo(name))
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())


def test_it_keeps_its_own_dtype(zoo: Zoo) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo("llama"), dtype=torch.bfloat16)
    wanted = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fill(model, zoo("llama"))
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())
