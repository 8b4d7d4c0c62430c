"""What does the service cost beside the model, and beside infinity-emb on the same weights?

    OMP_NUM_THREADS=2 python -m benchmarks.serve [--quick] [--infinity VENV/bin/infinity_emb]
        [--parts speed,protocol,mixed,writing,overload] [--no-ray]

The weights are all-MiniLM-L6-v2's, its table of positions repeated to 2,048, so that every side
takes long texts; vectors of all sides must agree (cosine) before anything is timed. Every side has
the same threads, and no cache. Requests ask for base64. infinity-emb needs an environment of its
own (`pip install "infinity-emb[server,torch]==0.0.78"`); without `--infinity` it is left out.

- speed: 16 texts a request, 8 requests at a time, lengths skewed as BRIGHT's passages have them.
  `raw` is `Embedder.encode_ids` over all the same token ids at once; `own` one process, `serve` the
  same on a Ray of one machine, whose daemons run only while it is measured
- protocol: the same with a model that hashes (`echo`) in place of one that computes: processor
  milliseconds a request, of 1 and of 16 texts, against a bare FastAPI route that computes nothing
  and infinity's `debugengine`. What hashing costs by itself is measured beside them and taken off
  ours before ratios are formed; what `serve` costs more than `own` is Ray Serve's share
- mixed: one text a request, 90 % of about 30 tokens and 10 % of about 2,000, open loop at 60 % of
  what the slower side can do; latencies of the short ones. `own busy` is at 60 % of what `own` can
  do, and `alone` is so many requests a second without long ones
- writing: milliseconds for a vector of 4,096 numbers, ours against json.dumps and a copy in memory
- overload: open loop at three times capacity, with room for about five seconds of work in the queue

Rounds run the sides in turns, in one order and then in the other; ratios are taken within a round:
median and 95 % bootstrap interval of it, a goal holds if the worse end of the interval does. Prints
a table and writes `benchmarks/results/serve.json`.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Call, Load, run
from benchmarks.servers import (
    DIMENSION,
    PATH,
    ROOT,
    Server,
    bare_route,
    body_of,
    closed_loop,
    infinity,
    own,
    vectors,
)

RESULT = Path(__file__).parent / "results" / "serve.json"
PARTS = ("speed", "protocol", "mixed", "writing", "overload")
MINILM = "all-minilm-l6-v2"
POSITIONS = 2_048
TEXTS, CONCURRENCY = 16, 8  # a request; requests at a time
MEDIAN_WORDS, SPREAD, MAX_WORDS = 60, 0.9, 350
SHORT_WORDS, LONG_WORDS, SHARE_OF_LONG = 22, 1_500, 0.1  # about 30 and 2,000 tokens
SHARE_OF_CAPACITY = 0.6
QUEUE_S, OVERLOAD = 5.0, 3.0
MIN_COSINE = 0.9999
ECHO: dict[str, Any] = {"model": "echo", "echo": {"dimension": DIMENSION}}
GOALS = {  # of a ratio: at least, or at most
    "own / raw": (">=", 0.8),
    "own / infinity": (">=", 1.0),
    "own / bare, 1 texts": ("<=", 2.0),
    "own / bare, 16 texts": ("<=", 2.0),
    "own / infinity, p99 of short": ("<=", 0.5),
    "json.dumps / base64": (">=", 10.0),
    "goodput / capacity": (">=", 0.9),
}


# ---- what is measured -----------------------------------------------------------------------


def long_minilm(folder: Path) -> Path:
    """MiniLM that takes 2,048 tokens, in a folder that every side loads."""
    from safetensors.numpy import load_file, save_file

    from reasonembed.models import resolve

    path = shutil.copytree(resolve(MINILM), folder / "minilm-2048")
    weights = load_file(path / "model.safetensors")
    for name, table in list(weights.items()):
        if name.endswith("position_embeddings.weight"):
            repeats = POSITIONS // len(table)
            weights[name] = np.ascontiguousarray(np.tile(table, (repeats, 1)))
        elif name.endswith("position_ids"):
            del weights[name]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    lengths = {
        "config.json": "max_position_embeddings",
        "sentence_bert_config.json": "max_seq_length",
        "tokenizer_config.json": "model_max_length",
    }
    for file, key in lengths.items():
        settings = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps({**settings, key: POSITIONS}))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer |= {"truncation": None, "padding": None}  # else its own 128 stay in force
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def settings_of(model: Path, *, threads: int) -> dict[str, Any]:
    """Fields of `ServeConfig` for that model."""
    encoder = {
        "model": str(model), "pooling": "mean", "query_template": "{query}",
        "max_query_tokens": POSITIONS, "max_document_tokens": POSITIONS,
    }  # fmt: skip
    return {"model": str(model), "encoder": encoder, "embedder": {"threads": threads}}


class Words:
    """Texts of real words, no two alike."""

    def __init__(self, *, seed: int) -> None:
        from reasonembed.corpus import read_corpus

        self._random = random.Random(seed)
        texts = read_corpus("python-stdlib", limit=400)["text"].to_pylist()
        self._words = [word for word in " ".join(texts).split() if word.isalpha()]

    def text(self, words: int) -> str:
        return " ".join(self._random.choices(self._words, k=words))

    def passage(self) -> str:
        length = self._random.lognormvariate(np.log(MEDIAN_WORDS), SPREAD)
        return self.text(min(MAX_WORDS, max(5, round(length))))

    def requests(self, number: int) -> list[list[str]]:
        return [[self.passage() for _ in range(TEXTS)] for _ in range(number)]


class Raw:
    """The model alone in a process of its own, on token ids."""

    def __init__(self, settings: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "benchmarks.serve", "--raw", json.dumps(settings)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip

    def __call__(self, texts: list[str], *, vectors: bool = False) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"texts": texts, "vectors": vectors}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        self._process.communicate(timeout=60)


def answer_raw(settings: dict[str, Any]) -> None:
    """The other end of `Raw`."""
    import torch

    from reasonembed.config import EncoderConfig
    from reasonembed.embedder.encode import Embedder
    from reasonembed.embedder.tokenisation import Role

    torch.set_num_threads(settings["embedder"]["threads"])
    embedder = Embedder.load(EncoderConfig(**settings["encoder"]))
    for line in sys.stdin:
        asked = json.loads(line)
        ids = embedder.tokenise(asked["texts"], role=Role.DOCUMENT)
        began = time.perf_counter()
        found = embedder.encode_ids(ids)
        answer = {"seconds": time.perf_counter() - began, "tokens": sum(map(len, ids))}
        answer["vectors"] = found.tolist() if asked["vectors"] else []
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


# ---- rounds, ratios, rows -------------------------------------------------------------------


def in_turns(
    sides: Mapping[str, Callable[[int], dict[str, float]]], *, rounds: int
) -> list[dict[str, dict[str, float]]]:
    """Figures of every side in every round; the first round warms up and is dropped."""
    found = []
    for number in range(rounds + 1):
        names = list(sides) if number % 2 == 0 else list(reversed(sides))
        found.append({name: sides[name](number) for name in names})
    return found[1:]


def median_of(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        side: {key: statistics.median(one[side][key] for one in rounds) for key in figures}
        for side, figures in rounds[0].items()
    }


def ratio(values: list[float], name: str) -> dict[str, Any]:
    """Median, 95 % bootstrap interval of it, and whether its goal holds at the worse end."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975]).tolist()
    row: dict[str, Any] = {"name": name, "ratio": statistics.median(values)}
    row |= {"low": low, "high": high}
    if name in GOALS:
        sign, goal = GOALS[name]
        row |= {"goal": f"{sign} {goal}", "holds": low >= goal if sign == ">=" else high <= goal}
    return row


