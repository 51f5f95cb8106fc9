"""What packaging computes; the rest is in pyproject.toml. Requirements are those of requirements.txt."""

import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

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


def refuse_without_basicsr() -> None:
    """End with what to do where BasicSR's own installation fails: pip prepares this package before it tries."""
    installed = any(distributions(name="basicsr", path=[sysconfig.get_path("purelib")]))
    if sys.version_info >= (3, 13) and not installed:
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(
            f"BasicSR 1.4.2, which esc_arch extends, cannot be installed by pip on Python {version}: its setup.py "
            "relies on exec() writing to locals(), which ended with 3.12.\n"
            "Run `python install_basicsr.py` in esc_arch's folder first, then this again; or use Python 3.10 to 3.12."
        )


refuse_without_basicsr()
setup(
    version=read_version(),
    packages=find_packages(include=["esc_arch", "esc_arch.*"]),
    package_data={
        "esc_arch": [
            "py.typed",
            "ops/cpu/csrc/*",
            "tools/benchmark/*.json",
            "checkpoints/*.json",
            "checkpoints/weights/*",
        ]
    },
    install_requires=read_requirements(),
    extras_require={
        "flash-attn": ["flash-attn>=2.6"],
        "lpips": ["lpips>=0.1.4"],
        "onnx": ONNX,
        "plot": ["matplotlib>=3.7"],
        "publish": PUBLISH,
        "spandrel": SPANDREL,
        "video": VIDEO,
        "wandb": ["wandb>=0.15"],
        "test": [
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
            *ONNX,
            *PUBLISH,
            *SPANDREL,
            *VIDEO,
        ],
    },
)
