"""What comes from outside can neither run code nor reach files beyond its own: models, checkpoints, recipes."""

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from gisp_tasks.errors import InputError
from gisp_tasks.export.huggingface import write_checkpoint
from gisp_tasks.export.reload import load_model, load_tokenizer
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.recipe import ModelSection, Recipe
from gisp_tasks.stores import model_source

ROOT = Path(__file__).parents[2]
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
INDEX = "model.safetensors.index.json"


def _calls_that_unpickle(tree: ast.AST) -> list[str]:
    """Imports and calls by which data can become code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLING]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLING:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            allows = any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords)
            if name in {"torch.load", "torch.jit.load", "pd.read_pickle", "yaml.unsafe_load", "eval", "exec"} or allows:
                found.append(name)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "x = torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "import a.b, dill.source",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert _calls_that_unpickle(ast.parse(text))


def test_nothing_in_the_package_unpickles() -> None:
    modules = [*(ROOT / "gisp_tasks").rglob("*.py"), *(ROOT / "dags").rglob("*.py")]
    assert len(modules) > 60
    found = {path.name: calls for path in modules if (calls := _calls_that_unpickle(ast.parse(path.read_text())))}
    assert found == {}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that could be a model, as far as names go; nothing here reads its weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def _resolve(directory: Path, **section: Any) -> dict[str, Any]:
    return model_source.resolve(ModelSection(source=str(directory), **section))


def test_the_model_itself_is_good(model: Path) -> None:
    assert set(_resolve(model)["files"]) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"])
def test_weights_in_formats_that_run_code_are_refused(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(InputError, match=rf"no \.safetensors file was found \({name}\).*convert the weights"):
        _resolve(model)


def test_pickled_weights_beside_safetensors_are_left_alone(model: Path) -> None:
    ran = model / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert set(_resolve(model)["files"]) == {"config.json", "model.safetensors"}
    assert not ran.exists()


@pytest.mark.parametrize("target", ["outside", "../../outside", "/etc/hostname"])
@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "model-2.safetensors", "more/file.json"])
def test_links_that_leave_the_directory_are_refused(model: Path, name: str, target: str) -> None:
    outside = model.parent / "outside"
    outside.write_text("a secret")
    link = model / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside if target == "outside" else target)
    with pytest.raises(InputError, match=f"{name} was found to be a link that leaves the directory"):
        _resolve(model)


def test_a_linked_directory_is_refused(model: Path) -> None:
    (model / "more").symlink_to(model.parent)
    with pytest.raises(InputError, match="more was found to be a link"):
        _resolve(model)


def test_links_inside_and_of_the_hub_cache_are_read(model: Path) -> None:
    (model / "LICENSE").symlink_to("config.json")
    assert "LICENSE" in _resolve(model)["files"]
    snapshot, blobs = model.parent / "hub/snapshots/0123", model.parent / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        (blobs / f"digest-of-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/digest-of-{path.name}")
    assert _resolve(snapshot)["files"] == _resolve(model)["files"]
    (model.parent / "hub/token").write_text("a secret")
    (snapshot / "merges.txt").symlink_to("../../token")
    with pytest.raises(InputError, match=r"merges\.txt was found to be a link"):
        _resolve(snapshot)


def test_the_directory_may_be_reached_by_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(model)
    assert _resolve(tmp_path / "latest")["files"] == _resolve(model)["files"]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../outside.safetensors",
            "/etc/outside.safetensors",
            "more/model.safetensors",
            "model.bin",
            "absent.safetensors",
        ),
        *("..", "", 7, None, ["model.safetensors"]),
    ],
)
def test_an_index_names_files_of_the_model_only(model: Path, name: Any) -> None:
    (model.parent / "outside.safetensors").write_bytes(b"weights")
    (model / "more").mkdir()
    for inside in ("more/model.safetensors", "model.bin"):
        (model / inside).write_bytes(b"weights")
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    with pytest.raises(InputError, match=INDEX):
        _resolve(model)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(model: Path, text: str) -> None:
    (model / INDEX).write_text(text)
    with pytest.raises(InputError, match="is no index of tensors"):
        _resolve(model)


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000])
def test_a_configuration_that_is_none_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        _resolve(model)


def test_code_of_another_repository_is_refused_even_where_code_is_allowed(model: Path) -> None:
    config = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "other/repo--modeling.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="trust_remote_code: true"):
        _resolve(model)
    with pytest.raises(InputError, match="code of another repository"):
        _resolve(model, trust_remote_code=True)


def test_code_is_off_unless_a_recipe_allows_it() -> None:
    assert ModelSection(source="a/model").trust_remote_code is False


# A checkpoint that `gisp evaluate` is given.


@pytest.fixture
def level(testdata: Path, tmp_path: Path) -> Path:
    """A level whose own code, run as a model or as a tokenizer, would leave a file ``ran`` behind."""
    base, directory = testdata / "models/stories260K", tmp_path / "level"
    geometry = geometry_of(json.loads((base / "config.json").read_text()))
    write_checkpoint(base, directory, geometry=geometry, keep=KeepSets.everything(geometry), dtype="float32")
    payload = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    (directory / "modeling_pruned.py").write_text(payload)
    (directory / "tokenization_own.py").write_text(payload)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_own.T", None]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_a_level_is_loaded_without_the_code_that_it_carries(level: Path) -> None:
    assert type(load_model(level, dtype="float32")).__name__ == "PrunedLlamaForCausalLM"
    load_tokenizer(level)
    assert not (level.parent / "ran").exists()


def test_code_of_other_checkpoints_is_not_run_unless_allowed(level: Path) -> None:
    config = json.loads((level / "config.json").read_text())
    (level / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    with pytest.raises(InputError, match="trust_remote_code"):
        load_model(level, dtype="float32")
    assert not (level.parent / "ran").exists()
    with pytest.raises(AttributeError, match="PrunedLlamaConfig"):  # it ran, and holds no model
        load_model(level, dtype="float32", trust_remote_code=True)
    assert (level.parent / "ran").exists()


# Recipes.

BASE: dict[str, Any] = {
    "name": "demo",
    "model": {"source": "a/model"},
    "calibration": {"dataset": "text", "path": "data/text.txt"},
    "evaluation": {"wikitext2": {}},
    "publish": {"store": "s3://models/gisp"},
}


@pytest.mark.parametrize("path", ["../secret.txt", "/srv/../etc/passwd", "a/..", "..\\x.txt", "a\nb.txt", "a\0b"])
@pytest.mark.parametrize(("section", "key"), [("calibration", "path"), ("model", "source")])
def test_paths_that_climb_are_refused(section: str, key: str, path: str) -> None:
    with pytest.raises(InputError, match=rf"{section}\.{key}: it contains '\.\.' or a control character"):
        Recipe.parse({**BASE, section: {**BASE[section], key: path}})


def test_paths_with_dots_in_names_are_accepted() -> None:
    for path in ("/srv/data..2024/a.txt", "./a.txt", "größe.txt"):
        assert Recipe.parse({**BASE, "calibration": {"dataset": "text", "path": path}}).calibration.path == path


_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (_LAUGHS, "aliases"),
        ("name: " + "[" * 30_000, "not readable as YAML"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(300)), "unknown key"),
        ("name: demo\npruning: {steps: " + "9" * 5000 + "}\n", "not readable as YAML"),
        ("name: " + "x" * 70_000, "at most 65536 are allowed"),
        ("name: !!python/object/apply:os.system [touch ran]\n", "not readable as YAML"),
    ],
)
def test_recipes_that_explode_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        Recipe.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"pruning": {"steps": 2001}},
        {"pruning": {"levels": [i / 100 for i in range(1, 40)]}},
        {"calibration": {"dataset": "c4", "sequences": 10**7}},
        {"calibration": {"dataset": "c4", "sequence_length": 10**6}},
        {"calibration": {"dataset": "text", "path": "x" * 5000}},
        {"model": {"source": "x" * 2000}},
        {"airflow": {"retries": 21}},
        {"name": "x" * 64},
    ],
)
def test_sizes_and_numbers_are_bounded(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Recipe.parse({**BASE, **changes})
    assert Recipe.parse(BASE)


def test_an_encrypted_store_is_on_s3_and_is_no_part_of_the_identity() -> None:
    def parse(**publish: Any) -> Recipe:
        return Recipe.parse({**BASE, "publish": {"store": "s3://models/gisp", **publish}})

    kms = parse(encryption={"method": "sse-kms", "kms_key": "alias/models"})
    assert parse().publish.encryption is None
    assert kms.identity() == parse().identity()
    assert "encryption" not in yaml.safe_dump(kms.identity())
    for wrong, says in (
        ({"store": "file:///srv/gisp", "encryption": {}}, "the store is a directory"),
        ({"encryption": {"kms_key": "alias/models"}}, "set method: sse-kms"),
        ({"encryption": {"method": "sse-c"}}, "publish.encryption.method"),
        ({"encryption": {"method": "sse-kms", "kms_key": "a b"}}, "kms_key"),
    ):
        with pytest.raises(InputError, match=says):
            parse(**wrong)
