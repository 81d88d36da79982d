"""Where rows come from, and what is recorded of it."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import HfHubHTTPError

from gisp_tasks.data import embedded, hub, sources
from gisp_tasks.errors import InputError, RetryableError

ROWS = [{"text": "first row"}, {"text": ""}, {"text": "third: ünïcode\nand a second line"}]


def write_parquet(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    """No mirror, an empty hub cache, no network, and a cache directory of the test's own."""
    monkeypatch.delenv("GISP_DATA_ROOT", raising=False)
    monkeypatch.setenv("GISP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "mirror"
    root.mkdir()
    monkeypatch.setenv("GISP_DATA_ROOT", str(root))
    return root


@pytest.fixture
def hub_cache(tmp_path) -> Path:
    """The pinned snapshot of GSM8K, as an earlier download leaves it; returns the file of the test split."""
    revision = hub.DATASETS["gsm8k"].revision
    snapshot = tmp_path / "hub" / "datasets--openai--gsm8k" / "snapshots" / revision
    return write_parquet(snapshot / hub.DATASETS["gsm8k"].files["test"], [{"question": "1+1?", "answer": "#### 2"}])


def test_mirror_is_read_and_recorded_without_its_place(mirror):
    path = write_parquet(mirror / "wikitext2" / "test.parquet", ROWS)
    source = sources.find("wikitext2", "test")
    assert source.rows() == ROWS
    assert source.text() == "first row\n\n\n\nthird: ünïcode\nand a second line"
    assert source.describe() == {
        "dataset": "wikitext2",
        "split": "test",
        "origin": "mirror",
        "revision": None,
        "digest": hashlib.sha256(sha256(path).encode()).hexdigest(),
        "files": [{"name": "wikitext2/test.parquet", "sha256": sha256(path), "size": path.stat().st_size}],
        "rows": 3,
    }
    assert str(mirror) not in json.dumps(source.describe())


@pytest.mark.parametrize("mark", ["first_half", "partial"])
def test_part_of_a_split_names_itself(mirror, mark):
    write_parquet(mirror / "wikitext2" / f"test_{mark}.parquet", ROWS)
    assert sources.find("wikitext2", "test").split == f"test_{mark}"


def test_whole_split_is_preferred_to_its_part(mirror):
    write_parquet(mirror / "wikitext2" / "test_first_half.parquet", ROWS[:1])
    write_parquet(mirror / "wikitext2" / "test.parquet", ROWS)
    assert sources.find("wikitext2", "test").split == "test"


def test_stand_in_for_another_split_is_not_taken_for_a_part(mirror):
    write_parquet(mirror / "gsm8k" / "train_surrogate.parquet", ROWS)
    with pytest.raises(InputError, match="GISP_DATA_ROOT"):
        sources.find("gsm8k", "train")


def test_real_mirror(testdata, monkeypatch):
    monkeypatch.setenv("GISP_DATA_ROOT", str(testdata / "data"))
    assert [sources.find("wikitext2", split).split for split in ("train", "validation", "test")] == [
        "train_partial",
        "validation",
        "test_first_half",
    ]
    source = sources.find("gsm8k", "train")
    assert source.describe()["rows"] == len(source.items()) == 7473
    assert source.items()[0][1].endswith("#### 72")


@pytest.mark.parametrize(("dataset", "split"), [("../secret", "train"), ("c4", "../../train"), ("c4", "/train")])
def test_mirror_is_not_left(mirror, dataset, split):
    write_parquet(mirror.parent / "secret" / "train.parquet", ROWS)
    with pytest.raises(InputError, match="cannot be a name in a mirror"):
        sources.find(dataset, split)


def test_mirror_that_is_no_directory_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("GISP_DATA_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no such directory"):
        sources.find("wikitext2", "test")
    with pytest.raises(InputError, match="no such directory"):
        sources.reachable("wikitext2", "test")


def test_hub_file_comes_from_the_pinned_snapshot(hub_cache):
    source = sources.find("gsm8k", "test")
    assert source.rows() == [{"question": "1+1?", "answer": "#### 2"}]
    description = source.describe()
    assert description["origin"] == "hub"
    assert description["repository"] == "openai/gsm8k"
    assert description["revision"] == hub.DATASETS["gsm8k"].revision
    assert description["files"][0] == {
        "name": "main/test-00000-of-00001.parquet",
        "sha256": sha256(hub_cache),
        "size": hub_cache.stat().st_size,
    }


def test_another_snapshot_of_the_hub_is_not_taken(hub_cache):
    snapshots = hub_cache.parents[2]
    hub_cache.parents[1].rename(snapshots / ("0" * 40))
    with pytest.raises(InputError):
        sources.find("gsm8k", "test")


def test_mirror_goes_before_the_hub(hub_cache, mirror):
    write_parquet(mirror / "gsm8k" / "test.parquet", [{"question": "mirror", "answer": "#### 1"}])
    assert sources.find("gsm8k", "test").origin == "mirror"


def test_revisions_are_commits():
    assert all(re.fullmatch("[0-9a-f]{40}", dataset.revision) for dataset in hub.DATASETS.values())


def test_no_mirror_and_no_hub_says_what_to_set():
    with pytest.raises(InputError, match="set GISP_DATA_ROOT to a mirror directory") as refusal:
        sources.find("wikitext2", "test")
    assert "HF_HUB_OFFLINE" in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (huggingface_hub.errors.HfHubHTTPError.__bases__[0]("connection reset"), RetryableError),
        (OSError("disk"), RetryableError),
        (503, RetryableError),
        (401, InputError),
    ],
)
def test_broken_download_is_tried_again_and_a_refusal_is_not(monkeypatch, error, expected):
    class Response:
        status_code = error
        headers: dict[str, str] = {}  # noqa: RUF012
        request = None

    def fail(*args, **kwargs):
        raise HfHubHTTPError("answer", response=Response()) if isinstance(error, int) else error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(expected, match="Salesforce/wikitext"):
        sources.find("wikitext2", "test")


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("wikitext3", "test", "Known are wikitext2, gsm8k, c4, boolq, .*, openbookqa, embedded, embedded_arithmetic;"),
        ("gsm8k", "validation", "It has train, test"),
        ("embedded", "validation", "It has train, test"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(dataset, split, message):
    with pytest.raises(InputError, match=message):
        sources.find(dataset, split)


def test_reachable(mirror, hub_cache):
    write_parquet(mirror / "wikitext2" / "test_first_half.parquet", ROWS)
    assert sources.reachable("wikitext2", "test")
    assert sources.reachable("gsm8k", "test")
    assert sources.reachable("embedded", "train")
    assert not sources.reachable("wikitext2", "train")
    assert not sources.reachable("gsm8k", "train")
    with pytest.raises(InputError, match="unknown"):
        sources.reachable("wikitext3", "test")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "rows.jsonl.gz", "rows.parquet"])
