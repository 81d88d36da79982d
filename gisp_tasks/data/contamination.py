"""Calibration data that overlaps the evaluation data: refused, or recorded as accepted.

A figure measured on data that the pruning has seen says too little. So what calibration really draws, decoded, is
compared with what is really evaluated (`evaluated`), in words. A sequence overlaps an evaluation when it has 13
words in a row of one of its texts (Brown et al. 2020, appendix C, take 8 to 13), or holds a whole text of 8 to 12
words, or is a shorter one. A window of text with fewer words is compared by its inner ones, 8 at least.

One overlapping sequence is too many in one's own file. Of a named data set 1 % is tolerated, and recorded: official
splits repeat a few of each other's items, and figures published on them do so too. What was counted on parts of the
data, against half of WikiText-2's and GSM8K's test, seven multiple-choice validation files and the embedded data:

- WikiText-2 train and validation, C4 train and validation, embedded text: none of 6,196 windows of 256 tokens.
- GSM8K train: 6 of 7,473 items (0.08 %), by phrases such as "7 days in a week so she eats 3 * 7 = ...".
- Seven commonsense train files: 77 of 61,158 answers with their questions (0.13 %), mostly questions or long contexts
  that stand in both splits.
- Generated arithmetic: 1,210 of 4,000 problems have 13 words in a row of a test problem, none a whole question; and
  BoolQ's splits share passages. So of these only whole questions count.
- Each test split against itself: every sequence, in all eleven.

A file that an evaluation measures is no calibration data even where the evaluation stops before what was drawn.
"""

import functools
import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.data.calibration import Calibration
from gisp_tasks.data.evaluated import Evaluated
from gisp_tasks.errors import InputError
from gisp_tasks.recipe import FILE_DATASETS, ITEM_DATASETS, CalibrationSection

logger = logging.getLogger(__name__)

PASSAGE_WORDS = 13
MIN_WORDS = 8
TOLERATED_SHARE = 0.01
_WORD = re.compile(r"[^\W_]+")
# With these, prompts are framed; another frame around the same item must not hide it.
_FRAME = frozenset({"question", "answer"})
_NUM_EXAMPLES = 8
_MAX_SHOWN = 80
# Odd, so that no digit of a digest is lost; digests are random, so its value is of no importance.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

_Words = NDArray[np.uint64]


@dataclass(frozen=True)
class _Sequence:
    """A calibration sequence in words, their digests, and how many of them in a row are telling."""

    words: list[str]
    digests: _Words
    passage: int


@dataclass(frozen=True)
class _Hit:
    """The first words of a sequence that an evaluation has too."""

    start: int
    length: int


@dataclass(frozen=True)
class _Places:
    """Every place of some sequences where ``length`` words stand in a row.

    Args:
        length: words in a row.
        grams: [P], one number each.
        owners: [P], index of the sequence.
        starts: [P], first word in it.
    """

    length: int
    grams: _Words
    owners: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Sequence[_Sequence], chosen: Sequence[int], length: int) -> "_Places":
        grams = [_grams(sequences[i].digests, length) for i in chosen]
        counts = [len(part) for part in grams]
        starts = [np.arange(count, dtype=np.int64) for count in counts]
        owners = np.repeat(np.array(chosen, dtype=np.int64), counts)
        return cls(length, _joined(grams, np.uint64), owners, _joined(starts, np.int64))

    def among(self, wanted: _Words) -> Iterator[tuple[int, int]]:
        """Sequence and first word of the places whose words are one of ``wanted``, in order."""
        for place in np.flatnonzero(np.isin(self.grams, wanted)):
            yield int(self.owners[place]), int(self.starts[place])


class _Drawn:
    """The calibration sequences, laid out for comparison."""

    def __init__(self, sequences: Sequence[_Sequence]) -> None:
        self.sequences = sequences
        lengths = sorted({sequence.passage for sequence in sequences if sequence.passage >= MIN_WORDS})
        self.passages = [
            _Places.of(sequences, [i for i, s in enumerate(sequences) if s.passage == length], length)
            for length in lengths
        ]
        self.anchors = _Places.of(sequences, range(len(sequences)), MIN_WORDS)

    def hits(self, texts: Evaluated) -> dict[int, _Hit]:
        """Index of each sequence that overlaps the texts -> where it does."""
        passages = [_digests(words(text)) for text in dict.fromkeys(texts.passages)]
        wholes = [digests for digests in passages if len(digests) < PASSAGE_WORDS]
        wholes += [_digests(words(text)) for text in dict.fromkeys(texts.wholes)]
        return {**self._wholes(wholes), **self._in_passages(passages)}

    def _in_passages(self, passages: Sequence[_Words]) -> dict[int, _Hit]:
        """Sequences with telling words in a row of one of the passages."""
        hits: dict[int, _Hit] = {}
        for places in self.passages:
            wanted = _joined([_grams(text, places.length) for text in passages], np.uint64)
            for i, start in places.among(wanted):
                hits.setdefault(i, _Hit(start, places.length))
        return hits

    def _wholes(self, wholes: Sequence[_Words]) -> dict[int, _Hit]:
        """Sequences that hold a whole text of at least `MIN_WORDS`, or that are a shorter one.

        Shorter ones are held by chance: "a plant" is an answer of OpenBookQA.
        """
        alone = {whole.tobytes() for whole in wholes if 0 < len(whole) < MIN_WORDS}
        hits = {i: _Hit(0, len(s.words)) for i, s in enumerate(self.sequences) if s.digests.tobytes() in alone}
        beginnings: dict[bytes, list[_Words]] = defaultdict(list)
        for whole in wholes:
            if len(whole) >= MIN_WORDS:
                beginnings[whole[:MIN_WORDS].tobytes()].append(whole)
        wanted = _joined([_grams(group[0][:MIN_WORDS], MIN_WORDS) for group in beginnings.values()], np.uint64)
        for i, start in self.anchors.among(wanted):
            rest = self.sequences[i].digests[start:]
            for whole in beginnings[rest[:MIN_WORDS].tobytes()]:
                if np.array_equal(rest[: len(whole)], whole):
                    hits.setdefault(i, _Hit(start, len(whole)))
        return hits


