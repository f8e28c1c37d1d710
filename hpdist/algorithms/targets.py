"""Soft targets and the losses against them, all from logits: a softmax of a softmax is nowhere."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities at a temperature: softmax(z / T), [rows, classes]; T = 1 changes nothing."""
    return (logits / temperature).softmax(dim=-1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """H(q, p) = -sum_c q_c log p_c of each row, [rows]; `targets` q are [rows, classes]."""
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)


def kl_divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(q || p) = sum_c q_c (log q_c - log p_c) of each row, [rows], both given as logits."""
    log_targets = target_logits.log_softmax(dim=-1)
    return (log_targets.exp() * (log_targets - logits.log_softmax(dim=-1))).sum(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """H(p, p) of each row, [rows]."""
    log_probabilities = logits.log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def hard_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """H(onehot(y), p) = -log p_y of each row, [rows]; `labels` int64 [rows]."""
    return F.cross_entropy(logits, labels, reduction="none")
