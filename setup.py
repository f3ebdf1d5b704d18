"""Build of the distribution `maskrcnn-mlops`; tool settings stand in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="maskrcnn-mlops",
    version="0.1.0",
    description="Mask R-CNN on COCO that a team can reproduce, compare and scale: DVC, MLflow, Kubeflow",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # recipes/ holds YAML alone; it is installed beside components/, where components/recipe.py looks for it.
    packages=[*find_packages(include=["components*", "cuda_ops*", "model*", "pipelines*"]), "recipes"],
    package_data={"recipes": ["*.yaml"]},
    entry_points={"console_scripts": ["maskrcnn = pipelines.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "torchvision>=0.26,<0.31",
        "numpy>=1.26",
        "pillow>=10.3",
        "pycocotools>=2.0.8",
        "pydantic>=2.9,<3",
        "ruamel.yaml>=0.18",
        "mlflow>=3,<4",
        "dvc>=3.50,<4",
        "requests>=2.31",
        "rich>=13",
        "matplotlib>=3.8",
    ],
    extras_require={
        "pipelines": ["kfp>=2.17,<3", "kfp-kubernetes>=2.17,<3", "kubernetes>=27,<31"],
        "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.8", "mypy>=1.11", "uv>=0.4"],
    },
)