def ratios(
    rounds: list[dict[str, dict[str, float]]], key: str, pairs: dict[str, tuple[str, str]]
) -> list[dict[str, Any]]:
    """Rows of those pairs whose sides were both measured; a pair is over and under."""
    return [
        ratio([one[over][key] / one[under][key] for one in rounds], name)
        for name, (over, under) in pairs.items()
        if over in rounds[0] and under in rounds[0]
    ]


class Report:
    """What was found, printed as it is found."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def add(self, part: str, figures: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.parts[part] = {"figures": figures, "rows": rows}
        print(f"\n{part}")
        for side, found in figures.items():
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            print(f"  {side:>14}: {shown}")
        for row in rows:
            goal = f"{row['goal']} {'met' if row['holds'] else 'MISSED'}" if "goal" in row else ""
            interval = f"{row['low']:.2f} to {row['high']:.2f}"
            print(f"  {row['name']:>30} {row['ratio']:7.2f}  {interval:>14}  {goal}", flush=True)


# ---- the parts ------------------------------------------------------------------------------


class Bench:
    """Servers and sizes that the parts share.

    Args:
        arguments: Of the command line.
        folder: For models, settings and logs.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder, self.report = arguments, folder, Report()
        self.rounds, self.is_quick = arguments.rounds, arguments.quick
        self.model = long_minilm(folder)
        self.settings = settings_of(self.model, threads=arguments.threads)
        self.capacity: float | None = None

    def run(self, part: str) -> None:
        getattr(self, part)()

    @contextlib.contextmanager
    def peer(self, *, engine: str = "torch") -> Iterator[dict[str, Server]]:
        """infinity, if there is one."""
        if self.arguments.infinity is None:
            yield {}
            return
        try:
            made = infinity(
                self.arguments.infinity, self.model, self.folder, engine=engine,
                batch_size=self.arguments.infinity_batch,
            )  # fmt: skip
            server = made.__enter__()
        except RuntimeError as error:
            print(f"infinity's {engine} does not start and is left out: {error}")
            yield {}
            return
        try:
            yield {"infinity": server}
        finally:
            made.__exit__(None, None, None)

    def speed(self) -> None:
        """Tokens a second."""
        raw = Raw(self.settings)
        pairs = {
            "own / raw": ("own", "raw"), "own / infinity": ("own", "infinity"),
            "serve / own": ("serve", "own"), "serve / raw": ("serve", "raw"),
        }  # fmt: skip
        with own(self.settings, self.folder) as here:
            with self.peer() as others:
                rounds = self._speeds(raw, {"own": here, **others})
            self.report.add("speed", median_of(rounds), ratios(rounds, "tokens_per_s", pairs))
            self.capacity = median_of(rounds)["own"]["tokens_per_s"]
            if not self.arguments.no_ray:
                with own(self.settings, self.folder, on_ray=True) as serve:
                    rounds = self._speeds(raw, {"own": here, "serve": serve})
                rows = ratios(
                    rounds, "tokens_per_s", {k: v for k, v in pairs.items() if "serve" in v}
                )
                self.report.add("speed on Ray Serve", median_of(rounds), rows)
        raw.close()

    def _speeds(self, raw: Raw, servers: dict[str, Server]) -> list[dict[str, dict[str, float]]]:
        words = Words(seed=1)
        self._check_same(raw, servers, [words.passage() for _ in range(32)])
        requests = [words.requests(self.arguments.requests) for _ in range(self.rounds + 1)]
        tokens = [0] * len(requests)

        def of_raw(number: int) -> dict[str, float]:
            found = raw([text for one in requests[number] for text in one])
            tokens[number] = found["tokens"]
            return {"tokens_per_s": found["tokens"] / found["seconds"]}

        def of(server: Server) -> Callable[[int], dict[str, float]]:
            def measure(number: int) -> dict[str, float]:
                bodies = [body_of(texts) for texts in requests[number]]
                return {"seconds": closed_loop(server, bodies, concurrency=CONCURRENCY)}

            return measure

        sides = {"raw": of_raw, **{name: of(server) for name, server in servers.items()}}
        rounds = in_turns(sides, rounds=self.rounds)
        for number, one in enumerate(rounds, start=1):
            for figures in one.values():
                if "seconds" in figures:
                    figures["tokens_per_s"] = tokens[number] / figures.pop("seconds")
        return rounds

    @staticmethod
    def _check_same(raw: Raw, servers: dict[str, Server], texts: list[str]) -> None:
        expected = np.float32(raw(texts, vectors=True)["vectors"])
        for name, server in servers.items():
            found = vectors(server, texts)
            found /= np.linalg.norm(found, axis=1, keepdims=True)
            cosines = (found * expected).sum(axis=1)
            assert cosines.min() > MIN_COSINE, f"{name}: vectors differ: cosine {cosines.min()}"

    def protocol(self) -> None:
        """Processor milliseconds a request, without a model."""
        with own(ECHO, self.folder) as here:
            with bare_route(self.folder) as bare, self.peer(engine="debugengine") as others:
                self._protocol("protocol", {"own": here, "bare": bare, **others})
            if not self.arguments.no_ray:
                with own(ECHO, self.folder, on_ray=True) as serve:
                    self._protocol("protocol on Ray Serve", {"own": here, "serve": serve})

    def _protocol(self, part: str, servers: dict[str, Server]) -> None:
        for texts in (1, TEXTS):
            words = Words(seed=2)
            number = self.arguments.requests * (40 if texts == 1 else 20)
            requests = [[words.text(30) for _ in range(texts)] for _ in range(number)]
            sides = {name: _cost(server, requests) for name, server in servers.items()}
            rounds = in_turns({**sides, "echo": _hashing(requests)}, rounds=self.rounds)
            for one in rounds:  # what is left of ours is the service alone
                for name in {"own", "serve"} & set(one):
                    one[name]["service_ms"] = one[name]["cpu_ms"] - one["echo"]["cpu_ms"]
                for name in {"bare", "infinity"} & set(one):
                    one[name]["service_ms"] = one[name]["cpu_ms"]
            pairs = {
                f"{over} / {under}, {texts} texts": (over, under)
                for over, under in (("own", "bare"), ("own", "infinity"), ("serve", "own"))
            }
            figures = median_of(rounds)
            if "serve" in figures:
                more = [one["serve"]["cpu_ms"] - one["own"]["cpu_ms"] for one in rounds]
                figures["Serve's share"] = {"cpu_ms": statistics.median(more)}
            self.report.add(f"{part}, {texts} texts", figures, ratios(rounds, "service_ms", pairs))

    def mixed(self) -> None:
        """Latency of short texts among long ones."""
        with own(self.settings, self.folder) as here, self.peer() as others:
            servers = {"own": here, **others}
            can = {name: self._requests_per_s(server) for name, server in servers.items()}
            rate, busy = (SHARE_OF_CAPACITY * one for one in (min(can.values()), can["own"]))

            def of(server: Server, rate: float, **how: bool) -> Callable[[int], dict[str, float]]:
                return lambda number: self._latencies(server, rate, number, **how)

            sides = {name: of(server, rate) for name, server in servers.items()}
            sides |= {"own busy": of(here, busy), "alone": of(here, busy, is_alone=True)}
            rounds = in_turns(sides, rounds=self.rounds)
        rows = []
        for key in ("p50", "p99"):
            pairs = {
                f"own / infinity, {key} of short": ("own", "infinity"),
                f"own busy / alone, {key} of short": ("own busy", "alone"),
            }
            rows += ratios(rounds, f"short_{key}_ms", pairs)
        figures = median_of(rounds)
        for name, most in can.items():
            figures[name]["most_rps"] = most
        self.report.add("mixed", figures, rows)

    def _requests_per_s(self, server: Server) -> float:
        """What it can do of the mixture, with so many under way as it likes."""
        bodies = [call.body for call in _mixed(Words(seed=3), 40)]
        closed_loop(server, bodies[:10], concurrency=2)  # warms up
        return len(bodies) / closed_loop(server, bodies, concurrency=CONCURRENCY)

    def _latencies(
        self, server: Server, rate: float, seed: int, *, is_alone: bool = False
    ) -> dict[str, float]:
        seconds = max(self.arguments.seconds, 10 / rate)
        calls = _mixed(Words(seed=100 + seed), int(rate * seconds * 2) + 50, long=not is_alone)
        load = Load(
            server.url, lambda number: calls[number], rate=rate, duration_s=seconds, seed=seed
        )
        statuses = run(load).statuses
        assert set(statuses) == {200}, statuses
        found = {"rps": rate, "late_ms": load.summary().late_s * 1e3}
        for kind in ("short",) if is_alone else ("short", "long"):
            figures = load.summary(kind)
            found |= {f"{kind}_p50_ms": figures.p50_s * 1e3, f"{kind}_p99_ms": figures.p99_s * 1e3}
        return found

    def writing(self) -> None:
        """Milliseconds a vector of 4,096 numbers."""
        from reasonembed.serving import writing

        vectors_ND = np.random.default_rng(0).standard_normal((64, 4_096)).astype(np.float32)
        told = [json.loads(one) for one in writing.rows(vectors_ND, "float")]
        assert np.float32(told).tobytes() == vectors_ND.tobytes()
        ways: dict[str, Callable[[], Any]] = {
            "base64": lambda: writing.rows(vectors_ND, "base64"),
            "float": lambda: writing.rows(vectors_ND, "float"),
            "json.dumps": lambda: json.dumps(vectors_ND.tolist()),
            "copy": vectors_ND.tobytes,
        }

        def of(way: Callable[[], Any]) -> Callable[[int], dict[str, float]]:
            def measure(_: int) -> dict[str, float]:
                repeats = 5
                began = time.perf_counter()
                for _ in range(repeats):
                    way()
                took = time.perf_counter() - began
                return {"ms": took / repeats / len(vectors_ND) * 1e3}

            return measure

        rounds = in_turns({name: of(way) for name, way in ways.items()}, rounds=2 * self.rounds)
        pairs = {
            "json.dumps / base64": ("json.dumps", "base64"),
            "json.dumps / float": ("json.dumps", "float"),
            "base64 / copy": ("base64", "copy"),
        }
        self.report.add("writing", median_of(rounds), ratios(rounds, "ms", pairs))

    def overload(self) -> None:
        """Three times what it can do."""
        capacity = self.capacity or self._measured_capacity()
        room = round(QUEUE_S * capacity)
        limits = {"max_request_tokens": room, "max_queued_tokens": room}
        found = []
        with own({**self.settings, "limits": limits}, self.folder) as here:
            for seed in range(1 if self.is_quick else 3):
                words = Words(seed=200 + seed)
                calls = [_call(texts, "") for texts in words.requests(50)]
                per_request = statistics.mean(call.tokens for call in calls)
                rate = OVERLOAD * capacity / per_request
                load = Load(
                    here.url, lambda number, calls=calls: calls[number % len(calls)], rate=rate,
                    duration_s=self.arguments.overload_seconds, seed=seed,
                )  # fmt: skip
                found.append(run(load))
        worst = [sum(n for status, n in one.statuses.items() if status not in (200, 429))
                 for one in found]  # fmt: skip
        figures = {
            "capacity": {"tokens_per_s": capacity},
            "own": {
                "tokens_per_s": statistics.median(one.tokens_per_s for one in found),
                "p99_s": statistics.median(one.p99_s for one in found),
                "bound_s": QUEUE_S, "late_ms": found[0].late_s * 1e3,
                "answered": sum(one.statuses.get(200, 0) for one in found),
                "refused": sum(one.statuses.get(429, 0) for one in found),
                "neither 200 nor 429": sum(worst),
            },
        }  # fmt: skip
        rows = [
            ratio([one.tokens_per_s / capacity for one in found], "goodput / capacity"),
            ratio([one.p99_s / QUEUE_S for one in found], "p99 / time that the queue holds"),
        ]
        self.report.add("overload", figures, rows)

    def _measured_capacity(self) -> float:
        with own(self.settings, self.folder) as here:
            requests = Words(seed=1).requests(self.arguments.requests)
            bodies, tokens = [body_of(one) for one in requests], sum(map(_tokens, requests))
            closed_loop(here, bodies, concurrency=CONCURRENCY)
            return tokens / closed_loop(here, bodies, concurrency=CONCURRENCY)