def check(
    section: CalibrationSection, calibration: Calibration, *, evaluated: Mapping[str, Evaluated], tokenizer: Any
) -> dict[str, Any]:
    """JSON-ready record of what the calibration sequences share with each evaluation.

    Args:
        section: what was asked for.
        calibration: what was drawn.
        evaluated: evaluation -> what it reads.
        tokenizer: decodes the sequences.

    Raises:
        InputError: more is shared than is tolerated, and the recipe does not accept it.
    """
    sequences = _decoded(calibration, tokenizer, cut=section.dataset not in ITEM_DATASETS)
    drawn = _Drawn(sequences)
    num_checked = sum(sequence.passage >= MIN_WORDS for sequence in sequences)
    tolerated = 0.0 if section.dataset in FILE_DATASETS else TOLERATED_SHARE
    drawn_files = frozenset(_file_digests(calibration.description["source"]))
    if evaluated and num_checked < len(sequences):
        logger.warning(
            "calibration: %d of %d sequences have too few words to be compared with evaluation data",
            len(sequences) - num_checked,
            len(sequences),
        )
    evaluations, faults = {}, []
    for name, texts in evaluated.items():
        hits = drawn.hits(texts)
        same_file = bool(drawn_files & texts.files)
        evaluations[name] = {
            "overlapping_sequences": len(hits),
            "checked": num_checked,
            "share": len(hits) / len(sequences),
            "same_file": same_file,
            "examples": sorted(hits)[:_NUM_EXAMPLES],
        }
        if hits:
            logger.warning("calibration: %s", _found(name, hits, sequences))
        if same_file:
            faults.append(f"it is read from the file that evaluation.{name} measures")
        elif len(hits) > tolerated * len(sequences):
            faults.append(_found(name, hits, sequences))
    if faults and section.overlap == "refuse":
        raise _refusal(section, faults, tolerated)
    criterion = (
        f"{PASSAGE_WORDS} words in a row, lower case, without punctuation; shorter texts, and generated problems, as "
        f"a whole"
    )
    return {
        "criterion": criterion,
        "n": PASSAGE_WORDS,
        "tolerated_share": tolerated,
        "evaluations": evaluations,
        "accepted": bool(faults),
    }


def words(text: str) -> list[str]:
    """The words that are compared: runs of letters and digits, lower case, without those that frame prompts.

    Punctuation parts words instead of vanishing (deviation from the usual definition), so that WikiText's
    ``twenty @-@ five`` is ``twenty-five``.
    """
    return [word for word in _WORD.findall(text.lower()) if word not in _FRAME]


def _decoded(calibration: Calibration, tokenizer: Any, *, cut: bool) -> list[_Sequence]:
    """The sequences in words.

    Args:
        calibration: what was drawn.
        tokenizer: decodes.
        cut: whether they are windows of text, whose first and last word may be parts of words. Of one that has
            fewer words than a passage and two, the inner words are telling together.
    """
    tokens = [calibration.set.tokens[start:end].tolist() for start, end in calibration.set.spans]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    sequences = []
    for text in texts:
        found = words(text)
        passage = min(PASSAGE_WORDS, len(found) - 2) if cut else PASSAGE_WORDS
        sequences.append(_Sequence(found, _digests(found), passage))
    return sequences


def _file_digests(source: Mapping[str, Any]) -> Iterable[str]:
    """Of a `Source.describe`, or of several under ``tasks``."""
    for part in source.get("tasks", {"": source}).values():
        yield from (file["sha256"] for file in part["files"])


def _grams(digests: _Words, length: int) -> _Words:
    """One number for each ``length`` words in a row: a polynomial of their digests, modulo 2**64.

    Two different ones agree by chance only, once in 10**7 comparisons of a million with a million.
    """
    count = max(len(digests) - length + 1, 0)
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(length):
        grams = grams * _FACTOR + digests[i : i + count]
    return grams


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *parts])


def _digests(found: Sequence[str]) -> _Words:
    return np.fromiter((_digest(word) for word in found), dtype=np.uint64, count=len(found))


@functools.cache
def _digest(word: str) -> int:
    # Not hash(), which differs from process to process.
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


def _found(name: str, hits: Mapping[int, _Hit], sequences: Sequence[_Sequence]) -> str:
    """How many sequences overlap an evaluation, with one example."""
    first = min(hits)
    hit = hits[first]
    shown = " ".join(sequences[first].words[hit.start : hit.start + hit.length])
    shown = shown if len(shown) <= _MAX_SHOWN else shown[: _MAX_SHOWN - 1] + "…"
    return f"{len(hits)} of {len(sequences)} sequences overlap what evaluation.{name} measures, e.g. {shown!r}"


def _refusal(section: CalibrationSection, faults: Sequence[str], tolerated: float) -> InputError:
    asked = f"calibration.dataset={section.dataset}" + (f", path={section.path}" if section.path else "")
    if section.path is None:
        asked += f", split={section.split}"
    allowed = f"at most {tolerated:.0%} of the sequences" if tolerated else "no overlap"
    return InputError(
        f"{asked}: {'; '.join(faults)}. Allowed is {allowed}, so that the figures are of unseen data; calibrate on "
        f"other data, leave the evaluation out, or set calibration.overlap: accept, which the run's record then says"
    )
