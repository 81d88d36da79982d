"""What a user can get wrong: exit status 2, one message that helps, and no run in the store."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from gisp_tasks.stores.artifacts import open_store

CLOSED = "http://127.0.0.1:9"


@dataclass
class Desk:
    """A directory with a model, a recipe and a store, and the command line.

    Args:
        directory: of everything.
        model: a copy of the small model, to be spoilt.
        recipe: what will be written as recipe.yaml.
        cli: starts or calls the command line.
        environment: variables of the command beside those of this process.
    """

    directory: Path
    model: Path
    recipe: dict[str, Any]
    cli: Any
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.directory / "store"

    def gisp(self, command: str, *options: str, status: int = 0, own_process: bool = False) -> Any:
        """Run a command on the recipe, `run` in a process and the others by a call.

        Args:
            command: its name.
            options: what follows the recipe.
            status: the exit status to be.
            own_process: start it as a user does, tasks in processes of their own.
        """
        path = self.directory / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        way = self.cli.start if own_process else self.cli.start_inline if command == "run" else self.cli.call
        return way(command, str(path), *options, status=status, environment=self.environment)

    def refuse(self, command: str, *options: str, says: tuple[str, str, str, str], own_process: bool = False) -> str:
        """Assert that the command is refused with the four parts of a message: asked, found, allowed, to do.

        Returns everything that it printed.
        """
        done = self.gisp(command, *options, status=2, own_process=own_process)
        message = [line for line in done.stderr.splitlines() if line.startswith("gisp: ")]
        assert len(message) == 1, done.stderr
        told = done.stderr[done.stderr.index("\ngisp: ") :] if "\ngisp: " in done.stderr else done.stderr
        for part, text in zip(("asked", "found", "allowed", "to do"), says, strict=True):
            assert text in told, f"what was {part}: {text!r} is not in {told!r}"
        assert not (self.store / "runs").exists()
        return done.stdout + done.stderr

    def edit_config(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def edit_weights(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the tensors of the model, by name."""
        from safetensors.torch import load_file, save_file

        path = self.model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def desk(gisp: Any, tmp_path: Path, testdata: Path) -> Desk:
    """A recipe that would run."""
    model = shutil.copytree(testdata / "models" / "stories260K", tmp_path / "model")
    recipe = {
        "name": "refused",
        "model": {"source": str(model), "dtype": "float32"},
        "calibration": {"dataset": "embedded", "sequences": 4, "sequence_length": 32},
        "pruning": {"levels": [0.2, 0.4], "steps": 2},
        "evaluation": {"embedded_text": {"windows": [64], "limit_tokens": 65}},
        "publish": {"store": f"file://{tmp_path}/store"},
    }
    return Desk(tmp_path, model, recipe, gisp, {"AWS_EC2_METADATA_DISABLED": "true"})


def _prune_refuses(desk: Desk, *, says: tuple[str, str, str, str], own_process: bool = False) -> None:
    """`gisp prune` checks the same input by the same task as `gisp run`, without Airflow."""
    desk.refuse("prune", "--out", str(desk.store), says=says, own_process=own_process)


# The recipe alone.


def test_the_recipe_itself_is_good(desk: Desk) -> None:
    done = desk.gisp("plan", "--json")
    assert [level["name"] for level in json.loads(done.stdout)["levels"]] == ["sp20", "sp40"]


@pytest.mark.parametrize("command", ["plan", "run"])
def test_unknown_key(desk: Desk, command: str) -> None:
    desk.recipe["pruning"]["step"] = 3
    desk.refuse(command, says=("recipe.yaml", "pruning.step: unknown key", "Allowed here: levels, steps", "'steps'?"))


def test_levels_that_do_not_rise(desk: Desk) -> None:
    desk.recipe["pruning"]["levels"] = [0.4, 0.2]
    desk.refuse("plan", says=("levels[1]=0.2", "does not rise above levels[0]=0.4", "nested", "write them in rising"))


