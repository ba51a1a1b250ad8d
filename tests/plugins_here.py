"""The example plug-in, installed into a folder of its own, as pip would: the package and its entry points."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path

from models import plugins
from orchestrator.sweep import fields

EXAMPLE = Path(__file__).parent / "plugin_example"


def install(folder: Path, source: Path = EXAMPLE) -> Path:
    """``folder`` with every package of ``source`` and the metadata of its pyproject.toml."""
    project = tomllib.loads((source / "pyproject.toml").read_text())
    for package in project["tool"]["setuptools"]["packages"]:
        shutil.copytree(source / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    name, version = project["project"]["name"], project["project"]["version"]
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["project"]["entry-points"]
    (metadata / "entry_points.txt").write_text(
        "".join(f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items()) for group, points in groups.items())
    )
    return folder


def look_again() -> None:
    """Forget what was found and imported: what is installed changes within a process only in tests."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("layer_scale", "broken_arm")]:
        del sys.modules[name]
    for cached in (plugins.names, plugins.load, fields.config_section, fields.config_fields):
        cached.cache_clear()
