"""What the pipeline needs from S3 is what docker/s3-policy.json grants, no more; encryption is asked for and seen.

The policies are tried on SeaweedFS, which reads them as AWS does, with the keys that docker/make-secrets makes.
"""

import configparser
import json
import os
import runpy
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from gisp_tasks.demo.services import start_s3
from gisp_tasks.errors import InputError, StoreUnavailableError
from gisp_tasks.recipe import EncryptionSection
from gisp_tasks.stores.artifacts import open_store

DOCKER = Path(__file__).parents[2] / "docker"
PREFIX = "s3://models/gisp"
LARGE_BYTES = 17 << 20  # two parts
ACTIONS = {  # what IAM calls the operations that a store uses
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
}


@dataclass(frozen=True)
class Login:
    """Takes the part of one identity of the server."""

    keys: dict[str, tuple[str, str]]
    environment: dict[str, str]
    patch: pytest.MonkeyPatch

    def __call__(self, name: str) -> Any:
        """A plain client of that identity; open stores take its part from now on."""
        for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
            self.patch.delenv(variable)
        access_key, secret_key = self.keys[name]
        own = {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}
        for variable, value in {**self.environment, **own}.items():
            self.patch.setenv(variable, value)
        return boto3.session.Session().client("s3")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, tuple[str, str]], dict[str, str]]]:
    directory = tmp_path_factory.mktemp("s3-access")
    made = runpy.run_path(str(DOCKER / "make-secrets"))["make"]()
    (directory / "identities.json").write_text(made["s3_identities"])
    keys = {}
    for name in ("admin", "gisp", "retention", "mlflow"):
        file = configparser.ConfigParser()
        file.read_string(made[f"s3_{name}"])
        keys[name] = (file["default"]["aws_access_key_id"], file["default"]["aws_secret_access_key"])
    with start_s3(
        directory, access_key=keys["admin"][0], secret_key=keys["admin"][1], identities=directory / "identities.json"
    ) as service:
        admin = boto3.session.Session(*keys["admin"], region_name="us-east-1").client("s3", endpoint_url=service.url)
        for bucket in ("models", "mlflow", "private"):
            admin.create_bucket(Bucket=bucket)
        yield keys, dict(service.environment)


