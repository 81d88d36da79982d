"""What every level is measured on."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gisp_tasks.errors import InputError
from gisp_tasks.recipe.section import Section


class TextEvaluation(Section):
    """Token perplexity in non-overlapping windows; the window is part of the metric's name."""

    windows: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(128, 2048), min_length=1, max_length=8)
    """Tokens a window; one longer than the model's context becomes the model's context."""
    limit_tokens: int | None = Field(default=None, ge=2)
    """Evaluate on this many leading tokens only; null: all."""

    @model_validator(mode="after")
    def _limit_holds_a_window(self) -> Self:
        if self.limit_tokens is not None and self.limit_tokens < max(self.windows):
            raise ValueError(
                f"limit_tokens={self.limit_tokens} is less than the window of {max(self.windows)} tokens, so nothing "
                f"could be measured in it; raise limit_tokens or drop that window"
            )
        return self


class ProblemEvaluation(Section):
    """Exact match through lm-eval, and token perplexity of the reference solutions."""

    shots: int = Field(default=5, ge=0, le=32)
    """Solved examples before each question."""
    limit: int | None = Field(default=None, ge=0)
    """Problems to solve by generation; null: all; 0: none, only the perplexity of solutions is taken."""
    max_new_tokens: int = Field(default=256, ge=1, le=4096)
    """Longest answer."""
    batch_size: int = Field(default=8, ge=1, le=1024)
    """Problems answered at once; scores depend on it, so it is recorded."""
    limit_solutions: int | None = Field(default=None, ge=1)
    """Reference solutions whose perplexity is taken; null: all."""


class ChoiceEvaluation(Section):
    """Accuracy on BoolQ, ARC-Easy, ARC-Challenge, HellaSwag, OpenBookQA, WinoGrande and PIQA through lm-eval."""

    shots: int = Field(default=0, ge=0, le=32)
    """Solved examples, of the train split, before each question."""
    limit: int | None = Field(default=None, ge=1)
    """Questions of each task, the first of its file; null: all."""
    batch_size: int = Field(default=8, ge=1, le=1024)
    """Answers weighed at once; scores depend on it in the last digits, so it is recorded."""
    split: Literal["validation", "test"] = "validation"
    """`test`: what lm-eval itself evaluates, which is the test split of ARC and OpenBookQA and validation elsewhere
    (the other test splits have no labels)."""


class SpeedEvaluation(Section):
    """Prefill and decoding speed, interleaved with the dense model in one process; model and cache sizes.

    Seconds differ from run to run: the figures of the first attempt stay in the record.
    """

    prompt_tokens: int = Field(default=512, ge=1, le=131_072)
    """Tokens of a prompt."""
    new_tokens: int = Field(default=32, ge=1, le=4096)
    """Tokens decoded after it, one by one."""
    batch_size: int = Field(default=1, ge=1, le=1024)
    """Prompts at once."""
    repetitions: int = Field(default=5, ge=1, le=100)
    """Measurements of each model, in turn; the median is taken."""

    def require_context(self, context: int) -> None:
        """Refuse a model that cannot hold that many tokens.

        Raises:
            InputError: prompt and new tokens are more than its ``context``.
        """
        if self.prompt_tokens + self.new_tokens > context:
            raise InputError(
                f"evaluation.speed asks for {self.prompt_tokens} + {self.new_tokens} tokens, and the model's context "
                f"is {context}; lower prompt_tokens or new_tokens"
            )


class EvaluationSection(Section):
    """What every level, and the dense model, is measured on. Leave a key out to skip its task."""

    wikitext2: TextEvaluation | None = None
    """Token perplexity of the WikiText-2 (raw) test split."""
    gsm8k: ProblemEvaluation | None = None
    """Grade-school word problems, test split."""
    commonsense_qa: ChoiceEvaluation | None = None
    """Seven multiple-choice tasks and their mean."""
    embedded_text: TextEvaluation | None = None
    """Token perplexity of the held-back part of the reference text that CPython ships. Works offline."""
    embedded_arithmetic: ProblemEvaluation | None = None
    """Generated arithmetic word problems in GSM8K's schema. Works offline."""
    speed: SpeedEvaluation | None = None
    """Tokens a second against the dense model, bytes of the weights and of the cache. Both models are in memory."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the evaluations asked for, in the order of this class."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def perplexity_task(self) -> str | None:
        """The text evaluation whose first window the gate and the report's curve read."""
        return next((name for name in self.tasks if isinstance(getattr(self, name), TextEvaluation)), None)

    @property
    def accuracy_metrics(self) -> tuple[str, ...]:
        """The accuracies that the gate reads, one of each task that measures any."""
        sections = {name: getattr(self, name) for name in self.tasks}
        found = [f"{n}_exact_match_flexible" for n, s in sections.items() if _solves_problems(s)]
        return (*found, *(f"{n}_acc" for n, s in sections.items() if isinstance(s, ChoiceEvaluation)))


def _solves_problems(section: Section) -> bool:
    return isinstance(section, ProblemEvaluation) and section.limit != 0