def test_formats_give_the_same_rows(tmp_path, name):
    path = tmp_path / name
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    if name.endswith(".parquet"):
        write_parquet(path, ROWS)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")
    source = sources.from_file(path)
    assert source.rows() == ROWS
    assert source.describe()["rows"] == 3
    assert source.files[0].name == name


def test_text_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\n two ü", encoding="utf-8")
    assert sources.from_file(tmp_path / "a.txt").text() == "one\n\n\n two ü"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "line 2: a JSON object was expected, found list"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "row 2: string fields text were expected, found body: str"),
        ("a.jsonl", b'{"text": null}\n', "row 1: string fields text were expected, found text: NoneType"),
        ("a.jsonl", b"\xff\xfe", "not readable as .jsonl"),
        ("a.json.gz", b"not gzipped", "not readable as .json.gz"),
        ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-20], "not readable as .json.gz"),
        ("a.parquet", b"PAR1 and nothing else", "not readable as .parquet"),
        ("a.txt", b"\xff\xfe", "not readable as .txt"),
        ("a.csv", b"text\nx", "Allowed are .parquet, .jsonl"),
    ],
)
def test_unusable_file_is_refused_by_name(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as refusal:
        sources.from_file(tmp_path / name).text()
    assert name in str(refusal.value)


def test_missing_file_and_directory_are_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            sources.from_file(path)


def test_embedded_text_is_found_twice_with_the_same_bytes(tmp_path):
    first, second = sources.find("embedded", "train"), sources.find("embedded", "train")
    assert first == second
    assert first.describe()["files"][0]["sha256"] == sha256(first.files[0].path)
    assert first.files[0].path.is_relative_to(tmp_path / "cache")
    first.files[0].path.write_text("changed by someone\n")
    assert sources.find("embedded", "train").rows() == embedded.text_rows("train")
    assert list((tmp_path / "cache" / "embedded").iterdir()) == [first.files[0].path]


def test_embedded_text_says_which_python_it_is_from():
    assert re.search(r"cpython-3\.\d+\.\d+", sources.find("embedded", "test").files[0].name)


def test_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GISP_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="Set GISP_CACHE"):
        sources.find("embedded", "train")


