import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from typer.testing import CliRunner

from reasonembed.artifacts import Artifact
from reasonembed.cli import app
from reasonembed.config import changed, load
from reasonembed.corpus import read_corpus
from reasonembed.errors import (
    AccessError,
    ConfigError,
    Interrupted,
    ModelError,
    StorageError,
    explain,
)
from reasonembed.evaluation.datasets import load_collection
from reasonembed.lease import FOLDER, Lease, claims, drivers_of, held
from reasonembed.models import resolve
from reasonembed.run import Run
from reasonembed.status import Progress, look, say_progress
from reasonembed.storage import Place, last_part, storage_error
from tests.ray.tiny_run import write_corpus
from tests.s3 import KEYS, make_bucket, serving

CORPUS_ROW = {
    "doc_id": "d1", "text": "t", "title": "", "task": "x", "parent_id": None,
    "text_hash": "h", "group_id": "g",
}  # fmt: skip
_REFUSED = "AWS Error {} during PutObject operation: x"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("s3")) as one:
        make_bucket(one)
        yield one


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path, monkeypatch):
    """A place on each kind of storage, with nothing in it."""
    if request.param == "disk":
        return Place(tmp_path / "run")
    return remote(request, monkeypatch)


@pytest.fixture
def stored(request, monkeypatch):
    return remote(request, monkeypatch)


