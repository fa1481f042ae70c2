"""Names of what programs leave beside a scan, and names of scans that only sound like it."""

from __future__ import annotations

import pytest

from brainfm.data import derived
from brainfm.data.derived import is_label_word, why_no_scan

BESIDE = {"sub-01_t1w", "sub-01_flair"}

NO_SCANS = {
    derived.LABEL: """
        sub-01_T1w_synthseg sub-01_FLAIR_samseg sub-01_T1w_segm-graymatter_probability sub-01_T1w_DLMUSE
        sub-01_T1w_dktatlas sub-01_FLAIR_wmh sub-01_T1w_truth sub-01_T1w_annot sub-01_T1w_LesionSeg sub-01_T1w_seg_0
        sub-01_T1w_dseg sub-01_desc-brain_mask sub-01_label-lesion_roi sub-01_T1w_aparc+aseg sub-01_FLAIR_seg-lst
        ples_lpa_mrmFLAIR sub-01_lesion_mask lesion.nii aseg.mgz ribbon.mgz T1_BrainExtractionMask consensus
        sub-01_T1w_synthseg_posteriors all_fast_firstseg FLAIR_pred case_prediction TCGA-02-0003_1997.06.08_GlistrBoost
        T1_GlistrBoost_ManuallyCorrected tumor sub-01_FLAIR_oedema infarct""",
    derived.MAP: """
        c1sub-01_T1w wc1sub-01_T1w mwp1sub-01_T1w smwc2sub-01_T1w p0sub-01_T1w rc3sub-01_T1w u_rc1sub-01_T1w
        sub-01_T1w_pve_1 sub-01_T1w_posteriors sub-01_T1w_thickness sub-01_T1w_prob_1 sub-01_T1w_mixeltype
        sub-01_T1w_bias sub-01_T1w_GM T1_BrainSegmentationPosteriors01 CorticalThickness s6mwp1sub-01_T1w
        s8wc2sub-01_T1w""",
    derived.TRANSFORM: """
        y_sub-01_T1w iy_sub-01_T1w sub-01_T1w_deformation sub-01_T1w_1InverseWarp T1_to_MNI_nonlin_field
        sub-01_from-T1w_to-MNI_mode-image_xfm jacobian
        wj_sub-01_T1w jac_sub-01_T1w""",
    derived.PART: """
        sub-01_part-phase_T1w sub-01_part-real_T1w sub-01_echo-1_part-imag_MEGRE sub-01_swi_phase sub-01_gre_ph_e1
        scan_imaginary sub-01_part-phase_T2starw""",
    derived.COPY: """
        wmsub-01_T1w rsub-01_T1w msub-01_FLAIR sub-01_T1w_something sub-01_T1w_SynthSR sub-01_T1wWarped
        sub-01_T1w_InverseWarped n4_sub-01_T1w meansub-01_FLAIR s8wmsub-01_T1w""",
    derived.TEMPLATE: "MNI152_T1_1mm_brain avg152T1 template mni_icbm152_t1_tal_nlin_sym_09a",
}
SCANS = """
    sub-mask01_T1w sub-GT_T1w sub-seg02_ses-label_T1w sub-01_acq-seg_T1w sub-01_run-2_T1w sub-01_ce-gd_T1w seg07_T1
    ms_lesion_seg_003_FLAIR label02_T1 gt001_T1 wmh_001_T1 sub-01_T1w_brain sub-01_T1w_defaced sub-01_T1w_1mm
    sub-01_part-mag_T2starw rCBV rT1 c1_T1 p1_T1 m01_T1 as001_T1 T1_prior phase2_T1w T2_hippocampus LesionStudy_01_T1w
    MNI152_T1 MNI_0152_T1 template01_T1 T1_tumor_FLAIR s01_T1 Predict-HD_07_T1
    sub-01_UNIT1 T1 t1_2 dwi_b1000 sub-01_inv-2_MP2RAGE"""


@pytest.mark.parametrize(("reason", "name"), [(why, name) for why, names in NO_SCANS.items() for name in names.split()])
def test_what_programs_leave_is_no_scan(reason: str, name: str) -> None:
    ending = "" if "." in name else ".nii.gz"
    assert why_no_scan(("sub-01", "anat", name + ending), BESIDE) == reason


@pytest.mark.parametrize("name", SCANS.split())
def test_names_that_only_sound_like_it_are_scans(name: str) -> None:
    assert why_no_scan(("somebody", f"{name}.nii.gz"), {*BESIDE, "cbv"}) == ""


def test_the_folder_tells_whose_a_file_is_and_what_it_holds() -> None:
    assert why_no_scan(("mask01", "mask01_T1.nii.gz")) == "" and why_no_scan(("GT", "GT_FLAIR.nii")) == ""
    assert why_no_scan(("mask01", "mask01.nii.gz")) == derived.LABEL, "with nothing else to go by"
    assert why_no_scan(("p1", "segs", "T1.nii.gz")) == why_no_scan(("derivatives", "x", "T1w.nii")) == derived.LABEL
    beside = {"t1", "orig", "nu", "norm"}
    assert why_no_scan(("bert", "mri", "nu.mgz"), beside) == derived.FREESURFER
    assert why_no_scan(("bert", "mri", "T1.mgz"), beside) == ""
    assert why_no_scan(("bert", "mri", "nu.mgz"), {"nu"}) == "", "where nothing better is there"
    for inside in ("orig/001.mgz", "transforms/talairach.mgz"):
        assert why_no_scan(("bert", "mri", *inside.split("/"))) == derived.FREESURFER
    assert why_no_scan(("p1", "mri", "orig", "T1.nii.gz")) == "", "orig is also what people call their originals"


def test_words_of_labels_and_ids_that_contain_one() -> None:
    assert is_label_word("seg") and is_label_word("Mask1") and not is_label_word("seg07") and not is_label_word("t1")
