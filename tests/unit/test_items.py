"""Items for the margin objective: the draw to a budget, one's own files, and what is recorded of them."""

import json
import random
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from gisp_tasks.data import calibration, sources
from gisp_tasks.data.items import encode_pairs
from gisp_tasks.data.multiple_choice import TASKS, questions
from gisp_tasks.errors import InputError
from gisp_tasks.recipe import CalibrationSection

IDS = {"prompt_ids": [1, 7, 8], "correct_ids": [9, 10], "wrong_ids": [[11], [12, 13, 14]]}
SECTION = {"dataset": "commonsense_qa", "split": "train_surrogate", "sequences": 40, "sequence_length": 350}
TEXT = {"prompt": "Once upon", "correct": " a time", "wrong": [" the end", "a time"]}


@pytest.fixture(scope="module")
def tokenizer(testdata):
    return AutoTokenizer.from_pretrained(testdata / "models/stories260K")


@pytest.fixture(autouse=True)
def _mirror(testdata, monkeypatch):
    monkeypatch.setenv("GISP_DATA_ROOT", str(testdata / "data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def build(tokenizer, vocab_size: int = 512, **section) -> calibration.Calibration:
    return calibration.build(CalibrationSection(**section), tokenizer=tokenizer, vocab_size=vocab_size)


def candidates_of(built: calibration.Calibration) -> list[tuple[list[int], list[float]]]:
    return [(built.set.tokens[a:b].tolist(), built.set.weights[a:b].tolist()) for a, b in built.set.spans]


def write(path, *rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def refusal(tokenizer, **section) -> str:
    with pytest.raises(InputError) as raised:
        build(tokenizer, **section)
    return str(raised.value)


class TestCommonsenseQA:
    def test_each_task_fills_its_share_in_seeded_order(self, tokenizer):
        built = build(tokenizer, **SECTION, seed=3)
        budget = 40 * 350 // 7
        expected = []
        for task in TASKS:
            split = "train_surrogate" if task in ("boolq", "piqa") else "train"
            rows = questions(task, sources.find(task, split).rows(), origin=task)
            used, too_long, chosen = 0, 0, []
            for index in random.Random(3).sample(range(len(rows)), len(rows)):
                item = encode_pairs(tokenizer, rows[index].pairs, rows[index].correct)
                lengths = [len(candidate.tokens) for candidate in item.candidates]
                if max(lengths) > 350:
                    too_long += 1
                    continue
                if used + sum(lengths) > budget:
                    break
                used += sum(lengths)
                chosen.append((index, item))
            counts = built.description["tasks"][task]
            assert (counts["items"], counts["items_drawn"]) == (len(rows), len(chosen))
            assert (counts["tokens"], counts["items_too_long"]) == (used, too_long)
            assert 0 < used <= budget
            expected += [c.tokens.tolist() for _, item in sorted(chosen, key=lambda p: p[0]) for c in item.candidates]
        assert [tokens for tokens, _ in candidates_of(built)] == expected
        assert built.description["tasks"]["boolq"]["items_too_long"] > 0, "the case that skips was not met"
        assert built.set.weights.sum() == pytest.approx(0, abs=1e-12)
        assert built.set.weights[built.set.weights > 0].sum() == pytest.approx(1)

    def test_the_record_names_what_stands_in_for_train(self, tokenizer, testdata):
        source = build(tokenizer, **SECTION).description["source"]
        assert source["split"] == (
            "train_surrogate (arc_easy: train, arc_challenge: train, hellaswag: train, openbookqa: train, "
            "winogrande: train)"
        )
        assert source["tasks"]["piqa"]["files"][0]["name"] == "piqa/train_surrogate.parquet"
        assert source["rows"] == sum(task["rows"] for task in source["tasks"].values())
        assert (source["origin"], source["revision"]) == ("mirror", None)
        assert str(testdata) not in json.dumps(source)

    def test_a_stand_in_is_never_taken_for_train(self, tokenizer):
        message = refusal(tokenizer, **SECTION | {"split": "train"})
        assert "baber/piqa/piqa_train.parquet" in message

    def test_seeds_differ_and_repeat(self, tokenizer):
        built = [candidates_of(build(tokenizer, **SECTION, seed=seed)) for seed in (0, 0, 1)]
        assert built[0] == built[1] != built[2]

    def test_a_budget_too_small_for_a_task_is_refused(self, tokenizer):
        message = refusal(tokenizer, **SECTION | {"sequences": 1})
        assert re.search(r"budget leaves 50 tokens for boolq, and the first item drawn takes \d+", message)

    def test_items_longer_than_a_sequence_are_refused_when_none_is_left(self, tokenizer):
        message = refusal(tokenizer, **SECTION | {"sequence_length": 20, "sequences": 2000})
        assert "boolq has 848 items, of which 848 have a candidate of more than 20 tokens" in message


class TestOwnItems:
    def test_ids_are_used_as_they_are_and_text_as_lm_eval_does(self, tmp_path, tokenizer):
        path = write(tmp_path / "a.jsonl", IDS, "", TEXT)
        built = build(tokenizer, dataset="items", path=path)
        correct, close, far, *texts = candidates_of(built)
        assert correct == ([1, 7, 8, 9, 10], [0, 0, 0, 1 / 4, 1 / 4])
        assert close == ([1, 7, 8, 11], [0, 0, 0, -1 / 4])
        assert far[0] == [1, 7, 8, 12, 13, 14]
        assert far[1] == pytest.approx([0, 0, 0, *[-1 / 12] * 3])
        prompt = tokenizer("Once upon")["input_ids"]
        for (tokens, weights), answer in zip(texts, (" a time", " the end", "a time"), strict=True):
            assert tokens == prompt + tokenizer("Once upon" + answer)["input_ids"][len(prompt) :]
            assert np.flatnonzero(weights).tolist() == list(range(len(prompt), len(tokens)))
        assert built.description["items"] == built.description["items_drawn"] == 2
        assert built.description["source"]["files"][0]["name"] == "a.jsonl"
        assert built.description["tokenizer"] is not None

    def test_items_of_ids_need_no_tokenizer(self, tmp_path):
        built = build(None, dataset="items", path=write(tmp_path / "a.jsonl", IDS))
        assert built.description["tokenizer"] is None

    def test_ids_must_lie_in_the_vocabulary(self, tmp_path):
        path = write(tmp_path / "a.jsonl", {**IDS, "wrong_ids": [[2**40]]})
        assert f"the file of items does not fit the model: token id {2**40}" in refusal(
            None, dataset="items", path=path
        )

    def test_the_budget_counts_all_candidates(self, tmp_path):
        path = write(tmp_path / "a.jsonl", *[IDS] * 10)  # 5 + 4 + 6 tokens each
        section = {"dataset": "items", "path": path, "sequence_length": 6}
        assert build(None, **section, sequences=15).description["items_drawn"] == 6
        assert build(None, **section, sequences=14).description["items_drawn"] == 5
        assert "the first item drawn takes 15" in refusal(None, **section, sequences=2)
        assert "10 have a candidate of more than 5" in refusal(None, **section | {"sequence_length": 5})

    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ({"prompt": "a", "correct": "b"}, "found the keys prompt, correct"),
            ({"text": "a"}, "found the keys text"),
            ({}, "found the keys none"),
            ({**TEXT, "label": 1}, "found the keys prompt, correct, wrong, label"),
            ({**TEXT, "prompt": " "}, "prompt is empty"),
            ({**TEXT, "correct": 4}, "correct is empty or of another kind"),
            ({**TEXT, "wrong": "no"}, "wrong is no list of answers"),
            ({**TEXT, "wrong": []}, "wrong is no list of answers"),
            ({**TEXT, "wrong": ["a", ""]}, "or one is empty"),
            ({**IDS, "prompt_ids": []}, "prompt_ids is empty"),
            ({**IDS, "correct_ids": [True]}, "correct_ids is empty or of another kind"),
            ({**IDS, "correct_ids": [-1]}, "correct_ids is empty or of another kind"),
            ({**IDS, "correct_ids": [2**63]}, "correct_ids is empty or of another kind"),
            ({**IDS, "wrong_ids": [3]}, "wrong_ids is no list of answers"),
            ({**IDS, "wrong_ids": [[3], []]}, "or one is empty"),
            ("[1, 2]", "a JSON object was expected, found list"),
            ("{", "not JSON"),
        ],
    )
    def test_a_bad_line_is_named_by_its_number(self, tmp_path, tokenizer, line, found):
        path = write(tmp_path / "a.jsonl", TEXT, "", IDS, line)
        message = refusal(tokenizer, dataset="items", path=path)
        assert "a.jsonl, line 4: " in message
        assert found in message

    def test_an_answer_without_a_token_of_its_own_is_refused(self, tmp_path):
        class Greedy:
            """Merges everything into one token, so that the answer has none."""

            bos_token = eos_token = None

            def __call__(self, text, **_):
                return {"input_ids": [5]}

        path = write(tmp_path / "a.jsonl", TEXT)
        assert "line 1: an answer comes to no token" in refusal(Greedy(), dataset="items", path=path)

    def test_files_that_are_no_json_lines_are_refused(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text("text")
        assert "JSON lines were expected" in refusal(tokenizer, dataset="items", path=str(tmp_path / "a.txt"))
        assert "no such file" in refusal(tokenizer, dataset="items", path=str(tmp_path / "none.jsonl"))
        assert "has 0 items" in refusal(tokenizer, dataset="items", path=write(tmp_path / "empty.jsonl"))

    def test_saved_items_come_back(self, tmp_path, tokenizer):
        built = build(tokenizer, dataset="items", path=write(tmp_path / "a.jsonl", IDS, TEXT))
        calibration.save(built, tmp_path / "tokens.safetensors")
        loaded = calibration.load(tmp_path / "tokens.safetensors")
        assert loaded.description == built.description
        np.testing.assert_array_equal(loaded.set.weights, built.set.weights)
