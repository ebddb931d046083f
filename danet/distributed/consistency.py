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


def require_same(config: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Compare config, code and data between all processes; raise InputError if one differs.

    Args:
        config: As plain values; ``run`` and ``resume`` may differ.
        data: Digests of the data sets by their names.
    """
    plain = {**config, "run": None, "resume": None}
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True, default=str)
    facts = {"config": hashlib.sha256(text.encode()).hexdigest()[:16], "code": _code_version()}
    facts |= {name.replace("_", " "): digest for name, digest in data.items()}
    # Gathered on all, so that all raise and none waits for the others in the next exchange.
    everywhere = collectives.gather(facts)
    for rank, others in enumerate(everywhere):
        for name, value in everywhere[0].items():
            if others[name] != value:
                raise InputError(
                    f"process {rank} has another {name} than process 0: {others[name]} against "
                    f"{value}; all processes of a run must start with the same"
                )


def _code_version() -> str:
    """Return the versions of this package and of torch, and a digest of the package's sources."""
    # Of the sources, not a git revision: a wheel has none, and local edits count.
    root = Path(danet.__file__).parent
    digest = hashlib.sha256()
    # In a checkout danet/datasets is a symbolic link, which glob follows and Path.rglob does not.
    for name in sorted(glob("**/*.py", root_dir=root, recursive=True)):
        digest.update(name.encode() + (root / name).read_bytes())
    return f"danet {danet.__version__} ({digest.hexdigest()[:16]}), torch {torch.__version__}"