def paragraphs(split: str) -> list[str]:
    text = "\n\n".join(row["text"] for row in embedded.text_rows(split))
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def test_no_paragraph_of_the_embedded_text_comes_twice():
    train, test = paragraphs("train"), paragraphs("test")
    assert len(set(train + test)) == len(train) + len(test)
    assert all(train)
    assert all(test)
    assert sum(map(len, train)) > sum(map(len, test)) > 50_000


def test_no_word_of_the_reference_text_is_lost():
    from pydoc_data.topics import topics

    kept = {word for split in embedded.SPLITS for paragraph in paragraphs(split) for word in paragraph.split()}
    assert kept == {word for topic in topics.values() for word in topic.split()}


def test_arithmetic_is_right_and_in_the_schema():
    for split in embedded.SPLITS:
        for question, answer in sources.find("embedded_arithmetic", split).items():
            assert "{" not in question + answer
            marks = re.findall(r"(\d+)([-+*/])(\d+) = <<(\d+)[-+*/](\d+)=(\d+)>>(\d+)", answer)
            for left, sign, right, again, second, result, shown in marks:
                value = {
                    "+": int(left) + int(right),
                    "-": int(left) - int(right),
                    "*": int(left) * int(right),
                    "/": int(left) / int(right),
                }[sign]
                assert (left, right, result) == (again, second, shown)
                assert value == int(result) > 0
            *steps, last = answer.split("\n")
            assert len(marks) == len(steps) >= 1
            assert last == f"#### {marks[-1][-1]}"


def test_arithmetic_splits_share_no_question():
    train, test = (
        [row["question"] for row in sources.find("embedded_arithmetic", split).rows()] for split in ("train", "test")
    )
    assert (len(train), len(test)) == (4000, 500)
    assert len(set(train + test)) == 4500


def test_arithmetic_is_the_same_on_every_machine():
    digests = [sources.find("embedded_arithmetic", split).files[0].sha256 for split in ("train", "test")]
    assert digests == [
        "25c3503e56bd1babb9228f295b9312e19945889c458db5c2613eff30c561dc99",
        "8e3d16fcc1c7d93c02e9054dafb6501cb8f4ddb704992c85f615a06dbfd52fc0",
    ]


@pytest.mark.parametrize(
    ("row", "found"),
    [({"question": "1 + 1?"}, "question: str"), ({"question": 3, "answer": "3"}, "question: int, answer: str")],
)
def test_a_word_problem_needs_both_texts(tmp_path, row, found):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=f"row 1: string fields question, answer were expected, found {found}"):
        sources.from_file(tmp_path / "a.jsonl").items()
