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
LINKED = {
    "danet.datasets": "datasets",
    "danet.datasets.exports": "datasets/exports",
    "danet.datasets.formats": "datasets/formats",
    "danet.configs": "configs",
    "danet.tools": "tools",
}
TIMM = ["timm>=1.0.15,<2"]
"""For model/backbone=timm."""
RESULTS = ["matplotlib>=3.10.8"]
"""For the curves of scripts/results.py."""
HUB = ["huggingface_hub>=1.0"]
"""For hf:// and push= of tools/export.py."""
EXPORT = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"]
"""For ONNX files of tools/export.py."""
TIFF = ["tifffile>=2024.1.30", "imagecodecs>=2024.1.1"]
"""For the bands of TIFFs, data.channels."""
GEO = ["rasterio>=1.4"]
"""For GeoTIFFs of tools/predict.py."""
OPENVINO = ["openvino>=2025.1"]
"""For tests of programs, and scripts/bench/deployment.py."""
SWEEP = ["optuna>=4"]
"""For scripts/sweep.py."""
WANDB = ["wandb>=0.19"]
MLFLOW = ["mlflow-skinny>=3"]
"""For run.log_to."""
DOCS = ["mkdocs>=1.6,<2", "mkdocstrings[python]>=0.29", "nbclient>=0.10", "ipykernel>=6.29"]
"""For the API pages and the notebook."""

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
        "danet": ["py.typed"],
        "danet.checkpoint": ["*.yaml"],
        "danet.config": ["*.yaml"],
        "danet.configs": ["**/*.yaml"],
        "danet.export": ["*.j2", "*.yaml"],
        "danet.visualization": ["templates/*"],
        "danet.datasets": ["tables/*", "splits/*.md", "splits/*/*.txt"],
    },
    install_requires=REQUIREMENTS,
    extras_require={
        "timm": TIMM,
        "results": RESULTS,
        "export": EXPORT,
        "hub": HUB,
        "tiff": TIFF,
        "geo": GEO,
        "openvino": OPENVINO,
        "sweep": SWEEP,
        "docs": DOCS,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "test": [
            *("pytest>=8", "pytest-xdist>=3.6"),
            *("ruff>=0.17,<0.18", "mypy>=2.4,<2.5", "types-PyYAML", "types-tqdm"),
            *(
                *TIMM,
                *RESULTS,
                *EXPORT,
                *OPENVINO,
                *HUB,
                *TIFF,
                *GEO,
                *SWEEP,
                *DOCS,
                *WANDB,
                *MLFLOW,
            ),
        ],
    },
    entry_points={
        "console_scripts": [
            "danet-train = danet.tools.train:main",
            "danet-eval = danet.tools.eval:main",
            "danet-check-data = danet.tools.check_data:main",
            "danet-convert = danet.tools.convert:main",
            "danet-compare = danet.tools.compare:main",
            "danet-export = danet.tools.export:main",
            "danet-predict = danet.tools.predict:main",
            "danet-visualize = danet.tools.visualize:main",
        ]
    },
)
