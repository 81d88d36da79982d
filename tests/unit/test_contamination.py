"""What calibration draws against what is evaluated: planted copies are found, strangers and boilerplate pass."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gisp_tasks.data import calibration, contamination, sources
from gisp_tasks.data.evaluated import Evaluated, choices, evaluated_texts
from gisp_tasks.data.multiple_choice import TASKS, questions
from gisp_tasks.errors import InputError
from gisp_tasks.pruning.objectives import perplexity
from gisp_tasks.recipe import CalibrationSection, Recipe
from gisp_tasks.tasks.measure import evaluation_sources

FILE = "f" * 64
# Two vocabularies without a common word.
evaluation_words = st.text("abcdefghijklm", min_size=1, max_size=6)
other_words = st.text("nopqrstuvwxyz", min_size=1, max_size=6)


class CharacterTokenizer:
    """One token a character."""

    def batch_decode(self, sequences, **_):
        return ["".join(map(chr, tokens)) for tokens in sequences]


def drawn(*texts: str, files: tuple[str, ...] = ("0" * 64,)) -> calibration.Calibration:
    """As `calibration.build` draws it: windows or items of these very texts."""
    sequences = [np.array([ord(character) for character in text], dtype=np.int64) for text in texts]
    return calibration.Calibration(perplexity(sequences), {"source": {"files": [{"sha256": file} for file in files]}})


def check(*texts: str, passages=(), wholes=(), files: tuple[str, ...] = ("0" * 64,), **section):
    """The record for one evaluation, named `wikitext2`."""
    asked = CalibrationSection(**({"dataset": "text", "path": "own.txt"} | section))
    evaluated = {"wikitext2": Evaluated(tuple(passages), tuple(wholes), frozenset({FILE}))}
    found = drawn(*texts, files=files)
    return contamination.check(asked, found, evaluated=evaluated, tokenizer=CharacterTokenizer())


def accepted(*texts: str, **options):
    record = check(*texts, overlap="accept", **options)
    return record["evaluations"]["wikitext2"], record["accepted"]


def naive_overlap(text: str, passage: str, length: int) -> bool:
    """Whether ``length`` words in a row of ``text`` stand in ``passage``, by a loop over strings."""
    words, padded = contamination.words(text), f" {' '.join(contamination.words(passage))} "
    return any(f" {' '.join(words[i : i + length])} " in padded for i in range(len(words) - length + 1))


class TestPassages:
    @given(
        st.lists(evaluation_words, min_size=13, max_size=60),
        st.lists(other_words, min_size=2, max_size=40),
        st.lists(other_words, min_size=2, max_size=40),
        st.data(),
    )
    def test_a_planted_passage_is_found_whatever_stands_around_it(self, passage, before, after, data):
        start = data.draw(st.integers(0, len(passage) - 13))
        end = data.draw(st.integers(start + 13, len(passage)))
        planted = " ".join([*before, *passage[start:end], *after])
        clean = " ".join([*before, *after])
        record, stops = accepted(clean, planted, passages=[" ".join(passage)])
        assert (record["overlapping_sequences"], record["examples"], stops) == (1, [1], True)
        with pytest.raises(InputError):
            check(clean, planted, passages=[" ".join(passage)])

    @given(
        st.lists(st.lists(other_words, max_size=50).map(" ".join), min_size=1, max_size=4),
        st.lists(evaluation_words, max_size=50).map(" ".join),
    )
    def test_no_false_hit_on_other_words(self, texts, passage):
        texts = [f"{text} z" for text in texts]
        assert check(*texts, passages=[passage], wholes=[passage])["evaluations"]["wikitext2"]["examples"] == []

    @settings(max_examples=300)
    @given(*[st.lists(st.sampled_from("ab"), min_size=15, max_size=40).map(" ".join)] * 2)
    def test_a_hit_is_13_words_in_a_row_of_one_text(self, text, passage):
        record, _ = accepted(text, passages=[passage])
        assert bool(record["overlapping_sequences"]) == naive_overlap(text, passage, 13)

    def test_no_hit_across_two_texts(self):
        halves = [" ".join(f"{side}{i}" for i in range(7)) for side in "ab"]
        assert check(f"x y {' '.join(halves)} y x", passages=halves)["evaluations"]["wikitext2"]["share"] == 0

    def test_case_punctuation_and_the_frame_of_prompts_do_not_hide_a_copy(self):
        passage = "Question: Twenty @-@ five of it 's men , 1 @,@ 000 strong , left “ Élan ” at dawn in May\nAnswer: no"
        copy = "so twenty-five OF IT'S MEN; 1,000 strong; left Élan -- at dawn? in may: no !"
        assert accepted(copy, passages=[passage])[1]

    def test_twelve_words_are_none(self):
        passage = " ".join(f"w{i}" for i in range(30))
        record, stops = accepted("a b w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 a b", passages=[passage])
        assert (record["overlapping_sequences"], stops) == (0, False)

    def test_a_short_window_is_compared_without_its_ends(self):
        passage = " ".join(f"w{i}" for i in range(30))
        inner = "w3 w4 w5 w6 w7 w8 w9 w10"
        assert accepted(f"nd {inner} w", passages=[passage])[1]
        record, stops = accepted(f"nd {inner[3:]} w", passages=[passage])
        assert (record["checked"], record["overlapping_sequences"], stops) == (0, 0, False)


class TestWholes:
    def test_a_short_item_is_found_in_a_longer_text_and_a_shorter_one_alone(self):
        item, shorter = "one two three four five six seven eight", "red is a colour"
        items = {"dataset": "items", "path": "own.jsonl"}
        assert accepted(f"zero {item.upper()}! nine", passages=[item], **items)[1]
        assert accepted(f"Question: {shorter}?", passages=[shorter], **items)[1]
        assert not accepted(f"zero {shorter} nine", passages=[shorter], **items)[1]

    def test_of_a_whole_a_part_is_no_hit(self):
        whole = " ".join(f"w{i}" for i in range(20))
        assert accepted(f"a {whole} b", wholes=[whole])[1]
        assert not accepted(f"a {whole[:-4]} b", wholes=[whole])[1]


class TestVerdict:
    PASSAGE = " ".join(f"w{i}" for i in range(40))

    def test_one_sequence_of_an_own_file_is_refused_in_four_parts(self):
        with pytest.raises(InputError) as caught:
            check(*["n o p"] * 199, f"n {self.PASSAGE} n", passages=[self.PASSAGE])
        for part in (
            "calibration.dataset=text, path=own.txt: 1 of 200 sequences overlap what evaluation.wikitext2 measures",
            "e.g. 'w0 w1 w2",
            "Allowed is no overlap",
            "calibrate on other data, leave the evaluation out, or set calibration.overlap: accept",
        ):
            assert part in str(caught.value)

    @pytest.mark.parametrize(("num_hits", "stops"), [(2, False), (3, True)])
    def test_of_a_named_data_set_one_percent_is_tolerated_and_recorded(self, num_hits, stops):
        texts = [f"n {self.PASSAGE} n"] * num_hits + ["n o p"] * (200 - num_hits)
        named = {"dataset": "wikitext2", "path": None}
        record, accepts = accepted(*texts, passages=[self.PASSAGE], **named)
        assert (record["overlapping_sequences"], record["share"], accepts) == (num_hits, num_hits / 200, stops)
        if stops:
            with pytest.raises(InputError, match=r"split=train: 3 of 200 .* Allowed is at most 1% of the sequences"):
                check(*texts, passages=[self.PASSAGE], **named)

    def test_the_example_is_short(self):
        long = " ".join(f"{'w' * 40}{i}" for i in range(20))
        with pytest.raises(InputError) as caught:
            check(f"n {long} n", passages=[long])
        shown = str(caught.value).split("e.g. '")[1].split("'")[0]
        assert len(shown) == 80

    def test_the_file_of_an_evaluation_is_refused_whatever_was_drawn(self):
        with pytest.raises(InputError, match=r"it is read from the file that evaluation\.wikitext2 measures"):
            check("n o p", passages=[self.PASSAGE], files=(FILE,), dataset="wikitext2", path=None)
        record, stops = accepted("n o p", passages=[self.PASSAGE], files=(FILE,))
        assert (record["same_file"], record["overlapping_sequences"], stops) == (True, 0, True)

    def test_the_record_is_json_without_text_and_the_same_each_time(self):
        texts = [f"n {self.PASSAGE} n"] * 20
        records = [check(*texts, passages=[self.PASSAGE], overlap="accept") for _ in range(2)]
        assert json.dumps(records[0]) == json.dumps(records[1])
        assert set(records[0]) == {"criterion", "n", "tolerated_share", "evaluations", "accepted"}
        assert len(records[0]["evaluations"]["wikitext2"]["examples"]) == 8
        assert "w1" not in json.dumps(records[0])


# Real data.


@pytest.fixture(scope="module")
def tokenizer(testdata):
    """Of a real model, with the real data within reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GISP_DATA_ROOT", str(testdata / "data"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield AutoTokenizer.from_pretrained(testdata / "models/stories260K")


