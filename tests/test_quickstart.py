"""scripts/quickstart.sh from its first to its last line, and the commands that it prints."""

import functools
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT, TINY, output_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout whose environment is the one of the tests, so that nothing is installed."""
    place = tmp_path_factory.mktemp("a checkout")
    for name in ("danet", "datasets", "configs", "tools"):
        (place / name).symlink_to(ROOT / name)
    (place / "scripts").mkdir()
    for name in ("quickstart.sh", "quickstart_end.py"):
        (place / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (place / "scripts" / "install.sh").write_text("")
    binaries = place / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f"PATH={shlex.quote(str(binaries))}:$PATH\n")
    (binaries / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (binaries / "python").chmod(0o755)
    return place


bash = functools.partial(output_of, "bash", path=ROOT)


def test_what_the_quickstart_prints_at_its_end_works_when_pasted(checkout, tmp_path):
    settings = [*TINY, "trainer.steps=3", "data.num_workers=0"]
    said = bash(str(checkout / "scripts" / "quickstart.sh"), *settings, cwd=tmp_path)
    results, _, following = said.partition("\nNext, ")
    (run,) = (checkout / "runs" / "quickstart").iterdir()
    for file in ("test/metrics.json", "best.pt", "example/classes.txt"):
        assert (run / file).is_file()
    assert f"{run.relative_to(checkout)}/best.pt  (step " in results
    assert "last.pt" not in following
    drawn = sorted(path.name for path in run.glob("pictures/*_attention.png"))
    assert sorted(re.findall(r"/(\w+_attention\.png)", results)) == drawn != []
    assert str(checkout / "runs" / "quickstart") in results  # where to look while it trains

    _, commands = following.split("\n", 1)
    assert commands.count("python tools/") == 4
    bash("-e", cwd=tmp_path, stdin=commands)
    assert (run / "pictures_test" / "report.html").is_file()
    lines = (run.parent / f"{run.name}_own" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 100
    assert (run.parent / f"{run.name}_fcn" / "best.pt").is_file()
