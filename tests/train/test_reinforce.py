import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator

from search_r3 import SearchR3
from search_r3.environment import Outcome, Relevant
from search_r3.errors import CheckpointError, StoreError, TrainingError
from search_r3.model.checkpoint import read_manifest
from search_r3.records import Episode, Reasoned, Status
from search_r3.train import rewards
from search_r3.train.grpo import RetrievalGRPOTrainer, arguments
from search_r3.train.reinforce import ENVIRONMENT, prepare, train
from search_r3.train.rl_config import Reward, RLRecipe
from search_r3.train.rollouts import Rollouter, RolloutPolicy, repeated
from search_r3.train.run import METRICS, TABLE
from tests.conftest import build_base
from tests.train.conftest import write_set
from tests.train.test_supervised import STATES, assert_equal, run_on_two, run_sharded, sharders, weights


def build(base, **changes):
    """A recipe of a few seconds on the tiny model."""
    values = {
        "model": str(base),
        "sources": [{"path": "train", "limit": 12}],
        "steps": 4,
        "group": {
            "queries": 2,
            "samples": 4,
            "micro": 4,
            "query_tokens": 16,
            "document_tokens": 128,  # whole: what is cut to the same text ties, and rounding then decides its rank
            "reasoning_tokens": 6,
        },
        "environment": {"budget": 0.4, "depth": 5, "k": 5, "audit_every": 2},
        "learning_rate": 1e-3,
        "objective": {"beta": 0.05, "info_nce": 0.2},
        "lora": {"r": 4, "alpha": 8},
        "save_every": 2,
        "table_every": 1,
        "guards": {"least_format": 0},
    }
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(values.get(name), dict) and isinstance(value, dict) else value
    return RLRecipe.model_validate(values)


@pytest.fixture
def rl(base):
    return lambda **changes: build(base, **changes)


def run(recipe, root, output, **options):
    return train(prepare(recipe, root), output, progress=False, **options)


def log(output):
    lines = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def first_step(recipe, root, output, monkeypatch):
    """Loss and gradients of the first optimiser step, accumulated over its parts."""
    found = {"loss": 0.0}
    original = RetrievalGRPOTrainer.training_step

    def step(self, model, inputs, num_items_in_batch=None):
        found["loss"] += original(self, model, inputs, num_items_in_batch).item()
        if self._step % self.args.gradient_accumulation_steps == 0:
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            raise StopIteration
        return torch.tensor(0.0)

    monkeypatch.setattr(RetrievalGRPOTrainer, "training_step", step)
    with pytest.raises(StopIteration):
        run(recipe, root, output)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("variant", ["dapo", "grpo"])
def test_accumulation_changes_no_gradient(rl, root, tmp_path, monkeypatch, variant):
    lengths = set()
    note = RetrievalGRPOTrainer._note

    def first(micro):
        def see(self, found):
            lengths.update(len(episode.reasoned.token_ids) for episode in found.episodes)
            note(self, found)

        recipe = rl(group={"micro": micro, "reasoning_tokens": 60}, objective={"variant": variant})
        monkeypatch.setattr(RetrievalGRPOTrainer, "_note", see)
        return first_step(recipe, root, tmp_path / str(micro), monkeypatch)

    whole, parts = first(8), first(1)
    assert len(lengths) > 1  # or what the loss is divided by would not matter
    assert whole.keys() == parts.keys()
    assert len(whole) > 10
    scale = max(value.abs().max().item() for name, value in whole.items() if name != "loss")
    assert scale > 0
    for name in whole.keys() - {"loss"}:
        torch.testing.assert_close(parts[name], whole[name], atol=2e-5 * scale, rtol=0)


def test_variants_that_differ_in_clipping_agree_on_fresh_rollouts(rl, root, tmp_path, monkeypatch):
    one, other = (
        first_step(rl(objective={"variant": variant}), root, tmp_path / variant, monkeypatch)
        for variant in ("dapo", "cispo")
    )
    scale = max(value.abs().max().item() for name, value in one.items() if name != "loss")
    for name in one.keys() - {"loss"}:
        torch.testing.assert_close(other[name], one[name], atol=2e-5 * scale, rtol=0)