@pytest.fixture(scope="module")
def against(tokenizer):
    """What the four evaluations read without limits."""
    return evaluated(tokenizer, wikitext2={}, gsm8k={}, embedded_text={}, embedded_arithmetic={})


def evaluated(tokenizer, **evaluations):
    recipe = Recipe.parse(
        {
            "name": "real",
            "model": {"source": "model"},
            "calibration": {"dataset": "c4"},
            "evaluation": evaluations,
            "publish": {"store": "file:///store", "gate": {"max_perplexity_ratio": None}},
        }
    )
    return evaluated_texts(recipe, evaluation_sources(recipe), tokenizer)


def real(tokenizer, *, against, **section):
    """The record of a real draw."""
    asked = CalibrationSection(**section)
    built = calibration.build(asked, tokenizer=tokenizer, vocab_size=512)
    return contamination.check(asked, built, evaluated=against, tokenizer=tokenizer)


def choice_texts(task: str) -> Evaluated:
    passages, wholes = choices(task, sources.find(task, "validation"), None)
    return Evaluated(tuple(passages), tuple(wholes), frozenset())


@pytest.mark.parametrize(
    ("dataset", "split"),
    [("wikitext2", "train"), ("wikitext2", "validation"), ("c4", "train"), ("embedded", "train")],
)
def test_text_to_calibrate_on_shares_nothing(tokenizer, against, dataset, split):
    record = real(tokenizer, against=against, dataset=dataset, split=split, sequences=200)
    assert not record["accepted"]
    for name, found in record["evaluations"].items():
        assert found["overlapping_sequences"] == 0, name
        # Some windows of the reference text are tables with few words.
        assert found["checked"] >= 190


