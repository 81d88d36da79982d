"""The recipe refuses what cannot be done, in words that help, and never repeats a secret."""

import copy
import json

import pytest
import yaml

from gisp_tasks.errors import InputError
from gisp_tasks.recipe import ProblemEvaluation, Recipe, level_name
from gisp_tasks.recipe.reading import MAX_RECIPE_BYTES

BASE = {
    "name": "demo",
    "model": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "calibration": {"dataset": "c4"},
    "evaluation": {"wikitext2": {}},
    "publish": {"store": "s3://models/gisp"},
}
MLFLOW = {"tracking_uri": "http://mlflow:5000", "model_name": "demo"}
SECRET = "hunter2"
# Marks what is wanted and not yet so; once it is, the mark itself fails the test and has to go.


def parse(**sections):
    return Recipe.parse(copy.deepcopy(BASE) | sections)


def refusal(**sections):
    with pytest.raises(InputError) as caught:
        parse(**sections)
    return str(caught.value)


@pytest.fixture
def load(tmp_path):
    """Write a recipe (a mapping, or text as it is) and load it."""

    def write_and_load(content, *settings, store=None):
        path = tmp_path / "recipe.yaml"
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        path.write_text(text, encoding="utf-8")
        return Recipe.load(path, settings, store)

    return write_and_load


# What is asked for


def test_defaults_are_those_of_the_method():
    recipe = parse()
    assert recipe.level_names == ("sp20", "sp30", "sp40", "sp50")
    assert recipe.pruning.steps == 30
    assert recipe.importance.normaliser == "elements"
    assert recipe.calibration.overlap == "refuse"
    assert recipe.evaluation.tasks == ("wikitext2",)
    assert recipe.evaluation.perplexity_task == "wikitext2"
    assert recipe.evaluation.wikitext2.windows == (128, 2048)
    assert recipe.publish.gate.max_perplexity_ratio == 4.0


def test_commonsense_qa_is_zero_shot_on_validation_by_default():
    recipe = parse(evaluation={"wikitext2": {}, "commonsense_qa": {}})
    assert recipe.evaluation.tasks == ("wikitext2", "commonsense_qa")
    assert recipe.evaluation.perplexity_task == "wikitext2"
    section = recipe.evaluation.commonsense_qa
    assert (section.limit, section.batch_size, section.shots, section.split) == (None, 8, 0, "validation")
    assert "'validation' or 'test'" in refusal(evaluation={"wikitext2": {}, "commonsense_qa": {"split": "train"}})


def test_a_recipe_survives_its_own_json():
    recipe = parse(publish={"store": "s3://models/gisp", "mlflow": MLFLOW}, evaluation={"wikitext2": {}, "gsm8k": {}})
    assert Recipe.parse(json.loads(recipe.to_json())) == recipe


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"pruningg": {}}, "pruningg: unknown key. Did you mean 'pruning'?"),
        ({"pruning": {"step": 3}}, "pruning.step: unknown key. Did you mean 'steps'?"),
        ({"evaluation": {"wikitext2": {"window": [3]}}}, "evaluation.wikitext2.window: unknown key. Did you mean"),
        ({"evaluation": {"commonsense_qa": {"tasks": ["piqa"]}}}, "Allowed here: shots, limit, batch_size, split"),
        ({"pruning": {"protect": {"zebra": 1}}}, "Allowed here: first_layers, last_layers, min_kv_groups"),
    ],
)
def test_an_unknown_key_is_named_with_what_was_meant(sections, expected):
    assert expected in refusal(**sections)


def test_all_faults_are_told_at_once():
    message = refusal(pruning={"step": 3, "steps": 0}, model={})
    assert "pruning.step: unknown key" in message
    assert "pruning.steps=0: input should be greater than or equal to 1" in message
    assert "model.source: required, and missing" in message


