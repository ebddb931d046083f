"""Packaging. What is needed at run time stands in requirements.txt and nowhere else."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
REQUIREMENTS = [
    line.strip()
    for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "danet" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)
# These folders stand at the top level and are imported as danet.<name>: danet/<name> is a link to
# them for a checkout, and this map is for what gets built.
LINKED = {"danet.datasets": "datasets", "danet.configs": "configs", "danet.tools": "tools"}

setup(
    name="danet",
    version=VERSION,
    description="Training semantic segmentation with the Dual Attention Network",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["danet", "danet.*"]), *LINKED],
    package_dir=LINKED,
    package_data={
        "danet.configs": ["**/*.yaml"],
        "danet.datasets": ["tables/*", "splits/*.md", "splits/*/*.txt"],
    },
    install_requires=REQUIREMENTS,
    extras_require={
        "timm": ["timm>=1.0,<2"],
        "results": ["matplotlib>=3.8"],
        "test": ["pytest>=8", "ruff>=0.17,<0.18", "mypy>=2.4,<2.5", "types-PyYAML", "types-tqdm"],
    },
    entry_points={
        "console_scripts": [
            "danet-train = danet.tools.train:main",
            "danet-eval = danet.tools.eval:main",
            "danet-check = danet.tools.check:main",
            "danet-convert = danet.tools.convert:main",
            "danet-visualize = danet.tools.visualize:main",
        ]
    },
)