def test_what_the_decoder_rounds_is_clipped(rl, root, tmp_path, monkeypatch):
    def first(precision, clip):
        recipe = rl(objective={"clip": clip, "clip_high": clip, "info_nce": 0}, rollout_precision=precision)
        return first_step(recipe, root, tmp_path / f"{precision}-{clip}", monkeypatch)

    def apart(one, other):
        names = one.keys() - {"loss"}
        scale = max(one[name].abs().max().item() for name in names)
        return max((one[name] - other[name]).abs().max().item() for name in names) / scale

    assert apart(first("float32", 0.2), first("float32", 1e-3)) < 1e-4
    assert apart(first("bfloat16", 0.2), first("bfloat16", 1e-3)) > 0.1


def test_the_packed_pass_agrees_with_the_rollout_and_with_trl(rl, root, tmp_path, monkeypatch):
    """Log-probabilities and vectors of the trainer are those that decoding gave, and TRL's own on finished rows."""
    found = {}
    original = RetrievalGRPOTrainer._compute_loss

    def compare(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        width = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            logps, entropies, _ = self._get_per_token_logps_and_entropies(model, ids, mask, width)
            vectors = self._vectors
            theirs = super(RetrievalGRPOTrainer, self)._get_per_token_logps_and_entropies(
                model, ids, mask, width, compute_entropy=True
            )
        for line, number in enumerate(inputs["rollout"].tolist()):
            reasoned = self.rollouts.episodes[number].reasoned
            count = len(reasoned.token_ids)
            torch.testing.assert_close(logps[line, :count], torch.tensor(reasoned.logprobs), atol=1e-4, rtol=0)
            torch.testing.assert_close(vectors[line], torch.tensor(reasoned.vector), atol=1e-5, rtol=0)
            torch.testing.assert_close(logps[line, :count], theirs[0][line, :count], atol=1e-4, rtol=0)
            torch.testing.assert_close(entropies[line, :count], theirs[1][line, :count], atol=1e-4, rtol=0)
            found[reasoned.status] = found.get(reasoned.status, 0) + 1
        return original(self, model, inputs)

    monkeypatch.setattr(RetrievalGRPOTrainer, "_compute_loss", compare)
    run(rl(steps=3, learning_rate=1e-2, group={"reasoning_tokens": 40, "micro": 8}), root, tmp_path / "run")
    assert sum(found.values()) == 24
    assert found[Status.FORCED] > 0


def test_a_run_logs_what_matters_and_ends_in_a_plain_checkpoint(rl, root, tmp_path):
    folder = run(rl(dev={"sets": ["train"], "every": 2, "reason": 4}), root, tmp_path / "run")
    model = SearchR3.from_pretrained(folder)
    assert model.reason(["a query"], max_new_tokens=3)[0].vector.shape == (32,)
    assert [made.stage for made in model.manifest.training] == ["rl"]
    assert model.manifest.max_tokens.reasoning == 6  # what it was trained with
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = "reward reward_rank reward_rank_spread zero_spread format_rate forced_rate length kl entropy info_nce "
    wanted += "anisotropy environment_age_mean environment_tokens repeated grad_norm"
    assert set(wanted.split()) <= lines[0].keys()
    assert "environment_audit_reward_error" in lines[-1]
    dev = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines() if "dev_ndcg10" in line]
    assert [line["step"] for line in dev] == [0, 2, 4]
    assert "dev_ndcg10_reason" in dev[0]
    table = [json.loads(line) for line in (tmp_path / "run" / TABLE).read_text().splitlines()]
    assert len(table) == 4 * 8
    assert {"query", "reasoning", "reward", "rank", "top"} <= table[0].keys()


def key_reward(episode, outcome):
    """1 where the relevant document comes first."""
    return float(outcome.relevant[0].rank == 1)


class Keys:
    """Documents stand at the corners of a cube of 4 dimensions; see `test_it_learns_for_the_stated_reason`."""

    def encode_documents(self, documents):
        return np.eye(4, 32, dtype=np.float32)[[int(document.id.split("d")[-1]) % 4 for document in documents]]


