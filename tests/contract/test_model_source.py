"""Base models from a directory, a real S3 server, a real registry and a hub: pinned, found again or refused."""

import contextlib
import shutil
import time
import uuid
from functools import partial

import boto3
import pytest
from fake_hub import fake_hub
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from s3_models import upload_model, upload_release

from gisp_tasks.errors import InputError, IntegrityError, RetryableError
from gisp_tasks.recipe import ModelSection
from gisp_tasks.stores import model_source

NEEDED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def model(testdata, tmp_path, monkeypatch):
    """A copy of stories260K that a test may change, and a cache of its own."""
    monkeypatch.setenv("GISP_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(testdata / "models" / "stories260K", tmp_path / "model", copy_function=shutil.copyfile)


@pytest.fixture
def uploaded(model, s3, request):
    """The model below a prefix."""
    prefix = f"base/{request.node.name}"
    upload_model(model, s3.bucket, prefix)
    return boto3.client("s3"), s3.bucket, prefix


def test_a_prefix_is_resolved_and_found_again(uploaded, model):
    _, bucket, prefix = uploaded
    record = model_source.resolve(ModelSection(source=f"s3://{bucket}/{prefix}"))
    assert set(record["files"]) == NEEDED
    assert record["files"] == model_source.resolve(ModelSection(source=str(model)))["files"]
    directory = model_source.locate(record)
    assert (directory / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_damaged_copy_is_fetched_again_and_a_changed_object_refused(uploaded):
    client, bucket, prefix = uploaded
    record = model_source.resolve(ModelSection(source=f"s3://{bucket}/{prefix}"))
    weights = model_source.locate(record) / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"\x00")
    assert (model_source.locate(record) / "model.safetensors").read_bytes() == good
    client.put_object(Bucket=bucket, Key=f"{prefix}/tokenizer_config.json", Body=b"{}")
    weights.unlink()
    with pytest.raises(IntegrityError, match=r"tokenizer_config\.json is no longer the one"):
        model_source.locate(record)


def test_an_empty_prefix_is_refused(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("GISP_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="no model file lies below this prefix"):
        model_source.resolve(ModelSection(source=f"s3://{s3.bucket}/nothing-here"))


def test_a_plan_reads_only_the_configuration(uploaded, tmp_path):
    _, bucket, prefix = uploaded
    config = model_source.read_config(ModelSection(source=f"s3://{bucket}/{prefix}"))
    assert config["hidden_size"] == 64
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["config.json"]


def test_files_of_a_directory_that_changed_are_refused(model):
    record = model_source.resolve(ModelSection(source=str(model)))
    assert model_source.locate(record) == model
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is no longer the one that this run began with"):
        model_source.locate(record)


def test_code_of_a_model_needs_permission_and_is_then_recorded(model):
    (model / "modeling_own.py").write_text("")
    (model / "config.json").write_text('{"model_type": "llama", "auto_map": {}}')
    with pytest.raises(InputError, match=r"set model\.trust_remote_code: true"):
        model_source.resolve(ModelSection(source=str(model)))
    record = model_source.resolve(ModelSection(source=str(model), trust_remote_code=True))
    assert record["trust_remote_code"]
    assert "modeling_own.py" in record["files"]


def test_a_directory_has_no_revision(model):
    with pytest.raises(InputError, match="has no revisions"):
        model_source.resolve(ModelSection(source=str(model), revision="main"))


# Releases below a prefix.


@pytest.fixture
def publish(model, s3, request):
    """Upload the model as a release below a prefix, marked complete or not; returns the prefix."""
    return partial(upload_release, model, f"s3://{s3.bucket}/base/{request.node.name}")


def test_the_newest_release_is_the_one_completed_last(publish, model):
    source = publish("v2")
    time.sleep(1.1)  # S3 tells times in seconds
    publish("v1")
    publish("v3", complete=False)
    section = ModelSection(source=source)
    assert model_source.newest_revision(section) == "v1"
    assert model_source.read_config(section)["hidden_size"] == 64
    record = model_source.resolve(section)
    assert (record["revision"], record["revision_kind"]) == ("v1", "release")
    assert set(record["files"]) == NEEDED | {"manifest.json"}
    directory = model_source.locate(record)
    assert (directory / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_release_that_is_named_stays_that_one(publish, model):
    source = publish("v1")
    section = ModelSection(source=source, revision="v1")
    old = model_source.resolve(section)
    (model / "generation_config.json").write_text('{"max_length": 7}')
    publish("v2")
    assert model_source.resolve(section) == old
    assert model_source.resolve(ModelSection(source=source, revision="v2"))["files"] != old["files"]
    (model_source.locate(old) / "generation_config.json").unlink()
    assert "max_length" not in (model_source.locate(old) / "generation_config.json").read_text()


def test_a_release_that_is_not_complete_is_refused(publish):
    source = publish("v1", complete=False)
    with pytest.raises(InputError, match=r"v1/manifest\.json was found.*publish it, or give another revision"):
        model_source.resolve(ModelSection(source=source, revision="v1"))


def test_a_prefix_that_is_a_model_has_nothing_to_watch(uploaded):
    _, bucket, prefix = uploaded
    section = ModelSection(source=f"s3://{bucket}/{prefix}")
    assert model_source.pinned_revision(model_source.resolve(section)) is None
    with pytest.raises(InputError, match=r"one model without revisions.*RELEASE/manifest\.json"):
        model_source.newest_revision(section)


# Versions of a registered model.


@pytest.fixture
def registered(model, mlflow_server, s3, tmp_path, monkeypatch):
    """Register directories as versions of a model, by their address; the environment names the registry."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    client = MlflowClient(mlflow_server.url, mlflow_server.url)
    name = f"base-{uuid.uuid4().hex}"

    def register(address, run_id=None):
        with contextlib.suppress(MlflowException):
            client.create_registered_model(name)
        return str(client.create_model_version(name, address, run_id=run_id).version)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    return f"models:/{name}", register


def test_a_registered_version_is_pinned_and_found_again(registered, uploaded, model):
    source, register = registered
    client, bucket, prefix = uploaded
    first = register(f"s3://{bucket}/{prefix}")
    # As levels lie: the checkpoint is in model/ below the version's directory.
    client.upload_file(str(model / "config.json"), bucket, f"{prefix}-2/model/config.json")
    client.upload_file(str(model / "model.safetensors"), bucket, f"{prefix}-2/model/model.safetensors")
    client.put_object(Bucket=bucket, Key=f"{prefix}-2/MLmodel", Body=b"flavors: {}")
    second = register(f"s3://{bucket}/{prefix}-2")

    assert model_source.newest_revision(ModelSection(source=source)) == second
    assert model_source.read_config(ModelSection(source=source))["hidden_size"] == 64
    newest = model_source.resolve(ModelSection(source=source))
    assert (newest["revision"], newest["revision_kind"]) == (second, "version of the registered model")
    assert set(newest["files"]) == {"config.json", "model.safetensors"}
    older = model_source.resolve(ModelSection(source=source, revision=first))
    assert set(older["files"]) == NEEDED
    for record in (newest, older):
        weights = model_source.locate(record) / "model.safetensors"
        weights.write_bytes(b"damaged")
        assert (model_source.locate(record) / "model.safetensors").read_bytes() == (
            model / "model.safetensors"
        ).read_bytes()


def test_a_registered_version_whose_files_the_server_keeps(registered, model):
    source, register = registered
    client = MlflowClient()
    run = client.create_run("0")
    client.log_artifacts(run.info.run_id, str(model), "base")
    version = register(f"{run.info.artifact_uri}/base", run_id=run.info.run_id)
    record = model_source.resolve(ModelSection(source=source))
    assert record["revision"] == version
    assert record["files"] == model_source.resolve(ModelSection(source=str(model)))["files"]


def test_a_registered_model_that_cannot_be_read_is_refused(registered, uploaded, monkeypatch):
    source, register = registered
    with pytest.raises(InputError, match="no such version that is ready; it has none"):
        model_source.resolve(ModelSection(source=source))
    register(f"s3://{uploaded[1]}/nothing")
    with pytest.raises(InputError, match=r"it has 1\. Register one, correct"):
        model_source.resolve(ModelSection(source=source, revision="2"))
    with pytest.raises(InputError, match=r"there is no config\.json in"):
        model_source.resolve(ModelSection(source=source))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(RetryableError):
        model_source.newest_revision(ModelSection(source=source))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(InputError, match="set MLFLOW_TRACKING_URI"):
        model_source.newest_revision(ModelSection(source=source))


# The hub.


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A hub that has the model at one commit."""
    from huggingface_hub import constants

    with fake_hub(model) as server:
        # What HF_ENDPOINT sets when the client is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        server.commits["org/model"] = "a" * 40
        yield server


def test_a_branch_of_the_hub_is_pinned_to_its_commit(hub, model):
    record = model_source.resolve(ModelSection(source="org/model", revision="main"))
    assert (record["revision"], record["revision_kind"]) == ("a" * 40, "hub commit")
    assert record["files"] == model_source.resolve(ModelSection(source=str(model)))["files"]
    hub.commits["org/model"] = "b" * 40
    assert model_source.newest_revision(ModelSection(source="org/model")) == "b" * 40
    assert (model_source.locate(record) / "config.json").is_file()


def test_what_may_pass_at_the_hub_is_tried_again_and_what_may_not_is_refused(hub, monkeypatch):
    from huggingface_hub import constants

    hub.failures = 1
    with pytest.raises(RetryableError, match="HTTP 503"):
        model_source.newest_revision(ModelSection(source="org/model"))
    with pytest.raises(InputError, match="no such model or revision"):
        model_source.newest_revision(ModelSection(source="org/other"))
    with pytest.raises(InputError, match="no such model or revision"):
        model_source.newest_revision(ModelSection(source="org/model", revision="other"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RetryableError, match="cannot be reached"):
        model_source.newest_revision(ModelSection(source="org/model"))
