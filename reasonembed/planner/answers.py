"""How long answers are: assumed at first, then as a model was seen to write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from reasonembed.config import LLMStageConfig, RunConfig

if TYPE_CHECKING:
    from reasonembed.planner.loads import Prompt

_TOKENS_A_WORD = 1.4
_ANALYSIS, _REASONING = 500, 800  # of models that are left room; the paper's own are not known
_AT_LIMIT = 0.9  # of a limit that is shorter than what a model would write


@dataclass(frozen=True)
class Answers:
    """The tokens that a row's answers take.

    Each token ends an answer with the same probability, until the limit does.

    Attributes:
        limit: Most tokens of an answer.
        ends: Probability that a token is the last one.
        again: Share of the answers that are asked for again.
        tries: Most of them.
        samples: Answers a row by design.
        grades: Questions of one token beside each answer.
    """

    limit: int
    ends: float
    again: float = 0.0
    tries: int = 1
    samples: float = 1.0
    grades: float = 0.0

    @property
    def tokens_a_try(self) -> float:
        """Mean of one answer."""
        if self.ends <= 0:
            return float(self.limit)
        return (1 - (1 - self.ends) ** self.limit) / self.ends

    @property
    def rounds(self) -> float:
        """Mean answers asked for, by design and again."""
        return self.samples * sum(self.again**n for n in range(self.tries))

    @property
    def tokens(self) -> float:
        """Mean of a row, all its answers."""
        return self.rounds * self.tokens_a_try + self.samples * self.grades

    @property
    def asks(self) -> float:
        """Questions a row."""
        return self.rounds + self.samples * self.grades

    def longest(self, batch: float) -> float:
        """Mean of the longest of so many answers."""
        if self.ends <= 0 or self.limit <= 1:
            return float(self.limit)
        stays = 1 - self.ends
        return math.fsum(1 - (1 - stays**n) ** max(1.0, batch) for n in range(self.limit))

    def steps(self, rows: float, *, batch: float, at_once: float, is_open: bool) -> float:
        """Decoding steps of so many rows.

        Args:
            rows: All of them.
            batch: Rows of a block.
            at_once: Texts that the engine writes at once.
            is_open: Blocks overlap, so that the engine is always full; else each block waits for
                its longest answer.
        """
        together = min(batch, rows) * self.samples
        if is_open:
            return rows * self.tokens / max(1.0, min(at_once, rows * self.samples))
        blocks = max(1.0, rows / batch)
        return (
            blocks
            * sum(
                self._steps_of_a_round(together * self.again**n, at_once) for n in range(self.tries)
            )
            + blocks * self.grades
        )

    def _steps_of_a_round(self, answers: float, at_once: float) -> float:
        if answers <= 0:
            return 0.0
        any_left = min(1.0, answers)
        if answers <= at_once:
            return any_left * self.longest(answers)
        return (answers / at_once - 1) * self.tokens_a_try + self.longest(at_once)


@dataclass(frozen=True)
class Seen:
    """What a model was seen to do in a stage.

    Attributes:
        ends: Probability that a token is the last one.
        again: Share of answers asked for again.
        prompt_ratio: Tokens of a question, measured by planned.
        computed_ratio: The same of those not in the cache.
        failed: Share of rows.
    """

    ends: float
    again: float = 0.0
    prompt_ratio: float = 1.0
    computed_ratio: float = 1.0
    failed: float = 0.0


@dataclass(frozen=True)
class Yields:
    """Shares that go on from stage to stage."""

    kept: float = 0.7
    queries: float = 0.95
    samples: float = 0.8


@dataclass(frozen=True)
class AnswerStatistics:
    """What is known of answers, by stage and model."""

    seen: dict[str, Seen] = field(default_factory=dict)
    yields: Yields = field(default_factory=Yields)

    def answers(self, stage: str, config: RunConfig) -> Answers:
        """What a stage's answers will be like."""
        known = self._known(stage, config)
        base = known_answers(stage, config)
        if known is None:
            return base
        return replace(base, ends=known.ends, again=known.again)

    def corrected(self, stage: str, config: RunConfig, prompt: Prompt) -> Prompt:
        """A question's tokens, by what was measured of others of the same stage."""
        answer = self.answers(stage, config)
        # A grade is asked for after the analysis: all but that is in the cache.
        share = answer.samples * answer.grades / answer.asks
        computed = prompt.computed * (1 - share) + answer.tokens_a_try * share
        whole = prompt.tokens + answer.tokens_a_try * share
        known = self._known(stage, config)
        if known is not None:
            computed, whole = computed * known.computed_ratio, whole * known.prompt_ratio
        return replace(prompt, tokens=whole, computed=min(whole, computed))

    def _known(self, stage: str, config: RunConfig) -> Seen | None:
        llm = _stage(stage, config).llm
        return self.seen.get(f"{stage}|{llm.model}") or self.seen.get(
            f"{'annotate' if stage == 'audit' else stage}|{llm.model}"
        )


def _stage(name: str, config: RunConfig) -> LLMStageConfig:
    found = getattr(config, "annotate" if name == "audit" else name)
    assert isinstance(found, LLMStageConfig), name
    return found


def known_answers(stage: str, config: RunConfig) -> Answers:
    """What is assumed of a stage's answers before anything was measured."""
    settings = _stage(stage, config)
    limit = settings.sampling.max_tokens
    if stage == "filter":
        return Answers(1, 1.0)
    may_retry = settings.sampling.temperature > 0
    found = Answers(
        limit,
        ends_for(_expected(stage, config), limit=limit),
        again=0.1 if may_retry else 0.0,
        tries=settings.tries if may_retry else 1,
    )
    if stage in ("annotate", "audit"):
        annotate = config.annotate
        samples = annotate.samples * (0.5 if annotate.cascade else 1.0)
        grades = float(annotate.label_from == "expected") + (2.0 if annotate.cascade else 0.0)
        found = replace(found, samples=samples, grades=grades)
    return found


def _expected(stage: str, config: RunConfig) -> float:
    if stage == "generate":
        lengths = config.plan.lengths
        words = sum(b.weight * (b.min_words + b.max_words) / 2 for b in lengths)
        return _TOKENS_A_WORD * words / sum(b.weight for b in lengths)
    return _ANALYSIS if stage in ("annotate", "audit") else _REASONING


def ends_for(mean: float, *, limit: int) -> float:
    """The probability of an end that gives a mean length, at most nine tenths of the limit."""
    wanted = min(mean, _AT_LIMIT * limit)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if Answers(limit, middle).tokens_a_try > wanted:
            low = middle
        else:
            high = middle
    return high


def seen_ends(tokens: Sequence[float], finished: Sequence[bool]) -> float:
    """The same from answers: of all tokens written, those after which an answer ended by itself.

    Args:
        tokens: Of each answer.
        finished: Whether it ended by itself and not by the limit.
    """
    total: float = math.fsum(tokens)
    return min(1.0, sum(finished) / total) if total else 1.0