@pytest.mark.parametrize(
    ("sparsity", "bound"), [(1.5, "less than or equal to 0.99"), (0, "greater than or equal to 0.001")]
)
def test_sparsity_out_of_range(desk: Desk, sparsity: float, bound: str) -> None:
    desk.recipe["pruning"]["levels"] = [sparsity]
    desk.refuse("plan", says=("pruning.levels[0]", f"={sparsity}", "input should be", bound))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("pruning.steps", ("--set", "no '='", "key.path=value", "Write --set")),
        ("pruning.stepps=3", ("--set pruning.stepps", "unknown key", "Allowed here: levels", "'steps'?")),
        ("pruning.steps=[", ("--set pruning.steps", "not readable as YAML", "line 1", "correct or quote it")),
        ("name.x=3", ("--set name.x", "unknown key", "Allowed here", "nothing below a plain value")),
    ],
)
def test_malformed_set(desk: Desk, setting: str, says: tuple[str, str, str, str]) -> None:
    desk.refuse("plan", "--set", setting, says=says)


# The recipe with the model's configuration.


@pytest.mark.parametrize("command", ["plan", "run"])
def test_missing_model_directory(desk: Desk, command: str) -> None:
    shutil.rmtree(desk.model)
    desk.refuse(command, says=(str(desk.model), "no such directory", "'owner/name' of the hub", "give the path"))


def test_levels_beyond_what_protection_leaves(desk: Desk) -> None:
    desk.recipe["pruning"] |= {"levels": [0.5, 0.9], "protect": {"first_layers": 2, "last_layers": 1}}
    # 2 layers are free: 2 of 5 x (4 kv groups, 172 channels), less 1 kv group and 32 channels each.
    desk.refuse("plan", says=("pruning.levels[1]=0.9", "keeps 3 of 5 layers", "at most 0.3", "lower the level or"))


def test_unsupported_architecture(desk: Desk) -> None:
    desk.edit_config(model_type="gpt2")
    desk.refuse("plan", says=("architecture is 'gpt2'", "config.json, model_type", "supported are llama", "Choose a"))


# The recipe with the weights and the data.


def test_only_bin_weights(desk: Desk) -> None:
    (desk.model / "model.safetensors").rename(desk.model / "pytorch_model.bin")
    _prune_refuses(desk, says=(str(desk.model), "pytorch_model.bin", "only safetensors are read", "convert the"))


def test_code_without_permission(desk: Desk) -> None:
    desk.edit_config(auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (desk.model / "modeling.py").write_text(f"open({str(desk.directory / 'ran')!r}, 'w')\n")
    _prune_refuses(desk, says=(str(desk.model), "auto_map", "not run unless", "model.trust_remote_code: true"))
    assert not (desk.directory / "ran").exists()


def test_a_tokenizer_that_does_not_fit(desk: Desk) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].clone()

    desk.edit_weights(cut)
    desk.edit_config(vocab_size=300)
    _prune_refuses(desk, says=("the tokenizer does not fit", "token id", "ids 0 to 299", "use the tokenizer of this"))


@pytest.mark.parametrize(
    # An overflow of squared activations is normalised away on the way forward, and shows in a score is not finite only.
    ("value", "found"),
    [("nan", "the objective over the calibration set is nan"), ("1e38", "a score is not finite")],
)
def test_weights_that_cannot_be_scored(desk: Desk, value: str, found: str) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"][:, 3] = float(value)

    desk.edit_weights(spoil)
    _prune_refuses(desk, says=(f"{desk.model} in float32", found, "Only a model whose loss", "check its weights"))


def test_calibration_text_shorter_than_a_sequence(desk: Desk) -> None:
    text = desk.directory / "own.txt"
    text.write_text("Once upon a time.\n")
    desk.recipe["calibration"] |= {"dataset": "text", "path": str(text)}
    _prune_refuses(desk, says=("calibration.sequences=4", "which make 0", "Allowed is at most", "use a longer text"))


@pytest.mark.parametrize("section", ["calibration", "evaluation"])
def test_missing_data_set(desk: Desk, section: str) -> None:
    empty = desk.directory / "mirror"
    empty.mkdir()
    desk.environment |= {
        "GISP_DATA_ROOT": str(empty),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(desk.directory / "hub"),
    }
    if section == "calibration":
        desk.recipe["calibration"]["dataset"] = "wikitext2"
    else:
        desk.recipe["evaluation"]["wikitext2"] = {"windows": [64]}
    # The hub's client reads its variables when it is imported.
    says = ("wikitext", "not in the local cache", "Allow access to the hub", "GISP_DATA_ROOT")
    _prune_refuses(desk, says=says, own_process=True)