def test_a_missing_section_is_named_with_the_file(load):
    with pytest.raises(InputError, match=r"recipe\.yaml: (?s:.*)calibration: required, and missing"):
        load({key: value for key, value in BASE.items() if key != "calibration"})


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), "much", None])
def test_sparsity_lies_between_zero_and_one(sparsity):
    assert f"pruning.levels[0]={sparsity!r}" in refusal(pruning={"levels": [sparsity]})


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0.3, 0.2], "levels[1]=0.2 does not rise above levels[0]=0.3"),
        ([0.1, 0.2, 0.2], "levels[2]=0.2 does not rise above levels[1]=0.2"),
        ([0.2, 0.2004], "two levels share a name (sp20, sp20)"),
        ([], "at least 1 item"),
        (0.3, "pruning.levels=0.3"),
    ],
)
def test_levels_rise_and_are_told_apart(levels, expected):
    assert expected in refusal(pruning={"levels": levels})


@pytest.mark.parametrize(
    ("sparsity", "name"), [(0.2, "sp20"), (0.375, "sp37.5"), (0.005, "sp0.5"), (0.29, "sp29"), (0.999, "sp99.9")]
)
def test_level_names(sparsity, name):
    assert level_name(sparsity) == name


@pytest.mark.parametrize("sparsity", [(0.0001), (0.9999)])
def test_no_level_is_named_like_the_dense_model_or_nothing(sparsity):
    refusal(pruning={"levels": [sparsity]})


@pytest.mark.parametrize("value", [1.5, -1])
def test_protected_layers_are_a_fraction_or_a_whole_number(value):
    assert "pruning.protect.first_layers" in refusal(pruning={"protect": {"first_layers": value}})


@pytest.mark.parametrize("calibration", [{"dataset": "commonsense_qa"}, {"dataset": "items", "path": "a.jsonl"}])
def test_objectives_go_with_their_data(calibration):
    assert parse(objective="margin", calibration=calibration).objective == "margin"
    message = refusal(calibration=calibration)
    assert (
        f"objective=perplexity would teach the wrong answers of calibration.dataset={calibration['dataset']}" in message
    )
    assert "objective: margin" in message
    message = refusal(objective="margin")
    assert "calibration.dataset=c4 has none; use calibration.dataset: commonsense_qa or items" in message


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        ({"dataset": "items"}, "dataset=items needs `path`"),
        ({"dataset": "commonsense_qa", "path": "a.jsonl"}, "path='a.jsonl' was given with dataset=commonsense_qa"),
        ({"dataset": "text"}, "dataset=text needs `path`"),
        ({"dataset": "tokens"}, "dataset=tokens needs `path`"),
        ({"dataset": "c4", "path": "a.txt"}, "path='a.txt' was given with dataset=c4"),
        ({"dataset": "embedded", "path": "a.txt"}, "path='a.txt' was given with dataset=embedded"),
        ({"dataset": "pile"}, "calibration.dataset='pile'"),
    ],
)
def test_a_path_goes_with_files_only(calibration, expected):
    assert expected in refusal(calibration=calibration)


@pytest.mark.parametrize("dataset", ["text", "tokens"])
def test_a_file_is_accepted_with_its_path(dataset):
    assert parse(calibration={"dataset": dataset, "path": "a.file"}).calibration.path == "a.file"


def test_an_empty_path_is_no_path():
    assert "needs `path`" in refusal(calibration={"dataset": "text", "path": ""})


def test_a_gate_needs_a_text_evaluation():
    assert "add evaluation.wikitext2 (or embedded_text), or set" in refusal(evaluation={"gsm8k": {}})
    assert "max_perplexity_ratio" in refusal(evaluation={})
    open_gate = {"store": "s3://models/gisp", "gate": {"max_perplexity_ratio": None}}
    assert parse(evaluation={"gsm8k": {}}, publish=open_gate).evaluation.perplexity_task is None
    assert parse(evaluation={"embedded_text": {}}).evaluation.perplexity_task == "embedded_text"


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse().pruning.steps = 3


# Where it goes


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        ("s3://models/gisp/", "s3://models/gisp"),
        ("s3://models", "s3://models"),
        ("file:///srv/gisp/", "file:///srv/gisp"),
    ],
)
def test_a_store_is_kept_without_its_last_slash(store, expected):
    assert parse(publish={"store": store}).publish.store == expected


