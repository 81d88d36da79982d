"""Base models in a bucket as others would put them there: plain objects, no digests."""

from pathlib import Path

import boto3


def upload_model(model: Path, bucket: str, prefix: str) -> None:
    """All files of a model's directory."""
    client = boto3.client("s3")
    for path in sorted(model.iterdir()):
        client.upload_file(str(path), bucket, f"{prefix}/{path.name}")


def upload_release(model: Path, address: str, release: str, *, complete: bool = True) -> str:
    """A model as a release below an s3:// address, which is returned; ``complete`` writes its manifest, last."""
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    upload_model(model, bucket, f"{prefix}/{release}")
    if complete:
        boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{release}/manifest.json", Body=b"{}")
    return address
