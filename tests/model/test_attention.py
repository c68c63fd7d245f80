import pytest
import torch
from transformers import DynamicCache

from search_r3.model.attention import Packed, _attention, packed_states
from search_r3.model.cache import take_prefix

PREFIX = [5, 9, 7]
TEXTS = [[11, 12], [13, 14, 15, 16, 17], [18]]


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_states_and_gradients_equal_unshared_unpadded_passes(model):
    """The prefix is computed once, and what flows back into it is the sum over all texts."""
    backbone = model.engine.backbone
    weights = torch.randn(len(TEXTS), model.manifest.dimension, generator=torch.Generator().manual_seed(0))

    alone = torch.stack(
        [backbone(input_ids=torch.tensor([PREFIX + text]), use_cache=False).last_hidden_state[0, -1] for text in TEXTS]
    )
    expected = gradients(model.engine.model, (alone * weights).sum())

    row = [token for text in TEXTS for token in text]
    packed = Packed.of([len(text) for text in TEXTS], len(PREFIX), torch.device("cpu"))
    together = packed_states(backbone, torch.tensor([PREFIX + row]), packed)[0, packed.ends]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    found = gradients(model.engine.model, (together * weights).sum())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)

    cache = DynamicCache()
    backbone(input_ids=torch.tensor([PREFIX]), past_key_values=cache, use_cache=True)
    packed = Packed.of([len(text) for text in TEXTS], take_prefix(cache), torch.device("cpu"))
    cached = packed_states(backbone, torch.tensor([row]), packed)[0, packed.ends]
    torch.testing.assert_close(cached, alone, atol=1e-5, rtol=0)


def test_a_turn_longer_than_the_attention_window_is_refused(model):
    packed = Packed.of([3], model.engine.prefix("embed"), torch.device("cpu"))
    part = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="attention window of 4"):
        _attention(model.engine.backbone.layers[0].self_attn, part, part, part, None, packed=packed, sliding_window=4)
