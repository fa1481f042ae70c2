"""Scope of an answer: why it may not be relied on, by what the weights were shown and by the answer itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from brainfm.data.labelling import FoundLabels
from brainfm.data.regions import CORTEX, DEEP, REGIONS, VENTRICLES, WHITE
from brainfm.imaging import scope

_GROUPS = {
    "ventricles": VENTRICLES, "fluid outside": ("csf",), "cortex": CORTEX, "white matter": WHITE, "deep grey": DEEP,
    "cerebellum": ("cerebellar_cortex", "cerebellar_white"), "brainstem": ("brainstem",),
}  # fmt: skip
_SIDED = {"cortex": CORTEX, "white matter": WHITE}  # of which both sides have about as much


def answer_measures(found: FoundLabels) -> dict[str, float]:
    """What an answer measures, for comparison with those to ordinary heads.

    Shares of the volume within the skull; how much more of the cortex and of the white matter lies on one side of the
    middle, from 0 to 1; the volume within the skull in ml; and the mean probability of the class answered.
    """
    icv = max(found.volumes_ml.get("icv", 0.0), 1e-9)
    measured = {
        f"share of {name}": sum(found.volumes_ml.get(part, 0.0) for part in parts) / icv
        for name, parts in _GROUPS.items()
    }
    inside = found.mask if found.mask is not None else found.labels > 0
    across = np.nonzero(inside.any(axis=(1, 2)))[0]
    middle = (across[0] + across[-1] + 1) / 2 if across.size else 0.0
    for name, parts in _SIDED.items():
        columns = np.isin(found.labels, [REGIONS[part] for part in parts]).sum(axis=(1, 2))
        weight = np.clip(middle - np.arange(len(columns)), 0, 1)  # of a column of voxels, how much lies to the left
        left, total = float((columns * weight).sum()), float(columns.sum())
        measured[f"asymmetry of {name}"] = abs(2 * left - total) / total if total else 1.0
    return measured | {"ml within the skull": icv, "mean probability": found.quality}


def of_answer(
    found: FoundLabels, release: Mapping[str, Any], contrasts: Iterable[str] = (), age: str | None = None
) -> list[str]:
    """Why an answer by weights that ship is out of their scope, as far as their release tells.

    Args:
        release: LoadedBackbone.release; an empty one tells nothing.
        contrasts: of the scans that were read.
        age: of the person, in years, as the manifest writes it.
    """
    said = []
    people = release.get("people", ())
    seen = {contrast for one in people for contrast in one["contrasts"]} - {"rendered"}
    strange = sorted(set(contrasts) - seen - {"unknown"}) if seen else []
    if strange:
        said.append(f"contrast {', '.join(strange)}, of real scans the weights saw {', '.join(sorted(seen))}")
    ages = [edge for one in people if one["ages"] for edge in (one["ages"][0], one["ages"][-1])]
    years = _number(age)
    if ages and years is not None and not min(ages) <= years <= max(ages):
        said.append(f"age {years:g}, the weights saw people of {min(ages):.0f} to {max(ages):.0f} years")
    ranges = release.get("ordinary", {}).get("ranges", {})
    return said + scope.beyond(answer_measures(found), {name: (name, *edges) for name, edges in ranges.items()})


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