@pytest.mark.parametrize("shuffled", [False, True])
def test_it_learns_for_the_stated_reason(rl, root, tmp_path, monkeypatch, shuffled):
    """Only the right word makes the vector find its document; with rewards shuffled nothing can be learnt."""
    original = RolloutPolicy.sample

    def sample(self, queries, recipe, seed, first_row):
        keyed = []
        for one in original(self, queries, recipe, seed, first_row):
            vector = np.eye(4, 32, dtype=np.float32)[one.token_ids[0] % 4]
            keyed.append(Reasoned(one.text, vector, one.token_ids, one.logprobs, one.status))
        return keyed

    monkeypatch.setattr(RolloutPolicy, "sample", sample)
    recipe = rl(
        steps=60, sources=[{"path": "train", "limit": 1, "documents": 4}], learning_rate=5e-3, lora=None,
        group={"queries": 4, "samples": 8, "micro": 32, "reasoning_tokens": 2}, save_every=1000,
        environment={"k": 1, "policy": "frozen"},
        reward={"rank": f"{__name__}:key_reward", "format_weight": 0, "shuffle": shuffled},
        objective={"beta": 0, "info_nce": 0},
    )  # fmt: skip
    run(recipe, root, tmp_path / "run", encoder=Keys())
    seen = [line["reciprocal_rank"] for line in log(tmp_path / "run")]
    first = np.mean([r == 1 for r in seen[:1]])
    assert first < 1
    right = [2 * value - 1 for value in seen]  # rank 1 or 2: the share that came first
    assert np.mean(right[:3]) < 0.6
    assert (np.mean(right[-5:]) > 0.9) == (not shuffled)


