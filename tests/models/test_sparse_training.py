"""Zeros stay exactly zero in training: every optimizer, accumulation, masters, accelerate, Trainer, DDP, FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from processes import together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from zoo import Zoo, tensors, token_rows

import obsprune
from obsprune.errors import InputError, ObspruneError
from obsprune.models.sparse_training import keep_sparse

Zero = dict[str, Tensor]
"""{parameter's name: True where it is zero}."""
Optimizing = Callable[[Iterable[nn.Parameter]], Optimizer]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


@torch.no_grad()
def made_sparse(model: nn.Module, seed: int = 1) -> Zero:
    """Zeros half of every matrix inside, at random; gives where."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {name: p for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name}
    zero = {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in chosen.items()}
    for name, parameter in chosen.items():
        parameter.masked_fill_(zero[name], 0)
    return zero


def lost(named: Iterable[tuple[str, Tensor]], zero: Zero) -> int:
    """How many numbers that should be zero are not."""
    return sum(int((x[zero[name]] != 0).sum()) for name, x in named if name in zero)


def train(model: nn.Module, optimizer: Optimizer, steps: int, before: Callable[[], Any] = lambda: None) -> None:
    generator = torch.Generator().manual_seed(2)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 8, generator=generator).to(dtype)).float().square().mean().backward()
        before()
        optimizer.step()


class Mastered(Optimizer):
    """SGD with momentum on float32 copies that its state holds, rounded into narrow weights."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"master": parameter.float().clone(), "momentum": torch.zeros_like(parameter.float())}
                state["momentum"].mul_(0.9).add_(parameter.grad.float())
                state["master"].mul_(0.999).sub_(state["momentum"], alpha=group["lr"])
                parameter.copy_(state["master"])


OPTIMIZERS: dict[str, Optimizing] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam-no-epsilon": lambda p: torch.optim.Adam(p, lr=0.01, eps=0.0),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "masters": Mastered,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_keeps_the_zeros_whatever_it_did_before(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)  # momentum, means and masters of the dense model
    zero = made_sparse(model)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with keep_sparse(model):
        for _ in range(5):
            train(model, optimizer, 1)
            assert lost(model.named_parameters(), zero) == 0
    for key, x in model.state_dict().items():
        assert x.isfinite().all()
        assert (x != before[key]).any()
    for key, parameter in model.named_parameters():
        for held in optimizer.state[parameter].values():
            if key in zero and isinstance(held, Tensor) and held.shape == parameter.shape:
                assert (held[zero[key]] == 0).all()


@pytest.mark.parametrize("name", ["sgd", "adamw", "masters"])
def test_without_it_the_zeros_are_lost(name: str) -> None:
    model = network()
    zero = made_sparse(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    with keep_sparse(model):
        train(model, optimizer, 2)
    assert lost(model.named_parameters(), zero) == 0
    train(model, optimizer, 2)  # the hooks are gone
    assert lost(model.named_parameters(), zero) > 50


def test_zeros_are_exact_after_two_hundred_steps_of_adam_with_weight_decay() -> None:
    model = network()
    zero = made_sparse(model)
    with keep_sparse(model):
        train(model, torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.05), 200)
    assert lost(model.named_parameters(), zero) == 0
    assert sum(int(mask.sum()) for mask in zero.values()) > 150


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_outside_the_optimizer_stay_zero_too(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    zero = made_sparse(model)
    narrow = list(model.parameters())
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizer = torch.optim.AdamW(wide, lr=0.01, weight_decay=0.1)
    with keep_sparse(model):
        for _ in range(5):
            model(torch.randn(6, 8).to(dtype)).float().square().mean().backward()
            for master, parameter in zip(wide, narrow, strict=True):
                master.grad = parameter.grad.float()
                parameter.grad = None
            optimizer.step()
            with torch.no_grad():  # after the hook of the optimizer
                for master, parameter in zip(wide, narrow, strict=True):
                    parameter.copy_(master)
            assert lost(model.named_parameters(), zero) == 0
    assert lost(zip(dict(model.named_parameters()), wide, strict=True), zero) == 0


def test_accumulated_gradients_are_zero_there_and_clipping_sees_the_others_alone() -> None:
    model, free = network(), network()
    zero = made_sparse(model)
    made_sparse(free)
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(4, 8, generator=generator) for _ in range(3)]
    with keep_sparse(model):
        for one in (model, free):
            for batch in batches:
                one(batch).square().sum().backward()
        assert lost(((name, p.grad) for name, p in model.named_parameters()), zero) == 0
        expected = [
            p.grad.masked_fill(zero[name], 0) if name in zero else p.grad for name, p in free.named_parameters()
        ]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert torch.equal(norm, nn.utils.get_total_norm(expected))
        assert norm < nn.utils.get_total_norm([p.grad for p in free.parameters()])


def test_codes_of_eight_bits_are_no_numbers() -> None:
    model = network()
    made_sparse(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    codes = torch.full(model[0].weight.shape, 127, dtype=torch.uint8)
    optimizer.state[model[0].weight] = {"state1": codes}
    with keep_sparse(model):
        train(model, optimizer, 1)
    assert (codes == 127).all()


def test_vectors_matrices_of_zeros_and_what_is_skipped_are_free() -> None:
    model = network()
    zero = made_sparse(model)
    with torch.no_grad():
        model[0].bias[:4] = 0
        model[2].weight.zero_()  # as LoRA's B begins
    with keep_sparse(model, skip=[r"^4\."]) as zeros:
        assert list(zeros.masks) == ["0.weight"]
        train(model, torch.optim.Adam(model.parameters(), lr=0.01), 2)
    assert (model[0].bias[:4] != 0).any()
    assert (model[2].weight != 0).any()
    assert lost([("4.weight", model[4].weight)], zero) > 0
    assert lost([("0.weight", model[0].weight)], zero) == 0


def test_a_dense_model_and_parameters_that_are_replaced_are_refused() -> None:
    model = network()
    with pytest.raises(InputError, match="none of the 3 matrices"), keep_sparse(model):
        pass
    made_sparse(model)
    said = r"0\.weight and 0 others were replaced.*after the model is wrapped"
    with pytest.raises(ObspruneError, match=said), keep_sparse(model):
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def test_zeros_are_whole_when_training_breaks_off() -> None:
    model = network()
    zero = made_sparse(model)
    with pytest.raises(KeyboardInterrupt), keep_sparse(model), torch.no_grad():
        model[0].weight.add_(1)
        raise KeyboardInterrupt
    assert lost(model.named_parameters(), zero) == 0


def test_frozen_weights_cost_nothing_in_a_step_and_adapters_are_merged_inside() -> None:
    """As peft merges: added in place to a weight that is not trained."""
    model = network()
    zero = made_sparse(model)
    model.requires_grad_(False)
    with keep_sparse(model) as zeros:
        model[0].weight.data += torch.randn(16, 2) @ torch.randn(2, 8)
        zeros.restore()
        assert lost(model.named_parameters(), zero) > 0
    assert lost(model.named_parameters(), zero) == 0


def test_accelerate_with_accumulation_and_clipping(tmp_path: Path) -> None:
    model = network()
    zero = made_sparse(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)

    def go(steps: int) -> None:
        for _ in range(steps):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(6, 8)).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                assert lost(model.named_parameters(), zero) == 0

    with keep_sparse(model):
        go(6)
        accelerator.save_state(str(tmp_path / "state"))
        go(4)
        accelerator.load_state(str(tmp_path / "state"))
        go(4)


# ---------------------------------------------------------------------------------------- transformers' Trainer


class Watching(TrainerCallback):
    """How many zeros are lost after each step."""

    def __init__(self, model: nn.Module, zero: Zero) -> None:
        self.model, self.zero, self.counts = model, zero, [-1]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counts.append(lost(self.model.named_parameters(), self.zero))


def trainer(source: Path, output: Path, steps: int = 4, **options: Any) -> tuple[Trainer, Zero, Watching]:
    model = AutoModelForCausalLM.from_pretrained(source)
    zero = {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1 and (p == 0).any()}
    watching = Watching(model, zero)
    arguments = TrainingArguments(
        str(output), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
        save_strategy="steps", save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in token_rows(24, 16)]
    callbacks = [obsprune.SparsityCallback(), watching]
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks), zero, watching


