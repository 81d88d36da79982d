"""The artefact store on S3, and on servers that speak its protocol: ``s3://bucket/prefix``."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gisp_tasks.errors import GispError, InputError, IntegrityError, StoreUnavailableError
from gisp_tasks.recipe import EncryptionSection
from gisp_tasks.stores.artifacts import Store, StoredObject, gone

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import ClientError
    from mypy_boto3_s3 import S3Client

_MULTIPART_BYTES = 16 << 20
_PATIENT: Mapping[str, Any] = {
    "connect_timeout": 10,
    "read_timeout": 60,
    "retries": {"mode": "standard", "total_max_attempts": 5},
}
_IMPATIENT: Mapping[str, Any] = {
    "connect_timeout": 3,
    "read_timeout": 4,
    "retries": {"mode": "standard", "total_max_attempts": 2},
}

_ALGORITHMS: Mapping[str, str] = {"sse-s3": "AES256", "sse-kms": "aws:kms"}
_NOT_FOUND = frozenset({"404", "NoSuchKey"})
_PASSING = frozenset(
    {
        # too much at once
        *("429", "RequestLimitExceeded", "RequestThrottled", "SlowDown", "Throttling", "ThrottlingException"),
        *("TooManyRequests", "TooManyRequestsException"),
        # damaged or lost on the way
        *("BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"),
        # two writers at once; also a completed upload whose answer was lost
        *("ConditionalRequestConflict", "NoSuchUpload", "OperationAborted"),
    }
)
_NO_PERMISSION = (
    "permission is refused",
    "Allow s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and s3:ListBucket to these credentials",
)
_REFUSALS: Mapping[str, tuple[str, str]] = {
    "InvalidAccessKeyId": ("the access key is not known there", "Correct AWS_ACCESS_KEY_ID, or the AWS profile"),
    "SignatureDoesNotMatch": (
        "the secret key does not belong to the access key",
        "Correct AWS_SECRET_ACCESS_KEY, or the AWS profile",
    ),
    "ExpiredToken": ("the session token has expired", "Renew the credentials"),
    "NoSuchBucket": ("there is no such bucket", "Create the bucket, or correct publish.store"),
    "AccessDenied": _NO_PERMISSION,
    "403": _NO_PERMISSION,
}
"""Error code -> what was found, what to do."""


class S3Store(Store):
    """Objects below a prefix.

    The SHA-256 of the whole object is recorded as its metadata ``sha256``; S3 checks each part on arrival by a
    SHA-256 of its own. Every write asks for ``If-None-Match: *``, so the server refuses a second one. A large file
    goes up in parts, which become an object at the end: a killed upload leaves none (its parts are removed by
    the bucket's rule for incomplete uploads).
    """

    def __init__(
        self, uri: str, *, encryption: EncryptionSection | None = None, settings: Mapping[str, Any] = _PATIENT
    ) -> None:
        super().__init__(uri)
        self._encryption = encryption
        self._bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._settings = settings

    def _impatient(self) -> "S3Store":
        return S3Store(self.uri, encryption=self._encryption, settings=_IMPATIENT)

    def _stat(self, key: str) -> tuple[str, int] | None:
        from botocore.exceptions import ClientError

        with self._errors(key):
            try:
                head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
            except ClientError as error:
                if _code(error) in _NOT_FOUND:
                    return None
                raise
        if "sha256" not in head["Metadata"]:
            raise IntegrityError(
                f"{self.uri}/{key} carries no digest: it was not published by this package. Remove it, or use another "
                f"prefix"
            )
        self._check_encrypted(key, head.get("ServerSideEncryption"))
        return head["Metadata"]["sha256"], head["ContentLength"]

    def _check_encrypted(self, key: str, found: str | None) -> None:
        """A server that knows no encryption ignores the request for it, and older objects may lie there in the clear.

        Raises:
            InputError: the object is not encrypted as asked.
        """
        if self._encryption is not None and found != _ALGORITHMS[self._encryption.method]:
            raise InputError(
                f"{self.uri}/{key} was asked to be encrypted ({self._encryption.method}), and was found with "
                f"{found or 'no encryption'}. Allowed are servers that encrypt, and objects written so. Give "
                f"the server its key, use another prefix, or correct publish.encryption"
            )

    def _create(self, key: str, source: Path | bytes, sha256: str) -> bool:
        from boto3.s3.transfer import create_transfer_manager
        from botocore.exceptions import ClientError

        body = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": sha256}, **_encryption(self._encryption)}
        with self._errors(key):
            try:
                with create_transfer_manager(self._client, _transfers()) as manager:
                    manager.upload(body, self._bucket, self._prefix + key, extra_args=extra).result()
            except ClientError as error:
                if _code(error) in {"412", "PreconditionFailed"}:
                    return False
                raise
        return True

    def _download(self, key: str, path: Path) -> None:
        from boto3.s3.transfer import create_transfer_manager

        with self._errors(key), create_transfer_manager(self._client, _transfers()) as manager:
            manager.download(self._bucket, self._prefix + key, str(path)).result()

    def _read(self, key: str) -> bytes:
        with self._errors(key):
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"].read()

    def _delete(self, key: str) -> None:
        with self._errors(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def _objects(self, prefix: str) -> Iterator[StoredObject]:
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # a console's marker of an empty folder
                        key = item["Key"].removeprefix(self._prefix)
                        yield StoredObject(key, item["Size"], item["LastModified"].timestamp())

    @cached_property
    def _client(self) -> "S3Client":
        import boto3
        from botocore.config import Config

        session = boto3.session.Session()
        config = Config(**self._settings)
        try:
            client = session.client("s3", config=config)
            if not (urlsplit(client.meta.endpoint_url).hostname or "").endswith(
                (".amazonaws.com", ".amazonaws.com.cn")
            ):
                # Other servers have no DNS name for each bucket.
                client = session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
        except ValueError as error:
            raise InputError(
                f"{self.uri} was asked for as the store, and the environment holds no usable endpoint or region: "
                f"{type(error).__name__}. Allowed is an address such as https://s3.example.org:9000. Correct "
                f"AWS_ENDPOINT_URL_S3 and AWS_DEFAULT_REGION"
            ) from None
        # The transfer manager passes no If-None-Match on, so the client adds it to everything that makes an object.
        for operation in ("PutObject", "CompleteMultipartUpload"):
            client.meta.events.register(f"before-parameter-build.s3.{operation}", _create_only)
        return client

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn what botocore raises into this package's errors."""
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer.exceptions import RetriesExceededError

        try:
            yield
        except ClientError as error:
            raise _refusal(error, f"{self.uri}/{key}") from error
        except (BotoCoreError, RetriesExceededError) as error:
            raise _failure(error, self.uri, self._endpoint) from error

    @property
    def _endpoint(self) -> str:
        """The server's address without a password that it may hold; for messages."""
        client = self.__dict__.get("_client")
        if client is None:
            return "S3"
        url = urlsplit(client.meta.endpoint_url)
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"


def _encryption(asked: EncryptionSection | None) -> dict[str, str]:
    """What a write says about encryption."""
    if asked is None:
        return {}
    key = {"SSEKMSKeyId": asked.kms_key} if asked.kms_key else {}
    return {"ServerSideEncryption": _ALGORITHMS[asked.method], **key}


def _create_only(params: dict[str, Any], **_: Any) -> None:
    params["IfNoneMatch"] = "*"


def _transfers() -> "TransferConfig":
    from boto3.s3.transfer import TransferConfig

    # The other client, `crt`, would not run the hooks of this one.
    return TransferConfig(
        multipart_threshold=_MULTIPART_BYTES, multipart_chunksize=_MULTIPART_BYTES, preferred_transfer_client="classic"
    )


def _code(error: "ClientError") -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _refusal(error: "ClientError", uri: str) -> GispError:
    """The error for an answer of the server that is no success."""
    code = _code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _NOT_FOUND and error.operation_name in {"GetObject", "HeadObject"}:
        return gone(uri)
    if status >= 500 or code in _PASSING:
        return StoreUnavailableError(f"{uri}: the server could not do it now ({status} {code})")
    found, advice = _REFUSALS.get(
        code,
        (
            "the server, if it is one for S3, refuses the request",
            "Correct publish.store and the AWS_ variables of the environment",
        ),
    )
    return InputError(
        f"{uri} was asked for, and {found} ({status} {code} in {error.operation_name}). Allowed is a bucket that the "
        f"credentials of the environment may read, write and list. {advice}"
    )


def _failure(error: Exception, uri: str, endpoint: str) -> GispError:
    """The error for a request that got no answer, or could not be sent."""
    from botocore import exceptions
    from s3transfer.exceptions import RetriesExceededError

    kind = type(error).__name__
    if isinstance(error, exceptions.FlexibleChecksumError):
        return IntegrityError(f"{uri}: {endpoint} sent bytes that are not those of its own checksum. Restore them")
    passing = (
        *(exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError, RetriesExceededError),
        *(exceptions.MetadataRetrievalError, exceptions.CredentialRetrievalError),
    )
    if isinstance(error, passing):
        return StoreUnavailableError(f"the store {uri} was asked for, and {endpoint} does not answer ({kind})")
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        found = "the environment holds no complete credentials"
    else:
        found = f"the client's settings do not allow a request: {error}"
    return InputError(
        f"the store {uri} was asked for, and {found} ({kind}). Allowed is any source that AWS clients know. Set "
        f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    )
