"""What only the artefact store in a directory can do wrong."""

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gisp_tasks.errors import InputError, IntegrityError, StoreUnavailableError
from gisp_tasks.stores.artifacts import open_store


@pytest.mark.parametrize("uri", ["", "relative", "/absolute", "file://host/x", "file:///", "s3://", "http://x/y"])
def test_other_addresses_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match=r"Correct publish\.store"):
        open_store(uri)


@pytest.mark.parametrize("uri", ["s3://bucket/../x", "file:///a/../b"])
def test_addresses_do_not_climb(uri: str) -> None:
    with pytest.raises(InputError, match=r"without '\.\.'"):
        open_store(uri)


def test_an_address_is_decoded(tmp_path: Path) -> None:
    directory = tmp_path / "größe und 100%"
    ref = open_store(directory.as_uri() + "/").put_bytes("a/k", b"x")
    assert (directory / "a" / "k").read_bytes() == b"x"
    assert ref.uri == f"{directory.as_uri()}/a/k"


def test_what_a_killed_writer_left_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / ".uploading").mkdir()
    (tmp_path / ".uploading" / "half").write_bytes(b"half of")
    store = open_store(tmp_path.as_uri())
    store.put_bytes("k", b"whole")
    assert list(store.keys()) == ["k"]


def test_a_failed_write_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"0123456789")

    def copy_half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:5])
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", copy_half)
    store = open_store((tmp_path / "store").as_uri())
    with pytest.raises(InputError, match="No space left"):
        store.put("k", source)
    assert store.stat("k") is None
    assert list((tmp_path / "store" / ".uploading").iterdir()) == []


def test_a_source_that_changes_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"before")
    copy = shutil.copyfile

    def change_and_copy(source: Path, target: Path) -> Any:
        source.write_bytes(b"after")
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", change_and_copy)
    store = open_store((tmp_path / "store").as_uri())
    with pytest.raises(IntegrityError, match="changed while"):
        store.put("k", source)
    assert list(store.keys()) == []


def test_a_network_file_system_that_is_away_is_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "link", stale)
    store = open_store(tmp_path.as_uri())
    with pytest.raises(StoreUnavailableError, match="Stale"):
        store.put_bytes("k", b"x")
    with pytest.raises(StoreUnavailableError, match="Stale"):
        store.check()


def test_check_of_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="Not a directory"):
        open_store((tmp_path / "file" / "store").as_uri()).check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_of_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        open_store(tmp_path.as_uri()).check()


def test_check_of_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError, match=r"hard\s+links"):
        open_store(tmp_path.as_uri()).check()
    assert list((tmp_path / ".uploading").iterdir()) == []


def test_check_where_nothing_may_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An archive that keeps everything is a store; the check says what it leaves."""
    store = open_store(tmp_path.as_uri())

    def refuse(key: str) -> None:
        raise InputError("deletion is refused")

    monkeypatch.setattr(store, "_delete", refuse)
    with caplog.at_level(logging.WARNING):
        store.check()
    (key,) = store.keys()
    assert key in caplog.text
