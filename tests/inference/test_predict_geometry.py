"""What goes in at a place comes out at that place: shape, affine and side, for every kind of grid.

The network is a threshold, so that the true answer is known on every grid; all that lies between file and mask is real.
"""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm.inference.predict import Engine, answer, predict, write_mask
from brainfm.specs import PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.bundle import Bundle
from brainfm.tasks.metrics import dice
from tests.inference.heads import GRIDS, affine_of, places_mm, write

TASK = TaskSpec("segmentation", "marker", ("t1", "flair"), (0, 1), (32, 32, 32))
PREPROCESS = PreprocessSpec(spacing_mm=(2.0, 2.0, 2.0))


class Threshold(torch.nn.Module):
    """Class 1 where the mean of the contrasts that are present is bright."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, image, present):
        there = present[:, :, None, None, None]
        bright = (image * there).sum(1, keepdim=True) / there.sum(1, keepdim=True) - 5.0
        return torch.cat([-4 * bright, 4 * bright], dim=1)


def engine(*networks):
    return Engine(networks or (Threshold(),), TASK, PREPROCESS, torch.device("cpu"), None, "stub")


def check(mask_path, source_path, marker, name):
    mask, source = nib.load(mask_path), nib.load(source_path)
    labels = np.asarray(mask.dataobj)
    assert mask.get_data_dtype() == np.uint8 and mask.shape == source.shape
    assert np.array_equal(mask.affine, source.affine)
    for form in ("sform_code", "qform_code"):
        assert mask.header[form] == source.header[form]
    assert np.array_equal(mask.header.get_qform(), source.header.get_qform())
    assert set(np.unique(labels)) == {0, 1}
    assert dice(labels, marker) > 0.8
    assert places_mm(affine_of(name), mask.shape)[labels > 0][:, 0].max() < -10  # wholly on the left


@pytest.mark.parametrize("name", GRIDS)
def test_the_mask_lies_where_the_marker_lies(tmp_path, name):
    marker = write(tmp_path / "t1.nii.gz", name)
    labels = answer(engine(), {"t1": tmp_path / "t1.nii.gz"}, "t1")
    write_mask(tmp_path / "mask.nii.gz", labels, tmp_path / "t1.nii.gz")
    check(tmp_path / "mask.nii.gz", tmp_path / "t1.nii.gz", marker, name)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), labels)


@pytest.mark.parametrize(("sform", "qform"), [(0, 1), (4, 0), (1, 4)])
def test_codes_survive(tmp_path, sform, qform):
    marker = write(tmp_path / "t1.nii", "lps", sform=sform, qform=qform)
    labels = answer(engine(), {"t1": tmp_path / "t1.nii"}, "t1")
    write_mask(tmp_path / "mask.nii", labels, tmp_path / "t1.nii")
    check(tmp_path / "mask.nii", tmp_path / "t1.nii", marker, "lps")


@pytest.mark.parametrize("on", ["t1", "flair"])
def test_contrasts_on_other_grids_meet(tmp_path, on):
    names = {"t1": "oblique", "flair": "thick_slice"}
    files = {contrast: tmp_path / f"{contrast}.nii.gz" for contrast in names}
    markers = {contrast: write(files[contrast], name) for contrast, name in names.items()}
    labels = answer(engine(), files, on)
    write_mask(tmp_path / "mask.nii.gz", labels, files[on])
    check(tmp_path / "mask.nii.gz", files[on], markers[on], names[on])


def test_members_are_averaged_as_probabilities(tmp_path):
    """One member is sure of nothing; two of three say marker: their mean must say marker, too."""

    class Silent(Threshold):
        def forward(self, image, present):
            logits = super().forward(image, present)
            return torch.cat([torch.full_like(logits[:, :1], 100.0), torch.zeros_like(logits[:, :1])], dim=1)

    marker = write(tmp_path / "t1.nii.gz", "ras")
    files = {"t1": tmp_path / "t1.nii.gz"}
    # As logits, the silent member's 100 would outvote the others.
    assert dice(answer(engine(Threshold(), Silent(), Threshold()), files, "t1"), marker) > 0.8
    assert answer(engine(Threshold(), Silent(), Silent()), files, "t1").max() == 0


def test_predict_writes_what_it_returns(tmp_path):
    bundle = Bundle(tmp_path, TASK, PREPROCESS, Provenance("0", "", ""), (Threshold(),), "stub")
    marker = write(tmp_path / "flair.nii.gz", "anisotropic")
    write(tmp_path / "t1.nii.gz", "oblique_lps")
    inputs = {"t1": tmp_path / "t1.nii.gz", "flair": str(tmp_path / "flair.nii.gz")}
    labels = predict(bundle, inputs, tmp_path / "new" / "mask.nii", on="flair", device="cpu")
    check(tmp_path / "new" / "mask.nii", tmp_path / "flair.nii.gz", marker, "anisotropic")
    written = np.asarray(nib.load(tmp_path / "new" / "mask.nii").dataobj)
    assert labels.dtype == np.uint8 and np.array_equal(labels, written)
    assert predict(bundle, inputs, device="cpu").shape == GRIDS["oblique_lps"][1]  # the first input's, nothing written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flair.nii.gz", "new", "t1.nii.gz"]
