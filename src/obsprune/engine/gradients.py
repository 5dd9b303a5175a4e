"""Gradients of KL(dense ‖ pruned) and Grams of all blocks at a sparse model, block after block from the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from obsprune.engine.inputs import Inputs, NotFinite, Run
from obsprune.engine.place import Source, Store, Tensors
from obsprune.engine.teacher import Lesson
from obsprune.models.backward import Visit, backward_of, reverse_walk
from obsprune.models.blocks import Block
from obsprune.models.load import Model
from obsprune.models.matrices import differentiated, take_gradients
from obsprune.models.samples import Batch
from obsprune.ranks import Ranks


@dataclass
class Sums:
    """What one block has gathered: gradients [R, C] by matrix name, float32, summed over tokens; Grams where wanted."""

    gradients: Tensors = field(default_factory=dict)
    inputs: Inputs | None = None

    def visit(self, block: Block, run: Run) -> None:
        """Lets `run` take one batch through the block, forward and backward, and adds what comes out."""
        if self.inputs:
            self.inputs.observe(run)
        else:
            run()
        for matrix, gradient in take_gradients(block.matrices):
            name = matrix.name
            self.gradients[name] = self.gradients[name].add_(gradient) if name in self.gradients else gradient.clone()

    def add_up(self, ranks: Ranks) -> None:
        """Over all processes, for all of them. Raises NotFinite when a gradient is."""
        ranks.sum(list(self.gradients.values()))
        for name, gradient in self.gradients.items():
            if not bool(gradient.isfinite().all()):
                raise NotFinite(f"the gradient of {name} is not finite; compute in a wider type (--dtype float32)")


Begin = Callable[[Block], Sums]
Done = Callable[[Block, Sums], None]


def gradients(lesson: Lesson, keys: Sequence[int], weights: Source, begin: Begin, done: Done) -> None:
    """∂KL(dense ‖ pruned)/∂W for all prunable weights, pruned ones too, over some batches of a lesson.

    begin(block): the sums to add to; done(block, sums): called from the last block to the first, while the block's
    weights are on the device, with the sums of this process. Raises WalkMismatch, InputError.
    """
    place = lesson.place

    @contextmanager
    def backward_at(index: int) -> Iterator[Visit]:
        with place.at(index, weights) as block, differentiated([matrix.tensor for matrix in block.matrices]):
            sums = begin(block)
            yield partial(sums.visit, block)
            done(block, sums)

    chosen = [lesson.batches[key] for key in keys]
    loss = backward_of(lambda place, output: lesson.divergence(keys[place], output))
    walk = place.model.walk(chosen, loss, record=True)
    with lesson.memory.beside(lambda: keys[walk.current()]):
        reverse_walk(walk, lambda index: place.at(index, weights), backward_at)


def whole_gradients(lesson: Lesson, keys: Sequence[int], weights: Source, begin: Begin, done: Done) -> None:
    """`gradients`, to the bit, with the graphs of all blocks alive at once (Place.holds): no block runs twice. `begin`
    must not ask for Grams.
    """
    place = lesson.place
    with ExitStack() as held:
        blocks = [held.enter_context(place.at(index, weights)) for index in range(len(place.model.blocks))]
        held.enter_context(differentiated([matrix.tensor for block in blocks for matrix in block.matrices]))
        sums = {block.name: begin(block) for block in blocks}
        for key in keys:
            with torch.enable_grad(), lesson.memory.beside(partial(int, key)):
                torch.autograd.backward([lesson.divergence(key, place.model.network(**lesson.batches[key]))])
            for block in blocks:
                sums[block.name].visit(block, lambda: None)
        for block in reversed(blocks):
            done(block, sums[block.name])


def graph_bytes(lesson: Lesson) -> int:
    """About what the graphs of all blocks hold for the largest batch, the blocks being on the device: measured on one
    sample, and the logits of both models.
    """
    model = lesson.place.model
    most = max(map(_samples, lesson.batches))
    one = {name: tensor[:1] for name, tensor in lesson.batches[0].items()}
    logits = 24 * model.kind.predictions(one) * model.classes
    return most * (_saved_bytes(model, one) + logits)


def _samples(batch: Batch) -> int:
    return max(map(len, batch.values()))


def _saved_bytes(model: Model, batch: Batch) -> int:
    """What autograd keeps of a forward, beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.network.parameters()}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with differentiated([matrix.tensor for matrix in model.matrices]), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = model.network(**batch).logits  # alive until the end, so that no address is used twice
        return sum(size for address, size in saved.items() if address not in weights) + int(output.nbytes)


def gradients_and_grams(lesson: Lesson, chunk: int, weights: Source, done: Done) -> None:
    """`gradients` over all batches of a lesson, with the Grams; `chunk` batches at a time, which changes no bit.

    Between two chunks a block's sums rest in a store of the place.
    """
    parked = lesson.place.store("sums")
    inputs = {block.name: Inputs(block.matrices) for block in lesson.place.model.blocks}
    count = len(lesson.batches)
    for start in range(0, count, chunk):
        keys = range(start, min(start + chunk, count))
        begin = partial(_fresh, inputs) if start == 0 else partial(_unpark, parked, inputs)
        gradients(lesson, keys, weights, begin, done if keys.stop == count else partial(_park, parked))


def _fresh(inputs: dict[str, Inputs], block: Block) -> Sums:
    return Sums({}, inputs[block.name])


def _park(store: Store, block: Block, sums: Sums) -> None:
    """Puts away all that is large."""
    assert sums.inputs is not None
    grams = {f"gram {matrix.name}": gram.H_CC for matrix, gram in sums.inputs.grams.items()}
    for gram in sums.inputs.grams.values():
        gram.H_CC = gram.H_CC.new_empty(0)
    store.put(block, {**{f"gradient {name}": gradient for name, gradient in sums.gradients.items()}, **grams})


def _unpark(store: Store, inputs: dict[str, Inputs], block: Block) -> Sums:
    tensors = store.get(block)
    for matrix, gram in inputs[block.name].grams.items():
        gram.H_CC = tensors.pop(f"gram {matrix.name}")
    return Sums({name.removeprefix("gradient "): tensor for name, tensor in tensors.items()}, inputs[block.name])
