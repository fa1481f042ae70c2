"""brainfm: compact 3D brain-MRI foundation models, from NIfTI files to masks on the original scans.

Four functions and one type are the Python face of the package; everything else is reached through its module.
They are imported when first used, so that ``import brainfm`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Volume", "__version__", "embed", "load", "predict"]

_HOME = {
    "Volume": "brainfm.volume",
    "embed": "brainfm.probing.features",
    "load": "brainfm.nets.backbone_file",
    "predict": "brainfm.inference.predict",
}

if TYPE_CHECKING:
    from brainfm.inference.predict import predict
    from brainfm.nets.backbone_file import load
    from brainfm.probing.features import embed
    from brainfm.volume import Volume


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'brainfm' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the sub-module of the same name (inference.predict) must not win a later look-up
    return value
