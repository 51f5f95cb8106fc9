"""Packaging of esc_arch. Requirements are read from requirements.txt, so there is one list of them."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

ONNX = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
SPANDREL = ["spandrel>=0.4.0"]
VIDEO = ["av>=17.1"]


def read_requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def read_version() -> str:
    text = (ROOT / "esc_arch" / "version.py").read_text(encoding="utf-8")
    return text.split('"')[1]


setup(
    name="esc-arch",
    version=read_version(),
    description="ESC image super-resolution (ICCV 2025) as a plugin of BasicSR",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    # BasicSR 1.4.2 cannot be built by Python 3.13 (its setup.py relies on exec() writing to locals()):
    # this bound makes pip say so in one line, before that build fails obscurely.
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["esc_arch", "esc_arch.*"]),
    package_data={"esc_arch": ["py.typed", "ops/native/csrc/*", "benchmark/*.json", "options/*.json"]},
    install_requires=read_requirements(),
    extras_require={
        "flash-attn": ["flash-attn>=2.6"],
        "lpips": ["lpips>=0.1.4"],
        "onnx": ONNX,
        "plot": ["matplotlib>=3.7"],
        "spandrel": SPANDREL,
        "video": VIDEO,
        "wandb": ["wandb>=0.15"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.13",
            "types-PyYAML",
            "types-tqdm",
            "hypothesis>=6.100",
            "jsonschema>=4",
            "matplotlib>=3.7",
            "openvino>=2025.0",
            *ONNX,
            *SPANDREL,
            *VIDEO,
        ],
    },
    entry_points={"console_scripts": ["basicsr=esc_arch.cli:main"]},
)
