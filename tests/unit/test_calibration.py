"""Calibration sets against loops written out by hand, and everything that must be refused."""

import json
import random
import re

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
from transformers import AutoTokenizer

from gisp_tasks.data import calibration
from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.recipe import CalibrationSection
from gisp_tasks.refs import canonical_json

VOCAB_SIZE = 512
BOS = 1


@pytest.fixture(scope="module")
def tokenizer(testdata):
    """Real, and it puts a BOS before every text."""
    return AutoTokenizer.from_pretrained(testdata / "models/stories260K")


@pytest.fixture(autouse=True)
def _mirror(testdata, monkeypatch):
    monkeypatch.setenv("GISP_DATA_ROOT", str(testdata / "data"))


def column(testdata, name: str, field: str) -> list[str]:
    return pyarrow.parquet.read_table(testdata / "data" / name)[field].to_pylist()


def build(tokenizer, vocab_size: int = VOCAB_SIZE, **section) -> calibration.Calibration:
    return calibration.build(CalibrationSection(**section), tokenizer=tokenizer, vocab_size=vocab_size)


def sequences_of(built: calibration.Calibration) -> list[list[int]]:
    return [built.set.tokens[start:end].tolist() for start, end in built.set.spans]


def refusal(tokenizer, vocab_size: int = VOCAB_SIZE, **section) -> str:
    with pytest.raises(InputError) as raised:
        build(tokenizer, vocab_size, **section)
    return str(raised.value)


def write_words(path, num_words: int):
    path.write_text(" ".join(f"w{i}" for i in range(num_words)))
    return path


class CharacterTokenizer:
    """One token a character, except that ``merged`` is a token of its own; ``closing`` follows every text."""

    def __init__(self, merged: str = "", closing: str = ""):
        self.pieces = re.compile(f"{re.escape(merged)}|." if merged else ".", re.DOTALL)
        self.closing = closing

    def __call__(self, text: str, **_):
        pieces = [*self.pieces.findall(text), *self.closing]
        return {"input_ids": [ord(piece) if len(piece) == 1 else 300 for piece in pieces]}

    def __len__(self):
        return 400


class TestDocuments:
    @pytest.mark.parametrize(("seed", "length"), [(0, 400), (7, 600)])
    def test_draw_is_that_of_the_reference(self, testdata, tokenizer, seed, length):
        texts = column(testdata, "c4/train.parquet", "text")
        rng = random.Random(seed)
        expected = []
        for _ in range(12):
            while True:
                ids = tokenizer(texts[rng.randint(0, len(texts) - 1)])["input_ids"]
                if len(ids) > length:
                    break
            start = rng.randint(0, len(ids) - length - 1)
            expected.append(ids[start : start + length])
        built = build(tokenizer, dataset="c4", sequences=12, sequence_length=length, seed=seed)
        assert sequences_of(built) == expected

    def test_special_token_counts_to_the_length(self, tmp_path, monkeypatch, tokenizer):
        """One token longer than a sequence, BOS included, is long enough, and has one window, at its start."""
        self.mirror(tmp_path, monkeypatch, ["a b c d e f"])
        ids = tokenizer("a b c d e f")["input_ids"]
        built = build(tokenizer, dataset="c4", sequences=3, sequence_length=len(ids) - 1)
        assert sequences_of(built) == [ids[:-1]] * 3
        assert ids[0] == BOS
        message = refusal(tokenizer, dataset="c4", sequences=3, sequence_length=len(ids))
        assert f"have at most {len(ids)}" in message

    def test_ends_when_no_document_is_long_enough(self, tokenizer):
        message = refusal(tokenizer, dataset="c4", sequences=1, sequence_length=2048)
        assert "sequence_length=2048" in message
        assert re.search(r"11\d\d different ones, drawn from 1180, have at most \d+\.", message)
        assert "lower calibration.sequence_length" in message

    def test_ends_when_long_documents_are_hardly_ever_drawn(self, tmp_path, monkeypatch, tokenizer):
        monkeypatch.setattr(calibration, "_MAX_SHORT_DRAWS", 20)
        self.mirror(tmp_path, monkeypatch, ["short"] * 100_000 + ["long " * 50])
        message = refusal(tokenizer, dataset="c4", sequences=1, sequence_length=40)
        assert "20 different ones, drawn from 100001" in message

    def test_short_draws_in_a_row_are_what_is_bounded(self, tmp_path, monkeypatch, tokenizer):
        monkeypatch.setattr(calibration, "_MAX_SHORT_DRAWS", 40)
        self.mirror(tmp_path, monkeypatch, ["short", "short", "long " * 50])
        assert build(tokenizer, dataset="c4", sequences=200, sequence_length=40).set.num_sequences == 200

    def test_no_documents(self, tmp_path, monkeypatch, tokenizer):
        self.mirror(tmp_path, monkeypatch, [])
        assert "no documents were found" in refusal(tokenizer, dataset="c4", sequences=1)

    @staticmethod
    def mirror(root, monkeypatch, texts):
        (root / "c4").mkdir()
        table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
        pyarrow.parquet.write_table(table, root / "c4" / "train.parquet")
        monkeypatch.setenv("GISP_DATA_ROOT", str(root))


