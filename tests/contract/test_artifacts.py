"""What every artefact store keeps to, tried on a directory and on a real S3 server; and what only S3 can do wrong."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest

from gisp_tasks.errors import InputError, IntegrityError, StoreUnavailableError
from gisp_tasks.refs import ArtifactRef, DirectoryListing, sha256_bytes
from gisp_tasks.stores import s3_store
from gisp_tasks.stores.artifacts import Store, open_store

LARGE_BYTES = 33 << 20  # three parts


@dataclass
class Place:
    """A store, and a way past it to what it holds."""

    store: Store
    overwrite: Callable[[str, bytes], None]
    remove: Callable[[str], None]


def _place_in_directory(directory: Path) -> Place:
    def overwrite(key: str, data: bytes) -> None:
        (directory / key).write_bytes(data)

    return Place(open_store(directory.as_uri()), overwrite, lambda key: (directory / key).unlink())


def _place_in_s3(bucket: str) -> Place:
    client = boto3.client("s3")
    prefix = uuid4().hex

    def overwrite(key: str, data: bytes) -> None:
        digest = client.head_object(Bucket=bucket, Key=f"{prefix}/{key}")["Metadata"]
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=data, Metadata=digest)

    def remove(key: str) -> None:
        client.delete_object(Bucket=bucket, Key=f"{prefix}/{key}")

    return Place(open_store(f"s3://{bucket}/{prefix}"), overwrite, remove)


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "file":
        return _place_in_directory(tmp_path / "a store")
    return _place_in_s3(request.getfixturevalue("s3").bucket)


@pytest.fixture
def store(place: Place) -> Store:
    return place.store


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every writing request of any botocore client, and every file linked into a local store."""
    from botocore.httpsession import URLLib3Session

    seen: list[str] = []
    send, link = URLLib3Session.send, os.link

    def counting_send(self: URLLib3Session, request: Any) -> Any:
        if request.method in {"PUT", "POST", "DELETE"}:
            seen.append(f"{request.method} {request.url}")
        return send(self, request)

    def counting_link(source: Any, target: Any) -> None:
        seen.append(f"link {target}")
        link(source, target)

    monkeypatch.setattr(URLLib3Session, "send", counting_send)
    monkeypatch.setattr(os, "link", counting_link)
    return seen


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "onnx").mkdir(parents=True)
    for name, data in {"config.json": b"{}", "model.safetensors": b"w" * 5000, "onnx/größe.bin": b""}.items():
        (directory / name).write_bytes(data)
    return directory


