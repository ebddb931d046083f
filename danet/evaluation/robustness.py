"""Scores under corruptions, kept so that an interrupted evaluation can go on."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danet.distributed import collectives
from danet.errors import InputError
from danet.evaluation.corruptions import GROUPS, STRENGTHS
from danet.evaluation.metrics import Scores
from danet.filesystem import atomic_write, storage_errors, write_table


class Robustness:
    """Scores under corruptions: a line of corruptions.jsonl for each that is finished.

    Lines of another ``origin``, such as another network, protocol or data set, are kept and not
    used. ``names`` gives for each corruption what else its scores depend on.
    """

    def __init__(
        self, folder: Path, origin: Mapping[str, Any], names: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.folder, self.names, self.path = folder, list(names), folder / "corruptions.jsonl"
        wanted = {name: {**origin, **further} for name, further in names.items()}
        self.origins: dict[str, Any] = json.loads(json.dumps(wanted))
        self.scores: dict[tuple[str, int], float] = {}  # of corruption and strength, mIoU
        if names and collectives.is_first() and self.path.exists():
            self._read()
        self.scores = collectives.from_first(self.scores)

    def _read(self) -> None:
        """Read the scores of these origins; raise InputError for a damaged line.

        A last line without an end, of a start that was killed while it wrote, is removed.
        """
        with storage_errors(self.path):
            *lines, rest = self.path.read_bytes().split(b"\n")
            if rest:
                with atomic_write(self.path) as temporary:
                    temporary.write_bytes(b"".join(line + b"\n" for line in lines))
        for number, line in enumerate(lines, start=1):
            try:
                found = json.loads(line)
                name, strength, miou = found["corruption"], found["strength"], found["miou"]
                if found["origin"] == self.origins.get(name):
                    self.scores[name, int(strength)] = float(miou)
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                raise InputError(
                    f"{self.path}: line {number} was damaged or edited; delete that "
                    "line to score its corruption again"
                ) from error

    def missing(self) -> list[tuple[str, int]]:
        """Return the corruptions and strengths that have no score yet."""
        wanted = [(name, strength) for name in self.names for strength in STRENGTHS]
        return [key for key in wanted if key not in self.scores]

    def add(self, name: str, strength: int, scores: Scores) -> None:
        """Keep the scores under a corruption; the first process writes them."""
        self.scores[name, strength] = scores.miou
        if not collectives.is_first():
            return
        iou = [None if math.isnan(value) else value for value in scores.iou]
        line = {"corruption": name, "strength": strength, "miou": scores.miou, "iou": iou}
        with storage_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "origin": self.origins[name]}) + "\n")

    def row(self, name: str) -> list[float]:
        """Return the mIoU of a corruption at strengths 1 to 5, and their mean."""
        values = [self.scores[name, strength] for strength in STRENGTHS]
        return [*values, sum(values) / len(values)]

    def summary(self, clean: float) -> dict[str, Any]:
        """Return what metrics.json has, given the mIoU without corruption.

        Mean and ratio are mPC and rPC of Michaelis et al. (see danet.evaluation.corruptions).
        """
        rows = {name: self.row(name) for name in self.names}
        mean = sum(row[-1] for row in rows.values()) / len(rows)
        return {
            "corruptions": {name: row[:-1] for name, row in rows.items()},
            "corruption_means": {name: row[-1] for name, row in rows.items()},
            "mean_corrupted_miou": mean,
            "relative_corrupted_miou": mean / clean if clean else None,
        }

    def write_table(self) -> None:
        """Write corruptions.csv."""
        rows = [(GROUPS[name], name, *map(str, self.row(name))) for name in self.names]
        header = "group", "corruption", *map(str, STRENGTHS), "mean"
        write_table(self.folder / "corruptions.csv", [header, *rows])
