"""DICOM series in, through dcm2niix, and segmentations out, as DICOM SEG objects."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from brainfm import __version__
from brainfm.errors import ScanError
from brainfm.extras import demand
from brainfm.files import writing
from brainfm.imaging import nifti
from brainfm.imaging.nifti import FileGrid

_AWAY_MM = 0.1  # a voxel of the converted file from where the series has it
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def converted(series: Path, out: Path) -> Path:
    """A DICOM series as a NIfTI file, ``out`` with the ending ``.nii.gz``.

    dcm2niix does it; where each voxel lies is then compared with what the series' own headers say, by another way.

    Args:
        series: a folder that holds the files of one series of one volume.

    Raises:
        ConfigError: dcm2niix or pydicom is not installed.
        ScanError: the folder holds no series, several, or one that is not a volume, or a voxel would lie elsewhere.
    """
    demand("dcm2niix", "a DICOM series")
    demand("pydicom", "a DICOM series")
    import dcm2niix

    slices = _slices(series)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        command = [dcm2niix.bin, "-z", "i", "-b", "n", "-f", "volume", "-o", folder, str(series)]
        done = subprocess.run(command, capture_output=True, text=True)
        files = sorted(Path(folder).glob("*.nii.gz"))
        if len(files) != 1:
            said = (done.stdout.strip().splitlines() or ["nothing"])[-1]
            raise ScanError(f"{series}: dcm2niix made {len(files)} volumes of it, expected one; it says: {said}")
        files[0].replace(out)
    grid = nifti.read_header(out).grid
    away = _away_mm(grid, slices)
    if away > _AWAY_MM:
        out.unlink()
        raise ScanError(f"{series}: voxels of the converted volume lie {away:.1f} mm from where the series has them")
    return out


def _slices(series: Path) -> list[Any]:
    """The series' files without pixels, from the first place along the normal to the last. Raises: ScanError."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    found = []
    for path in sorted(path for path in series.iterdir() if path.is_file()):
        try:
            held = pydicom.dcmread(path, stop_before_pixels=True)
        except InvalidDicomError:
            continue
        if "ImagePositionPatient" in held:
            found.append(held)
    if not found:
        raise ScanError(f"{series}: no DICOM file with a place in it, expected a folder with the slices of one series")
    names = {str(held.SeriesInstanceUID) for held in found}
    if len(names) > 1:
        raise ScanError(f"{series}: holds {len(names)} series, expected one")
    turned = {tuple(np.round(np.asarray(held.ImageOrientationPatient, float), 3)) for held in found}
    if len(turned) > 1:
        raise ScanError(f"{series}: its slices are turned against each other, expected one volume")
    across, down = _directions(found[0])
    normal = np.cross(across, down)
    return sorted(found, key=lambda held: float(np.asarray(held.ImagePositionPatient, float) @ normal))


def _directions(held: Any) -> tuple[np.ndarray, np.ndarray]:
    """In LPS, where the columns of a slice follow each other, and where its rows do."""
    both = np.asarray(held.ImageOrientationPatient, float)
    return both[:3], both[3:]


def _slice_affine(held: Any) -> np.ndarray:
    """[4, 3] of a slice: (column, row, 1) -> RAS+ mm."""
    across, down = _directions(held)
    down_mm, across_mm = (float(edge) for edge in held.PixelSpacing)
    columns = np.stack([across * across_mm, down * down_mm, np.asarray(held.ImagePositionPatient, float)], axis=1)
    return (_LPS @ np.vstack([columns, [0, 0, 1]]))[:, [0, 1, 2]]


def _index_of(grid: FileGrid, held: Any) -> np.ndarray:
    """[3, 3]: (column, row, 1) of a slice -> index in the file's own axes, not yet rounded."""
    inverse = np.linalg.inv(np.asarray(grid.affine_mm, float))
    found: np.ndarray = (inverse @ _slice_affine(held))[:3]
    return found


def _away_mm(grid: FileGrid, slices: list[Any]) -> float:
    """How far the corners of the first and the last slice lie from the voxel centres of a grid, or outside of it."""
    worst = 0.0
    for held in (slices[0], slices[-1]):
        rows, columns = int(held.Rows), int(held.Columns)
        corners = np.array([[0, 0, 1], [columns - 1, 0, 1], [0, rows - 1, 1], [columns - 1, rows - 1, 1]], float).T
        at = _index_of(grid, held) @ corners
        nearest = np.clip(np.round(at), 0, np.asarray(grid.shape_vox)[:, None] - 1)
        apart = np.asarray(grid.affine_mm, float)[:3, :3] @ (at - nearest)
        worst = max(worst, float(np.linalg.norm(apart, axis=0).max()))
    return worst


def write_segmentation(
    path: Path, labels: np.ndarray, grid: FileGrid, series: Path, names: Mapping[int, str], about: str
) -> None:
    """A DICOM SEG object on the slices of a series, one binary segment a label.

    The segments' coded meaning is no more than "lesion"; what they are is in their labels.

    Args:
        labels: label values in the shape and axis order of the converted file.
        grid: of that file.
        series: the folder it was converted from.
        names: label value -> name; every value that is not 0.
        about: of the algorithm, e.g. the bundle's fingerprint.

    Raises:
        ConfigError: highdicom is not installed.
        ScanError: the grid is not that of the series.
        FileError: where it cannot be written.
    """
    demand("highdicom", "DICOM SEG output")
    import highdicom
    import pydicom
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    slices = _slices(series)
    if _away_mm(grid, slices) > _AWAY_MM:
        raise ScanError(f"{series}: the labels lie on another grid than its slices")
    frames = np.stack([_on_slice(labels, grid, held) for held in slices])
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="brainfm", version=__version__, family=codes.DCM.ArtificialIntelligence, parameters={"bundle": about}
    )
    described = [
        SegmentDescription(
            segment_number=number, segment_label=name,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC, algorithm_identification=algorithm,
        )
        for number, name in enumerate(names.values(), start=1)
    ]  # fmt: skip
    masks = np.stack([frames == value for value in names], axis=-1).astype(np.uint8)
    made = Segmentation(
        source_images=[pydicom.dcmread(held.filename) for held in slices],
        pixel_array=masks,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=highdicom.UID(),
        series_number=int(getattr(slices[0], "SeriesNumber", None) or 0) + 1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="brainfm",
        manufacturer_model_name="brainfm",
        software_versions=__version__,
        device_serial_number="0",
        series_description=f"brainfm {', '.join(names.values())}"[:64],
        omit_empty_frames=True,
    )
    with writing(path) as file:
        made.save_as(file)


def _on_slice(labels: np.ndarray, grid: FileGrid, held: Any) -> np.ndarray:
    """[rows, columns] of a slice out of the labels."""
    rows, columns = np.mgrid[: int(held.Rows), : int(held.Columns)]
    places = np.stack([columns.ravel(), rows.ravel(), np.ones(rows.size)])
    x, y, z = np.round(_index_of(grid, held) @ places).astype(int)
    found: np.ndarray = labels[x, y, z].reshape(rows.shape)
    return found
