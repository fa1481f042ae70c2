"""The picture of a labelled head, beside its label map: tissues outlined in three planes."""

from __future__ import annotations

from pathlib import Path

from brainfm.files import write_whole
from brainfm.imaging import nifti
from brainfm.inference.anatomy import Written, tissues_of
from brainfm.reports.pictures import overlay_figure


def write_picture(written: Written) -> Path:
    """The brain mask and the tissues over the scan, where the brain is largest.

    Returns: the picture, named as the label map with the ending ``.png``.

    Raises: FileError where it cannot be written.
    """
    volume, _ = nifti.read(written.like)
    found = written.found
    assert found.mask is not None  # the network's answers bring one
    tissues = tissues_of(found.labels)
    picture = written.labels.with_name(written.labels.name.removesuffix(".gz").removesuffix(".nii") + ".png")
    figure = overlay_figure(
        volume.voxels, tissues, found.mask, ("Fluid, grey and white matter", "Within the skull"), volume.spacing_mm
    )
    write_whole(picture, figure)
    return picture