class TestArtifacts:
    def test_what_is_put_is_read_back(self, store: Store, tmp_path: Path) -> None:
        source = tmp_path / "plan.json"
        source.write_bytes(b"the plan")
        ref = store.put("runs/1/plan.json", source)
        assert ref == ArtifactRef(uri=f"{store.uri}/runs/1/plan.json", sha256=sha256_bytes(b"the plan"), size=8)
        assert store.stat("runs/1/plan.json") == ref
        assert store.read(ref) == b"the plan"
        target = tmp_path / "new" / "plan.json"
        assert store.fetch(ref, target) == target
        assert target.read_bytes() == b"the plan"
        assert list(target.parent.iterdir()) == [target]
        assert store.key_of(ref.uri) == "runs/1/plan.json"

    def test_nothing_is_there_before(self, store: Store) -> None:
        store.put_bytes("a/b", b"x")
        assert store.stat("missing") is None
        assert store.stat("a") is None
        assert store.stat("a/b/c") is None
        assert store.stat_directory("a") is None

    def test_the_second_put_sends_nothing(self, store: Store, writes: list[str], tmp_path: Path) -> None:
        source = tmp_path / "file"
        source.write_bytes(b"data" * 1000)
        first = store.put("k", source)
        assert len(writes) == 1
        assert store.put("k", source) == first
        assert store.put_bytes("k", b"data" * 1000) == first
        assert len(writes) == 1

    def test_other_bytes_are_refused(self, store: Store, writes: list[str]) -> None:
        first = store.put_bytes("k", b"one")
        with pytest.raises(IntegrityError, match="never replaced"):
            store.put_bytes("k", b"two")
        assert len(writes) == 1
        assert store.read(first) == b"one"

    @pytest.mark.parametrize("size", [10, LARGE_BYTES])
    def test_of_two_writers_at_once_one_wins(self, place: Place, size: int) -> None:
        """Both saw the name free: the write itself has to be conditional."""
        stores = [place.store, open_store(place.store.uri)]
        barrier = threading.Barrier(2)
        outcomes: list[ArtifactRef | Exception] = []

        def publish(store: Store, data: bytes) -> None:
            create = store._create

            def create_together(*arguments: Any) -> bool:
                barrier.wait(timeout=30)
                return create(*arguments)

            store._create = create_together  # type: ignore[method-assign]
            try:
                outcomes.append(store.put_bytes("k", data))
            except Exception as error:
                outcomes.append(error)

        threads = [
            threading.Thread(target=publish, args=(store, letter * size))
            for store, letter in zip(stores, (b"a", b"b"), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (won,) = [outcome for outcome in outcomes if isinstance(outcome, ArtifactRef)]
        assert [type(outcome) for outcome in outcomes if outcome is not won] == [IntegrityError]
        assert sha256_bytes(place.store.read(won)) == won.sha256

    def test_of_two_writers_of_the_same_bytes_both_succeed(self, place: Place) -> None:
        first = place.store.put_bytes("k", b"same")
        late = open_store(place.store.uri)
        stat, answers = late._stat, iter([None])
        late._stat = lambda key: next(answers, stat(key))  # type: ignore[method-assign]
        assert late.put_bytes("k", b"same") == first

    def test_corruption_is_found(self, place: Place, tmp_path: Path) -> None:
        ref = place.store.put_bytes("k", b"good")
        place.overwrite("k", b"evil")
        with pytest.raises(IntegrityError, match="changed after"):
            place.store.fetch(ref, tmp_path / "fetched")
        with pytest.raises(IntegrityError, match="changed after"):
            place.store.read(ref)
        assert not [path for path in tmp_path.iterdir() if "fetched" in path.name]

    def test_a_lost_artefact_is_an_integrity_error(self, place: Place, tmp_path: Path) -> None:
        ref = place.store.put_bytes("k", b"data")
        place.remove("k")
        with pytest.raises(IntegrityError, match="is gone"):
            place.store.read(ref)
        with pytest.raises(IntegrityError, match="is gone"):
            place.store.fetch(ref, tmp_path / "fetched")
        assert not [path for path in tmp_path.iterdir() if "fetched" in path.name]

    def test_keys_are_listed_by_whole_parts(self, store: Store) -> None:
        for key in ("b/2", "b/10/x", "bc", "a"):
            store.put_bytes(key, b"")
        assert list(store.keys()) == ["a", "b/10/x", "b/2", "bc"]
        assert list(store.keys("b")) == list(store.keys("b/")) == ["b/10/x", "b/2"]
        assert list(store.keys("missing")) == []

    @pytest.mark.parametrize(
        "key", ["", "/a", "a/", "a//b", "../a", "a/../../b", "./a", "a\\b", "a\nb", ".uploading/a"]
    )
    def test_keys_stay_in_the_store(self, store: Store, key: str) -> None:
        with pytest.raises(InputError, match="Correct it"):
            store.put_bytes(key, b"")
        with pytest.raises(InputError, match="Correct it"):
            store.stat(key)

    def test_foreign_addresses_are_refused(self, store: Store) -> None:
        ref = store.put_bytes("k", b"")
        for uri in ("s3://other/k", f"{store.uri}-other/k", "k"):
            with pytest.raises(InputError, match="store at hand"):
                store.key_of(uri)
            with pytest.raises(InputError, match="store at hand"):
                store.read(replace(ref, uri=uri))
        with pytest.raises(InputError, match="Correct it"):
            store.key_of(f"{store.uri}/a/../../k")

    def test_check_leaves_nothing(self, store: Store) -> None:
        store.put_bytes("there", b"")
        store.check()
        assert list(store.keys()) == ["there"]

    def test_a_large_file_goes_up_and_down(self, store: Store, tmp_path: Path) -> None:
        source = tmp_path / "large"
        source.write_bytes(os.urandom(LARGE_BYTES))
        ref = store.put("large", source)
        assert ref.size == LARGE_BYTES
        assert store.put("large", source) == ref
        assert store.fetch(ref, tmp_path / "back").read_bytes() == source.read_bytes()


class TestDirectories:
    def test_a_directory_goes_up_and_down(self, store: Store, model: Path, tmp_path: Path, writes: list[str]) -> None:
        ref = store.put_directory("levels/sp20/model", model)
        listing = DirectoryListing.of(model)
        assert ref.uri == f"{store.uri}/levels/sp20/model/"
        assert (ref.sha256, ref.size) == (sha256_bytes(listing.to_bytes()), 5002)
        assert writes[-1].endswith("/levels/sp20/model.json")
        assert store.stat_directory("levels/sp20/model") == store.verify_directory("levels/sp20/model") == ref
        assert store.key_of(ref.uri) == "levels/sp20/model"
        assert DirectoryListing.of(store.fetch_directory(ref, tmp_path / "back")) == listing
        count = len(writes)
        assert store.put_directory("levels/sp20/model", model) == ref
        assert len(writes) == count == 4

    def test_an_interrupted_one_resumes(
        self, store: Store, model: Path, writes: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create = store._create

        def create_one(key: str, source: Path | bytes, sha256: str) -> bool:
            if writes:
                raise StoreUnavailableError("the network is away")
            return create(key, source, sha256)

        with monkeypatch.context() as interrupted:
            interrupted.setattr(store, "_create", create_one)
            with pytest.raises(StoreUnavailableError):
                store.put_directory("model", model)
        assert len(writes) == 1
        assert store.stat_directory("model") is None
        with pytest.raises(IntegrityError, match="incomplete"):
            store.verify_directory("model")
        ref = store.put_directory("model", model)
        assert len(writes) == 4
        assert store.verify_directory("model") == ref

    def test_another_directory_is_refused_whole(self, store: Store, model: Path, writes: list[str]) -> None:
        store.put_directory("model", model)
        (model / "added").write_bytes(b"new")
        count = len(writes)
        with pytest.raises(IntegrityError, match="never replaced"):
            store.put_directory("model", model)
        assert len(writes) == count

    def test_no_files_is_an_input_error(self, store: Store, tmp_path: Path) -> None:
        for directory in (tmp_path / "missing", tmp_path):
            with pytest.raises(InputError, match="holds no file"):
                store.put_directory("model", directory)

    def test_verify_finds_a_lost_and_a_changed_file(self, place: Place, model: Path) -> None:
        place.store.put_directory("model", model)
        place.overwrite("model/config.json", b"{   }")
        with pytest.raises(IntegrityError, match=r"model/config\.json"):
            place.store.verify_directory("model")
        place.remove("model/config.json")
        with pytest.raises(IntegrityError, match=r"model/config\.json was published, and is gone"):
            place.store.verify_directory("model")

    def test_fetch_finds_a_changed_file(self, place: Place, model: Path, tmp_path: Path) -> None:
        ref = place.store.put_directory("model", model)
        place.overwrite("model/config.json", b"[]")
        with pytest.raises(IntegrityError, match=r"model/config\.json"):
            place.store.fetch_directory(ref, tmp_path / "back")
        with pytest.raises(IntegrityError):
            place.store.fetch_directory(replace(ref, sha256="0" * 64), tmp_path / "back")

    @pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", ""])
    def test_a_listing_cannot_leave_the_directory(self, store: Store, name: str, tmp_path: Path) -> None:
        listing = DirectoryListing({name: (sha256_bytes(b""), 0)})
        listing_ref = store.put_bytes("evil.json", listing.to_bytes())
        ref = ArtifactRef(uri=f"{store.uri}/evil/", sha256=listing_ref.sha256, size=0)
        with pytest.raises(IntegrityError, match="not the listing"):
            store.fetch_directory(ref, tmp_path / "out")
        assert not list(tmp_path.rglob("*escaped*"))

    def test_a_json_artefact_is_no_listing(self, store: Store) -> None:
        store.put_bytes("evaluation.json", b'{"ppl_token": 3.5}')
        with pytest.raises(IntegrityError, match="not the listing"):
            store.stat_directory("evaluation")


class TestS3:
    def test_a_refused_upload_in_parts_leaves_no_parts(self, s3: Any) -> None:
        place = _place_in_s3(s3.bucket)
        place.store.put_bytes("k", b"first")
        place.store._stat = lambda key: None  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailableError):  # refused by the server at its last request, and "not there"
            place.store.put_bytes("k", b"x" * LARGE_BYTES)
        assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=s3.bucket)
        again = open_store(place.store.uri)
        found = again.stat("k")
        assert found is not None
        assert found.size == 5

    def test_a_killed_upload_leaves_no_object(self, s3: Any, tmp_path: Path) -> None:
        source = tmp_path / "large"
        with source.open("wb") as file:
            file.truncate(1 << 30)
        uri = f"s3://{s3.bucket}/{uuid4().hex}"
        code = (
            "import sys; from gisp_tasks.stores.artifacts import open_store; "
            "open_store(sys.argv[1])._create('large', __import__('pathlib').Path(sys.argv[2]), '0' * 64)"
        )
        process = subprocess.Popen([sys.executable, "-c", code, uri, str(source)])
        client = boto3.client("s3")
        deadline = time.monotonic() + 60
        while "Uploads" not in client.list_multipart_uploads(Bucket=s3.bucket) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -9
        (upload,) = client.list_multipart_uploads(Bucket=s3.bucket)["Uploads"]
        assert list(open_store(uri).keys()) == []
        assert open_store(uri).stat("large") is None
        client.abort_multipart_upload(Bucket=s3.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def test_an_object_of_others_has_no_digest(self, s3: Any) -> None:
        place = _place_in_s3(s3.bucket)
        boto3.client("s3").put_object(Bucket=s3.bucket, Key=f"{place.store.uri.split('/')[3]}/k", Body=b"x")
        with pytest.raises(IntegrityError, match="no digest"):
            place.store.stat("k")

    def test_the_whole_bucket_is_a_store(self, s3: Any) -> None:
        store = open_store(f"s3://{s3.bucket}/")
        key = f"{uuid4().hex}/k"
        ref = store.put_bytes(key, b"x")
        assert ref.uri == f"s3://{s3.bucket}/{key}"
        assert store.key_of(ref.uri) == key
        assert list(store.keys(key.split("/")[0])) == [key]


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials in files either."""
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def refusing(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A server that answers every request with one S3 error, which the test chooses; it counts them."""
    answer: dict[str, Any] = {"status": 0, "code": "", "count": 0}

    class Handler(BaseHTTPRequestHandler):
        def _refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer["count"] += 1
            body = b"" if self.command == "HEAD" else f"<Error><Code>{answer['code']}</Code></Error>".encode()
            self.send_response(answer["status"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _refuse  # noqa: N815 - names that http.server looks for

        def log_message(self, *arguments: object) -> None:
            """Nothing: the test counts."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        yield answer
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("no_home")
class TestCheck:
    """One message that says what is wrong, before a run starts."""

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("AWS_ACCESS_KEY_ID", "another", "access key is not known"),
            ("AWS_SECRET_ACCESS_KEY", "hidden-value", "secret key does not belong"),
            ("AWS_ACCESS_KEY_ID", None, "no complete credentials"),
            ("AWS_SECRET_ACCESS_KEY", None, "no complete credentials"),
            ("AWS_ENDPOINT_URL_S3", "not an address", "no usable endpoint"),
            ("AWS_PROFILE", "missing", "missing"),
        ],
    )
    def test_of_the_environment(
        self, s3: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, message: str
    ) -> None:
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=message) as raised:
            open_store(f"s3://{s3.bucket}/check").check()
        assert "hidden-value" not in str(raised.value)
        assert "test-secret-key" not in str(raised.value)

    def test_of_no_credentials_at_all(self, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(InputError, match="no complete credentials"):
            open_store(f"s3://{s3.bucket}/check").check()

    def test_of_the_bucket(self, s3: Any) -> None:
        with pytest.raises(InputError, match="no such bucket"):
            open_store("s3://gisp-missing/check").check()
        assert "gisp-missing" not in [b["Name"] for b in boto3.client("s3").list_buckets()["Buckets"]]

    def test_of_a_closed_port(self, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:hidden-value@127.0.0.1:{port}")
        start = time.monotonic()
        with pytest.raises(StoreUnavailableError, match=f"127.0.0.1:{port} does not answer") as raised:
            open_store(f"s3://{s3.bucket}/check").check()
        assert time.monotonic() - start < 10
        assert "hidden-value" not in str(raised.value)

    def test_of_a_server_that_never_answers(self, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
            start = time.monotonic()
            with pytest.raises(StoreUnavailableError, match="does not answer"):
                open_store(f"s3://{s3.bucket}/check").check()
            assert time.monotonic() - start < 12

    def test_of_permissions(self, refusing: dict[str, Any]) -> None:
        refusing.update(status=403, code="AccessDenied")
        with pytest.raises(InputError, match=r"permission is refused .*s3:PutObject"):
            open_store("s3://bucket/check").check()

    def test_of_another_kind_of_server(self, refusing: dict[str, Any]) -> None:
        refusing.update(status=404, code="404")  # what botocore makes of a web server's answer to a PUT
        with pytest.raises(InputError, match=r"if it is one for S3.*AWS_ variables"):
            open_store("s3://bucket/check").check()

    def test_of_a_server_that_overwrites(self, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """As when the server does not know If-None-Match: it gets the request without it."""
        monkeypatch.setattr(s3_store, "_create_only", lambda params, **_: None)
        store = open_store(f"s3://{s3.bucket}/{uuid4().hex}")
        with pytest.raises(InputError, match="overwrote an object"):
            store.check()
        assert list(store.keys()) == []

    @pytest.mark.parametrize(
        ("status", "code", "kind"),
        [
            (409, "ConditionalRequestConflict", StoreUnavailableError),
            (400, "ThrottlingException", StoreUnavailableError),
            (501, "NotImplemented", StoreUnavailableError),
            (400, "ExpiredToken", InputError),
            (400, "InvalidArgument", InputError),
        ],
    )
    def test_outside_of_check_an_answer_decides_about_retries(
        self, refusing: dict[str, Any], status: int, code: str, kind: type[Exception]
    ) -> None:
        refusing.update(status=status, code=code)
        store = open_store("s3://bucket/check")
        with pytest.raises(kind, match=code):
            store.read(ArtifactRef(uri=f"{store.uri}/k", sha256="", size=0))

    def test_a_passing_error_is_tried_again_before(self, refusing: dict[str, Any]) -> None:
        refusing.update(status=503, code="SlowDown")
        with pytest.raises(StoreUnavailableError, match="503 SlowDown"):
            open_store("s3://bucket/check").check()
        assert refusing["count"] > 1

    def test_outside_of_check_a_closed_port_is_retryable(self, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        with pytest.raises(StoreUnavailableError):
            open_store(f"s3://{s3.bucket}/check").stat("k")
