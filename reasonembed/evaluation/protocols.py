"""Under which rules a figure stands: exclusion, depth, instructions, length, headline.

The field's BRIGHT figures disagree for want of these; every figure of ours is printed with the
name of its protocol. The sentences are those of the protocols' own code: the configurations of
BRIGHT's repository, FlagEmbedding's `evaluation/bright/prompts.py`, ReasonEmbed's
`evaluation_r2med/code/prompts.py` and MTEB's tasks `Bright…Retrieval`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from reasonembed import tasks
from reasonembed.errors import EvaluationError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.metrics import Run, best_first

Style = Literal["none", "instruct", "represent"]


@dataclass(frozen=True)
class Sentences:
    """What a protocol tells an encoder of one task.

    Attributes:
        instruct: For encoders that take an instruction: "Given a biology post, retrieve …".
        represent: For encoders of the BGE kind, with the blank that parts it from the query:
            "Represent this biology post for searching relevant passages: ".
    """

    instruct: str
    represent: str


@dataclass(frozen=True)
class Protocol:
    """Rules of one evaluation.

    Attributes:
        name: What is printed with every figure.
        about: The rules in one sentence.
        depth: Documents that a system returns for a query before anything is taken away.
        keep: Documents of a query that are measured.
        exclusion: Whether excluded documents go before the cut at `depth`, or after it, where the
            list gets shorter by them.
        max_tokens: Largest length of queries and documents, by benchmark, with "" for all others;
            benchmarks that stand nowhere are searched at the system's own length.
        sentences: By whether whole pages are searched, then by name of the task.
    """

    name: str
    about: str
    depth: int
    keep: int
    exclusion: Literal["before", "after"]
    max_tokens: Mapping[str, int]
    sentences: Mapping[bool, Mapping[str, Sentences]]

    def instruction(self, collection: Collection, *, style: Style) -> str:
        """What fills `{instruction}` of a system's query template.

        A task that the protocol has no sentence for is searched with the collection's own
        instruction, or with BGE's general one.

        Args:
            collection: Its task, instruction, and whether it holds whole pages.
            style: Which kind of sentence the system was trained with; none gives "".
        """
        if style == "none":
            return ""
        own = Sentences(collection.instruction, BGE_GENERAL)
        sentences = self.sentences[collection.is_long].get(collection.task, own)
        return sentences.instruct if style == "instruct" else sentences.represent

    def length_limit(self, collection: Collection) -> int | None:
        """Largest length of queries and documents in tokens; None for the system's own."""
        benchmark = collection.benchmark.partition("+")[0]
        return self.max_tokens.get(benchmark, self.max_tokens.get(""))

    def masked(self, collection: Collection) -> Mapping[str, frozenset[str]]:
        """By query, the documents that a search leaves out before its cut at `depth`."""
        return collection.excluded if self.exclusion == "before" else {}

    def settle(self, run: Run, collection: Collection) -> Run:
        """What of a system's run is measured: without excluded documents, `keep` a query.

        It is the run itself where a search masked what it had to. A run of another origin may hold
        excluded documents: they go before the cut, or after a cut at `depth`, as the protocol has
        it. Best first; equal scores stay in the order of the run.
        """
        settled: Run = {}
        for query_id, scores in run.items():
            shut = collection.excluded.get(query_id, frozenset())
            ranked = best_first(scores)
            if self.exclusion == "after":
                ranked = ranked[: self.depth]
            left = [doc_id for doc_id in ranked if doc_id not in shut]
            settled[query_id] = {doc_id: scores[doc_id] for doc_id in left[: self.keep]}
        return settled

    def headline(self, *, is_long: bool) -> str:
        """The metric that is compared first, such as "ndcg@10"."""
        return "recall@1" if is_long else "ndcg@10"