def test_a_killed_run_resumes_to_the_same_curve(rl, root, tmp_path):
    recipe = rl(steps=12)
    straight = run(recipe, root, tmp_path / "straight")
    file, broken = tmp_path / "recipe.yaml", tmp_path / "broken"
    file.write_text(yaml.safe_dump(recipe.model_dump()))
    command = [sys.executable, "-m", "search_r3", "train", "rl", str(file), "--data", str(root), "-o", str(broken)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (broken / "checkpoint-4" / ENVIRONMENT).exists():
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    half = broken / "checkpoint-99"  # what a kill while saving leaves: no state of the environment
    half.mkdir()
    (half / "trainer_state.json").write_text("{}")
    resumed = run(recipe, root, broken, resume=True)
    assert not half.exists()
    assert_equal(weights(straight), weights(resumed), 1e-6)
    for one, other in zip(log(tmp_path / "straight"), log(broken), strict=True):
        for name in ("loss", "reward", "kl", "environment_age_mean", "environment_tokens"):
            assert one[name] == pytest.approx(other[name], abs=1e-6), name


def test_two_processes_equal_one(rl, root, tmp_path):
    recipe = rl(environment={"policy": "frozen"}, group={"reasoning_tokens": 60})  # of several lengths
    single = run(recipe, root, tmp_path / "one")
    done = run_on_two(recipe, root, tmp_path / "two", "search_r3", "rl", timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(weights(single), weights(tmp_path / "two" / "model"), 1e-5)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    for name in ("reward_rank", "format_rate", "length", "info_nce"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], abs=1e-4), name


@sharders
def test_sharded_weights_equal_whole_ones_and_resume(rl, root, tmp_path, sharder):
    recipe = rl(environment={"policy": "frozen"}, dev={"sets": ["train"], "every": 2, "queries": 8})
    whole, output = run(recipe, root, tmp_path / "whole"), tmp_path / "sharded"
    for more in [[], ["--resume"]] if sharder == "deepspeed" else [[]]:  # FSDP resumes in stage 1
        done = run_sharded(recipe, root, output, *more, stage="rl", sharder=sharder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (output / "checkpoint-4" / STATES[sharder]).exists()
        assert_equal(weights(whole), weights(output / "model"), 1e-5)
        assert dev(tmp_path / "whole") == pytest.approx(dev(output), abs=1e-6)
        shutil.rmtree(output / "model")
        shutil.rmtree(output / "checkpoint-4")


def test_sharded_weights_without_adapters_equal_whole_ones(rl, root, tmp_path):
    recipe = rl(model=str(build_base(tmp_path / "base", tied=False)), environment={"policy": "frozen"}, lora=None)
    whole = run(recipe, root, tmp_path / "whole")
    done = run_sharded(recipe, root, tmp_path / "sharded", stage="rl")
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = weights(whole), weights(tmp_path / "sharded" / "model")
    assert_equal(one, other, 1e-3)  # Adam makes a whole step of what rounding leaves of a gradient near zero ...
    far = sum(int(((one[name] - other[name]).abs() > 1e-5).sum()) for name in one)
    assert far <= 1e-3 * sum(part.numel() for part in one.values())  # ... which few are


def test_sharded_weights_in_mixed_precision(rl, root, tmp_path):
    recipe = rl(precision="bfloat16", rollout_precision="bfloat16", gradient_checkpointing=True)
    done = run_sharded(recipe, root, tmp_path / "sharded", stage="rl")
    assert done.returncode == 0, done.stderr[-3000:]
    for line in log(tmp_path / "sharded"):
        assert np.isfinite(line["loss"])
        assert line["grad_norm"] > 0


def test_bfloat16_rounds_nothing_that_is_saved(rl, root, tmp_path):
    recipe = rl(precision="bfloat16", rollout_precision="bfloat16", dev={"sets": ["train"], "every": 4, "queries": 8})
    after, before = weights(run(recipe, root, tmp_path / "run")), weights(tmp_path / "run" / "initial")
    name = next(name for name in before if name.endswith("q_proj.weight"))
    change = after[name] - before[name]
    assert 0 < torch.linalg.matrix_rank(change, rtol=1e-3) <= recipe.lora.r
    assert all(torch.equal(after[name], before[name]) for name in before if "proj" not in name)


def dev(folder):
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [line["dev_ndcg10"] for line in lines if "dev_ndcg10" in line]


def test_two_processes_refresh_and_resample_in_step(rl, root, tmp_path):
    recipe = rl(group={"queries": 4}, guards={"resample": 2}, reward={"rank": f"{__name__}:rough", "format_weight": 0})
    done = run_on_two(recipe, root, tmp_path / "run", "search_r3", "rl", timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = log(tmp_path / "run")
    assert any(line["resampled"] > 0 for line in lines)
    assert lines[-1]["environment_age_mean"] < 4


def rough(episode, outcome):
    """The same for most groups: whether the document is in the better half."""
    return float(outcome.relevant[0].rank <= outcome.corpus / 2)


def test_an_end_of_another_recipe_is_not_kept(rl, root, tmp_path):
    run(rl(), root, tmp_path / "run")
    before = weights(tmp_path / "run" / "model")
    with pytest.raises(TrainingError, match=r"learning_rate was 0\.001, is 0\.1: the model, its adapters"):
        run(rl(learning_rate=0.1), root, tmp_path / "run", resume=True, change=True)
    with pytest.raises(TrainingError, match=r"lora\.alpha was 8, is 1: the model, its adapters"):
        run(rl(lora={"alpha": 1}), root, tmp_path / "run", resume=True, change=True)
    other = shutil.copytree(rl().model, tmp_path / "other")
    with pytest.raises(TrainingError, match=r"model was .*, is .*other: .* start anew"):
        run(rl(model=str(other)), root, tmp_path / "run", resume=True, change=True)
    model = run(rl(steps=6), root, tmp_path / "run", resume=True, change=True)
    assert read_manifest(model).training[-1].changes == ("from checkpoint-4: steps was 4, is 6",)
    after = weights(model)
    assert any((before[name] != after[name]).any() for name in before)


def test_resuming_with_other_rewards_or_another_environment_is_refused(rl, root, tmp_path):
    run(rl(), root, tmp_path / "run")
    with pytest.raises(TrainingError, match=r"reward\.rank was dcg, is margin"):
        run(rl(reward={"rank": "margin"}), root, tmp_path / "run", resume=True)
    with pytest.raises(TrainingError, match=r"environment\.policy was read_repair\+drift, is frozen"):
        run(rl(environment={"policy": "frozen"}), root, tmp_path / "run", resume=True)
    (tmp_path / "run" / "checkpoint-4" / ENVIRONMENT).write_bytes(b"damaged")
    with pytest.raises(StoreError, match="go on from an older one"):
        run(rl(), root, tmp_path / "run", resume=True)


def none(episode, outcome):
    return None


def test_what_cannot_be_learnt_from_stops_with_advice(rl, root, tmp_path):
    with pytest.raises(TrainingError, match=r"all rewards are None.*reward\.rank"):
        run(rl(reward={"rank": f"{__name__}:none"}), root, tmp_path / "none")
    guards = {"patience": 2, "least_format": 1.0}
    with pytest.raises(TrainingError, match=r"stopped at step 2: format was 0.*`thoughts`"):
        run(rl(guards=guards), root, tmp_path / "format")
    assert (tmp_path / "format" / "checkpoint-2" / ENVIRONMENT).exists()
    with pytest.raises(TrainingError, match=r"stopped at step 3: length was .*stopped thinking"):
        run(rl(guards={"patience": 3, "least_length": 50}), root, tmp_path / "length")
    for name in ("nope", "nope.nope:nope", ":nope", ".nope:nope", "os:sep"):
        with pytest.raises(TrainingError, match=rf"reward\.rank: {name}"):
            prepare(rl(reward={"rank": name}), root)


def test_a_document_that_a_test_query_should_find_is_nowhere(rl, root):
    qrels = root / "train" / "qrels" / "train.tsv"
    qrels.write_text(qrels.read_text() + "q9\td0\t1\n")  # q9 keeps its other document
    write_set(root / "held", 1)
    prepared = prepare(rl(held_out=["held"]), root)
    assert "train:d0" not in {document.id for document in prepared.documents}
    assert prepared.qrels["train:q9"] == {"train:d9": 1}
    assert "train:q0" not in prepared.queries


def test_nothing_is_claimed_for_a_model_that_does_not_exist(rl, root, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        train(prepare(rl(model="./typo"), root), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_what_answers_a_query_answers_it_where_it_is_asked_again(rl, root):
    queries = root / "train" / "queries.jsonl"
    lines = [json.loads(line) for line in queries.read_text().splitlines()]
    lines[7]["text"] = lines[3]["text"]
    queries.write_text("".join(json.dumps(line) + "\n" for line in lines))
    qrels = root / "train" / "qrels" / "train.tsv"
    qrels.write_text(qrels.read_text().replace("q3\td3\t1", "q3\td3\t2") + "q3\td7\t0\nq3\td5\t0\n")
    prepared = prepare(rl(), root)
    assert prepared.qrels["train:q3"] == {"train:d3": 2, "train:d5": 0, "train:d7": 1}
    assert prepared.qrels["train:q7"] == {"train:d7": 1, "train:d3": 1}


def test_an_empty_reasoning_is_a_rollout_like_any_other(rl, root, tmp_path, monkeypatch):
    original = RolloutPolicy.sample

    def sample(self, queries, recipe, seed, first_row):
        token = self.engine.embed_token_id
        some = original(self, queries, recipe, seed, first_row)
        empty = [Reasoned("", one.vector, (token,), (-1.0,), Status.FINISHED) for one in some]
        return [empty[n] if n % 3 == 0 else one for n, one in enumerate(some)]

    monkeypatch.setattr(RolloutPolicy, "sample", sample)
    run(rl(steps=2), root, tmp_path / "run")
    assert all(line["format_rate"] == 0 and np.isfinite(line["loss"]) for line in log(tmp_path / "run"))


def test_out_of_memory_says_what_to_halve(rl, root, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Accelerator, "backward", full)
    with pytest.raises(TrainingError, match=r"step 1; halve group\.micro \(now \d+\), or group\.decode_rows"):
        run(rl(), root, tmp_path / "run")


def test_a_guard_can_halve_the_rate(rl, root, tmp_path):
    run(rl(guards={"patience": 2, "least_format": 1.0, "action": "halve"}), root, tmp_path / "run")
    rates = [line["learning_rate"] for line in log(tmp_path / "run")]
    assert rates[-1] == pytest.approx(rates[0] / 2)


def test_groups_without_a_spread_are_replaced(rl, root):
    prepared = prepare(rl(guards={"resample": 2}), root)
    asked = []

    def sample(queries, seed, first_row):
        asked.append(list(queries))
        good = len(asked) > 1
        reasoned = []
        for _ in queries:
            for n in range(4):
                vector = np.eye(4, 32, dtype=np.float32)[n if good else 0]
                reasoned.append(Reasoned("text", vector, (5, 6), (0.0, 0.0), Status.FORCED))
        return reasoned

    from search_r3.environment import RetrievalEnvironment

    environment = RetrievalEnvironment(prepared.documents, prepared.qrels, Keys(), prepared.recipe.environment)
    environment.reset()
    found = Rollouter(prepared.recipe, environment, prepared.queries, sample)(prepared.order[:2], 1)
    assert [len(one) for one in asked] == [2, 2]
    assert found.resampled == 2
    assert [episode.query for episode in found.episodes[::4]] == asked[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_text_from_another_backend_gets_its_vector_from_one_pass(rl, root, tmp_path, monkeypatch, precision):
    original, seen = RetrievalGRPOTrainer._compute_loss, []

    def compare(self, model, inputs):
        loss = original(self, model, inputs)
        for line, number in enumerate(inputs["rollout"].tolist()):
            reasoned = self.rollouts.episodes[number].reasoned
            atol = 1e-5 if precision == "float32" else 0.05
            torch.testing.assert_close(self._vectors[line], torch.tensor(reasoned.vector), atol=atol, rtol=0)
            seen.append(reasoned.token_ids)
        return loss

    monkeypatch.setattr(RetrievalGRPOTrainer, "_compute_loss", compare)
    run(rl(backend="trl", steps=2, learning_rate=1e-2, precision=precision), root, tmp_path / "run")
    assert len(set(seen)) > 8


def test_the_reference_of_full_training_is_the_first_policy(rl, root, tmp_path):
    run(rl(lora=None, steps=2), root, tmp_path / "run")
    kl = [line["kl"] for line in log(tmp_path / "run")]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-6


def episode(tokens=10, status=Status.FINISHED, text="words", limit=20):
    reasoned = Reasoned(text, np.ones(2, np.float32), tuple(range(tokens)), (0.0,) * tokens, status)
    return Episode("q", "query", reasoned, limit)


def outcome(rank, similarity=0.5, negative=0.4, corpus=100):
    relevant = (Relevant("d", 1, rank, similarity),) if rank else ()
    return Outcome("q", ("d",), np.array([similarity], np.float32), relevant, negative, corpus)


def test_rewards_by_hand():
    assert rewards.log_rank(episode(), outcome(10)) == pytest.approx(0.5)
    assert rewards.log_rank(episode(), outcome(1)) == 1
    assert rewards.dcg(episode(), outcome(3)) == pytest.approx(0.75 / 2)
    assert rewards.margin(episode(), outcome(10)) == pytest.approx(0.4 * 0.75 + 0.6 * 0.5)
    assert rewards.margin(episode(), outcome(1, 0.9, 0.1)) == pytest.approx(1)
    assert rewards.log_rank(episode(), outcome(0)) is None
    assert rewards.dcg(episode(), outcome(0)) is None
    assert rewards.margin(episode(), outcome(0)) is None
    assert rewards.format(episode()) == 1
    assert rewards.format(episode(status=Status.FORCED)) == 0
    assert rewards.format(episode(text="")) == 0
    assert [rewards.length(episode(n), 4, 10) for n in (2, 4, 10, 15, 20)] == [0.5, 1, 1, 0.5, 0]
    scored = rewards.Scorer(Reward(rank="log_rank", format_weight=0.2, length_weight=0.1, least_tokens=20))
    assert scored(episode(), outcome(10)).total == pytest.approx(0.5 + 0.2 + 0.05)
    assert scored(episode(), outcome(0)).total is None
    scored.rank = lambda episode, outcome: float("nan")
    assert scored(episode(), outcome(1)).total is None


def test_a_reward_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text("def half(episode, outcome):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # as of an installed script
    assert rewards.find("my_own_reward:half")(None, None) == 0.5


def test_repetition_is_seen():
    assert repeated("one two three four") == 0
    assert repeated("a b c " * 10) > 0.8
    assert repeated("") == 0


def test_impossible_sizes_are_refused(rl):
    with pytest.raises(ValueError, match="must divide the 8 rollouts"):
        rl(group={"micro": 3})
    with pytest.raises(ValueError, match="nothing rewards"):
        rl(reward={"rank_weight": 0}, objective={"info_nce": 0})
    with pytest.raises(ValueError, match=r"most_kl needs the divergence"):
        rl(guards={"most_kl": 1}, objective={"beta": 0})
    for micro, processes in ((4, 1), (4, 2)):
        with pytest.raises(TrainingError, match="bnpo averages over each"):
            arguments(rl(group={"micro": micro}, objective={"variant": "bnpo"}), Path("output"), processes, False)
    with pytest.raises(ValueError, match="vespo cannot be trained"):
        rl(backend="vllm", objective={"variant": "vespo"})
    limit = rl().group.reasoning_tokens
    for least, most in ((1, limit), (3, 2)):
        with pytest.raises(ValueError, match=rf"must lie below group.reasoning_tokens \({limit}\)"):
            rl(reward={"length_weight": 0.1, "least_tokens": least, "most_tokens": most})