class TestRunningText:
    def test_windows_are_whole_distinct_and_in_text_order(self, testdata, tokenizer):
        text = "\n\n".join(column(testdata, "wikitext2/validation.parquet", "text"))
        ids = tokenizer(text)["input_ids"]
        windows = [ids[i : i + 128] for i in range(0, len(ids) - 127, 128)]
        built = build(tokenizer, dataset="wikitext2", split="validation", sequences=40, sequence_length=128, seed=3)
        drawn = random.Random(3).sample(range(len(windows)), 40)
        assert sequences_of(built) == [windows[i] for i in sorted(drawn)]
        assert built.description["windows"] == len(windows)

    def test_bos_stands_at_the_very_start_only(self, tmp_path, tokenizer):
        path = write_words(tmp_path / "a.txt", 200)
        num_windows = len(tokenizer(path.read_text())["input_ids"]) // 16
        built = build(tokenizer, dataset="text", path=str(path), sequences=num_windows, sequence_length=16)
        assert built.set.tokens[0] == BOS
        assert BOS not in built.set.tokens[1:]

    def test_seed_decides(self, tokenizer):
        first, same, other = (
            sequences_of(build(tokenizer, dataset="embedded", sequences=20, sequence_length=64, seed=seed))
            for seed in (1, 1, 2)
        )
        assert first == same != other

    def test_as_many_windows_as_there_are_and_one_more(self, tmp_path, tokenizer):
        path = write_words(tmp_path / "a.txt", 200)
        section = {"dataset": "text", "path": str(path), "sequence_length": 50}
        num_windows = len(tokenizer(path.read_text())["input_ids"]) // 50
        assert build(tokenizer, sequences=num_windows, **section).set.num_sequences == num_windows
        message = refusal(tokenizer, sequences=num_windows + 1, **section)
        assert f"make {num_windows} such sequences" in message

    def test_rows_of_a_file_are_joined_by_blank_lines(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "abc"}\n{"text": "de"}\n')
        built = build(CharacterTokenizer(), dataset="text", path=str(path), sequences=1, sequence_length=7)
        assert "".join(map(chr, built.set.tokens)) == "abc\n\nde"

    @pytest.mark.parametrize("content", ["", "too short"])
    def test_text_shorter_than_a_sequence_is_refused(self, tmp_path, tokenizer, content):
        (tmp_path / "a.txt").write_text(content)
        message = refusal(tokenizer, dataset="text", path=str(tmp_path / "a.txt"), sequences=1)
        assert "make 0 such sequences" in message

    def test_missing_file_and_line_without_text_are_refused(self, tmp_path, tokenizer):
        assert "no such file" in refusal(tokenizer, dataset="text", path=str(tmp_path / "none.txt"))
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
        message = refusal(tokenizer, dataset="text", path=str(tmp_path / "a.jsonl"))
        assert "a.jsonl, row 2" in message


