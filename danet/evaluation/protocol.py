"""What a number was measured with, as text: it says little without."""

import re
from collections.abc import Mapping
from typing import Any


def name_of(node: Mapping[str, Any]) -> str:
    """Returns the name of a way to run a network: the class of its config, as words_and_words."""
    target = str(node.get("_target_", "")).rpartition(".")[2]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", target).lower()


def described(node: Mapping[str, Any], name: str | None = None) -> str:
    """Returns the name and every value that is set: ``whole (flip=false, max_pixels=4194304)``.

    Args:
        node: The config group ``evaluation``.
        name: What it was chosen by; None for the name of its class.
    """
    values = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in node.items()
        if not key.startswith("_") and value is not None
    ]
    return f"{name or name_of(node)} ({', '.join(values)})"
