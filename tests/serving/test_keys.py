import hashlib
import logging
import os
import stat
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from reasonembed import keys_cli
from reasonembed.config import ServeConfig
from reasonembed.errors import ConfigError
from reasonembed.serving import keys
from reasonembed.serving.keys import (
    KeyFile,
    add_key,
    check_exposure,
    is_loopback,
    read_keys,
    remove_key,
)


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def later(self, seconds=keys.CHECK_EVERY_S):
        self.now += seconds


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.txt"


@pytest.fixture
def clock():
    return Clock()


def test_a_key_is_shown_once_and_stored_as_its_hash(path):
    key = add_key(path, "ann", comment="her laptop")
    assert key.startswith("reasonembed_") and len(key) >= len("reasonembed_") + 43
    text = path.read_text()
    assert key not in text and hashlib.sha256(key.encode()).hexdigest() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [(one.name, one.comment) for one in read_keys(path)] == [("ann", "her laptop")]
    assert not list(path.parent.glob(".*")), "no temporary file stays"


def test_keys_are_told_apart(path):
    ann, bob = add_key(path, "ann"), add_key(path, "bob")
    assert ann != bob
    file = KeyFile(path)
    assert file.name_of(ann.encode()) == "ann" and file.name_of(bob.encode()) == "bob"
    for wrong in (b"", b"x", ann[:-1].encode(), f"{ann} ".encode(), b"\xff\xfe"):
        assert file.name_of(wrong) is None


def test_every_hash_is_compared_in_constant_time(path, monkeypatch):
    ann = add_key(path, "ann")
    for name in ("bob", "cid", "dora"):
        add_key(path, name)
    seen = []
    compare = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: seen.append(a) or compare(a, b))
    file = KeyFile(path)
    assert file.name_of(ann.encode()) == "ann"
    assert len(seen) == 4, "a hit does not end the search"
    assert file.name_of(b"nobody's") is None
    assert len(seen) == 8


def test_rotation_without_restart(path, clock):
    old = add_key(path, "old")
    file = KeyFile(path, clock=clock)
    new = add_key(path, "new")
    assert file.name_of(new.encode()) is None, "looked at once a second, not at each request"
    clock.later()
    assert file.name_of(new.encode()) == "new" and file.name_of(old.encode()) == "old"
    remove_key(path, "old")
    clock.later()
    assert file.name_of(old.encode()) is None and file.name_of(new.encode()) == "new"


def test_the_file_is_looked_at_once_a_second_at_most(path, clock, monkeypatch):
    add_key(path, "ann")
    file = KeyFile(path, clock=clock)
    looks = []
    version_of = keys._version_of
    monkeypatch.setattr(keys, "_version_of", lambda at: looks.append(at) or version_of(at))
    for _ in range(100):
        file.name_of(b"x")
        clock.later(0.05)
    assert len(looks) <= 6


def broken(path):
    path.write_text("ann deadbeef\n")


def vanished(path):
    path.unlink()


def not_text(path):
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("spoil", [broken, vanished, not_text])
def test_a_spoilt_file_leaves_the_last_good_keys_and_says_so_once(path, clock, caplog, spoil):
    key = add_key(path, "ann")
    file = KeyFile(path, clock=clock)
    good = path.read_bytes()
    spoil(path)
    for _ in range(3):
        clock.later()
        assert file.name_of(key.encode()) == "ann"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and "stay in force (ann)" in errors[0].getMessage()
    path.write_bytes(good.replace(b"ann", b"bob"))
    clock.later()
    assert file.name_of(key.encode()) == "bob", "as soon as it is whole again, it counts"


def test_an_empty_file_refuses_everybody_and_says_so(path, clock, caplog):
    path.write_text("# nobody yet\n\n")
    file = KeyFile(path, clock=clock)
    assert "every request is refused" in caplog.text
    assert file.name_of(b"") is None and file.name_of(b"x") is None
    key = add_key(path, "ann")
    clock.later()
    assert file.name_of(key.encode()) == "ann"
    caplog.clear()
    path.write_text("")
    clock.later()
    assert file.name_of(key.encode()) is None and "every request is refused" in caplog.text


def test_no_key_is_ever_logged(path, clock, caplog):
    caplog.set_level(logging.DEBUG)
    key = add_key(path, "ann")
    file = KeyFile(path, clock=clock)
    file.name_of(key.encode())
    path.write_text(f"ann {key}\n")  # pasted in place of its hash
    clock.later()
    file.name_of(key.encode())
    assert "line 1" in caplog.text
    assert key not in caplog.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ann\n", "line 1"),
        ("# fine\nann 123\n", "line 2"),
        ("ann " + "A" * 64, "lower-case"),
        ("a/b " + "0" * 64, "line 1"),
        (f"ann {'0' * 64}\nann {'1' * 64}\n", "line 2: its name stands above"),
    ],
)
def test_a_file_that_is_none_is_refused_at_start(path, text, says):
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        KeyFile(path)


def test_a_missing_file_names_the_command_that_makes_one(path):
    with pytest.raises(ConfigError, match=r"No such file.*reasonembed keys add"):
        KeyFile(path)


def test_changes_keep_remarks_and_links(path, tmp_path):
    path.write_text("# of the lab\n")
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    add_key(link, "ann")
    add_key(link, "bob")
    remove_key(link, "ann")
    assert link.is_symlink()
    assert path.read_text().startswith("# of the lab\nbob ")


