"""Makes the buckets, and the login that the pipeline has on MLflow; again is harmless (python init_services.py)."""

import configparser
import os
from pathlib import Path

SECRETS = Path(os.environ.get("GISP_SECRETS_DIR", "/run/secrets"))
BUCKETS = ("models", "mlflow")


def make_buckets() -> None:
    """With the administrator's key, which no other container has."""
    import boto3

    session = boto3.session.Session()
    client = session.client("s3")
    have = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in BUCKETS:
        if name not in have:
            client.create_bucket(Bucket=name)
            print(f"bucket {name}: created")


def make_mlflow_user() -> None:
    """The user ``gisp``: owns what it makes, and reads the rest."""
    from mlflow.exceptions import MlflowException
    from mlflow.server import get_app_client

    os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = _login("mlflow_admin")
    client = get_app_client("basic-auth", tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    user, password = _login("mlflow_gisp")
    try:
        client.create_user(user, password)
        print(f"MLflow user {user}: created")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _login(name: str) -> tuple[str, str]:
    file = configparser.ConfigParser()
    file.read_string((SECRETS / name).read_text())
    return file["mlflow"]["mlflow_tracking_username"], file["mlflow"]["mlflow_tracking_password"]


if __name__ == "__main__":
    make_buckets()
    make_mlflow_user()
