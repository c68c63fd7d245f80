"""The terms of stage 1 as pure functions of tensors. Source: arXiv 2510.07048, section 3, unless marked (ours).

L = a1 * sft_nll + a2 * kl_to_base + a3 * info_nce + a4 * triplet_margin (+ a5 * distillation, where there is a teacher)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, relu


def sft_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token cross-entropy on the assistant turn: the format, and the embedding token in the right place.

    logits: (N, V) at the positions before each target. targets: (N,) token ids. Returns a scalar, nats a token.
    """
    return cross_entropy(logits.float(), targets)


def kl_to_base(base_logits: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(base || model) over positions, so that the model keeps its language.

    base_logits, logits: (N, V), the first without gradient. Returns a scalar, nats a token.
    """
    base = log_softmax(base_logits.float(), dim=-1)
    model = log_softmax(logits.float(), dim=-1)
    return (base.exp() * (base - model)).sum(dim=-1).mean()


def info_nce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    known: Tensor | None = None,
    *,
    temperature: float = 0.02,
    false_negative_margin: float | None = None,
) -> Tensor:
    """Each query must find its positive among all documents of the batch.

    queries: (B, D), documents: (C, D), unit rows. positives: (B,) row of each query's positive in `documents`.
    known: (B, C) bool, true for documents that are relevant to the query; they are no negatives.
    false_negative_margin (ours): documents whose cosine exceeds the positive's by more than this are taken for
    unlabelled positives and left out; None keeps them.
    Returns a scalar. With one positive a query, in-batch negatives and no mask it equals sentence-transformers'
    MultipleNegativesRankingLoss with scale 1/temperature.
    """
    cosines = queries.float() @ documents.float().T  # (B, C)
    own = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, positives[:, None], True)
    left_out = torch.zeros_like(own) if known is None else known.clone()
    if false_negative_margin is not None:
        limit = cosines.detach().gather(1, positives[:, None]) + false_negative_margin
        left_out |= cosines.detach() > limit
    scores = (cosines / temperature).masked_fill(left_out & ~own, -torch.inf)
    return cross_entropy(scores, positives)


def triplet_margin(queries: Tensor, positives: Tensor, negatives: Tensor, *, margin: float = 0.15) -> Tensor:
    """Mean of max(0, margin + cos(q, d-) - cos(q, d+)) over pairs of a query and one of its hard negatives.

    queries, positives, negatives: (N, D), unit rows. Returns a scalar; 0 for no pairs.
    """
    if not len(queries):
        return queries.sum()
    gap = (queries.float() * (negatives - positives).float()).sum(dim=-1)
    return relu(margin + gap).mean()


def distillation(
    cosines: Tensor, taught: Tensor, left_out: Tensor, *, temperature: float = 0.03, teacher_temperature: float = 0.03
) -> Tensor:
    """Mean KL(teacher || student) between distributions over the documents of the batch, one of each row. (ours)

    cosines: (R, C) of the student, rows of queries and documents against documents. taught: (R, C) the teacher's.
    left_out: (R, C) bool, true where a document meets itself. Unlike InfoNCE it does not call a document wrong for not
    being judged. Returns a scalar, nats a row. Soft targets: Hinton et al., 2015 (arXiv 1503.02531).
    """
    never = -1e9  # finite, so that a row with nothing to meet agrees with itself
    teacher = log_softmax((taught.float() / teacher_temperature).masked_fill(left_out, never), dim=-1)
    student = log_softmax((cosines.float() / temperature).masked_fill(left_out, never), dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1).mean()


def uniformity(vectors: Tensor) -> Tensor:
    """log of the mean of exp(-2 |x - y|^2) over pairs; lower is more even. Source: Wang and Isola, 2020."""
    squared = 2 - 2 * (vectors.float() @ vectors.float().T)  # (N, N), unit rows
    pairs = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    return squared[pairs].mul(-2).exp().mean().log()


def anisotropy(vectors: Tensor) -> Tensor:
    """Mean cosine between different vectors: 0 in an even space, near 1 in a narrow cone."""
    count = len(vectors)
    return (vectors.float().sum(dim=0).square().sum() - count) / (count * (count - 1))
