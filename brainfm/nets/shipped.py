"""Weights that ship: the backbone files inside the package, by name."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from brainfm.errors import BrainfmWarning, WeightsError

FOLDER = Path(__file__).parents[1] / "weights"  # NAME.safetensors, NAME.md beside it, and the weights' own LICENSE
USUAL = "brainfm_s"  # taken where no backbone is named
MOST_BYTES = 11_000_000  # of one file
_ENDING = ".safetensors"
_NAME = re.compile(r"[A-Za-z]\w*")


def names() -> tuple[str, ...]:
    """Of the backbone files that ship, sorted; maybe none."""
    return tuple(sorted(path.stem for path in FOLDER.glob(f"*{_ENDING}")))


def located(backbone: str | os.PathLike[str]) -> Path:
    """The backbone file that a path, or the name of weights that ship, stands for.

    A path that exists is taken before a name, with a warning where it is both.

    Raises: WeightsError where there is neither such a file nor such a name.
    """
    path, name = Path(backbone), str(backbone)
    is_name = bool(_NAME.fullmatch(name))
    shipped = FOLDER / f"{name}{_ENDING}"
    known = is_name and shipped.is_file()
    if path.exists():
        if known:
            warnings.warn(
                f"{name}: the file of this name that lies here is taken, not the weights that ship; remove it, or give "
                f"{shipped}, to have those",
                BrainfmWarning,
                stacklevel=3,
            )
        return path
    if known:
        return shipped
    listed = ", ".join(names()) or "none"
    if is_name:
        raise WeightsError(f"{name}: no such file, and no weights of this name ship; those that do: {listed}")
    raise WeightsError(
        f"{path}: no such file, expected a backbone file (*{_ENDING}) or the name of weights that ship: {listed}"
    )
