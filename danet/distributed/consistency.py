"""Refusing a run whose processes were started with different configs, code or data."""

import hashlib
import json
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Any

import torch

import danet
from danet.distributed import collectives
from danet.errors import InputError


def digest_of(value: Any) -> str:
    """Return 16 hex digits of a plain value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_version() -> str:
    """Return the versions of this package and of torch, and a digest of the package's sources."""
    # Of the sources, not a git revision: a wheel has none, and local edits count.
    root = Path(danet.__file__).parent
    digest = hashlib.sha256()
    # In a checkout danet/datasets is a symbolic link, which glob follows and Path.rglob does not.
    for name in sorted(glob("**/*.py", root_dir=root, recursive=True)):
        digest.update(name.encode())
        digest.update((root / name).read_bytes())
    return f"danet {danet.__version__} ({digest.hexdigest()[:16]}), torch {torch.__version__}"


def require_same(facts: Mapping[str, str]) -> None:
    """Compare facts between all processes.

    Args:
        facts: Name -> value or digest; the same names on every process.

    Raises:
        InputError: A fact differs.
    """
    # Gathered on all, so that all raise and none waits for the others in the next exchange.
    everywhere = collectives.gather(dict(facts))
    for name in facts:
        values = [of.get(name) for of in everywhere]
        other = next((r for r, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise InputError(
                f"process {other} has another {name} than process 0: {values[other]} against "
                f"{values[0]}; all processes of a run must start with the same"
            )
