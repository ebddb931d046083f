"""Writes the table of docs/reliability.md from a run of the tests in tests/faults.

    DANET_FAULTS_JSON=faults.json python -m pytest tests/faults
    python scripts/reliability.py faults.json

Rows of the file are tests; those of one number become one line of the table, which has passed when
all of them have. A second run adds to the file, so that a number may be repeated alone.
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN = "<!-- table: python scripts/reliability.py FILE -->"
END = "<!-- end of table -->"


def table(rows: list[dict[str, str]]) -> str:
    """Returns the table, a line per number.

    Args:
        rows: number, fault, test, outcome (passed, failed, skipped) and figure of each test.
    """
    lines = ["| | fault | tests passed | figures |", "|---|---|---|---|"]
    for number in sorted({row["number"] for row in rows}):
        mine = [row for row in rows if row["number"] == number]
        faults = "; ".join(dict.fromkeys(row["fault"] for row in mine))
        passed = sum(row["outcome"] == "passed" for row in mine)
        figures = "; ".join(dict.fromkeys(row["figure"] for row in mine if row["figure"]))
        lines.append(f"| {number} | {faults} | {passed} of {len(mine)} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Reads the file that is named and replaces the table of the page."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/reliability.py FILE.json")
    rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{PAGE}: the lines around the table are missing")
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
