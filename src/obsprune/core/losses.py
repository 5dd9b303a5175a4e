"""How far a pruned model's outputs are from the dense model's, and from the text.

Legend: s logits of the pruned model (student), t of the dense one (teacher), [..., V]; V classes or vocabulary.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, in float32 or better."""
    return functional.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, dim=-1)


def divergence(s: Tensor, t: Tensor) -> Tensor:
    """KL(dense ‖ pruned) in nats, summed over all tokens; s, t: log-probabilities [..., V]. No gradient enters t."""
    t = t.detach()
    return (t.exp() * (t - s)).sum()


def next_token_nll(s: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each next token, summed; s log-probabilities [B, T, V], ids [B, T]; B·(T−1) terms."""
    return -s[:, :-1].gather(-1, ids[:, 1:, None]).sum()


def cross_entropy(s: Tensor, t: Tensor) -> Tensor:
    """−Σ p(dense) log p(pruned) in nats, summed: the divergence and the dense model's own entropy; [..., V] both."""
    return -(t.exp() * s).sum()


def agreement(s: Tensor, t: Tensor) -> Tensor:
    """For how many predictions both models have the same first choice; [..., V] both."""
    return (s.argmax(-1) == t.argmax(-1)).sum()


def perplexity(nll: float) -> float:
    """exp of the mean negative log-likelihood; of a hopeless one, the largest number that is still a number."""
    return math.exp(min(nll, 700.0))
