import math

import pytest
import torch
from torch.nn.functional import normalize

from search_r3.train.losses import anisotropy, distillation, info_nce, kl_to_base, sft_nll, triplet_margin, uniformity


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_sft_nll_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert sft_nll(logits, torch.tensor([0, 1])).item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_kl_by_hand_and_zero_for_equal():
    base, model = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl_to_base(base, model).item() == pytest.approx(expected)
    assert kl_to_base(base, base + 5).item() == pytest.approx(0, abs=1e-6)


def test_info_nce_by_hand():
    queries = torch.tensor([[1.0, 0.0]])
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = info_nce(queries, documents, torch.tensor([0]), temperature=0.5)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)))


def test_known_positives_and_too_good_negatives_do_not_count():
    queries, documents = torch.tensor([[0.8, 0.6]]), torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])
    positive = torch.tensor([0])  # cosine 0.8; the second document's is 1.0
    without = info_nce(queries, documents[[0, 2]], positive)
    known = torch.tensor([[True, True, False]])
    assert info_nce(queries, documents, positive, known).item() == pytest.approx(without.item())
    assert info_nce(queries, documents, positive, false_negative_margin=0.1).item() == pytest.approx(without.item())
    assert info_nce(queries, documents, positive, false_negative_margin=0.3).item() > without.item() + 1


def test_info_nce_equals_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    queries, positives, negatives = unit(6, 16), unit(6, 16, seed=1), unit(6, 16, seed=2)
    peer = losses.MultipleNegativesRankingLoss(model=None, scale=20.0)
    expected = peer.compute_loss_from_embeddings([queries, positives, negatives], None)
    found = info_nce(queries, torch.cat([positives, negatives]), torch.arange(6), temperature=1 / 20)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_triplet_margin_by_hand():
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    positives = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
    negatives = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    assert triplet_margin(queries, positives, negatives, margin=0.1).item() == pytest.approx(0.15)
    assert triplet_margin(queries[:0], positives[:0], negatives[:0]).item() == 0


def test_triplet_equals_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    queries, positives, negatives = unit(6, 16), unit(6, 16, seed=1), unit(6, 16, seed=2)
    distance = losses.TripletDistanceMetric.COSINE
    peer = losses.TripletLoss(model=None, distance_metric=distance, triplet_margin=0.2)
    expected = peer.compute_loss_from_embeddings([queries, positives, negatives], None)
    assert triplet_margin(queries, positives, negatives, margin=0.2).item() == pytest.approx(expected.item(), abs=1e-6)


def test_distillation_by_hand():
    student, teacher = torch.tensor([[0.3, 0.0, 0.1]]), torch.tensor([[0.2, 0.1, 0.9]])
    hidden = torch.tensor([[False, False, True]])
    p, q = (torch.softmax(row / 0.1, dim=0) for row in (teacher[0, :2], student[0, :2]))
    expected = (p * (p / q).log()).sum()
    found = distillation(student, teacher, hidden, temperature=0.1, teacher_temperature=0.1)
    torch.testing.assert_close(found, expected)


def test_distillation_is_zero_for_the_teacher_s_own_order_and_hides_rows_with_nothing_to_meet():
    cosines = unit(4, 5).requires_grad_()
    hidden = torch.eye(4, 5, dtype=torch.bool)
    hidden[3] = True
    # shifted and stretched alike: the same distribution
    same = distillation(cosines, 2 * cosines.detach() + 0.3, hidden, temperature=0.05, teacher_temperature=0.1)
    assert same.item() == pytest.approx(0, abs=1e-6)
    other = distillation(cosines, unit(4, 5, seed=1), hidden)
    other.backward()
    assert other.item() > 0.1
    assert torch.isfinite(cosines.grad).all()
    assert not cosines.grad[hidden].any()
    assert distillation(cosines, cosines, torch.ones_like(hidden)).item() == 0


def test_spread_of_vectors():
    same, opposite = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert anisotropy(same).item() == pytest.approx(1)
    assert anisotropy(opposite).item() == pytest.approx(-1)
    assert uniformity(same).item() == pytest.approx(0)
    assert uniformity(opposite).item() == pytest.approx(-8)