def sparse_checkpoint(zoo: Zoo, folder: Path, family: str, dtype: torch.dtype) -> Path:
    model = AutoModelForCausalLM.from_pretrained(zoo(family, dtype))
    made_sparse(model.model)
    model.save_pretrained(folder / "sparse")
    return folder / "sparse"


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("llama-tied", torch.float32, {"gradient_accumulation_steps": 2}),
        ("llama", torch.bfloat16, {"optim": "adamw_torch_fused"}),
        ("llama", torch.float32, {"bf16": True, "optim": "adafactor"}),
        ("mixtral", torch.float32, {"optim": "sgd", "optim_args": "momentum=0.9"}),
    ],
)
def test_the_trainer_keeps_zeros_in_memory_and_in_every_checkpoint(
    zoo: Zoo, tmp_path: Path, family: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    source = sparse_checkpoint(zoo, tmp_path, family, dtype)
    training, zero, watching = trainer(source, tmp_path / "out", **options)
    assert len(zero) >= 8 and sum(int(mask.sum()) for mask in zero.values()) > 5_000
    training.train()
    assert watching.counts == [-1, 0, 0, 0, 0]
    stored = tensors(source)
    for step in (2, 4):
        saved = tensors(tmp_path / "out" / f"checkpoint-{step}")
        assert saved.keys() == stored.keys()
        assert sum(int((saved[name][x == 0] != 0).sum()) for name, x in stored.items() if x.dim() > 1) == 0
        assert any((saved[name] != x).any() for name, x in stored.items())


def test_the_trainer_goes_on_from_a_checkpoint_with_its_zeros_and_the_same_bits(zoo: Zoo, tmp_path: Path) -> None:
    source = sparse_checkpoint(zoo, tmp_path, "llama", torch.float32)
    whole, zero, _ = trainer(source, tmp_path / "whole")
    whole.train()
    half, _, _ = trainer(source, tmp_path / "half", steps=2)
    half.train()
    dense = AutoModelForCausalLM.from_pretrained(
        zoo("llama")
    )  # whatever it was made with, the checkpoint's zeros count
    resumed, _, _ = trainer(source, tmp_path / "half")
    resumed.model.load_state_dict(dense.state_dict())
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert lost(resumed.model.named_parameters(), zero) == 0
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.model.named_parameters())