def _cost(server: Server, requests: list[list[str]]) -> Callable[[int], dict[str, float]]:
    """Processor milliseconds a request, less what the server uses when nobody asks."""
    bodies, idle = [body_of(texts) for texts in requests], _idle(server)

    def measure(_: int) -> dict[str, float]:
        before = server.cpu_s()
        took = closed_loop(server, bodies, concurrency=CONCURRENCY)
        used = server.cpu_s() - before - idle * took
        figures = {"cpu_ms": used / len(bodies) * 1e3, "rps": len(bodies) / took}
        return figures | {"idle_cpu_share": idle}

    return measure


def _hashing(requests: list[list[str]]) -> Callable[[int], dict[str, float]]:
    """What the model that hashes costs by itself; no part of the protocol."""
    from reasonembed.config import ServeConfig
    from reasonembed.serving.backend import open_model
    from reasonembed.serving.protocol import EmbedItem

    model = open_model(ServeConfig(**ECHO))
    assert model.forward is not None
    items = [[EmbedItem(text) for text in texts] for texts in requests]

    def measure(_: int) -> dict[str, float]:
        began = time.process_time()
        for one in items:
            model.forward(model.preparer.prepare(one))
        return {"cpu_ms": (time.process_time() - began) / len(items) * 1e3}

    return measure


