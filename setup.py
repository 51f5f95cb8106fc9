"""What packaging computes; the rest is in pyproject.toml.

Requirements are those of requirements.txt. BasicSR and lmdb, which only training needs, are the extra `train`.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

DOCS = ["mkdocs-material>=9.5", "mkdocs-jupyter>=0.25", "mkdocstrings[python]>=0.29"]
ONNX = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
PUBLISH = ["huggingface-hub>=0.20"]
SPANDREL = ["spandrel>=0.4.0"]
VIDEO = ["av>=17.1"]


def read_requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def read_version() -> str:
    text = (ROOT / "esc_arch" / "version.py").read_text(encoding="utf-8")
    return text.split('"')[1]


def read_readme() -> str:
    """README.md, for the package index: links into the repository are absolute if pyproject.toml has its URL."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    url = re.search(r'^Repository = "(.+?)/?"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if url is None:
        return text
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\g<1>{url[1]}/raw/HEAD/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:)", rf"\g<1>{url[1]}/blob/HEAD/", text)


class BuildWithOptionFiles(build_py):
    """Puts options/ into the package, too: an editable installation reads it where it is."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "options", Path(self.build_lib, "esc_arch", "option_files"), dirs_exist_ok=True)


REQUIREMENTS = read_requirements()
TRAIN = [each for each in REQUIREMENTS if each.startswith(("basicsr", "lmdb"))]
setup(
    version=read_version(),
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["esc_arch", "esc_arch.*"]),
    package_data={"esc_arch": ["py.typed", "ops/cpu/csrc/*", "tools/benchmark/*.json"]},
    install_requires=[each for each in REQUIREMENTS if each not in TRAIN],
    cmdclass={"build_py": BuildWithOptionFiles},
    extras_require={
        "completion": ["argcomplete>=3"],
        "docs": DOCS,
        "flash-attn": ["flash-attn>=2.6"],
        "lpips": ["lpips>=0.1.4"],
        "onnx": ONNX,
        "plot": ["matplotlib>=3.7"],
        "publish": PUBLISH,
        "spandrel": SPANDREL,
        "train": TRAIN,
        "video": VIDEO,
        "wandb": ["wandb>=0.15"],
        "test": [
            "argcomplete>=3",
            "build>=1",
            "twine>=6",
            "pytest>=8",
            "pytest-cov>=6",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.13",
            "codespell>=2.3",
            "import-linter>=2.6",
            "types-PyYAML",
            "types-tqdm",
            "hypothesis>=6.100",
            "jsonschema>=4",
            "matplotlib>=3.7",
            "openvino>=2025.0",
            "nbconvert>=7",
            "ipykernel>=6",
            *DOCS,
            *ONNX,
            *PUBLISH,
            *SPANDREL,
            *VIDEO,
        ],
    },
)
