"""Networks whose zeros are left out give what the dense ones give, and those stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import Zoo, logits, reference, token_batches

from obsprune.core.patterns import Unstructured
from obsprune.errors import InputError
from obsprune.models.csr import CsrLinear, to_csr
from obsprune.models.forms import Csr, SemiStructured, twin, weight_bytes


def sparse(layer: nn.Linear, share: float) -> nn.Linear:
    with torch.no_grad():
        layer.weight.mul_(Unstructured(share).keep(layer.weight.abs()))
    return layer.requires_grad_(False)


def network(*shares: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(sparse(nn.Linear(24, 24), share) for share in shares))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (7, 24), (2, 700, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_csr_layer_is_the_dense_one(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = sparse(nn.Linear(24, 10, bias=bias), 0.8)
    layer.weight[3] = 0.0  # a row without a number
    x, made = torch.randn(shape), CsrLinear.of(layer)
    y = made(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)
    assert y.is_contiguous() and made.weight.col_indices().dtype == torch.int32
    assert torch.equal(made.weight.to_dense(), layer.weight)


def test_indices_of_32_bits_multiply_as_those_of_64() -> None:
    weight = network(0.9)[0].weight
    for x in (torch.randn(24), torch.randn(24, 5)):
        assert torch.allclose(to_csr(weight) @ x, weight.to_sparse_csr() @ x, atol=1e-6)


def test_bytes_are_those_that_are_held() -> None:
    formed = Csr(0.5).of(network(0.75, 0.25))
    numbers = 24 * 24 // 4
    assert formed.layers == 1
    assert weight_bytes(formed.network) == 4 * (25 + 2 * numbers) + 4 * 24 + 4 * (24 * 24 + 24)


def test_layers_are_chosen_by_their_zeros_and_the_network_stays() -> None:
    dense = network(0.5, 0.75, 0.9)  # three quarters exactly
    formed = Csr(0.75).of(dense)
    assert [type(layer) for layer in formed.network] == [nn.Linear, CsrLinear, CsrLinear]
    assert [type(layer) for layer in dense] == [nn.Linear] * 3
    assert formed.network[0].weight is dense[0].weight and formed.network[1].bias is dense[1].bias
    x = torch.randn(3, 24)
    torch.testing.assert_close(formed.network(x), dense(x), rtol=1e-5, atol=1e-6)


def test_what_is_missing_is_told() -> None:
    with pytest.raises(InputError, match=r"none of the 2 Linear layers has 80% zeros; the sparsest has 50\.0%"):
        Csr().of(network(0.5, 0.25))
    with pytest.raises(InputError, match=r"none of the 0 Linear layers has 80% zeros$"):
        Csr().of(nn.Conv2d(1, 1, 1))
    with pytest.raises(InputError, match=r"not in bfloat16; --dtype float32"):
        Csr().of(network(0.9).to(torch.bfloat16))
    with pytest.raises(InputError, match="for CPUs, and the weights are on meta"):
        Csr().of(nn.Linear(2, 2, device="meta"))


def test_without_mkl_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with pytest.raises(InputError, match="has no MKL to multiply CSR by"):
        Csr().of(network(0.9))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_semi_structured_without_a_gpu_is_told() -> None:
    with pytest.raises(InputError, match="need a CUDA device"):
        SemiStructured().of(network(0.5))


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])
def test_a_whole_model_in_csr(zoo: Zoo, family: str) -> None:
    model = reference(zoo(family)).requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            sparse(layer, 0.8)
    formed, batch = Csr(0.75).of(model), token_batches(1)[0]
    found, expected = logits(formed.network, batch), logits(model, batch)
    assert formed.layers > 0 and (found - expected).norm() < 1e-5 * expected.norm()


def test_a_twin_shares_tensors_and_ties() -> None:
    one = nn.Linear(3, 3)
    other = twin(nn.ModuleDict({"a": one, "b": one}))
    shared: list[Tensor] = [parameter for _, parameter in other.named_parameters(remove_duplicate=False)]
    assert all(parameter is one.weight or parameter is one.bias for parameter in shared)
    assert other["a"] is other["b"] and other["a"] is not one  # type: ignore[index]