def get(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        EvaluationError: There is none; the message lists those that exist.
    """
    try:
        return PROTOCOLS[name]
    except KeyError:
        raise EvaluationError(
            f"unknown protocol {name!r}; there are: {', '.join(PROTOCOLS)}"
        ) from None


# ---- sentences ----------------------------------------------------------------------------------

BGE_GENERAL = "Represent this sentence for searching relevant passages: "
_PAGED = (*tasks.BRIGHT[:7], "pony")  # the tasks of BRIGHT that have whole pages too


def _sought(task: str, *, is_long: bool) -> str:
    if is_long:
        return "documents"
    if task == "theoremqa_theorems":
        return "theorems"
    return "examples" if task in ("leetcode", "aops", "theoremqa_questions") else "passages"


def _official(task: str, *, is_long: bool) -> Sentences:
    """BRIGHT's `configs/{qwen,qwen2,e5,sf}` and `configs/bge`: raw names, no article, no stop."""
    if task in ("aops", "theoremqa_questions", "theoremqa_theorems"):
        given, represented, noun = "Math problem", "Math problem", "problem"
    elif task == "leetcode":
        given, represented, noun = "coding problem", "Coding problem", "problem"
    elif task == "pony":
        given, represented, noun = "pony question", "Pony question", "question"
    else:
        given, represented, noun = f"{task} post", f"{task} post", "post"
    sought = _sought(task, is_long=is_long)
    return Sentences(
        f"Given a {given}, retrieve relevant {sought} that help answer the {noun}",
        f"Represent this {represented} for searching relevant {sought}: ",
    )


def _flag_embedding(task: str, *, is_long: bool) -> Sentences:
    """ReasonEmbed's own; it has none for encoders of the BGE kind, which keep the official one."""
    instruct = tasks.get(task).instruction
    if is_long:
        instruct = instruct.replace("passages", "documents")
        if task == "pony":
            instruct = instruct.removesuffix(".")  # as released
    return Sentences(instruct, _official(task, is_long=is_long).represent)


def _mteb(task: str, *, is_long: bool) -> Sentences:
    """One sentence for every encoder; whole pages are "passages" too."""
    del is_long
    represent = _official(task, is_long=False).represent
    return Sentences(represent, represent)


_R2MED = {
    "r2med-biology": "Given a Biology post, retrieve relevant passages that help answer the post",
    "r2med-bioinformatics": "Given a Bioinformatics post, retrieve relevant passages that help "
    "answer the post",
    "r2med-medical-sciences": "Given a Medical Science post, retrieve relevant passages that help "
    "answer the post",
    "r2med-medxpertqa-exam": "Given a Medical Exam, retrieve relevant passages that help answer "
    "the exam",
    "r2med-medqa-diag": "Given a Medical Exam, retrieve relevant passages that help answer the "
    "exam",
    "r2med-pmc-treatment": "Given a Clinical Case, retrieve relevant passages that help answer "
    "the case",
    "r2med-pmc-clinical": "Given a Clinical Case, retrieve similar cases that help diagnose the "
    "case",
    "r2med-iiyi-clinical": "Given a Clinical Case, retrieve similar cases that help diagnose the "
    "case",
}
"""R2MED's own (its `src/instruction.py`); ReasonEmbed's add a full stop."""


def _r2med(*, stop: str) -> dict[str, Sentences]:
    return {task: Sentences(one + stop, BGE_GENERAL) for task, one in _R2MED.items()}


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        one.name: one
        for one in (
            Protocol(
                name="bright",
                about="official BRIGHT: excluded documents are masked, then the best 1,000 of each "
                "query are measured; BRIGHT's instructions; the system's own length",
                depth=1_000,
                keep=1_000,
                exclusion="before",
                max_tokens={},
                sentences={
                    False: {one: _official(one, is_long=False) for one in tasks.BRIGHT}
                    | _r2med(stop=""),
                    True: {one: _official(one, is_long=True) for one in _PAGED},
                },
            ),
            Protocol(
                name="reasonembed",
                about="ReasonEmbed (FlagEmbedding): the best 2,000 of each query, from which "
                "excluded documents are then removed; ReasonEmbed's instructions; 8,192 tokens, "
                "512 on R2MED",
                depth=2_000,
                keep=2_000,
                exclusion="after",
                max_tokens={"": 8_192, "r2med": 512},
                sentences={
                    False: {one: _flag_embedding(one, is_long=False) for one in tasks.BRIGHT}
                    | _r2med(stop="."),
                    True: {one: _flag_embedding(one, is_long=True) for one in _PAGED},
                },
            ),
            Protocol(
                name="mteb-v1.1",
                about="MTEB BRIGHT(v1.1): every document but the excluded ones is a candidate, the "
                "best 1,000 of each query are measured; MTEB's prompts; the system's own length",
                depth=1_000,
                keep=1_000,
                exclusion="before",
                max_tokens={},
                sentences={
                    False: {one: _mteb(one, is_long=False) for one in tasks.BRIGHT},
                    True: {one: _mteb(one, is_long=True) for one in _PAGED},
                },
            ),
        )
    }
)
"""Every protocol by its name."""
