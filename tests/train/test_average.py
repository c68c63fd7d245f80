import pytest
import torch

from search_r3 import SearchR3
from search_r3.errors import CheckpointError
from search_r3.model.checkpoint import Stage, initialise, load, save
from search_r3.model.export import card
from search_r3.train.average import average
from tests.conftest import build_base


@pytest.fixture
def other(checkpoint, tmp_path):
    """The tiny checkpoint, every weight one more, perhaps with its prompts swapped."""
    model, tokenizer, manifest = load(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1

    def write(name, swapped=False, training=()):
        acts = manifest.prompts
        prompts = acts.model_copy(update={"embed": acts.reason, "reason": acts.embed}) if swapped else acts
        save(tmp_path / name, model, tokenizer, prompts, embed_token=manifest.embed_token, training=training)
        return tmp_path / name

    return write


def test_the_mean_lies_between(checkpoint, other, tmp_path):
    average(checkpoint, other("other"), tmp_path / "mean", 0.25)
    before, (mean, _, manifest) = load(checkpoint)[0], load(tmp_path / "mean")
    for one, between in zip(before.parameters(), mean.parameters(), strict=True):
        torch.testing.assert_close(between, one + 0.25)
    assert manifest.parent.weights_sha256 == load(checkpoint)[2].weights_sha256
    told = card(SearchR3.from_pretrained(tmp_path / "mean"))
    assert f"`{checkpoint.parent.name}/{checkpoint.name}, averaged with {tmp_path.name}/other (weight 0.25)`" in told


def test_the_mean_was_trained_as_both_were(other, tmp_path):
    sft, rl = (Stage(stage=stage, recipe={}, data="0f") for stage in ("sft", "rl"))
    average(other("before", training=(sft,)), other("after", training=(sft, rl)), tmp_path / "mean")
    assert load(tmp_path / "mean")[2].training == (sft, rl)


def test_what_cannot_be_averaged_is_refused(checkpoint, other, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        average(checkpoint, checkpoint, tmp_path / "taken")
    with pytest.raises(CheckpointError, match=r"between 0 and 1, got 1\.5"):
        average(checkpoint, checkpoint, tmp_path / "mean", 1.5)
    for n in range(2):
        initialise(build_base(tmp_path / f"b{n}", tied=n == 0), tmp_path / f"c{n}")
    for pair in ((tmp_path / "c0", tmp_path / "c1"), (tmp_path / "c1", tmp_path / "c0")):
        with pytest.raises(CheckpointError, match=r"differ in lm_head\.weight"):
            average(*pair, tmp_path / "mean")
    with pytest.raises(CheckpointError, match="different prompts"):
        average(checkpoint, other("asked", swapped=True), tmp_path / "mean")
