"""bench-inference on tiny models, by a clock that ticks at each look."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from zoo import Zoo, tensors

from obsprune.core.patterns import Unstructured
from obsprune.errors import InputError
from obsprune.evaluate.inference import Asked, bench_inference, conclusion
from obsprune.models import csr
from obsprune.models.checkpoint import write_shard
from obsprune.progress import Silent


def pruned(directory: Path, output: Path, share: float) -> Path:
    """A copy of a checkpoint whose matrices have so many zeros."""
    shutil.copytree(directory, output)
    sparse = {
        name: x * Unstructured(share).keep(x.abs()) if x.dim() == 2 and "embed" not in name else x
        for name, x in tensors(directory).items()
    }
    write_shard(output / "model.safetensors", sparse)
    return output


def asked(**more: object) -> Asked:
    ticks = itertools.count().__next__
    return Asked(**{"batch_sizes": (1, 3), "repeats": 2, "warmup": 1, "clock": lambda: float(ticks()), **more})  # type: ignore[arg-type]


def test_dense_beside_sparse_in_all_its_forms(zoo: Zoo, tmp_path: Path) -> None:
    dense = zoo("llama")
    sparse = pruned(dense, tmp_path / "sparse", 0.9)
    found = bench_inference(str(sparse), Silent(), str(dense), asked(new=8), device="cpu")
    assert found["work"] == "prefill of 56 tokens, then 8 decoded one by one"  # as many as the model has room for
    assert [(row["batch"], row["phase"], row["form"]) for row in found["rows"]] == list(
        itertools.product((1, 3), ("prefill", "decode"), ("dense", "as it is", "CSR"))
    )
    assert found["baseline"] == "dense" and found["forms"]["CSR"]["layers"] == found["linears"] == 22
    sizes = {form: one["bytes"] for form, one in found["forms"].items()}
    assert sizes["dense"] == sizes["as it is"] > 1.5 * sizes["CSR"]
    # each look takes a second: prefill is one, and eight steps of decode are one, too
    assert {(row["phase"], row["seconds"]["median"]) for row in found["rows"]} == {("prefill", 1.0), ("decode", 0.125)}
    assert {row["verdict"] for row in found["rows"]} == {"baseline", "no faster here"}
    assert found["conclusion"].startswith("No faster here. Zeros in a dense tensor")
    assert "need a CUDA device" in found["absent"]["semi-structured"] or torch.cuda.is_available()


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "mixtral"])
def test_families_decode_with_their_caches(zoo: Zoo, family: str) -> None:
    found = bench_inference(str(zoo(family)), Silent(), None, asked(prompt=6, new=2, csr_from=0.0), device="cpu")
    assert {row["form"] for row in found["rows"]} == {"as it is", "CSR"}


def test_images_have_a_forward(zoo: Zoo) -> None:
    found = bench_inference(str(zoo("deit")), Silent(), None, asked(csr_from=0.0), device="cpu")
    assert {row["phase"] for row in found["rows"]} == {"forward"} and "a forward of images of" in found["work"]
    assert {row["form"] for row in found["rows"]} == {"as it is", "CSR"}


def test_what_does_not_apply_has_its_reason(zoo: Zoo) -> None:
    found = bench_inference(str(zoo("llama")), Silent(), None, asked(prompt=4, new=0), device="cpu", dtype="bfloat16")
    assert {(row["phase"], row["form"]) for row in found["rows"]} == {("prefill", "as it is")}
    assert "not in bfloat16" in found["absent"]["CSR"] and found["conclusion"].startswith("No faster here")


def test_errors_tell_the_way_out(zoo: Zoo, tmp_path: Path) -> None:
    llama = str(zoo("llama"))
    with pytest.raises(InputError, match="room for 64 tokens, and a prompt of 60 and 8 new"):
        bench_inference(llama, Silent(), None, asked(prompt=60, new=8), device="cpu")
    with pytest.raises(InputError, match=r"another network than .* is missing there and .* here"):
        bench_inference(llama, Silent(), str(zoo("opt")), asked(), device="cpu")
    lacking = tmp_path / "lacking"
    shutil.copytree(llama, lacking)
    kept = {name: x for name, x in tensors(lacking).items() if "layers.1.mlp" not in name}
    write_shard(lacking / "model.safetensors", kept)
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.down_proj\.weight and 2 other weights"):
        bench_inference(str(lacking), Silent(), None, asked(), device="cpu")


def test_a_form_that_is_wrong_is_not_measured(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    right = csr.product
    monkeypatch.setattr(csr, "product", lambda weight, x: right(weight, x) * 1.01)
    with pytest.raises(InputError, match=r"the outputs of the CSR form are .* its kernels give wrong results"):
        bench_inference(str(zoo("llama")), Silent(), None, asked(csr_from=0.0), device="cpu")


def test_a_dense_model_that_is_stored_narrower_is_measured_in_the_same_dtype(zoo: Zoo) -> None:
    found = bench_inference(str(zoo("llama")), Silent(), str(zoo("llama", torch.bfloat16)), asked(new=0), device="cpu")
    assert found["dtype"] == "float32"
    assert found["forms"]["dense"]["bytes"] == found["forms"]["as it is"]["bytes"]


def test_the_conclusion_names_what_is_faster() -> None:
    row = {"form": "CSR", "phase": "decode", "batch": 1, "verdict": "1.40 x as fast"}
    assert conclusion([{**row, "form": "as it is"}]).startswith("No faster here")  # by chance: it has no other kernel
    told = conclusion([row, {**row, "batch": 16, "verdict": "no faster here"}])
    assert told.startswith("Faster here: CSR, decode at batch 1: 1.40 x as fast. Zeros")