@pytest.fixture
def login(server: tuple[dict[str, tuple[str, str]], dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Login:
    return Login(*server, monkeypatch)


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every operation that any botocore client asks for."""
    from botocore.client import BaseClient

    asked: set[str] = set()
    call = BaseClient._make_api_call  # type: ignore[attr-defined]

    def recording(self: Any, name: str, arguments: Any) -> Any:
        asked.add(name)
        return call(self, name, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", recording)
    return asked


def _granted(file: str) -> set[str]:
    found: set[str] = set()
    for statement in json.loads((DOCKER / file).read_text())["Statement"]:
        actions = statement["Action"]
        found |= {actions} if isinstance(actions, str) else set(actions)
    return found


def _publish_and_read(directory: Path) -> None:
    """All that tasks do with a store."""
    store = open_store(f"{PREFIX}/{uuid.uuid4().hex}")
    root = open_store(PREFIX)
    root.check()
    store.put_bytes("plan.json", b"{}")
    (directory / "model").mkdir()
    (directory / "model/large.safetensors").write_bytes(b"w" * LARGE_BYTES)
    ref = store.put_directory("model", directory / "model")
    assert store.fetch_directory(ref, directory / "copy")
    assert store.verify_directory("model") == ref
    assert "plan.json" in set(store.keys())


def test_the_policy_of_the_pipeline_suffices_and_grants_nothing_unused(
    login: Login, operations: set[str], tmp_path: Path
) -> None:
    login("gisp")
    _publish_and_read(tmp_path)
    # A part that fails is given up; nothing fails here.
    assert {ACTIONS[name] for name in operations} | {"s3:AbortMultipartUpload"} == _granted("s3-policy.json")
    assert "UploadPart" in operations
    assert not [key for key in open_store(PREFIX).keys() if key.startswith(".check")]  # noqa: SIM118


def _refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except ClientError as error:
        return bool(error.response["Error"]["Code"] == "AccessDenied")
    return False


def test_the_pipeline_may_not_remove_runs_nor_leave_its_prefix(login: Login) -> None:
    admin = login("admin")
    admin.put_object(Bucket="models", Key="gisp/runs/0123456789ab/plan.json", Body=b"{}")
    admin.put_object(Bucket="private", Key="secret", Body=b"x")
    gisp = login("gisp")
    key = {"Bucket": "models", "Key": "gisp/runs/0123456789ab/plan.json"}
    assert not _refused(lambda: gisp.get_object(**key))
    assert _refused(lambda: gisp.delete_object(**key))
    assert _refused(lambda: gisp.put_object(Bucket="models", Key="elsewhere", Body=b"x"))
    assert _refused(lambda: gisp.get_object(Bucket="private", Key="secret"))
    assert _refused(lambda: gisp.list_objects_v2(Bucket="private"))
    assert _refused(lambda: gisp.create_bucket(Bucket="another"))
    assert _refused(lambda: gisp.delete_bucket(Bucket="models"))


def test_the_policy_of_retention_removes_runs_and_writes_nothing(login: Login, operations: set[str]) -> None:
    login("gisp")
    root = open_store(PREFIX)
    root.put_bytes("runs/ba9876543210/plan.json", b"{}")
    retention = login("retention")
    operations.clear()
    store = open_store(PREFIX)
    ref = store.stat("runs/ba9876543210/plan.json")
    assert ref is not None
    assert store.read(ref) == b"{}"
    for item in list(store.objects("runs/ba9876543210")):
        store.delete(item.key)
    assert not list(store.keys("runs/ba9876543210"))
    assert {ACTIONS[name] for name in operations} == _granted("s3-policy-retention.json")
    assert _refused(lambda: retention.put_object(Bucket="models", Key="gisp/runs/ba9876543210/plan.json", Body=b""))


def test_mlflow_sees_its_own_bucket_only(login: Login) -> None:
    mlflow = login("mlflow")
    mlflow.put_object(Bucket="mlflow", Key="artifacts/a", Body=b"x")
    assert _refused(lambda: mlflow.get_object(Bucket="models", Key="gisp/plan.json"))


# Encryption.


@pytest.mark.parametrize("size", [5, LARGE_BYTES])
def test_objects_are_encrypted_where_it_is_asked(login: Login, size: int) -> None:
    client = login("gisp")
    prefix = uuid.uuid4().hex
    store = open_store(f"{PREFIX}/{prefix}", encryption=EncryptionSection())
    store.check()
    ref = store.put_bytes("a", b"x" * size)
    assert client.head_object(Bucket="models", Key=f"gisp/{prefix}/a")["ServerSideEncryption"] == "AES256"
    assert store.stat("a") == ref
    assert store.read(ref) == b"x" * size
    open_store(f"{PREFIX}/{prefix}").put_bytes("b", b"x")
    assert "ServerSideEncryption" not in client.head_object(Bucket="models", Key=f"gisp/{prefix}/b")
    with pytest.raises(InputError, match=r"asked to be encrypted \(sse-s3\), and was found with no encryption"):
        store.put_bytes("b", b"x")
    with pytest.raises(InputError, match=r"asked to be encrypted \(sse-kms\), and was found with AES256"):
        open_store(f"{PREFIX}/{prefix}", encryption=EncryptionSection(method="sse-kms")).stat("a")


def test_a_key_of_the_key_management_service_is_named_in_every_write(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SeaweedFS without such a service refuses; what AWS would be asked for is read off the requests."""
    from botocore.httpsession import URLLib3Session

    seen: list[dict[str, str]] = []
    send = URLLib3Session.send

    def recording(self: Any, request: Any) -> Any:
        if request.method in {"PUT", "POST"}:
            names = {name: name.lower().removeprefix("x-amz-server-side-encryption") for name in request.headers}
            seen.append({short: _text(request.headers[name]) for name, short in names.items() if short != name.lower()})
        return send(self, request)

    monkeypatch.setattr(URLLib3Session, "send", recording)
    login("gisp")
    kms = EncryptionSection(method="sse-kms", kms_key="alias/models")
    for size in (5, LARGE_BYTES):
        seen.clear()
        with pytest.raises(StoreUnavailableError):
            open_store(f"{PREFIX}/{uuid.uuid4().hex}", encryption=kms)._impatient().put_bytes("a", b"x" * size)
        assert seen
        assert seen[0] == {"": "aws:kms", "-aws-kms-key-id": "alias/models"}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
