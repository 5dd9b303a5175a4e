"""scripts/bench_peer.py with a stand-in for the authors' class: magnitude, through the same methods."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_peer  # noqa: E402  # a script, beside the package

from obsprune.models.shapes import SHAPES  # noqa: E402

STAND_IN = """
import torch

class SparseGPT:
    seen = []

    def __init__(self, layer):
        self.layer, self.tokens = layer, 0

    def add_batch(self, inp, out):
        self.tokens += inp.numel() // inp.shape[-1]

    def fasterprune(self, sparsity, prunen=0, prunem=0, percdamp=0.01, blocksize=128):
        W = self.layer.weight.data
        least = W.abs().flatten().kthvalue(int(sparsity * W.numel())).values
        W[W.abs() <= least] = 0
        SparseGPT.seen.append((tuple(W.shape), self.tokens))

    def free(self):
        self.H = None
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["llama-2-7b"].reduced, dtype="float32"))
    monkeypatch.setattr(torch.cuda, "synchronize", torch.cuda.synchronize)  # the script exchanges it
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "sparsegpt", raising=False)
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "sparsegpt.py").write_text(STAND_IN)
    return folder


def test_blocks_of_a_shape_by_theirs_and_ours(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_peer.main(checkout, threads=1, shape_of="tiny", blocks=1, nsamples=3, seqlen=32, workdir=checkout)
    seen = sys.modules["sparsegpt"].SparseGPT.seen
    shapes = [(16, 16)] * 4 + [(32, 16)] * 2 + [(16, 32)]
    assert seen == [(shape, 3 * 32) for shape in shapes]  # each matrix by itself, all tokens
    told = capsys.readouterr().out
    assert "tiny, 1 of 2 blocks, 3 samples" in told and len(re.findall(r" s: \d+\.\d\d x", told)) == 2
    assert {path.name for path in checkout.iterdir()} <= {"sparsegpt.py", "__pycache__"}


def test_single_matrices(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_peer.main(checkout, shape=["16x32"], threads=1, repeats=2)
    told = capsys.readouterr().out.splitlines()[2:]
    assert len(told) == 2 and all(re.search(r"\d x; loss over theirs \d\.\d{5}$", line) for line in told)