def _calibrate_on_evaluated_text(desk: Desk) -> None:
    """One's own text, in which the evaluated one stands."""
    from gisp_tasks.data import sources

    text = desk.directory / "own.txt"
    evaluated = sources.find("embedded", "test").texts()[0]
    text.write_text("\n\n".join([*sources.find("embedded", "train").texts()[:3], evaluated]))
    desk.recipe["calibration"] |= {"dataset": "text", "path": str(text), "sequence_length": 128}
    desk.recipe["evaluation"]["embedded_text"]["limit_tokens"] = None


def test_calibration_on_what_is_evaluated(desk: Desk) -> None:
    _calibrate_on_evaluated_text(desk)
    says = ("calibration.dataset=text, path=", "of 4 sequences overlap what evaluation.embedded_text", "Allowed is no")
    _prune_refuses(desk, says=(*says, "or set calibration.overlap: accept"))


def test_calibration_on_a_test_split(desk: Desk) -> None:
    desk.recipe["calibration"]["split"] = "test"
    says = ("split=test", "the file that evaluation.embedded_text measures", "Allowed is", "calibrate on other data")
    _prune_refuses(desk, says=says)


def test_overlap_that_is_accepted_is_recorded(desk: Desk) -> None:
    _calibrate_on_evaluated_text(desk)
    desk.gisp("prune", "--out", str(desk.store), "--json", "--set", "calibration.overlap=accept")
    (record,) = desk.store.glob("runs/*/calibration/tokens.json")
    found = json.loads(record.read_text())["contamination"]
    assert found["accepted"]
    assert found["evaluations"]["embedded_text"]["overlapping_sequences"] > 0


# What only a whole run meets: stores, servers, runs that are not there.


def test_resume_without_a_run(desk: Desk) -> None:
    says = ("--resume was given", "holds no run", "this recipe", "run without --resume")
    desk.refuse("run", "--resume", says=says, own_process=True)


def _s3_environment(**changes: str) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**keys, **changes}


def test_unreachable_s3(desk: Desk) -> None:
    desk.environment |= _s3_environment(AWS_ENDPOINT_URL_S3=CLOSED)
    desk.recipe["publish"]["store"] = "s3://gisp-test/refused"
    desk.refuse("run", says=("s3://gisp-test/refused", CLOSED, "", "AWS_ENDPOINT_URL"))


def test_wrong_s3_keys(desk: Desk, s3: Any) -> None:
    desk.environment |= {**s3.environment, "AWS_SECRET_ACCESS_KEY": "another-secret"}
    desk.recipe["publish"]["store"] = f"s3://{s3.bucket}/refused"
    printed = desk.refuse("run", says=(f"s3://{s3.bucket}/refused", "", "", "AWS_SECRET_ACCESS_KEY"))
    assert "another-secret" not in printed
    assert list(open_store(f"s3://{s3.bucket}/refused").keys()) == []


@pytest.mark.parametrize("store", ["s3", "file"])
def test_unreachable_mlflow(desk: Desk, s3: Any, store: str) -> None:
    desk.environment |= s3.environment
    uri = f"s3://{s3.bucket}/refused-mlflow" if store == "s3" else desk.recipe["publish"]["store"]
    desk.recipe["publish"] |= {"store": uri, "mlflow": {"tracking_uri": CLOSED, "model_name": "refused"}}
    if store == "file":
        says = (f"publish.store={uri}", "directory of this machine", "only addresses that its clients", "Use an s3://")
    else:
        says = (f"tracking_uri={CLOSED}", "", "a running MLflow tracking server", "Start it or correct the address")
    desk.refuse("run", says=says)
    assert list(open_store(f"s3://{s3.bucket}/refused-mlflow").keys()) == []


def test_an_mlflow_database_that_cannot_be_written(desk: Desk) -> None:
    (desk.directory / "file").write_text("no directory")
    uri = f"sqlite:///{desk.directory}/file/mlflow.db"
    desk.recipe["publish"]["mlflow"] = {"tracking_uri": uri, "model_name": "refused"}
    desk.refuse("run", says=(f"tracking_uri={uri}", "", "a database file that MLflow can write", "Correct the path"))