@pytest.mark.parametrize(
    "store",
    [
        "/srv/gisp",
        "file://srv/gisp",
        "gs://models/gisp",
        "s3://Models/gisp",
        "s3://m/gisp",
        "s3:///gisp",
        "s3://models/../other",
        "file:///srv/../etc",
        ("file:///"),
        ("s3://models/gisp\n"),
    ],
)
def test_a_store_is_an_s3_or_an_absolute_file_address(store):
    assert "publish.store" in refusal(publish={"store": store})


@pytest.mark.parametrize(
    "uri",
    [
        f"http://user:{SECRET}@mlflow:5000",
        f"https://:{SECRET}@mlflow",
        f"http://user:{SECRET}@{SECRET}@mlflow",
        f"postgresql+psycopg2://user:{SECRET}@db/mlflow",
        (f"HTTP://user:{SECRET}@mlflow"),
        (f" http://user:{SECRET}@mlflow"),
        (f"http://{SECRET}@mlflow:5000"),
        (f"http://user:a/{SECRET}@mlflow"),
    ],
)
def test_credentials_in_the_tracking_address_are_refused_and_not_repeated(uri):
    message = refusal(publish={"store": "s3://models/gisp", "mlflow": MLFLOW | {"tracking_uri": uri}})
    assert "publish.mlflow.tracking_uri" in message
    assert "MLFLOW_TRACKING_PASSWORD" in message
    assert SECRET not in message


@pytest.mark.parametrize("uri", ["http://mlflow:5000", "https://mlflow.example.org/a", "sqlite:///mlflow.db"])
def test_an_address_without_credentials_is_accepted(uri):
    publish = {"store": "s3://models/gisp", "mlflow": MLFLOW | {"tracking_uri": uri}}
    assert parse(publish=publish).publish.mlflow.tracking_uri == uri


@pytest.mark.parametrize(
    "publish",
    [
        ({"store": "s3://models/gisp", "mlflow": f"http://user:{SECRET}@mlflow"}),
        ({"store": f"s3://key:{SECRET}@models/gisp"}),
        (f"http://user:{SECRET}@mlflow"),
    ],
)
def test_credentials_in_a_wrong_place_are_not_repeated(publish):
    assert SECRET not in refusal(publish=publish)


@pytest.mark.parametrize(
    ("signing", "expected"),
    [
        ({}, "a key has one place"),
        ({"private_key_path": "/k.pem", "private_key_env": "KEY"}, "a key has one place"),
        ({"private_key_env": f"-----BEGIN PRIVATE KEY-----\n{SECRET}: x"}, "private_key_env"),
        ({"private_key_path": f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n" + 60 * "x"}, "private_key_path"),
        ({"private_key": f"-----BEGIN PRIVATE KEY-----\n{SECRET}"}, "private_key: unknown key"),
    ],
)
def test_a_signing_key_has_one_place_and_is_not_repeated(signing, expected):
    message = refusal(publish={"store": "s3://models/gisp", "signing": signing})
    assert "publish.signing" in message
    assert expected in message
    assert SECRET not in message


# Who promotes

APPROVAL = {"by": "approval", "approvers": ["ana"], "timeout_hours": 0.5}


def test_nothing_is_promoted_unless_asked():
    assert parse().publish.promotion.model_dump() == {"by": "none", "approvers": (), "timeout_hours": 168.0}


@pytest.mark.parametrize("promotion", [{"by": "gate"}, APPROVAL])
def test_a_promotion_needs_a_registry(promotion):
    publish = {"store": "s3://models/gisp", "promotion": promotion}
    assert "names no registry; add publish.mlflow" in refusal(publish=publish)
    assert parse(publish=publish | {"mlflow": MLFLOW}).publish.promotion.by == promotion["by"]


@pytest.mark.parametrize(
    ("promotion", "expected"),
    [
        ({"by": "approval"}, "nobody is named who may approve"),
        ({"by": "gate", "approvers": ["ana"]}, "approvers were named with by=gate, which asks nobody"),
        (APPROVAL | {"timeout_hours": 0}, "publish.promotion.timeout_hours=0"),
        (APPROVAL | {"approvers": [""]}, "publish.promotion.approvers[0]"),
        ({"by": "vote"}, "publish.promotion.by='vote'"),
    ],
)
def test_promotions_that_cannot_be(promotion, expected):
    assert expected in refusal(publish={"store": "s3://models/gisp", "mlflow": MLFLOW, "promotion": promotion})


# What decides the bytes of a run


def test_identity_leaves_out_addresses_and_the_scheduler():
    here = parse(publish={"store": "s3://models/gisp", "mlflow": MLFLOW})
    there = parse(
        publish={
            "store": "file:///srv",
            "mlflow": MLFLOW | {"tracking_uri": "http://other:1"},
            "signing": {"private_key_env": "KEY"},
        },
        airflow={"pool": "gpu", "retries": 1, "steps_per_task": 30},
    )
    assert here.identity() == there.identity()
    assert here != there
    asked = parse(publish={"store": "s3://models/gisp", "mlflow": MLFLOW, "promotion": APPROVAL})
    assert asked.identity() == here.identity()


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "other"},
        {"model": {"source": "other/model"}},
        {"calibration": {"dataset": "c4", "seed": 1}},
        {"calibration": {"dataset": "c4", "overlap": "accept"}},
        {"pruning": {"steps": 3}},
        {"evaluation": {"wikitext2": {"windows": [128]}}},
    ],
)
def test_identity_holds_everything_else(sections):
    assert parse(**sections).identity() != parse().identity()


