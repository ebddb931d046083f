"""Write the tables of docs/reliability.md from a run of the tests.

    python scripts/reliability.py rows.json

The page gives the command that makes the file. Its rows are tests; those of one number become one
line. A second run adds to the file, so a number may be repeated alone. Any Python from 3.7 on
suffices, without packages.
"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN = "<!-- tables: python scripts/reliability.py FILE -->"
BETWEEN = "Bad inputs: C config, F folders, L labels, I images, K checkpoints, R results."
END = "<!-- end of tables -->"
MOST = 40
"""Maximum number of tests of a bad input that are listed by name."""


def table(rows: "list[dict[str, str]]", columns: str) -> str:
    """Return a table, a line per number.

    Args:
        rows: number, fault, test, outcome (passed, failed, skipped) and figure of each test.
        columns: The head of the table; the last column is of figures, or of the tests' names.
    """
    lines = [columns, "|---" * (columns.count("|") - 1) + "|"]
    for number in sorted({row["number"] for row in rows}):
        mine = [row for row in rows if row["number"] == number]
        passed = sum(row["outcome"] == "passed" for row in mine)
        count = f"{passed} of {len(mine)}"
        if mine[0]["fault"]:
            what = "; ".join(dict.fromkeys(row["fault"] for row in mine))
            figures = "; ".join(dict.fromkeys(row["figure"] for row in mine if row["figure"]))
            lines.append(f"| {number} | {what} | {count} | {figures} |")
        else:
            tests = dict.fromkeys(row["test"].split("[")[0] for row in mine)
            names = ", ".join(f"`{test.partition('::')[2]}`" for test in tests)
            names = names if len(tests) <= MOST else f"{len(tests)} tests"
            files = ", ".join(dict.fromkeys(f"`{test.partition('::')[0]}`" for test in tests))
            lines.append(f"| {number} | {count} | {names} in {files} |")
    return "\n".join(lines)


def main() -> None:
    """Read the given file and replace the tables of the page."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/reliability.py FILE.json")
    rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{PAGE}: the lines around the table are missing")
    failures = table([row for row in rows if row["fault"]], "| | fault | tests passed | figures |")
    inputs = table([row for row in rows if not row["fault"]], "| | tests passed | tests |")
    text = f"{BEGIN}\n\n{failures}\n\n{BETWEEN}\n\n{inputs}\n\n{END}"
    PAGE.write_text(f"{before}{text}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