def test_what_cannot_be_done_is_refused(path, tmp_path):
    add_key(path, "ann")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="has a key of ann already"):
        add_key(path, "ann")
    with pytest.raises(ConfigError, match="no key of bob; there are: ann"):
        remove_key(path, "bob")
    with pytest.raises(ConfigError, match="cannot name a key"):
        add_key(path, "two words")
    with pytest.raises(ConfigError, match="No such file"):
        add_key(tmp_path / "nowhere" / "keys.txt", "ann")
    assert path.read_bytes() == before and not list(path.parent.glob(".*"))


def test_a_comment_cannot_become_a_line(path):
    add_key(path, "ann", comment=f"x\nmallory {'0' * 64}\u2028eve {'0' * 64}")
    assert [one.name for one in read_keys(path)] == ["ann"]


def test_two_writers_do_not_lose_a_key(path):
    add_key(path, "ann")
    other = path.with_name(f".{path.name}.new")
    other.touch()
    with pytest.raises(ConfigError, match="being written"):
        add_key(path, "bob")
    other.unlink()
    add_key(path, "bob")
    assert [one.name for one in read_keys(path)] == ["ann", "bob"]


NAMES = st.text(string.ascii_letters + string.digits + "._@-", min_size=1, max_size=64)
COMMENTS = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)


@settings(max_examples=25, deadline=None)  # each key is synced to the disk
@given(st.lists(st.tuples(NAMES, COMMENTS), unique_by=lambda pair: pair[0], max_size=5))
def test_what_is_written_is_read(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.touch()
    made = {name: add_key(path, name, comment=comment) for name, comment in pairs}
    assert [(one.name, one.comment) for one in read_keys(path)] == pairs
    file = KeyFile(path)
    assert {name: file.name_of(key.encode()) for name, key in made.items()} == {
        name: name for name in made
    }


def test_the_command(path):
    runner = CliRunner()
    made = runner.invoke(keys_cli.app, ["add", str(path), "ann", "--comment", "laptop"])
    assert made.exit_code == 0
    key = made.stdout.strip()
    assert KeyFile(path).name_of(key.encode()) == "ann", "stdout is the key alone"
    listed = runner.invoke(keys_cli.app, ["list", str(path)]).stdout
    assert "ann" in listed and "laptop" in listed and key not in listed
    assert runner.invoke(keys_cli.app, ["remove", str(path), "ann"]).exit_code == 0
    assert read_keys(path) == []
    assert isinstance(
        runner.invoke(keys_cli.app, ["remove", str(path), "ann"]).exception, ConfigError
    )


def test_a_comment_is_shown_as_it_is(path):
    add_key(path, "ann", comment="[/] [red]laptop")
    listed = CliRunner().invoke(keys_cli.app, ["list", str(path)])
    assert listed.exit_code == 0 and "[/] [red]laptop" in listed.stdout


def test_the_command_is_reached():
    from reasonembed.cli import app

    helped = CliRunner().invoke(app, ["keys", "add", "--help"])
    assert helped.exit_code == 0 and "NAME" in helped.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(path):
    path.write_text("")
    path.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        KeyFile(path)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("search.example.com", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_what_is_this_machine_alone(host, expected):
    assert is_loopback(host) is expected


def test_beyond_this_machine_keys_or_a_word_are_needed(path):
    check_exposure(ServeConfig(model="echo"))
    check_exposure(ServeConfig(model="echo", host="0.0.0.0", keys_file=str(path)))
    check_exposure(ServeConfig(model="echo", host="0.0.0.0", allow_anonymous=True))
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0.*keys add.*allow_anonymous"):
        check_exposure(ServeConfig(model="echo", host="0.0.0.0"))


def test_a_file_keeps_its_mode_owner_and_group(path, monkeypatch):
    add_key(path, "ann")
    path.chmod(0o640)
    changed = []
    monkeypatch.setattr(os, "fchown", lambda handle, *ids: changed.append(ids))
    before = path.stat()
    add_key(path, "bob")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and not changed
    real = os.fstat

    def of_another(handle):  # what a new file has, where another user runs the command
        found = list(real(handle))
        found[4:6] = [before.st_uid + 1, before.st_gid + 1]
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", of_another)
    remove_key(path, "bob")
    assert changed == [(before.st_uid, before.st_gid)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_group_that_reads_the_file_still_does(path):
    add_key(path, "ann")
    os.chown(path, 0, 12_345)
    path.chmod(0o640)
    remove_key(path, "ann")
    found = path.stat()
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (12_345, 0o640)


def test_a_file_that_could_not_be_kept_readable_is_left_as_it_is(path, monkeypatch):
    add_key(path, "ann")
    before = path.read_text()

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refused)
    with pytest.raises(ConfigError, match=r"not permitted.*the service might not read it"):
        remove_key(path, "ann")
    assert path.read_text() == before
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("change", [add_key, remove_key])
def test_a_file_that_is_no_text_is_refused_by_the_commands(path, change):
    path.write_bytes(b"\xff\xfe#")
    with pytest.raises(ConfigError, match="not UTF-8"):
        change(path, "ann")
    assert not list(path.parent.glob(".*"))


def test_a_disk_that_is_full_is_told(path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        add_key(path, "ann")
    assert not path.exists() and not list(path.parent.glob(".*"))
