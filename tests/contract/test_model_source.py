"""Base models from a directory and from a real S3 server: pinned by digests, found again or refused."""

import shutil

import boto3
import pytest

from gisp_tasks.errors import InputError, IntegrityError
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
    """The model as others would put it into a bucket: plain objects, no digests."""
    client = boto3.client("s3")
    prefix = f"base/{request.node.name}"
    for path in sorted(model.iterdir()):
        client.upload_file(str(path), s3.bucket, f"{prefix}/{path.name}")
    return client, s3.bucket, prefix


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
