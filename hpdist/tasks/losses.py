"""Soft targets and the losses against them, all from logits: a softmax of a softmax is nowhere."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def confident(probabilities: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """Which rows reach a threshold, fp32 [rows], and every row's likeliest class, int64 [rows].

    The threshold is one number for all rows, or [classes]: of the row's likeliest class.
    """
    confidence, pseudo_labels = probabilities.max(dim=-1)
    if isinstance(threshold, Tensor) and threshold.dim() > 0:
        threshold = threshold[pseudo_labels]
    return (confidence >= threshold).float(), pseudo_labels


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities at a temperature: softmax(z / T), [rows, classes]; T = 1 changes nothing."""
    return (logits / temperature).softmax(dim=-1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """H(q, p) = -sum_c q_c log p_c of each row, [rows]; `targets` q are [rows, classes]."""
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """mean_c (p_c - q_c)^2 of each row, [rows]; `targets` q are [rows, classes]."""
    return (logits.softmax(dim=-1) - targets).square().mean(dim=-1)


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