def test_identity_does_not_change_the_recipe():
    recipe = parse(publish={"store": "s3://models/gisp", "mlflow": MLFLOW})
    before = recipe.to_json()
    recipe.identity()
    assert recipe.to_json() == before


# The file


def test_a_key_that_stands_twice_is_refused(load):
    with pytest.raises(InputError, match="the key 'steps' stands twice"):
        load("name: demo\npruning:\n  steps: 3\n  steps: 4\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [1, 2\n", "not readable as YAML"),
        ("", "a mapping was expected, found NoneType"),
        ("- a\n- b\n", "a mapping was expected, found list"),
        ("name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("3: demo\n", "keys should be strings"),
        ("? [a, b]\n: 2\n", "not readable as YAML"),
        ("name: 2020-13-45\n", "not readable as YAML"),
        ("name: " + "[" * 5000, "not readable as YAML"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused(load, text, expected):
    with pytest.raises(InputError, match=expected):
        load(text)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(InputError, match="not readable as YAML"):
        Recipe.load(path)


def test_a_file_too_large_is_refused_unread(load):
    padding = "# " + "x" * MAX_RECIPE_BYTES
    with pytest.raises(InputError, match=f"at most {MAX_RECIPE_BYTES} are allowed"):
        load(yaml.safe_dump(BASE) + padding)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            Recipe.load(path)


# --set and --store


def test_settings_override_the_file(load):
    recipe = load(BASE, "pruning.steps=5", "pruning.levels=[0.1, 0.25]", "model.revision=main", "model.dtype=float32")
    assert recipe.pruning.steps == 5
    assert recipe.pruning.levels == (0.1, 0.25)
    assert (recipe.model.revision, recipe.model.dtype) == ("main", "float32")


def test_a_later_setting_wins(load):
    assert load(BASE, "pruning.steps=5", "pruning.steps=6").pruning.steps == 6


def test_a_setting_may_hold_an_equals_sign(load):
    assert load(BASE, "model.source=s3://models/a=b").model.source == "s3://models/a=b"


@pytest.mark.parametrize("mlflow", [None, {}, {"model_name": "old"}])
def test_settings_reach_into_sections_that_are_null_or_absent(load, mlflow):
    recipe = load(
        BASE | {"publish": {"store": "s3://models/gisp", "mlflow": mlflow}},
        "publish.mlflow.tracking_uri=http://mlflow:5000",
        "publish.mlflow.model_name=demo",
    )
    assert recipe.publish.mlflow.model_dump() == MLFLOW
    assert load(BASE, "evaluation.gsm8k.shots=3").evaluation.gsm8k.shots == 3


def test_a_section_can_be_set_to_null(load):
    mlflow = {"store": "s3://models/gisp", "mlflow": MLFLOW}
    assert load(BASE | {"publish": mlflow}, "publish.mlflow=null").publish.mlflow is None


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("pruning.steps", "no '=' found"),
        ("pruning.stepz=3", "pruning.stepz: unknown key. Did you mean 'steps'?"),
        ("prunning.steps=3", "prunning: unknown key. Did you mean 'pruning'?"),
        ("name.first=3", "name.first: unknown key. Allowed here: nothing below a plain value"),
        ("pruning.levels.0=0.1", "nothing below a plain value"),
        ("=3", "unknown key"),
        ("pruning.levels=[0.1", "not readable as YAML"),
        ("pruning.steps=many", "pruning.steps='many'"),
        ("name=2020-13-45", "not readable as YAML"),
        ("name=" + "[" * 5000, "not readable as YAML"),
    ],
)
def test_a_bad_setting_is_refused(load, setting, expected):
    with pytest.raises(InputError) as caught:
        load(BASE, setting)
    assert expected in str(caught.value)


