"""The systems that ship with the project, each a short YAML, and those of the user's own."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import yaml

from reasonembed.config import SystemConfig, read_mapping, validated
from reasonembed.errors import ConfigError

_SUFFIXES = (".yaml", ".yml")
_SHIPPED = files("reasonembed.systems") / "catalogue"


def system_names() -> list[str]:
    """Names of the systems that ship, sorted."""
    return sorted(
        file.name.removesuffix(".yaml")
        for file in _SHIPPED.iterdir()
        if file.name.endswith(".yaml")
    )


def load_system(name_or_file: str | Path) -> SystemConfig:
    """A system of the catalogue by its name, or one from a YAML file.

    Raises:
        ConfigError: There is no such name (those that exist are listed) or file, or the file holds
            an unknown key or a value out of range; each is named with its path.
    """
    name = str(name_or_file)
    if name in system_names():
        text = (_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
        return validated(SystemConfig, yaml.safe_load(text), where=f"system {name}")
    if Path(name).suffix in _SUFFIXES:
        return validated(SystemConfig, read_mapping(name), where=name)
    raise ConfigError(
        f"unknown system {name!r}; there are: {', '.join(system_names())}; a system of your own is "
        "a YAML file, named by its path"
    )