def test_problems_to_calibrate_on_pass_with_their_boilerplate(tokenizer, against):
    record = real(tokenizer, against=against, dataset="gsm8k", sequences=1000, sequence_length=1000)
    assert record["evaluations"]["gsm8k"]["share"] < 0.005
    record = real(tokenizer, against=against, dataset="embedded_arithmetic", sequences=1000, sequence_length=1000)
    assert record["evaluations"]["embedded_arithmetic"]["overlapping_sequences"] == 0


@pytest.mark.parametrize(
    ("dataset", "evaluation"),
    [("wikitext2",) * 2, ("gsm8k",) * 2, ("embedded", "embedded_text"), ("embedded_arithmetic",) * 2],
)
def test_calibrating_on_a_test_split_is_refused(tokenizer, against, dataset, evaluation):
    section = {"dataset": dataset, "split": "test", "sequences": 50, "sequence_length": 256}
    with pytest.raises(
        InputError, match=rf"split=test: it is read from the file that evaluation\.{evaluation} measures"
    ):
        real(tokenizer, against=against, **section)
    record = real(tokenizer, against=against, **section, overlap="accept")
    found = record["evaluations"][evaluation]
    assert found["overlapping_sequences"] == found["checked"] >= 48
    assert record["accepted"]


def test_one_evaluated_paragraph_in_an_own_text_is_refused(tokenizer, against, tmp_path):
    paragraph = next(text for text in sources.find("wikitext2", "test").texts() if len(text.split()) > 60)
    around = sources.find("c4", "train").texts()[:20]
    path = tmp_path / "own.txt"
    section = {"dataset": "text", "path": str(path), "sequence_length": 128}
    path.write_text("\n\n".join(around))
    assert not real(tokenizer, against=against, **section, sequences=60)["accepted"]
    path.write_text("\n\n".join([*around[:10], paragraph.lower(), *around[10:]]))
    windows = len(calibration.encode(tokenizer, path.read_text())) // 128
    with pytest.raises(InputError, match=r"evaluation\.wikitext2 measures, e\.g\. "):
        real(tokenizer, against=against, **section, sequences=windows)


