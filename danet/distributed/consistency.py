"""What a run is: digests of its config, code and data, which all processes must share."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import danet
from danet.distributed import collectives
from danet.errors import InputError


def digest_of(value: Any) -> str:
    """Returns 16 hexadecimal digits that depend on a plain value but not on the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_names(names: Iterable[str]) -> str:
    """Returns 16 hexadecimal digits that depend on names and their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def code() -> str:
    """Returns the versions of this package and of torch, and a digest of the package's sources."""
    root = Path(danet.__file__).parent
    digest = hashlib.sha256()
    # In a checkout danet/datasets is a link, which rglob would not follow.
    folders = (Path(folder) for folder, _, _ in os.walk(root, followlinks=True))
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return f"danet {danet.__version__} ({digest.hexdigest()[:16]}), torch {torch.__version__}"


def require_same(facts: Mapping[str, str]) -> None:
    """Compares facts between all processes.

    Args:
        facts: What it is -> its value or digest, the same keys on every process.

    Raises:
        InputError: A fact differs; names it, the values and the processes.
    """
    if collectives.world_size() == 1:
        return
    everywhere: list[Any] = [None] * collectives.world_size()
    with collectives.collective("comparison of config, code and data"):
        dist.all_gather_object(everywhere, dict(facts))
    for name in facts:
        values = [of.get(name) for of in everywhere]
        other = next((r for r, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise InputError(
                f"process {other} has another {name} than process 0: {values[other]} against "
                f"{values[0]}; all processes of a run must start with the same"
            )
