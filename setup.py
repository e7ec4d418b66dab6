"""Packaging of EC-DiT: three packages, one command, extras for what is heavy."""

from pathlib import Path

from setuptools import find_packages, setup

DEEPSPEED = ["deepspeed>=0.19.8,<0.20"]
SERVE = ["gradio>=6"]
ENCODERS = ["transformers>=4.50", "diffusers>=0.35", "sentencepiece"]

setup(
    name="ecdit",
    version="0.1.0",
    description="Train and sample diffusion transformers with expert-choice routing",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=["benchmarks", "ecdit", "ecdit.*", "parallel", "parallel.*", "launcher", "launcher.*"]
    ),
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16.1,<0.17",
        "mosaicml-streaming>=0.13,<0.14",
        "filelock>=3.13",
        "fsspec[http]>=2024.6",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "pillow>=10",
        "psutil>=5.9",
        "pydantic>=2.10",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "typer>=0.15",
        "xxhash>=3.4",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.9,<2.12"],
        "deepspeed": DEEPSPEED,
        "encoders": ENCODERS,
        "eval": ["requests>=2.32", "transformers>=4.50"],
        "parquet": ["pyarrow>=17"],
        "serve": SERVE,
        "wandb": ["wandb>=0.18"],
        "test": [
            *DEEPSPEED,
            *ENCODERS,
            *SERVE,
            "hypothesis>=6.100",
            "playwright>=1.50",
            "pyarrow>=17",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "requests>=2.32",
            "ruff>=0.17",
            "scipy>=1.13",
            "torchmetrics>=1.7",
            "triton>=3.6; platform_system == 'Linux'",  # its interpreter; a CUDA build of torch brings its own
        ],
    },
    entry_points={"console_scripts": ["ecdit=ecdit.cli:main"]},
)
