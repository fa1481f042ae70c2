"""The picture of an explained answer, beside the map that `brainfm explain` writes."""

from __future__ import annotations

from pathlib import Path

from brainfm.files import write_whole
from brainfm.inference.explain import Explanation, describe
from brainfm.reports.pictures import heat_figure
from brainfm.specs import TaskSpec


def write_picture(
    map_file: str | Path, found: Explanation, spec: TaskSpec, spacing_mm: tuple[float, float, float]
) -> Path:
    """Draws the map over the scan it is about, in three planes.

    Args:
        map_file: the ``.nii`` or ``.nii.gz`` of the map; the picture gets its name with the ending ``.png``.
        found: with the scan.
        spec: of the task that answered.
        spacing_mm: of the prepared grid.

    Returns:
        The picture.

    Raises:
        OSError: where it cannot be written.
    """
    assert found.scan is not None
    path = Path(map_file)
    ending = ".nii.gz" if path.name.endswith(".nii.gz") else ".nii"
    picture = path.with_name(path.name.removesuffix(ending) + ".png")
    write_whole(picture, heat_figure(found.scan, found.heat, spacing_mm, label=describe(found, spec)))
    return picture
