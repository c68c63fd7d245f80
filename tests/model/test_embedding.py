import pytest
import torch

from search_r3.model.embedding import embed, embed_positions

E = 9


def test_takes_the_last_embedding_token_of_each_row():
    ids = torch.tensor([[E, 1, E, 0], [1, E, 0, 0], [0, 0, 2, E]])
    assert embed_positions(ids, E).tolist() == [2, 1, 3]


def test_a_row_without_the_token_is_an_error_not_another_position():
    with pytest.raises(ValueError, match="row 1"):
        embed_positions(torch.tensor([[1, E], [1, 2]]), E)


def test_hand_worked_value_in_float32():
    states = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
    states[0, 1] = torch.tensor([3.0, 4.0, 0.0, 5.0])
    ids = torch.tensor([[1, E]])
    assert embed(states, ids, E, dims=2).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    assert embed(states, ids, E).dtype == torch.float32
    assert embed(states, ids, E).norm() == pytest.approx(1.0)


def test_padding_side_does_not_matter():
    states = torch.randn(1, 3, 8)
    right = torch.cat([states, torch.randn(1, 2, 8)], dim=1)
    left = torch.cat([torch.randn(1, 2, 8), states], dim=1)
    ids = [1, 2, E]
    plain = embed(states, torch.tensor([ids]), E)
    assert torch.equal(plain, embed(right, torch.tensor([[*ids, 0, 0]]), E))
    assert torch.equal(plain, embed(left, torch.tensor([[0, 0, *ids]]), E))