def test_the_trainer_refuses_a_dense_model(zoo: Zoo, tmp_path: Path) -> None:
    training, _, _ = trainer(zoo("llama"), tmp_path / "out")
    with pytest.raises(InputError, match="has zeros to keep"):
        training.train()


# ------------------------------------------------------------------------------------------- several processes


@contextmanager
def group() -> Iterator[int]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def distributed(folder: Path, work: Callable[[int], Any]) -> list[Any]:
    def inside() -> Any:
        with group() as rank:
            return work(rank)

    ended = together(2, inside, folder)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    return [one.value for one in ended]


def trained(model: nn.Module, rank: int, steps: int = 6) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(rank)
    for number in range(2 * steps):
        model(torch.randn(6, 8, generator=generator)).square().mean().backward()
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("views", [False, True])
def test_ddp_keeps_zeros_on_all_processes(tmp_path: Path, views: bool) -> None:
    def work(rank: int) -> tuple[int, list[list[float]]]:
        model = network()
        zero = made_sparse(model)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
        with keep_sparse(wrapped):
            wrapped(torch.randn(2, 8)).square().mean().backward()
            gone = lost(((name, p.grad) for name, p in model.named_parameters()), zero)  # as reduced
            trained(wrapped, rank)
        return gone + lost(model.named_parameters(), zero), model[4].weight.tolist()

    (one, weights), (other, same) = distributed(tmp_path, work)
    assert one == other == 0 and weights == same


def test_fsdp2_keeps_zeros_of_every_shard(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    def work(rank: int) -> tuple[int, int, int, float]:
        model = network()
        with torch.no_grad():
            model[2].weight[:8] = 0  # a shard of zeros alone, in a matrix that has others
        zero = made_sparse(model) | {"2.weight": model[2].weight == 0}
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer)
        fully_shard(model)
        before = {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}
        with keep_sparse(model) as zeros:
            model(torch.randn(2, 8)).square().mean().backward()
            steep = lost(((name, p.grad.full_tensor()) for name, p in model.named_parameters()), zero)
            trained(model, rank)
        after = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        moved = min(float((after[name] - before[name]).abs().max()) for name in after)
        return steep, lost(after.items(), zero), len(zeros.masks), moved

    for steep, gone, held, moved in distributed(tmp_path, work):
        assert steep == gone == 0 and held == 3 and moved > 0


def test_what_fsdp_flattens_is_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def work(rank: int) -> str:
        model = network()
        made_sparse(model)
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(InputError) as refused, keep_sparse(wrapped):
            pass
        return str(refused.value)

    for said in distributed(tmp_path, work):
        assert "fsdp_version 2" in said


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, obsprune; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    assert obsprune.keep_sparse is keep_sparse
    with pytest.raises(AttributeError, match="keep_spars"):
        _ = obsprune.keep_spars