class TestSolvedProblems:
    def test_targets_are_the_answers(self, testdata, tokenizer):
        questions, answers = (column(testdata, "gsm8k/train.parquet", field) for field in ("question", "answer"))
        built = build(tokenizer, dataset="gsm8k", sequences=25, sequence_length=700, seed=5)
        by_question = dict(zip(questions, answers, strict=True))
        for start, end in built.set.spans:
            targets = built.set.weights[start:end] > 0
            first = int(np.argmax(targets))
            assert targets[first:].all()
            prompt = tokenizer.decode(built.set.tokens[start : start + first], skip_special_tokens=True)
            answer = tokenizer.decode(built.set.tokens[start + first : end])
            question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
            assert prompt == f"Question: {question}\nAnswer:"
            assert answer.lstrip(" ") == by_question[question]
            assert built.set.weights[start + first : end] == pytest.approx(1 / (25 * (end - start - first)))

    def test_items_are_those_of_the_seed_that_fit_in_file_order(self, testdata, tokenizer):
        questions, answers = (column(testdata, "gsm8k/train.parquet", field) for field in ("question", "answer"))
        chosen, skipped = {}, 0
        for i in random.Random(2).sample(range(len(questions)), len(questions)):
            ids = tokenizer(f"Question: {questions[i]}\nAnswer: {answers[i]}")["input_ids"]
            if len(ids) > 300:
                skipped += 1
            elif len(chosen) < 10:
                chosen[i] = ids
            if len(chosen) == 10:
                break
        built = build(tokenizer, dataset="gsm8k", sequences=10, sequence_length=300, seed=2)
        assert sequences_of(built) == [chosen[i] for i in sorted(chosen)]
        assert built.description["items_too_long"] == skipped > 0

    def test_too_few_items_that_fit(self, tokenizer):
        message = refusal(tokenizer, dataset="gsm8k", sequences=5, sequence_length=20)
        assert "7473 items, of which 0 have at most sequence_length=20 tokens" in message

    @pytest.mark.parametrize(
        ("tokenizer", "target"),
        [
            (CharacterTokenizer(), " 4"),
            (CharacterTokenizer(merged=": 4"), ": 4"),
            (CharacterTokenizer(closing="$"), " 4$"),
        ],
        ids=["at a boundary", "a token over the boundary", "a token that closes every text"],
    )
    def test_boundary_of_prompt_and_answer(self, tokenizer, target):
        ids, prompt_length = calibration.encode_problem(tokenizer, "2+2?", "4")
        assert "".join(": 4" if token == 300 else chr(token) for token in ids[prompt_length:]) == target
        text = "".join(": 4" if token == 300 else chr(token) for token in ids)
        assert text.removesuffix("$") == "Question: 2+2?\nAnswer: 4"