def remote(request, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    server = request.getfixturevalue("server")
    return Place(server.uri(f"{request.node.name}-{time.time_ns()}"))


class TestPlace:
    def test_what_is_written_is_read(self, place):
        file = place / "a" / "b.json"
        assert file.read() is None and not file.is_file() and not place.is_dir()
        file.write(b"one")
        file.write(b"two")
        assert file.read() == b"two" and file.is_file() and (place / "a").is_dir()
        assert [child.name for child in place.children()] == ["a"]
        assert [info.size for info in place.files()] == [3]
        file.delete()
        file.delete()
        assert file.read() is None
        place.delete()
        assert place.children() == []

    def test_two_who_write_one_file_at_once(self, tmp_path):
        file, failed = Place(tmp_path / "record.json"), []

        def write(data):
            for _ in range(100):
                try:
                    file.write(data)
                except StorageError as error:
                    failed.append(error)

        threads = [threading.Thread(target=write, args=(data,)) for data in (b"1" * 9, b"2" * 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == [] and file.read() in (b"1" * 9, b"2" * 9)
        assert [child.name for child in Place(tmp_path).children()] == ["record.json"]

    def test_rows_are_added_one_by_one(self, place):
        log = place / "timeline.jsonl"
        assert log.rows() == []
        for number in range(3):
            log.append({"number": number})
        assert log.rows() == [{"number": number} for number in range(3)]

    def test_a_folder_goes_there_and_back(self, place, tmp_path):
        source = tmp_path / "source"
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "x").write_bytes(b"1" * 100_000)
        (source / "y").write_bytes(b"2")
        place.put(source)
        (place / "one").put(source / "y")
        back = tmp_path / "back"
        back.mkdir()
        (back / "stale").write_text("goes")
        assert place.fetch(back)
        found = {str(one.relative_to(back)) for one in back.rglob("*") if one.is_file()}
        assert found == {"sub/x", "y", "one"}
        assert (back / "sub" / "x").read_bytes() == b"1" * 100_000
        assert (place / "y").fetch(back / "deep" / "y")
        assert (back / "deep" / "y").read_bytes() == b"2"
        assert (place / "y").digest() == Place(source / "y").digest()

    def test_what_is_not_there_is_not_fetched_and_not_left(self, place, tmp_path):
        (tmp_path / "copy").write_text("old")
        assert not (place / "nothing").fetch(tmp_path / "copy")
        assert not (tmp_path / "copy").exists()

    def test_it_travels(self, place):
        (place / "odd name #1?").write(b"x")
        again = pickle.loads(pickle.dumps(place / "odd name #1?"))
        assert again == place / "odd name #1?" and again.read() == b"x"
        assert again.parent == place and again.name == "odd name #1?"

    def test_a_place_below_keeps_the_query(self, server):
        below = Place(server.uri("run/")) / "train" / "log.jsonl"
        assert below.uri == server.uri("run/train/log.jsonl")
        assert below.parent.uri == server.uri("run/train")
        assert below.path == "bucket/run/train/log.jsonl"
        assert last_part(server.uri("run/export/model")) == "model"
        assert last_part("Qwen/Qwen3-4B") == "Qwen3-4B"

    def test_a_small_object_is_one_request(self, server, stored):
        before = len(server.requests())
        (stored / "record.json").write(b"{}")
        assert [one.split()[0] for one in server.requests()[before:]] == ["PUT"]

    def test_a_remote_place_is_no_path(self, stored, tmp_path):
        with pytest.raises(StorageError, match="no folder of this machine"):
            _ = stored.local
        assert Place(tmp_path).local == tmp_path

    def test_sharing_copies_and_can_be_begun_again(self, place, request, tmp_path):
        source = Artifact.declared(str(place / "corpus-a"), "corpus")
        source.begin({"a": 1})
        source.commit("p1", pa.Table.from_pylist([CORPUS_ROW], schema=source.schema))
        (source.place / "_todo" / "waits").write(b"")
        for target in (place / "corpus-b", Place(tmp_path / "a" / "b"), Place("mock:///a/b")):
            for _ in range(2):
                source.place.share(target)
            shared = Artifact(str(target), schema=source.schema, key=source.key, name="corpus")
            if target.uri.startswith("mock"):  # every connection is a store of its own
                shared.place.fs = shared._fs = target.fs
            assert shared.stage() == source.stage() and shared.read() == source.read()
            assert not (target / "_todo").children()

    def test_the_environment_names_the_server(self, server, tmp_path):
        """As workers are told: by their machine's environment, not by the URI."""
        code = (
            "from reasonembed.storage import Place; p = Place('s3://bucket/by-env/x');"
            "p.write(b'1'); print(p.read(), p.uri)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | server.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "b'1' s3://bucket/by-env/x\n"


class TestMistakes:
    def test_a_bucket_that_is_not_there(self, server, monkeypatch):
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        place = Place(server.uri("run", bucket="nowhere"))
        for attempt in (lambda: (place / "x").write(b""), place.check, lambda: Run.existing(place)):
            with pytest.raises(AccessError, match="no such bucket; create it") as found:
                attempt()
            assert explain(found.value)[1] == 2

    def test_a_bucket_without_the_run(self, stored):
        with pytest.raises(ConfigError, match="holds no run"):
            Run.existing(stored.uri)

    def test_a_store_that_does_not_answer(self, monkeypatch):
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        place = Place("s3://bucket/run?endpoint_override=localhost:1&scheme=http")
        with pytest.raises(StorageError, match="cannot be reached") as found:
            place.is_file()
        assert explain(found.value)[1] == 75

    def test_a_region_that_cannot_be_asked_for(self, monkeypatch):
        def fail(_):
            raise OSError("AWS Error NETWORK_CONNECTION during HeadBucket: Could not resolve host")

        monkeypatch.setattr("reasonembed.storage._connect", fail)
        with pytest.raises(StorageError, match="cannot be reached") as found:
            Place("s3://bucket/run")
        assert explain(found.value)[1] == 75

    def test_a_key_that_nobody_knows(self, tmp_path, monkeypatch):
        """Of a server that asks for keys; HEAD has no body, so the store cannot say why."""
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        with serving(tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="2") as strict:
            make_bucket(strict)
            place = Place(strict.uri("run"))
            with pytest.raises(AccessError, match="AWS_ACCESS_KEY_ID") as found:
                (place / "x").write(b"")
            assert explain(found.value)[1] == 2

    @pytest.mark.parametrize(
        ("said", "cure", "code"),
        [
            (_REFUSED.format("EXPIRED_TOKEN"), "the key has expired; fetch a new one", 2),
            ("ExpiredToken: The provided token has expired.", "the key has expired", 2),
            (_REFUSED.format("INVALID_ACCESS_KEY_ID"), "does not know this key", 2),
            (_REFUSED.format("ACCESS_DENIED"), "no permission to write here", 2),
            ("google::cloud::Status(PERMISSION_DENIED: x)", "no permission to write", 2),
            (_REFUSED.format("UNKNOWN (HTTP status 400)"), "refuses without a reason", 2),
            (_REFUSED.format("UNKNOWN (HTTP status 301)"), "another region; name it", 2),
            (_REFUSED.format("NO_SUCH_BUCKET"), "no such bucket", 2),
            ("XMinioStorageFull: Storage backend has reached", "the storage is full", 75),
            (_REFUSED.format("SLOW_DOWN"), "overloaded; start again", 75),
            (_REFUSED.format("NETWORK_CONNECTION"), "cannot be reached", 75),
            ("something new", "something new", 75),
        ],
    )
    def test_what_stores_say(self, said, cure, code):
        error = storage_error("s3://bucket/run", OSError(said))
        assert str(error).startswith("cannot write s3://bucket/run: ") and cure in str(error)
        assert explain(error)[1] == code

    @pytest.mark.parametrize(
        ("number", "cure", "code"),
        [(errno.ENOSPC, "the disk is full", 75), (errno.EROFS, "read-only; choose another", 2)],
    )
    def test_a_file_system_that_fails(self, number, cure, code):
        """A store made up in Python, as pyarrow takes any."""
        place = Place("mock:///run")
        place.fs = pafs.PyFileSystem(Failing(number))
        for attempt in (lambda: place.write(b"x"), lambda: place.put(Path(__file__))):
            with pytest.raises(StorageError, match=f"cannot write mock:///run: .*{cure}") as found:
                attempt()
            assert explain(found.value)[1] == code

    @pytest.mark.parametrize(
        ("uri", "cure"),
        [
            ("http://bucket/run", "not a storage location that pyarrow.fs knows; give a folder"),
            ("s3:///run", "Missing bucket name"),
            ("s3://bucket/run?endpoint=x", "Unexpected query parameter"),
            ("s3://key:word@bucket/run", "a key stands in this address"),
            ("abfs://account:word@host/run", "a key stands in this address"),
            ("abfs://c@host/run?client_id=a&client_secret=word", "a key stands in this address"),
            ("abfs://c@host/run?sv=2&sig=word", "a key stands in this address"),
            ("abfs://c@host/run?client%5Fsecret=word", "a key stands in this address"),
            ("s3://bucket/run#1?scheme=http", "write it as %23"),
        ],
    )
    def test_addresses(self, uri, cure):
        with pytest.raises(AccessError, match=cure) as found:
            Place(uri)
        assert "word" not in str(found.value) and explain(found.value)[1] == 2

    def test_a_configuration_with_such_an_address(self):
        with pytest.raises(ConfigError, match=r"run_dir.*http://x/run is not a storage location"):
            load("configs/quickstart.yaml", overrides=["run_dir=http://x/run"])
        config = load("configs/quickstart.yaml", overrides=["run_dir=s3://bucket/run"])
        assert config.run_dir == "s3://bucket/run"


class Failing(pafs.FileSystemHandler):
    """A store that cannot be written."""

    def __init__(self, number):
        self._number = number

    def _fail(self, *_, **__):
        raise OSError(self._number, os.strerror(self._number))

    def get_type_name(self):
        return "failing"

    normalize_path = staticmethod(lambda path: path)
    get_file_info = staticmethod(
        lambda paths: [pafs.FileInfo(path, pafs.FileType.NotFound) for path in paths]
    )
    get_file_info_selector = staticmethod(lambda selector: [])
    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _fail
    delete_file = move = copy_file = open_input_stream = open_input_file = _fail
    open_output_stream = open_append_stream = _fail


class TestLease:
    def test_the_second_driver_is_refused_by_name_and_time(self, stored):
        with held(stored):
            with pytest.raises(
                StorageError, match=r"in use by another driver: .* on .* since "
            ) as e:
                Lease(stored).take()
            assert f"process {os.getpid()}" in str(e.value) and "If it was killed" in str(e.value)
            assert explain(e.value)[1] == 75
            assert [one.claim.pid for one in drivers_of(stored)] == [os.getpid()]
        assert drivers_of(stored) == []
        with held(stored):  # let go of, it can be had at once
            pass
        assert claims(stored) == []

    def test_of_many_that_start_at_once_one_gets_it(self, stored):
        got, refused = [], []
        barrier = threading.Barrier(6)

        def start():
            lease = Lease(stored)
            barrier.wait()
            try:
                lease.take()
            except StorageError as error:
                refused.append(error)
            else:
                got.append(lease)

        threads = [threading.Thread(target=start) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and len(refused) == 5
        for lease in got:
            lease.release()

    def test_a_driver_that_was_killed_is_known_on_its_machine(self, stored):
        code = (
            "import os, sys; from reasonembed.lease import Lease; from reasonembed.storage import "
            "Place; Lease(Place(sys.argv[1])).take(); os._exit(9)"
        )
        subprocess.run([sys.executable, "-c", code, stored.uri], check=False)
        assert len(claims(stored)) == 1
        with held(stored):  # at once, without waiting for its lease to end
            assert [one.claim.pid for one in drivers_of(stored)] == [os.getpid()]

    def test_a_claim_that_is_not_renewed_ends_by_the_stores_clock(self, stored, monkeypatch):
        silent = Lease(stored, renew_s=1000)
        silent.take()
        monkeypatch.setattr("time.time", lambda: 0.0)  # a host whose clock is wrong
        with pytest.raises(StorageError, match="in use"):
            Lease(stored, stale_s=1000).take()
        time.sleep(2.1)  # S3 dates to the second
        second = Lease(stored, stale_s=1)
        second.take()
        assert [one.claim.is_held for one in claims(stored)] == [True]
        second.release()
        silent.release()

    def test_a_driver_that_is_renewed_lives_on(self, stored):
        first = Lease(stored, renew_s=0.2, stale_s=2)
        first.take()
        time.sleep(3.2)
        with pytest.raises(StorageError, match="in use"):
            Lease(stored, stale_s=2).take()
        first.release()

    def test_who_lost_the_run_stops_by_75(self, stored):
        first = Lease(stored, renew_s=1000)
        first.take()
        (stored / FOLDER).delete()  # as a takeover would
        lost = threading.Event()
        second = Lease(stored, renew_s=0.1, on_loss=lost.set)
        second.take()
        time.sleep(1.1)
        third = Lease(stored)
        third._claim = third._claim.__class__(**{**vars(third._claim), "taken_ns": 2**62})
        third._write()
        assert lost.wait(5) and "has taken it over" in second.lost
        for lease in (second, third, first):
            lease.release()

    @pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
    def test_a_lost_lease_ends_the_body(self, stored, handler):
        """What the main thread gets is an interrupt; what a person reads is why.

        A shell that puts a job into the background has it ignore interrupts.
        """
        before = signal.signal(signal.SIGINT, handler)
        try:
            self._lose_in_body(stored)
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)

    def _lose_in_body(self, stored):

        def lose():
            while not (found := claims(stored)):
                time.sleep(0.1)
            lease, own = Lease(stored), found[0].claim
            lease._claim = own.__class__(**{**vars(own), "id": "z", "taken_ns": 2**62})
            lease._write()

        thread = threading.Thread(target=lose)
        with (
            pytest.raises(Interrupted, match=r"lease of .* was lost") as found,
            held(stored, renew_s=0.1),
        ):
            thread.start()
            for _ in range(300):
                time.sleep(0.1)
        thread.join()
        assert explain(found.value)[1] == 75

    def test_a_driver_that_cannot_renew_stops_too(self, stored, monkeypatch):
        lost = threading.Event()
        lease = Lease(stored, renew_s=0.1, stale_s=0.5, on_loss=lost.set)
        lease.take()

        def fail():
            raise StorageError("the store is gone")

        monkeypatch.setattr(lease, "_write", fail)
        assert lost.wait(5) and "could not be renewed" in lease.lost
        lease.release()

    def test_no_error_ends_the_renewal_unheard(self, stored, monkeypatch):
        lost = threading.Event()
        lease = Lease(stored, renew_s=0.1, stale_s=0.5, on_loss=lost.set)
        lease.take()

        def fail():
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(lease, "_write", fail)
        assert lost.wait(5) and "could not be renewed" in lease.lost
        lease.release()

    def test_a_claim_that_is_being_written_is_in_the_way(self, stored, monkeypatch):
        """Some stores show an empty object first."""
        monkeypatch.setattr("reasonembed.lease._TRIES", 2)
        first = Lease(stored, renew_s=1000)
        first.take()
        first._file(first._claim).write(b"")
        with pytest.raises(StorageError, match="in use by another driver: somebody on an unknown"):
            Lease(stored).take()
        assert first._rival() is None and drivers_of(stored) == []
        time.sleep(2.1)  # S3 dates to the second
        second = Lease(stored, stale_s=1)
        second.take()  # its writer was killed
        assert len(claims(stored)) == 1
        second.release()
        first.release()

    def test_a_claim_of_a_later_version_counts(self, stored):
        with held(stored):
            [own] = claims(stored)
            more = vars(own.claim) | {"id": "later", "said_besides": 1}
            (stored / FOLDER / "later.json").write(json.dumps(more).encode())
            assert {one.claim.id for one in claims(stored)} == {own.claim.id, "later"}

    def test_on_a_disk_the_kernel_holds_it(self, tmp_path):
        place = Place(tmp_path / "run")
        with (
            held(place),
            pytest.raises(StorageError, match="in use by another driver"),
            held(place),
        ):
            pass
        assert drivers_of(place) == []


class TestRun:
    @pytest.fixture
    def run(self, stored, tmp_path):
        config = load("configs/quickstart.yaml")
        settings = {"run_dir": stored.uri, "runtime.cache_dir": str(tmp_path / "cache")}
        run = Run(changed(config, settings, where="test"))
        run.save_config()
        return run

    def test_it_is_found_again_with_its_query(self, run):
        again = Run.existing(run.place.uri)
        assert again.config == run.config and again.place == run.place
        assert again.artifact("seeds").uri == (run.place / "seeds").uri

    def test_files_come_and_go(self, run, tmp_path):
        with run.writing("evaluate") as folder:
            (folder / "after").mkdir()
            (folder / "after" / "x").write_text("1")
            assert run.place.children() and not (run.place / "evaluate").is_dir()
        assert run.local("evaluate/after/x").read_text() == "1"
        assert not run.local("evaluate/none").exists()
        with pytest.raises(RuntimeError), run.writing("half") as folder:
            (folder / "x").write_text("1")
            raise RuntimeError
        assert not (run.place / "half").is_dir()

    def test_attempts_are_noted(self, run):
        with run.timed("corpus") as note:
            note["result"] = {"documents": 3}
        with pytest.raises(ValueError, match="no"), run.timed("plan"):
            raise ValueError("no")
        assert [(one["stage"], one["outcome"]) for one in run.timeline()] == [
            ("corpus", "done"),
            ("plan", "failed"),
        ]

    def test_a_model_is_fetched_once_and_again_when_it_changes(self, server, run):
        cache = run.config.runtime.cache_dir
        with pytest.raises(ModelError, match=r"no config\.json"):
            resolve(run.encoders.trained.model, cache_dir=cache)
        (run.model_place / "config.json").write(b"{}")
        first = resolve(run.encoders.trained.model, cache_dir=cache)
        assert first.name == "model" and (first / "config.json").read_text() == "{}"
        before = len(server.requests())
        (run.model_place / "README.md").write(b"a card says nothing of weights")
        assert resolve(run.encoders.trained.model, cache_dir=cache) == first
        assert not any("config.json" in one for one in server.requests()[before:])
        (run.model_place / "config.json").write(b"{ }")
        second = resolve(run.encoders.trained.model, cache_dir=cache)
        assert second != first and (second / "config.json").read_text() == "{ }"

    def test_rows_are_adopted_from_and_to_anywhere(self, run, tmp_path):
        seeds = run.artifact("seeds")
        seeds.begin({"a": 1})
        row = {
            "query_id": "q", "source_doc_id": "d", "task": "t", "min_words": 1, "max_words": 2,
            "education_level": "college", "seed": 1,
        }  # fmt: skip
        seeds.commit("p1", pa.Table.from_pylist([row], schema=seeds.schema))
        here = Run(run.config.model_copy(update={"run_dir": str(tmp_path / "second")}))
        here.adopt(run)
        assert here.artifact("seeds").stage() == seeds.stage()
        assert here.artifact("seeds").read() == seeds.read()
        there = Run(run.config.model_copy(update={"run_dir": str(run.place.parent / "third")}))
        there.adopt(here)
        assert there.artifact("seeds").stage() == seeds.stage()
        assert there.artifact("seeds").read() == seeds.read()

    def test_status_from_anywhere_with_few_requests(self, server, run):
        from tests.test_artifacts import ok

        rewrites = run.artifact("rewrites")
        rewrites.begin({"a": 1})
        for number in range(5):
            rewrites.commit(f"p{number}", ok(f"q{number}"))
        with run.timed("rewrite"):
            pass
        say_progress(
            run.place,
            Progress(time=10.0, stage="rewrite", label="rewrite", done=5, planned=9, note="slowly"),
        )
        for done, shard in ((2, "2/2"), (3, "1/2")):
            said = Progress(time=9.0, stage="annotate", shard=shard, label="annotate", done=done)
            say_progress(run.place, said)
        with held(run.place):
            before = len(server.requests())
            found = look(run)
            asked = server.requests()[before:]
        [stage] = [one for one in found.stages if one.stage == "rewrite"]
        assert (stage.state, stage.rows, stage.failed, stage.planned) == ("done", 5, 0, 9)
        assert {one.state for one in found.stages if one.stage != "rewrite"} == {"not run"}
        assert [one.claim.pid for one in found.drivers] == [os.getpid()]
        assert [(one.done, one.note) for one in found.progress] == [(5, "slowly")]
        assert not any("/data/" in one for one in asked) and len(asked) < 40, asked

    def test_each_shard_says_how_far_it_is(self, run):
        for done, shard in ((5, "2/12"), (4, "10/12"), (3, "1/12")):
            say_progress(
                run.place, Progress(time=9.0 + done, stage="annotate", shard=shard, done=done)
            )
        assert [(one.shard, one.done) for one in look(run).progress] == [
            ("1/12", 3), ("2/12", 5), ("10/12", 4)
        ]  # fmt: skip
        say_progress(run.place, Progress(time=99.0, stage="annotate", done=12))
        assert [(one.shard, one.done) for one in look(run).progress] == [("", 12)]

    def test_small_parts_are_merged_by_the_command(self, run):
        from tests.test_artifacts import ok

        rewrites = run.artifact("rewrites")
        rewrites.begin({"a": 1})
        for number in range(3):
            rewrites.commit(f"p{number}", ok(f"q{number}"))
        run.save_config()
        before = rewrites.read()
        done = CliRunner().invoke(app, ["compact", run.place.uri])
        assert done.exit_code == 0 and done.output.split() == ["rewrites:", "2", "files", "fewer"]
        assert len(rewrites.commits()) == 1 and rewrites.read().equals(before)
        with held(run.place):
            refused = CliRunner().invoke(app, ["compact", run.place.uri])
        assert "in use by another driver" in str(refused.exception)


class TestInputs:
    """A corpus and a collection that lie in a store, as if they lay here."""

    @pytest.fixture
    def data(self, stored, tmp_path, monkeypatch):
        monkeypatch.setenv("REASONEMBED_CACHE", str(tmp_path / "cache"))
        here = write_corpus(tmp_path / "data")
        (stored / "data").put(here)
        (stored / "parts" / "docs-1.jsonl").put(here / "corpus.jsonl")
        (stored / "parts" / "other.jsonl").put(here / "queries.jsonl")
        (stored / "parts" / "below" / "docs-2.jsonl").put(here / "queries.jsonl")
        return here

    def test_a_folder_a_file_and_several_are_read(self, stored, data, server):
        there, expected = stored / "data", read_corpus(str(data))
        assert read_corpus(there.uri).equals(expected)
        assert read_corpus((there / "corpus.jsonl").uri).equals(expected)
        assert read_corpus((stored / "parts" / "docs-*.jsonl").uri).equals(expected)
        found, here = load_collection(there.uri), load_collection(str(data))
        assert (found.name, found.queries, found.qrels) == (here.name, here.queries, here.qrels)
        before = len(server.requests())
        assert read_corpus(there.uri).equals(expected)
        assert not any("corpus.jsonl" in one for one in server.requests()[before:])

    def test_another_version_is_fetched_again(self, stored, data):
        read_corpus((stored / "data").uri)
        with (data / "corpus.jsonl").open("a") as stream:
            stream.write(json.dumps({"_id": "new", "text": "A new document."}) + "\n")
        (stored / "data" / "corpus.jsonl").put(data / "corpus.jsonl")
        assert "new" in read_corpus((stored / "data").uri).column("doc_id").to_pylist()

    @pytest.mark.parametrize("name", ["none.jsonl", "none-*.jsonl", "nothing"])
    def test_what_is_not_there_is_said(self, stored, data, name):
        with pytest.raises(AccessError, match=r"none|nothing"):
            read_corpus((stored / name).uri)