def test_only_what_the_limits_leave_is_evaluated(tokenizer, tmp_path):
    problems = sources.find("gsm8k", "test").items()
    path = tmp_path / "own.jsonl"

    def overlap(index: int, **limits) -> bool:
        question, answer = problems[index]
        path.write_text(json.dumps({"prompt": f"{question} =", "correct": f" {answer}", "wrong": [" 7"]}))
        section = {"dataset": "items", "path": str(path), "sequence_length": 1000, "overlap": "accept"}
        return real(tokenizer, against=evaluated(tokenizer, gsm8k=limits), **section)["accepted"]

    assert overlap(5, limit=6, limit_solutions=2)
    assert overlap(5, limit=2, limit_solutions=6)
    assert overlap(500, limit=2)
    assert not overlap(6, limit=6, limit_solutions=2)
    text = evaluated(tokenizer, wikitext2={"windows": [64], "limit_tokens": 65})["wikitext2"].passages[0]
    assert len(calibration.encode(tokenizer, text)) <= 66


def test_a_token_file_made_from_test_text_is_refused(tokenizer, against, tmp_path):
    tokens = calibration.encode(tokenizer, sources.find("wikitext2", "test").text())[10_000:]
    path = tmp_path / "own.npy"
    np.save(path, tokens[: 8 * 128].reshape(8, 128))
    with pytest.raises(InputError, match=r"path=.*own\.npy: 8 of 8 sequences"):
        real(tokenizer, against=against, dataset="tokens", path=str(path), sequence_length=128)


@pytest.mark.parametrize("task", TASKS)
def test_one_evaluated_question_among_own_items_is_refused(tokenizer, tmp_path, task):
    """Its prompt shouted, and framed or not."""
    rows = questions(task, sources.find(task, "validation").rows(), origin=task)
    chosen = random.Random(task).sample(rows, 3)
    path = tmp_path / "own.jsonl"
    section = {"dataset": "items", "path": str(path), "sequences": 100, "sequence_length": 4000}
    own = {"prompt": "Lily had a red ball. Lily was", "correct": " happy with the ball.", "wrong": [" angry."]}
    against = {task: choice_texts(task)}
    path.write_text(json.dumps(own))
    assert not real(tokenizer, against=against, **section)["accepted"]
    for question in chosen:
        prompt, answer = question.pairs[question.correct]
        copy = {"prompt": prompt.upper().replace("?", " ?!"), "correct": answer, "wrong": [" something else"]}
        for frame in ("", "Question: "):
            path.write_text("\n".join(json.dumps(item) for item in (own, {**copy, "prompt": frame + copy["prompt"]})))
            with pytest.raises(InputError, match=rf"evaluation\.{task} measures"):
                real(tokenizer, against=against, **section)


def test_training_questions_of_seven_tasks_pass(tokenizer):
    section = {"dataset": "commonsense_qa", "split": "train_surrogate", "sequences": 1000, "sequence_length": 256}
    record = real(tokenizer, against={task: choice_texts(task) for task in TASKS}, **section)
    assert not record["accepted"]
    assert all(found["share"] < 0.005 for found in record["evaluations"].values())