@pytest.mark.parametrize("publish", [("nothing"), (["a"])])
def test_a_setting_below_what_is_no_section_is_refused(load, publish):
    with pytest.raises(InputError, match="publish"):
        load(BASE | {"publish": publish}, "publish.store=s3://models/gisp")


@pytest.mark.parametrize(
    "setting",
    [
        f"publish.mlflow.tracking_uri=http://user:{SECRET}@mlflow",
        (f"publish.mlflow.trackin_uri=http://user:{SECRET}@mlflow"),
        (f"publish.mlflow.tracking_uri=[http://user:{SECRET}@mlflow"),
        (f"publish.mlflow.tracking_uri:http://user:{SECRET}@mlflow"),
    ],
)
def test_credentials_in_a_setting_are_not_repeated(load, setting):
    with pytest.raises(InputError) as caught:
        load(BASE, setting)
    assert SECRET not in str(caught.value)


def test_aliases_are_refused(load):
    text = yaml.safe_dump(BASE | {"evaluation": None}).replace(
        "evaluation: null", "evaluation:\n  wikitext2: &text {windows: [128]}\n  embedded_text: *text"
    )
    with pytest.raises(InputError, match=r"aliases \(\*name\) are not allowed in line \d+"):
        load(text)


def test_the_store_replaces_that_of_the_file(load):
    assert load(BASE, store="file:///srv/gisp").publish.store == "file:///srv/gisp"
    without = {key: value for key, value in BASE.items() if key != "publish"}
    assert load(without, store="file:///srv/gisp").publish.store == "file:///srv/gisp"
    with pytest.raises(InputError, match="publish is 'nothing' in the recipe, and a mapping was expected"):
        load(BASE | {"publish": "nothing"}, store="file:///srv/gisp")


# The reference's own way


def test_compat_shows_what_the_reference_does():
    recipe = parse(importance={"compat": "reference"})
    assert recipe.importance.model_dump() == {
        "score": "taylor",
        "normaliser": "reference",
        "granularity": "head",
        "compat": "reference",
    }
    assert recipe.pruning.structure_ratio == 0.7
    assert Recipe.parse(json.loads(recipe.to_json())) == recipe
    asked = parse(
        importance={"compat": "reference", "normaliser": "elements", "granularity": "kv_group"},
        pruning={"structure_ratio": 0.25, "protect": {"first_layers": 0.1}},
    )
    assert asked.importance == recipe.importance
    assert asked.pruning.structure_ratio == 0.25


