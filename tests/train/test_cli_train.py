import json

import pytest
import yaml
from typer.testing import CliRunner

from search_r3.cli import app
from search_r3.errors import DataError, TrainingError
from search_r3.train import supervised
from search_r3.train.config import read_recipe
from tests.train.conftest import RECIPE


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def recipe_file(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump()))
    return path


def test_dry_run_counts_and_trains_nothing(recipe_file, recipe, root, tmp_path):
    result = run("train", "sft", recipe_file, "--data", root, "-o", tmp_path / "run", "--dry-run", "--json")
    report = json.loads(result.stdout)
    assert report["examples"] == {"train": 20}
    assert report["recipe"] == json.loads(recipe.model_dump_json())
    assert report["tokens"] > 6 * 4 * 10
    assert report["trained_parameters"] < report["parameters"]
    assert not (tmp_path / "run").exists()


def test_train_plot_and_refusals(recipe_file, root, tmp_path, monkeypatch):
    output, train = tmp_path / "run", supervised.train
    monkeypatch.setattr(supervised, "train", lambda *a, **k: print("a library's noise") or train(*a, **k))
    result = run("train", "sft", recipe_file, "--data", root, "-o", output, "--set", "steps=2", "--json")
    assert json.loads(result.stdout) == {"model": str(output / "model")}
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # is being written
    run("plot", "run", output)
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TrainingError, match="holds a run"):
        run("train", "sft", recipe_file, "--data", root, "-o", output)
    with pytest.raises(TrainingError, match="no readable log"):
        run("plot", "run", tmp_path)


def test_mine(root, tmp_path):
    output = tmp_path / "mined.jsonl"
    report = json.loads(run("mine", root / "train", "-o", output, "--json").stdout)
    assert report["queries"] == len(output.read_text().splitlines()) == 20
    read_recipe(RECIPE)
    with pytest.raises(DataError, match="a folder that exists"):
        run("mine", root / "train", "-o", tmp_path / "nowhere" / "mined.jsonl")


def test_reinforce_from_the_command_line(base, root, tmp_path):
    recipe = tmp_path / "rl.yaml"
    recipe.write_text(
        f"model: {base}\nsources: [{{path: train}}]\nsteps: 1\n"
        "group: {queries: 2, samples: 2, micro: 4, reasoning_tokens: 4}\nenvironment: {k: 5}\n"
    )
    output = tmp_path / "run"
    report = json.loads(run("train", "rl", recipe, "--data", root, "-o", output, "--dry-run", "--json").stdout)
    assert (report["rollouts"], report["documents"], report["queries"]) == (4, 20, 20)
    assert not output.exists()
    with pytest.raises(TrainingError, match="seed: Input should be greater than or equal to 0"):
        run("train", "rl", recipe, "--data", root, "-o", output, "--set", "seed=-1")
    done = run("train", "rl", recipe, "--data", root, "-o", output, "--set", "reward.rank=log_rank", "--json")
    assert json.loads(done.stdout) == {"model": str(output / "model")}
    run("plot", "run", output)
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    packed = run("package", output / "model", "--base", output / "initial", "-o", tmp_path / "adapter", "--json")
    assert json.loads(packed.stdout)["kept"] > 0.99
    recipe.write_text(f"model: {tmp_path / 'adapter'}\nsources: [{{path: train}}]\nsteps: 1\n")
    report = json.loads(run("train", "sft", recipe, "--data", root, "--dry-run", "--json").stdout)
    assert report["parameters"] > report["trained_parameters"] > 0
    with pytest.raises(TrainingError, match=r"group\.sample: no such key; did you mean samples\?"):
        run("train", "rl", recipe, "--set", "group.sample=3")
    with pytest.raises(TrainingError, match=r"environment\.bugdet: no such key; did you mean budget\?"):
        run("train", "rl", recipe, "--set", "environment.bugdet=0.1")
    with pytest.raises(TrainingError, match=r"--set dev\.sets=\[a: not valid YAML"):
        run("train", "rl", recipe, "--set", "dev.sets=[a")


@pytest.mark.parametrize(
    ("stage", "recipe", "other"), [("sft", "smoke-rl-cpu.yaml", "train rl"), ("rl", "smoke-cpu.yaml", "train sft")]
)
def test_a_recipe_of_the_other_stage_is_named(root, stage, recipe, other):
    with pytest.raises(TrainingError, match=f"this recipe is for: search-r3 {other}"):
        run("train", stage, RECIPE.parent / recipe, "--data", root, "--dry-run")