def _idle(server: Server, *, seconds: float = 2.0) -> float:
    """Share of a core that it uses when nobody asks."""
    before = server.cpu_s()
    time.sleep(seconds)
    return (server.cpu_s() - before) / seconds


def _mixed(words: Words, number: int, *, long: bool = True) -> list[Call]:
    """Requests of one text; exactly every tenth is long, in a place of its ten drawn by lot."""
    lot = random.Random(number)
    every = round(1 / SHARE_OF_LONG)
    places = {start + lot.randrange(every) for start in range(0, number, every)}
    return [
        _call([words.text(LONG_WORDS)], "long")
        if long and index in places
        else _call([words.text(SHORT_WORDS)], "short")
        for index in range(number)
    ]


_TOKENIZER: list[Any] = []


def _tokens(texts: list[str]) -> int:
    if not _TOKENIZER:
        from reasonembed.embedder.contract import load_tokenizer
        from reasonembed.models import resolve

        _TOKENIZER.append(load_tokenizer(resolve(MINILM)))
    ids = _TOKENIZER[0](texts, truncation=False, padding=False, verbose=False)["input_ids"]
    return sum(min(POSITIONS, len(one)) for one in ids)


def _call(texts: list[str], kind: str) -> Call:
    return Call(PATH, body_of(texts), kind=kind, tokens=_tokens(texts))


