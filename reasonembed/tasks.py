"""The one table of retrieval tasks: what is searched for, in what, and what counts as relevant.

Instructions of the BRIGHT tasks are those that ReasonEmbed was trained and evaluated with
(arXiv:2510.08252); they stand on the query side only. Those of R2MED, MS MARCO and the others are
in our own words; `evaluation.protocols` has the sentences that published figures stand under.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from reasonembed.errors import ConfigError

Relation = Literal["concept", "algorithm", "syntax", "skill", "theorem", "helps"]
"""What ties a relevant document to a query: a concept or theory to reason from, a shared algorithm
or data structure, the language constructs that an answer needs, a shared problem-solving skill, a
shared theorem, or plain help with the answer."""

RELATIONS: Mapping[Relation, str] = MappingProxyType(
    {
        "concept": "the text explains a concept, theory or fact, and the person's situation is one "
        "that an expert would explain by reasoning from it.",
        "algorithm": "the text solves a problem with some algorithm or data structure, and the "
        "request is another problem, with a story of its own, whose solution rests on the same "
        "one.",
        "syntax": "the text describes syntax or behaviour of a programming language, and the "
        "request asks for a program that cannot be written without it.",
        "skill": "the text solves a problem by some way of thinking, and the request is another "
        "problem, about other things, that gives way to the same one.",
        "theorem": "the text states a theorem or definition or solves a problem by one, and the "
        "request is another problem, about other things, whose solution applies the same one.",
        "helps": "what the text says helps to answer the request, directly or as a step of the "
        "reasoning.",
    }
)
"""What a relation means for who writes a query (a request) to a document (a text)."""


@dataclass(frozen=True)
class Task:
    """A retrieval task.

    Attributes:
        name: Key of the table; what configurations and the `task` columns hold.
        display_name: For people, in reports.
        relation: What ties a relevant document to a query.
        query_kind: What a query is, with its article: "a Biology post".
        document_kind: What a document is, with its article: "a passage".
        instruction: What a query asks for; fills the query template.
        relevance: What relevant means, for annotators; one or two sentences.
    """

    name: str
    display_name: str
    relation: Relation
    query_kind: str
    document_kind: str
    instruction: str
    relevance: str


def get(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: There is none; the message lists those that exist.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ConfigError(f"unknown task {name!r}; there are: {', '.join(TASKS)}") from None


_CONCEPT = (
    "A document is relevant if the concept, theory or fact that it explains is one that an expert "
    "would draw on to reason about the post and answer it. Sharing the post's subject or words is "
    "not enough."
)
_ALGORITHM = (
    "A document is relevant if its solution rests on the same algorithm or data structure that "
    "solves the problem in the query, however different the two stories are."
)
_SYNTAX = (
    "A document is relevant if it describes syntax or behaviour of the Pony language that is "
    "needed to write the code that the query asks for."
)
_SKILL = (
    "A document is relevant if its solution uses the same problem-solving skill as the problem in "
    "the query needs, so that knowing one helps to solve the other."
)
_SHARED_THEOREM = (
    "A document is relevant if its problem is solved by the same theorem as the problem in the "
    "query."
)
_THEOREM = (
    "A document is relevant if the theorem or definition that it states can be applied to solve "
    "the problem in the query, even where the query never names it."
)


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOU" else f"a {noun}"


def _post(name: str, display_name: str) -> Task:
    kind = _with_article(f"{display_name} post")
    instruction = f"Given {kind}, retrieve relevant passages that help answer the post."
    return Task(name, display_name, "concept", kind, "a passage", instruction, _CONCEPT)


def _medical(name: str, display_name: str, *, query: str, document: str, relevance: str) -> Task:
    noun = query.split()[-1]
    plural = document.split(maxsplit=1)[1] + "s"
    instruction = f"Given {query}, retrieve relevant {plural} that help answer the {noun}."
    return Task(f"r2med-{name}", display_name, "helps", query, document, instruction, relevance)


_BRIGHT = (
    _post("biology", "Biology"),
    _post("earth_science", "Earth Science"),
    _post("economics", "Economics"),
    _post("psychology", "Psychology"),
    _post("robotics", "Robotics"),
    _post("stackoverflow", "Stack Overflow"),
    _post("sustainable_living", "Sustainable Living"),
    Task(
        "leetcode",
        "LeetCode",
        "algorithm",
        "a Coding problem",
        "a solved coding problem",
        "Given a Coding problem, retrieve relevant examples that help answer the problem.",
        _ALGORITHM,
    ),
    Task(
        "pony",
        "Pony",
        "syntax",
        "a Pony question",
        "a passage of the Pony language's documentation",
        "Given a Pony question, retrieve relevant passages that help answer the question.",
        _SYNTAX,
    ),
    Task(
        "aops",
        "AoPS",
        "skill",
        "a Math problem",
        "a solved math problem",
        "Given a Math problem, retrieve relevant examples that help answer the problem.",
        _SKILL,
    ),
    Task(
        "theoremqa_questions",
        "TheoremQA Questions",
        "theorem",
        "a Math problem",
        "a solved math problem",
        "Given a Math problem, retrieve relevant examples that help answer the problem.",
        _SHARED_THEOREM,
    ),
    Task(
        "theoremqa_theorems",
        "TheoremQA Theorems",
        "theorem",
        "a Math problem",
        "a theorem or definition",
        "Given a Math problem, retrieve relevant theorems that help answer the problem.",
        _THEOREM,
    ),
)

_EVIDENCE = (
    "A document is relevant if it holds knowledge that supports the answer to the question, as a "
    "specialist would reason it out; naming the same terms is not enough."
)
_DIAGNOSIS = (
    "A document is relevant if it explains the diagnosis, finding or treatment that the case leads "
    "to, even where the case does not name it."
)
_SIMILAR_CASE = (
    "A document is relevant if it reports a patient whose condition is the one that underlies the "
    "case in the query, so that its course informs this one."
)

_R2MED = (
    _medical(
        "biology",
        "R2MED Biology",
        query="a biology question",
        document="a passage",
        relevance=_EVIDENCE,
    ),
    _medical(
        "bioinformatics",
        "R2MED Bioinformatics",
        query="a bioinformatics question",
        document="a passage",
        relevance=_EVIDENCE,
    ),
    _medical(
        "medical-sciences",
        "R2MED Medical Sciences",
        query="a medical question",
        document="a passage",
        relevance=_EVIDENCE,
    ),
    _medical(
        "medxpertqa-exam",
        "R2MED MedXpertQA-Exam",
        query="a medical examination question",
        document="a textbook passage",
        relevance=_DIAGNOSIS,
    ),
    _medical(
        "medqa-diag",
        "R2MED MedQA-Diag",
        query="a diagnostic examination question",
        document="a textbook passage",
        relevance=_DIAGNOSIS,
    ),
    _medical(
        "pmc-treatment",
        "R2MED PMC-Treatment",
        query="a treatment question",
        document="a passage",
        relevance=_DIAGNOSIS,
    ),
    _medical(
        "pmc-clinical",
        "R2MED PMC-Clinical",
        query="a patient case",
        document="a case report",
        relevance=_SIMILAR_CASE,
    ),
    _medical(
        "iiyi-clinical",
        "R2MED IIYi-Clinical",
        query="a patient case",
        document="a case report",
        relevance=_SIMILAR_CASE,
    ),
)

_OTHER = (
    Task(
        "msmarco",
        "MS MARCO",
        "helps",
        "a web search query",
        "a passage",
        "Given a web search query, retrieve relevant passages that answer the query.",
        "A document is relevant if it answers the query or states the fact that it asks for.",
    ),
    Task(
        "generic",
        "Generic",
        "helps",
        "a question",
        "a document",
        "Given a query, retrieve documents that can help answer the query.",
        "A document is relevant if what it says helps to answer the query, directly or as a step "
        "of the reasoning; sharing words with it is not enough.",
    ),
    Task(
        "python-stdlib",
        "Python standard library",
        "helps",
        "a programmer's description of a problem",
        "a passage of Python's reference documentation",
        "Given a programmer's description of a problem, retrieve relevant passages of Python's "
        "reference that help solve the problem.",
        "A document is relevant if it describes the function, class or language rule that solves "
        "the problem or explains what happens in it, even where the query names neither.",
    ),
)

TASKS = MappingProxyType({task.name: task for task in (*_BRIGHT, *_R2MED, *_OTHER)})
"""Every task by name: the twelve of BRIGHT, the eight of R2MED, and three more."""

BRIGHT = tuple(task.name for task in _BRIGHT)
"""Names of BRIGHT's tasks in the order of its tables."""

R2MED = tuple(task.name for task in _R2MED)
"""Names of R2MED's tasks in the order of its tables."""
