"""DICOM in and out, on series that are made here: oblique and sagittal slices, in no order, out and back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from brainfm.cli import main
from brainfm.errors import ScanError
from brainfm.imaging import nifti
from brainfm.imaging.dicom import converted, write_segmentation
from tests import phantoms

pytest.importorskip("pydicom")
pytest.importorskip("highdicom")
pytest.importorskip("dcm2niix")

OLD = Path(__file__).parents[1] / "fixtures" / "format_9328027"
SHAPE, SPACING = (30, 26, 12), (3.0, 4.0, 5.0)  # columns, rows, slices


def directions(kind: str) -> np.ndarray:
    """[3, 3] in LPS: along the columns, along the rows, from slice to slice."""
    if kind == "sagittal":
        return np.array([[0, 0, 1.0], [1.0, 0, 0], [0, -1.0, 0]])
    turn = phantoms.rotation(0.3, 0.2) if kind == "oblique" else np.eye(3)
    return turn @ np.eye(3)


def series(folder: Path, kind: str = "axial", **changes: Any) -> np.ndarray:
    """Writes a series; returns its affine, (column, row, slice) -> RAS+ mm."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    axes = directions(kind) * np.asarray(SPACING)
    origin = -axes @ (np.asarray(SHAPE) - 1) / 2 + [3.0, -7.0, 11.0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, origin
    affine = np.diag([-1, -1, 1, 1]) @ affine
    voxels = phantoms.head(SHAPE, affine, np.random.default_rng(0), noise=1.0)
    voxels = np.round((voxels - voxels.min()) / np.ptp(voxels) * 1000).astype(np.uint16)
    names = [generate_uid() for _ in range(3)]
    folder.mkdir(parents=True)
    for number in np.random.default_rng(1).permutation(SHAPE[2]):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = names
        one.Modality, one.Manufacturer, one.PatientName, one.PatientID = "MR", "x", "A^B", "1"
        one.StudyID, one.SeriesNumber, one.InstanceNumber, one.AccessionNumber = "1", 4, int(number) + 1, ""
        one.StudyDate = one.SeriesDate = one.AcquisitionDate = one.ContentDate = "20240101"
        one.StudyTime = one.SeriesTime = one.AcquisitionTime = one.ContentTime = "120000"
        one.PatientBirthDate, one.PatientSex, one.ReferringPhysicianName = "", "", ""
        one.SeriesDescription, one.ImageType, one.ScanningSequence = "t1", ["ORIGINAL", "PRIMARY", "M"], "GR"
        one.SequenceVariant, one.MRAcquisitionType, one.EchoTime, one.RepetitionTime = "NONE", "3D", 3.0, 8.0
        one.PixelSpacing, one.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        one.ImageOrientationPatient = [float(v) for v in directions(kind)[:, :2].T.ravel()]
        one.ImagePositionPatient = [float(v) for v in origin + axes[:, 2] * number]
        one.Columns, one.Rows, one.SamplesPerPixel, one.PhotometricInterpretation = *SHAPE[:2], 1, "MONOCHROME2"
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation = 15, 0
        one.PixelData = np.ascontiguousarray(voxels[:, :, number].T).tobytes()
        for key, value in changes.items():
            setattr(one, key, value)
        one.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)
    return affine


def at(affine: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    return (affine @ [*index, 1])[:3]


@pytest.mark.parametrize("kind", ["axial", "sagittal", "oblique"])
def test_every_voxel_keeps_its_place(tmp_path: Path, kind: str) -> None:
    affine = series(tmp_path / "s", kind)
    volume, _ = nifti.read(converted(tmp_path / "s", tmp_path / "v.nii.gz"))
    import pydicom

    for path in sorted((tmp_path / "s").iterdir())[::5]:
        one = pydicom.dcmread(path)
        number = one.InstanceNumber - 1
        for row, column in ((0, 0), (25, 29), (13, 4)):
            x, y, z = np.round(np.linalg.inv(volume.affine_mm) @ [*at(affine, (column, row, number)), 1])[:3].astype(
                int
            )
            assert volume.voxels[x, y, z] == one.pixel_array[row, column]


@pytest.mark.parametrize("kind", ["axial", "sagittal", "oblique"])
def test_a_segmentation_lies_on_the_slices_where_the_labels_lie(tmp_path: Path, kind: str) -> None:
    import highdicom
    import pydicom

    series(tmp_path / "s", kind)
    file = converted(tmp_path / "s", tmp_path / "v.nii.gz")
    grid, scan = nifti.read_header(file).grid, np.asarray(nib.load(file).dataobj)
    labels = np.zeros(grid.shape_vox, np.uint8)
    labels[scan > np.percentile(scan, 95)] = 1
    labels[scan < np.percentile(scan, 5)] = 2
    write_segmentation(tmp_path / "seg.dcm", labels, grid, tmp_path / "s", {1: "bright", 2: "dark"}, "mark")
    found = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert [found.get_segment_description(n).segment_label for n in (1, 2)] == ["bright", "dark"]
    bright = np.percentile(scan, 95)
    for path in sorted((tmp_path / "s").iterdir()):
        one = pydicom.dcmread(path)
        masks = found.get_pixels_by_source_instance([one.SOPInstanceUID], assert_missing_frames_are_empty=True)
        assert np.array_equal(masks[0, ..., 0] == 1, one.pixel_array > bright)


def test_predict_reads_a_series_and_writes_a_segmentation(tmp_path: Path) -> None:
    import pydicom

    series(tmp_path / "s", "sagittal")
    words = ["predict", f"bundle={OLD / 'lesion_bundle'}", f"input.t1={tmp_path / 's'}", "device=cpu"]
    assert main([*words, f"out={tmp_path / 'mask.nii.gz'}"]) == 0
    assert main([*words, f"out={tmp_path / 'seg.dcm'}"]) == 0
    held = pydicom.dcmread(tmp_path / "seg.dcm")
    assert held.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4" and held.PatientID == "1"
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    assert mask.shape[0] * mask.shape[1] * mask.shape[2] == np.prod(SHAPE)
    assert held.SegmentSequence[0].SegmentLabel == "lesion"


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanError, match="no DICOM file with a place"):
        converted(tmp_path / "empty", tmp_path / "v.nii.gz")
    series(tmp_path / "s")
    series(tmp_path / "t", "sagittal")
    for path in (tmp_path / "t").iterdir():
        path.rename(tmp_path / "s" / f"t{path.name}")
    with pytest.raises(ScanError, match="holds 2 series"):
        converted(tmp_path / "s", tmp_path / "v.nii.gz")
    words = [f"bundle={OLD / 'age_bundle'}", f"input.t1={tmp_path / 's'}", f"out={tmp_path / 'x.dcm'}"]
    assert main(["predict", *words]) == 2
    assert "answers for a whole head" in capsys.readouterr().err