def test_compat_can_be_set_on_a_recipe_that_says_otherwise(load):
    importance = {"score": "taylor", "normaliser": "elements", "granularity": "kv_group", "compat": "default"}
    recipe = load(BASE | {"importance": importance}, "importance.compat=reference", "pruning.steps=4")
    assert (recipe.importance.normaliser, recipe.pruning.steps, recipe.pruning.structure_ratio) == ("reference", 4, 0.7)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"importance": {"compat": "reference", "score": "gate_fisher"}}, "has the first-order score only"),
        ({"importance": {"compat": "reference", "scores": "taylor"}}, "scores: unknown key"),
        (
            {"importance": {"compat": "reference"}, "pruning": {"protect": {"first_layers": 0.2}}},
            "pruning.protect was changed",
        ),
        (
            {"importance": {"compat": "reference"}, "pruning": {"protect": {"min_channels": 8}}},
            "pruning.protect was changed",
        ),
        ({"importance": {"compat": "reference"}, "pruning": {"structure_ratio": 1.0}}, "pruning.structure_ratio=1.0"),
        ({"importance": {"compat": "reference"}, "pruning": {"structure_ratio": 0}}, "pruning.structure_ratio=0"),
        ({"importance": {"compat": "reference"}, "pruning": None}, "pruning"),
        ({"pruning": {"structure_ratio": 0.7}}, "structure_ratio=0.7 was set, but importance.compat=default"),
        ({"importance": {"granularity": "query"}}, "importance.granularity='query'"),
    ],
)
def test_what_compat_cannot_be_combined_with(sections, expected):
    assert expected in refusal(**sections)


def test_query_heads_are_the_users_choice_without_compat():
    recipe = parse(importance={"granularity": "head", "score": "gate_fisher"})
    assert (recipe.importance.granularity, recipe.pruning.structure_ratio) == ("head", None)
    assert recipe.identity() != parse().identity()


def test_problems_may_be_weighed_without_being_solved() -> None:
    assert ProblemEvaluation.parse({"limit": 0}).limit == 0
    with pytest.raises(InputError, match="limit=-1"):
        ProblemEvaluation.parse({"limit": -1})


# What a model's revision may be, and what can be watched.


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"source": "models:/base/3"}, "named as models:/NAME, without version"),
        ({"source": "models:/base@prod"}, "give the version as model.revision"),
        ({"source": "models:/base", "revision": "prod"}, "allowed is the number of a version"),
        ({"source": "s3://bucket/releases", "revision": "a/b"}, "the name of a release right below the prefix"),
        ({"source": "s3://bucket/releases", "revision": "../other"}, "it contains '..'"),
        ({"source": "org/model", "revision": "a/../../b"}, "it contains '..'"),
        ({"source": "org/model", "revision": ""}, "model.revision="),
    ],
)
def test_a_revision_is_of_the_kind_that_its_source_has(model, expected):
    assert expected in refusal(model=model)


@pytest.mark.parametrize(
    "model",
    [
        {"source": "org/model"},
        {"source": "org/model", "revision": "release/2"},
        {"source": "models:/base model"},
        {"source": "s3://bucket/releases"},
    ],
)
def test_what_has_new_revisions_can_be_watched(model):
    assert parse(model=model, airflow={"watch": "@daily"}).airflow.watch == "@daily"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"source": "/srv/model"}, "the model is a directory, which has no revisions"),
        ({"source": "org/model", "revision": "0" * 40}, "the model names one commit"),
        ({"source": "models:/base", "revision": "3"}, "the model names one revision"),
        ({"source": "s3://bucket/releases", "revision": "v1"}, "the model names one revision"),
    ],
)
def test_what_cannot_change_is_not_watched(model, expected):
    assert expected in refusal(model=model, airflow={"watch": "@daily"})
    assert parse(model=model).airflow.watch is None


@pytest.mark.parametrize("key", ["watch", "schedule"])
@pytest.mark.parametrize("times", ["daily", "0 3 * *", "0 0 3 * * *", "61 * * * *", "", "@sometimes"])
def test_times_are_cron_or_a_preset(key, times):
    assert f"airflow.{key}: {times!r} says no times" in refusal(airflow={key: times})


def test_a_watch_has_times():
    assert parse(airflow={"schedule": "@continuous"}).airflow.schedule == "@continuous"
    assert "'@continuous' says no times" in refusal(airflow={"watch": "@continuous"})


def test_the_watch_does_not_decide_the_bytes():
    assert parse(airflow={"watch": "@daily"}).identity() == parse().identity()


def test_another_revision_of_the_same_recipe():
    recipe = parse(model={"source": "models:/base"}, airflow={"watch": "@daily"})
    assert recipe.with_revision("3").model.revision == "3"
    assert recipe.with_revision(None) == recipe
    with pytest.raises(InputError, match="allowed is the number of a version"):
        recipe.with_revision("prod")
