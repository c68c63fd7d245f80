import numpy as np
import pytest
import torch

from search_r3 import SearchR3, Status
from search_r3.model.checkpoint import initialise
from search_r3.model.reasoning import Sampling, _choose, _Row
from tests.conftest import TEXTS, build_base
from tests.model.test_engine import full_forward


def control_ids(model):
    return {i for i, token in model.engine.tokenizer.added_tokens_decoder.items() if token.special}


def thought(model, result):
    return [token for token in result.token_ids if token not in control_ids(model)]


def reference_greedy(model, query, limit):
    """Greedy decoding by full passes over the growing text."""
    engine, control, ids = model.engine, control_ids(model), []
    prompt = engine.prefix_ids("reason") + engine.tails([query], "reason", 256)[0]
    with torch.inference_mode():
        while len(ids) < limit and not (ids and ids[-1] in control):
            ids.append(int(engine.model(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
    return ids


def test_greedy_tokens_and_vectors_equal_full_passes(model):
    for query, result in zip(TEXTS, model.reason(TEXTS, max_new_tokens=12), strict=True):
        assert list(result.token_ids) == reference_greedy(model, query, 12)
        expected = full_forward(model, query, "reason", 256, thought(model, result))
        np.testing.assert_allclose(result.vector, expected, atol=1e-5)


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A model whose sampled reasonings end in every way: by E, by the end of turn, by running out of tokens."""
    folder = tmp_path_factory.mktemp("talkative")
    initialise(build_base(folder / "base", seed=3), folder / "checkpoint")
    model = SearchR3.from_pretrained(folder / "checkpoint")
    head = torch.nn.Linear(32, model.engine.model.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(model.engine.model.lm_head.weight)
        head.bias.zero_()
        head.bias[model.engine.embed_token_id] = 2.0
        head.bias[model.engine.tokenizer.eos_token_id] = 2.0
    model.engine.model.lm_head = head
    return model


def test_every_ending_has_the_vector_of_a_full_pass(talkative):
    results = talkative.reason(TEXTS, max_new_tokens=10, temperature=1.0, samples=8, seed=1)
    assert len(results) == 48
    endings = set()
    for number, result in enumerate(results):
        last = result.token_ids[-1]
        finished = last == talkative.engine.embed_token_id
        assert result.status is (Status.FINISHED if finished else Status.FORCED)
        endings.add("E" if finished else "eos" if last in control_ids(talkative) else "length")
        assert len(result.logprobs) == len(result.token_ids) <= 10
        expected = full_forward(talkative, TEXTS[number // 8], "reason", 256, thought(talkative, result))
        np.testing.assert_allclose(result.vector, expected, atol=1e-5)
    assert endings == {"E", "eos", "length"}


def test_logprobs_are_those_of_a_full_pass(talkative):
    temperature = 0.7
    result = talkative.reason(TEXTS[:1], max_new_tokens=8, temperature=temperature, seed=4)[0]
    engine = talkative.engine
    prompt = engine.prefix_ids("reason") + engine.tails(TEXTS[:1], "reason", 256)[0]
    with torch.inference_mode():
        logits = engine.model(torch.tensor([prompt + list(result.token_ids)])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits / temperature, dim=-1).gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
    np.testing.assert_allclose(result.logprobs, expected.numpy(), atol=1e-4)


def test_same_seed_same_text_whatever_the_batch(talkative):
    kwargs = {"max_new_tokens": 10, "temperature": 1.0, "seed": 7, "samples": 2}
    whole = talkative.reason(TEXTS, **kwargs)
    again = talkative.reason(TEXTS, batch_rows=3, **kwargs)
    assert [r.token_ids for r in whole] == [r.token_ids for r in again]
    other = talkative.reason(TEXTS, **(kwargs | {"seed": 8}))
    assert [r.token_ids for r in whole] != [r.token_ids for r in other]


def test_sampling_follows_the_distribution(talkative):
    engine = talkative.engine
    prompt = engine.prefix_ids("reason") + engine.tails(TEXTS[:1], "reason", 256)[0]
    with torch.inference_mode():
        expected = torch.softmax(engine.model(torch.tensor([prompt])).logits[0, -1].float(), dim=-1)
    results = talkative.reason(TEXTS[:1], max_new_tokens=1, temperature=1.0, samples=2000, batch_rows=2000)
    counts = np.bincount([r.token_ids[0] for r in results], minlength=len(expected)) / 2000
    assert np.abs(counts - expected.numpy()).sum() / 2 < 0.2  # total variation
    likely = int(expected.argmax())
    assert counts[likely] == pytest.approx(float(expected[likely]), abs=0.05)


def test_top_p_never_leaves_the_nucleus(talkative):
    engine = talkative.engine
    prompt = engine.prefix_ids("reason") + engine.tails(TEXTS[:1], "reason", 256)[0]
    with torch.inference_mode():
        probabilities = torch.softmax(engine.model(torch.tensor([prompt])).logits[0, -1].float(), dim=-1)
    ordered, tokens = probabilities.sort(descending=True)
    nucleus = set(tokens[: int((ordered.cumsum(0) < 0.3).sum()) + 1].tolist())
    results = talkative.reason(TEXTS[:1], max_new_tokens=1, temperature=1.0, top_p=0.3, samples=200, batch_rows=200)
    assert {r.token_ids[0] for r in results} <= nucleus
    assert len({r.token_ids[0] for r in results}) > 1


def test_streamed_pieces_make_the_text(talkative):
    pieces: dict[int, str] = {}
    results = talkative.reason(
        TEXTS[:3], max_new_tokens=10, temperature=1.0, seed=2,
        on_text=lambda row, piece: pieces.update({row: pieces.get(row, "") + piece}),
    )  # fmt: skip
    for row, result in enumerate(results):
        assert pieces.get(row, "").strip() == result.text
    assert any(result.text for result in results)


def test_encode_reasoned_agrees_with_reason(talkative):
    results = talkative.reason(TEXTS, max_new_tokens=6)
    vectors = talkative.encode_reasoned(TEXTS, [thought(talkative, r) for r in results])
    np.testing.assert_allclose(vectors, np.stack([r.vector for r in results]), atol=1e-5)


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"max_new_tokens": 1, "temperature": -1}, {"max_new_tokens": 1, "top_p": 0}]
)
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(ValueError, match="max_new_tokens >= 1"):
        Sampling(**bad)


def test_rows_can_be_stopped_and_results_come_as_rows_end(model):
    turns, came = [], []
    results = model.reason(
        TEXTS[:3],
        max_new_tokens=6,
        between=lambda: turns.append(len(came)),
        stop=lambda row: row == 1 and len(turns) == 3,
        on_result=lambda row, result: came.append((row, result)),
    )
    whole = model.reason(TEXTS[:3], max_new_tokens=6)
    assert len(whole[1].token_ids) > 2
    assert results[1].token_ids == whole[1].token_ids[:2]
    assert results[1].status is Status.FORCED
    np.testing.assert_allclose(
        results[1].vector, full_forward(model, TEXTS[1], "reason", 256, list(whole[1].token_ids[:2])), atol=1e-5
    )
    assert [results[n].token_ids for n in (0, 2)] == [whole[n].token_ids for n in (0, 2)]
    assert sorted(row for row, _ in came) == [0, 1, 2]
    assert all(result is results[row] for row, result in came)
    assert turns == sorted(turns)
    assert len(turns) == max(len(result.token_ids) for result in results)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reasoning_does_not_open_with_the_words_of_the_embed_act(model, temperature):
    engine = model.engine
    assert engine.tokenizer.decode(engine.reply_ids) == "The embedding is"
    first, second = engine.reply_ids[:2]
    logits = torch.zeros(2, engine.model.config.vocab_size)
    logits[:, second] = 50.0
    rows = [_Row(0, np.full(4, 0.5), [first]), _Row(1, np.full(4, 0.5), [first + 1])]
    chosen, logprobs = _choose(logits, rows, 1, Sampling(4, temperature), engine.reply_ids)
    assert chosen[0] != second
    assert chosen[1] == second
    assert logprobs[0] == pytest.approx(-50 / (temperature or 1.0), abs=1e-3)  # of the model, not of what was allowed
    assert _choose(logits, rows, 2, Sampling(4, temperature), engine.reply_ids)[0].tolist()[0] == second


def test_no_samples_are_none(model):
    with pytest.raises(ValueError, match="samples=0"):
        model.reason(TEXTS, samples=0)
