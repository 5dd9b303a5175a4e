"""What a recipe is made of: plain values, each with its default."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelPart:
    """Which model, and how it is opened. blocks: regular expression of the blocks' names, if they are not found;
    depthwise: prune depthwise convolutions, too.
    """

    name: str = ""
    revision: str | None = None
    dtype: str = "auto"
    blocks: str | None = None
    depthwise: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataPart:
    """Calibration. nsamples: sequences or images; heldout: others kept apart for judging and evaluation. Without a
    number, what suits the kind of model: 128 and 16 sequences, 512 and 64 images.
    """

    dataset: str | None = None
    text_column: str | None = None
    nsamples: int | None = None
    seqlen: int = 2048
    heldout: int | None = None


@dataclass(frozen=True)
class EnginePart:
    """How the work is carried out. batch_size: samples in one forward, or `auto`; true_sequential: measure again after
    each group of matrices; reestimate_norms: new statistics for the batch norms of each pruned block; activations:
    where those of waiting batches live: `device`, `host`, `disk` (of the output), or `auto`, the first of them where
    half of what is free suffices.
    """

    device: str = "auto"
    batch_size: int | str = "auto"
    true_sequential: bool = False
    reestimate_norms: bool = False
    activations: str = "auto"


@dataclass(frozen=True)
class RoundsPart:
    """What a round after the first does, where `iters` is more than 1.

    tune: fine-tuning before the projection: `masked` (zeros stay), `free` (every weight may come back), or `none`;
    steps: its optimizer steps in each of `passes` over the sequences, at most one a sequence; step: `newton`, `local`,
    or `none` (projection alone); damping: λ of the Newton step as a share of the mean diagonal; patience: how many
    rounds in a row are no better on what is held out before the rounds end; scored: each round's iterate is evaluated,
    too; memory: where all that a round keeps lives: `auto`, `device`, `host`, `disk`.
    """

    tune: str = "masked"
    steps: int = 32
    passes: int = 1
    step: str = "newton"
    damping: float = 0.01
    patience: int = 1
    scored: bool = False
    memory: str = "auto"


@dataclass(frozen=True)
class MatchingPart:
    """Block matching: at most `passes` over the calibration sequences for each pruned block (0: none), of `steps`
    optimizer steps each; rate: how far a step moves a weight, as a share of the root mean square of its matrix.
    """

    passes: int = 0
    steps: int = 8
    rate: float = 0.03


@dataclass(frozen=True)
class AllocationPart:
    """Which matrix gives more zeros. rules: those tried beside uniform shares (owl, importance, knapsack); `least`: not
    below this sparsity. Only `unstructured` leaves anything to share out.
    """

    rules: list[str] = field(default_factory=list)
    least: float = 0.6


@dataclass(frozen=True)
class ExpertsPart:
    """Mixtures of experts. starved: what becomes of an expert that fewer than `fewest` calibration tokens reach:
    `all_tokens` (it is measured on all tokens of its layer), `wanda` (pruned by that), or `skip` (it stays dense);
    fewest: without a number as many as the expert has inputs.
    """

    starved: str = "all_tokens"
    fewest: int | None = None