class TestTokenFiles:
    TOKENS = np.arange(24).reshape(4, 6)

    def write(self, path, array):
        if path.suffix == ".npy":
            np.save(path, array)
        else:
            safetensors.numpy.save_file({"tokens": np.ascontiguousarray(array)}, path)
        return str(path)

    @pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
    @pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
    def test_used_as_they_are(self, tmp_path, name, dtype):
        path = self.write(tmp_path / name, self.TOKENS.astype(dtype))
        built = build(None, dataset="tokens", path=path)
        assert sequences_of(built) == self.TOKENS.tolist()
        assert built.description["source"]["rows"] == 4
        assert built.description["tokenizer"] is None

    def test_sequences_and_length_only_limit(self, tmp_path):
        path = self.write(tmp_path / "a.npy", self.TOKENS)
        built = build(None, dataset="tokens", path=path, sequences=3, sequence_length=4)
        assert sequences_of(built) == self.TOKENS[:3, :4].tolist()

    @pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
    @pytest.mark.parametrize(
        ("array", "found"),
        [
            (np.zeros((2, 3), np.float32), "an array of type float32"),
            (np.zeros((2, 3), np.bool_), "an array of type bool"),
            (np.zeros(6, np.int32), r"an array of shape \[6\]"),
            (np.zeros((2, 3, 4), np.int32), r"an array of shape \[2, 3, 4\]"),
            (np.zeros((2, 1), np.int32), r"an array of shape \[2, 1\]"),
            (np.zeros((0, 3), np.int32), r"an array of shape \[0, 3\]"),
            (np.array([[1, 2], [3, -100]]), "the negative id -100"),
        ],
    )
    def test_refused(self, tmp_path, name, array, found):
        message = refusal(None, dataset="tokens", path=self.write(tmp_path / name, array))
        assert re.search(f"found {found}. Allowed is one integer array", message)

    @pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.bin"])
    def test_other_bytes_are_refused(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"something else entirely")
        assert name in refusal(None, dataset="tokens", path=str(tmp_path / name))
        (tmp_path / name).unlink()
        assert "no such file" in refusal(None, dataset="tokens", path=str(tmp_path / name))

    def test_pickles_are_never_loaded(self, tmp_path):
        np.save(tmp_path / "a.npy", np.array([[{"a": 1}, 2]], dtype=object), allow_pickle=True)
        assert "do not read as .npy" in refusal(None, dataset="tokens", path=str(tmp_path / "a.npy"))

    def test_types_that_numpy_does_not_know_are_refused(self, tmp_path):
        torch = pytest.importorskip("torch")
        from safetensors.torch import save_file

        save_file({"tokens": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
        assert "a.safetensors" in refusal(None, dataset="tokens", path=str(tmp_path / "a.safetensors"))

    def test_several_arrays_are_refused(self, tmp_path):
        safetensors.numpy.save_file({"b": self.TOKENS, "a": self.TOKENS}, tmp_path / "a.safetensors")
        message = refusal(None, dataset="tokens", path=str(tmp_path / "a.safetensors"))
        assert "found 2 arrays (a, b)" in message

    def test_ids_must_lie_in_the_vocabulary(self, tmp_path):
        path = self.write(tmp_path / "a.npy", self.TOKENS)
        assert build(None, 24, dataset="tokens", path=path).set.tokens.max() == 23
        message = refusal(None, 23, dataset="tokens", path=path)
        assert "the file a.npy does not fit the model: token id 23 was found" in message

    def test_ids_beyond_int32_are_refused_and_not_wrapped(self, tmp_path):
        path = self.write(tmp_path / "a.npy", np.array([[1, 2**32 + 5]]))
        assert f"token id {2**32 + 5}" in refusal(None, dataset="tokens", path=path)


def test_tokenizer_of_another_model_is_refused(tokenizer):
    message = refusal(tokenizer, 100, dataset="embedded", sequences=4, sequence_length=64)
    assert "the tokenizer does not fit the model" in message
    assert "has 100 rows" in message


@pytest.mark.parametrize(
    "section",
    [
        {"dataset": "c4", "sequences": 7, "sequence_length": 100},
        {"dataset": "wikitext2", "sequences": 7, "sequence_length": 100},
        {"dataset": "embedded", "sequences": 7, "sequence_length": 100},
        {"dataset": "gsm8k", "sequences": 7, "sequence_length": 500},
    ],
    ids=lambda section: section["dataset"],
)
def test_weights_and_record(tokenizer, section, testdata):
    built = build(tokenizer, **section)
    first = built.set.spans[:, 0]
    assert built.set.weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert (built.set.weights >= 0).all()
    assert (built.set.weights[first] == 0).all()
    assert built.set.tokens.dtype == np.int32
    if section["dataset"] != "gsm8k":
        assert built.set.num_targets == 7 * 99
        assert set(built.set.weights.tolist()) == {0.0, 1 / (7 * 99)}
    description = built.description
    assert description["num_targets"] == np.count_nonzero(built.set.weights)
    assert (description["sequences"], description["num_tokens"]) == (7, len(built.set.tokens))
    assert description["tokenizer"]["special_tokens_of_empty_text"] == [BOS]
    assert str(testdata) not in json.dumps(description)


@pytest.mark.parametrize("section", [{"dataset": "gsm8k", "sequence_length": 500}, {"dataset": "embedded"}])
def test_saved_set_comes_back_and_has_the_same_bytes(tmp_path, tokenizer, section):
    built = build(tokenizer, sequences=6, **section)
    paths = [tmp_path / "a" / "tokens.safetensors", tmp_path / "b" / "tokens.safetensors"]
    for path in paths:
        path.parent.mkdir()
        calibration.save(built, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].with_suffix(".json").read_bytes() == canonical_json(built.description)
    loaded = calibration.load(paths[0])
    assert loaded.description == built.description
    for name in ("tokens", "spans", "weights", "groups"):
        np.testing.assert_array_equal(getattr(loaded.set, name), getattr(built.set, name))
        assert getattr(loaded.set, name).dtype == getattr(built.set, name).dtype


def test_what_was_not_saved_here_is_not_loaded(tmp_path, tokenizer):
    path = tmp_path / "tokens.safetensors"
    calibration.save(build(tokenizer, dataset="embedded", sequences=2, sequence_length=8), path)
    whole = safetensors.numpy.load_file(path)
    for change in (
        {"weights": whole["weights"].astype(np.float32)},
        {"weights": whole["weights"][:-1]},
        {"spans": whole["spans"].reshape(-1)},
        {"groups": whole["groups"][:-1]},
        {"extra": whole["spans"]},
    ):
        safetensors.numpy.save_file({**whole, **change}, path)
        with pytest.raises(IntegrityError, match=r"tokens\.safetensors"):
            calibration.load(path)
    path.write_bytes(b"torn")
    with pytest.raises(IntegrityError, match="not readable"):
        calibration.load(path)
    with pytest.raises(IntegrityError, match="not readable"):
        calibration.load(tmp_path / "none.safetensors")