# ---- the command line -----------------------------------------------------------------------


def arguments_of() -> argparse.Namespace:
    cores = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--infinity", type=Path, help="its program, or the Python beside it")
    parser.add_argument("--infinity-batch", type=int, default=32, help="its own default")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--requests", type=int, help="a round of `speed`; others by it")
    parser.add_argument("--seconds", type=float, help="a round of `mixed`")
    parser.add_argument("--overload-seconds", type=float)
    parser.add_argument("--threads", type=int, default=cores, help="of every side")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--raw", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = {"rounds": (5, 2), "requests": (48, 8), "seconds": (30.0, 5.0),
             "overload_seconds": (20.0, 5.0)}  # fmt: skip
    for name, (whole, quick) in sizes.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else whole)
    if arguments.infinity is not None:
        arguments.infinity = _program(arguments.infinity)
    return arguments


def _program(given: Path) -> Path | None:
    """infinity's program; given may be the Python beside it."""
    program = given.with_name("infinity_emb") if given.name.startswith("python") else given
    if not program.is_file():
        print(f"there is no {program}")
        return None
    return program.absolute()


def device() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.split(":")[1].strip() for line in info if "model name" in line}
    name = f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, no accelerator"
    return ", ".join([name, *models])


def peer_version(program: Path) -> str:
    """Of infinity-emb in its own environment."""
    code = "from importlib.metadata import version; print(version('infinity-emb'))"
    done = subprocess.run(
        [str(program.with_name("python")), "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def main() -> None:
    arguments = arguments_of()
    if arguments.raw:
        answer_raw(json.loads(arguments.raw))
        return
    if arguments.infinity is None:
        print("infinity-emb is left out; name its program by --infinity")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of every server
    with tempfile.TemporaryDirectory(prefix="reasonembed-serve-") as folder:
        bench = Bench(arguments, Path(folder))
        for part in arguments.parts.split(","):
            bench.run(part)
    packages = ("reasonembed", "torch", "transformers", "ray", "fastapi", "uvicorn")
    versions = {one: version(one) for one in packages}
    if arguments.infinity:
        versions["infinity-emb"] = peer_version(arguments.infinity)
    sizes = (
        "rounds", "requests", "seconds", "overload_seconds", "threads", "infinity_batch",
    )  # fmt: skip
    written = {
        "device": device(), "versions": versions,
        **{name: getattr(arguments, name) for name in sizes}, "parts": bench.report.parts,
    }  # fmt: skip
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
