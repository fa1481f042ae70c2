"""What goes in at a place comes out at that place: shape, affine and side, for every kind of grid.

The network is a threshold, so that the true answer is known on every grid; all that lies between file and mask is real.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm.errors import ScanError
from brainfm.imaging import nifti
from brainfm.imaging.nifti import write_mask
from brainfm.inference.predict import predict
from brainfm.scoring.masks import dice
from brainfm.specs import Decisions, PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.bundle import Bundle
from brainfm.tasks.engine import Engine
from brainfm.tasks.segmentation.answer import answer
from tests import phantoms

TASK = TaskSpec("segmentation", "marker", ("t1", "flair"), (0, 1), (32, 32, 32))
PREPROCESS = PreprocessSpec(spacing_mm=(2.0, 2.0, 2.0))
GRIDS = sorted(set(phantoms.READABLE) - {"constant"})
GEOMETRY = (
    "sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units",
)  # fmt: skip


class Threshold(torch.nn.Module):
    """Class 1 where the mean of the contrasts that are present is bright."""

    def forward(self, image, present):
        there = present[:, :, None, None, None]
        bright = (image * there).sum(1, keepdim=True) / there.sum(1, keepdim=True) - 4.0
        return torch.cat([-4 * bright, 4 * bright], dim=1)


def engine(*networks):
    return Engine(networks or (Threshold(),), TASK, PREPROCESS, torch.device("cpu"), None, "stub")


def write(path: Path, name: str) -> Path:
    phantoms.READABLE[name](path, np.random.default_rng(0))
    return path


def marker_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(the marker, the R coordinate in mm of every voxel) on a file's grid."""
    grid = nifti.read_header(path).grid
    affine = np.array(grid.affine_mm)
    return phantoms.marker(grid.shape_vox, affine), phantoms.world_mm(grid.shape_vox, affine)[..., 0]


def check(mask_path: Path, source_path: Path) -> np.ndarray:
    mask, source = nib.load(mask_path), nib.load(source_path)
    labels = np.asarray(mask.dataobj)
    assert mask.get_data_dtype() == np.uint8 and mask.shape == source.shape[:3]
    assert np.array_equal(mask.affine, source.affine)
    for name in GEOMETRY:
        assert np.array_equal(mask.header[name], source.header[name]), name
    assert np.array_equal(mask.header["pixdim"][:4], source.header["pixdim"][:4])
    marker, right_mm = marker_of(source_path)
    assert set(np.unique(labels)) == {0, 1}
    assert dice(labels, marker) > 0.8
    assert right_mm[labels > 0].max() < -5  # the marker reaches from -28 to -12 mm: wholly on the left
    return labels


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_the_mask_lies_where_the_marker_lies(tmp_path, name, ending):
    source = write(tmp_path / f"t1{ending}", name)
    labels = answer(engine(), {"t1": source}, "t1")
    write_mask(tmp_path / f"mask{ending}", labels, source)
    assert np.array_equal(check(tmp_path / f"mask{ending}", source), labels)


@pytest.mark.parametrize("name", sorted({"constant", *phantoms.REFUSED}))
def test_unusable_scans_are_refused_by_name(tmp_path, name):
    source = tmp_path / "scan.nii.gz"
    (phantoms.REFUSED | phantoms.READABLE)[name](source, np.random.default_rng(0))
    with pytest.raises(ScanError, match=r"scan\.nii\.gz"):
        answer(engine(), {"t1": source}, "t1")


@pytest.mark.parametrize("on", ["t1", "flair"])
def test_contrasts_on_other_grids_meet(tmp_path, on):
    files = {"t1": write(tmp_path / "t1.nii.gz", "oblique"), "flair": write(tmp_path / "flair.nii.gz", "thick_slices")}
    write_mask(tmp_path / "mask.nii.gz", answer(engine(), files, on), files[on])
    check(tmp_path / "mask.nii.gz", files[on])


def test_members_are_averaged_as_probabilities(tmp_path):
    """Two of three members say marker: their mean must, too, however loud the third one is."""

    class Silent(torch.nn.Module):
        def forward(self, image, present):
            loud = torch.full_like(image[:, :1], 100.0)
            return torch.cat([loud, -loud], dim=1)

    files = {"t1": write(tmp_path / "t1.nii.gz", "ras")}
    # As logits, the silent member's 100 would outvote the others.
    found = answer(engine(Threshold(), Silent(), Threshold()), files, "t1")
    assert dice(found, marker_of(files["t1"])[0]) > 0.8
    assert answer(engine(Threshold(), Silent(), Silent()), files, "t1").max() == 0


def test_predict_writes_what_it_returns(tmp_path):
    bundle = Bundle(tmp_path, TASK, PREPROCESS, Provenance("0", "", ""), (Threshold(),), "stub", Decisions())
    inputs = {"t1": write(tmp_path / "t1.nii.gz", "psr"), "flair": str(write(tmp_path / "flair.nii.gz", "anisotropic"))}
    labels = predict(bundle, inputs, tmp_path / "new" / "mask.nii", on="flair", device="cpu")
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, check(tmp_path / "new" / "mask.nii", tmp_path / "flair.nii.gz"))
    # without `on` the first input is answered for; without `out` nothing is written
    assert predict(bundle, inputs, device="cpu").shape == nib.load(inputs["t1"]).shape
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flair.nii.gz", "new", "t1.nii.gz"]


@pytest.mark.parametrize("on", ["t1", "flair"])
def test_a_patient_who_moved_between_two_scans(tmp_path, on):
    """A bundle that was trained on aligned sessions aligns, and answers on the file that is asked for."""
    pytest.importorskip("SimpleITK")
    motion, files, markers = np.eye(4), {}, {}
    for seed, (name, shape, spacing) in enumerate(
        (("t1", (44, 52, 44), (2, 2, 2)), ("flair", (64, 72, 34), (1.5, 1.5, 3)))
    ):
        affine = phantoms.centred(phantoms.axes("LPS"), spacing, shape)
        place = np.linalg.inv(motion) @ affine
        x, y, z = np.moveaxis(phantoms.world_mm(shape, place), -1, 0)
        voxels = phantoms.head(shape, place, np.random.default_rng(seed))
        folds = 30 * np.sin(x / 5) * np.cos(y / 7 + 1) + 25 * np.sin(z / 6 + y / 11)
        files[name] = tmp_path / f"{name}.nii.gz"
        phantoms.write(files[name], np.where((voxels > 50) & (voxels < 200), voxels + folds, voxels), affine)
        markers[name] = phantoms.marker(shape, place)
        motion[:3, :3], motion[:3, 3] = phantoms.rotation(6, -8), (5, -7, 4)
    aligned = replace(engine(), preprocess=PreprocessSpec(spacing_mm=(2.0, 2.0, 2.0), align="rigid"))
    assert dice(answer(engine(), files, on), markers[on]) < 0.5, "the headers alone do not do"
    assert dice(answer(aligned, files, on), markers[on]) > 0.8
