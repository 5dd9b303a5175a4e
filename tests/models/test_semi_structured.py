"""Which Linear layers can be semi-structured and why not, decided without a GPU; the conversion itself on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import Zoo, logits, reference, token_batches

from obsprune.core.patterns import NofM
from obsprune.errors import InputError
from obsprune.models.semi_structured import (
    candidates,
    reasons,
    require_machine,
    require_some,
    to_semi_structured,
)

NO_GPU = not torch.cuda.is_available()


@torch.no_grad()
def prune(layer: nn.Linear) -> None:
    layer.weight.mul_(NofM(2, 4).keep(layer.weight.float().abs()))


def linear(inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16, sparse: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    if sparse:
        prune(layer)
    return layer.to(dtype)


def why(layer: nn.Linear) -> tuple[str, str]:
    found = candidates(nn.Sequential(layer))[0]
    assert found.broken is not None and found.why is not None
    return found.broken.name, found.why


def sparse_llama(directory: Path, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = reference(directory).to(dtype)
    for layer in model.get_submodule("model").modules():
        if isinstance(layer, nn.Linear):
            prune(layer)
    return model


def shifted(layer: nn.Linear) -> nn.Linear:
    """Groups of four begin in the middle of those that are 2:4."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, 2:6] = 1.0
        layer.weight[0, 1] = 1.0
    return layer


@pytest.mark.parametrize(
    ("layer", "rule", "said"),
    [
        (linear(64, 32), "not on CUDA", "on cpu"),
        (linear(64, 32, torch.float16), "not on CUDA", "on cpu"),
        (linear(64, 32, sparse=False), "not 2:4", "512 of 512 groups"),
        (shifted(linear(8, 16)), "not 2:4", "1 of 32 groups"),
        (linear(30, 32, sparse=False), "not 2:4", "30 inputs are no multiple of 4"),
        (linear(64, 32, torch.float32), "dtype", "float32, not one of float16, bfloat16, int8"),
        (linear(64, 24), "shape", "24 x 64 is no multiple of 16 x 16"),
        (linear(40, 32), "shape", "32 x 40 is no multiple of 16 x 16"),
    ],
)
def test_the_first_broken_rule_is_told_with_its_values(layer: nn.Linear, rule: str, said: str) -> None:
    broken, told = why(layer)
    assert broken == rule and said in told


def test_the_kernel_itself_says_which_shapes_it_takes() -> None:
    layer = linear(16, 16)
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    assert why(layer) == ("shape", "16 x 16 is no multiple of 32 x 32")


def test_of_a_language_model_the_blocks_can_and_the_head_cannot(zoo: Zoo) -> None:
    found = {one.name: one.broken for one in candidates(sparse_llama(zoo("llama"), torch.bfloat16))}
    assert len(found) == 3 * 7 + 1
    names = {name: rule.name for name, rule in found.items() if rule}
    assert names.pop("lm_head") == "not 2:4" and set(names.values()) == {"not on CUDA"}


def test_a_weight_that_two_share_stays(zoo: Zoo) -> None:
    model = sparse_llama(zoo("llama-tied"), torch.bfloat16)
    prune(model.get_submodule("lm_head"))  # type: ignore[arg-type]
    found = {one.name: one.broken for one in candidates(model)}
    head = found["lm_head"]
    assert head is not None and head.name == "weight shared with another layer"


def test_nothing_to_convert_is_told_with_counts_and_the_way_out(zoo: Zoo) -> None:
    dense = reference(zoo("llama")).to(torch.bfloat16)
    with pytest.raises(InputError, match=r"none of the 22 .*22 not 2:4.*obsprune prune MODEL --pattern 2:4"):
        require_some(candidates(dense))
    with pytest.raises(InputError, match=r'21 not on CUDA, 1 not 2:4\); move it there: model.to\("cuda"\)'):
        require_some(candidates(sparse_llama(zoo("llama"), torch.bfloat16)))
    with pytest.raises(InputError, match=r"21 dtype, 1 not 2:4\); load it with dtype=torch.bfloat16"):
        require_some(candidates(sparse_llama(zoo("llama"), torch.float32)))
    with pytest.raises(InputError, match=r"none of the 0 Linear layers .*there are none"):
        require_some(candidates(nn.Conv2d(1, 1, 1)))


def test_reasons_are_a_sentence_each(zoo: Zoo) -> None:
    told = reasons(candidates(sparse_llama(zoo("llama"), torch.bfloat16)))
    assert len(told) == 2
    assert told[0].startswith("21 not on CUDA: model.layers.0.self_attn.q_proj (on cpu), ") and "18 more" in told[0]
    assert told[1].startswith("1 not 2:4: lm_head (") and "more than two numbers" in told[1]


@pytest.mark.skipif(not NO_GPU, reason="there is a CUDA device")
def test_without_cuda_it_is_refused_and_nothing_changes(zoo: Zoo) -> None:
    model = sparse_llama(zoo("llama"), torch.bfloat16)
    former = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="need a CUDA device"):
        to_semi_structured(model)
    assert all(torch.equal(tensor, former[name]) for name, tensor in model.state_dict().items())


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(InputError, match=r"Tesla V100 has compute capability 7\.0; .* need 8\.0"):
        require_machine(nn.Linear(2, 2))


class Notices:
    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)

    def stage(self, title: str, total: int) -> None: ...
    def step(self, text: str = "") -> None: ...
    def detail(self, text: str) -> None: ...
    def line(self, text: str) -> None: ...


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_outputs_stay_and_weights_shrink(zoo: Zoo, dtype: torch.dtype) -> None:
    model = sparse_llama(zoo("llama"), dtype).to("cuda").requires_grad_(False)
    batch: dict[str, Tensor] = {name: x.cuda() for name, x in token_batches(1)[0].items()}
    expected, watch = logits(model, batch).float(), Notices()
    assert to_semi_structured(model, watch) is model
    assert watch.said[0] == "21 of 22 Linear layers are semi-structured now" and "lm_head" in watch.said[1]
    found = logits(model, batch).float()
    assert (found - expected).norm() <= (1e-2 if dtype is torch.float16 else 5e-2) * expected.norm()
