"""The people, scans and labels of scripts/evidence/foundation.py: who is trained on, who is tested, and their stores.

People are named as in foundation/split.csv. Trials of rates and training take people of its side ``train``, apart from
one another; tests take people of its side ``held``, whom no pre-training and no choice has seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from render_contrasts import MUSE

from brainfm import seeds
from brainfm.comparison.people import People, dealt
from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.schemes import to_groups
from brainfm.data.store import Store
from brainfm.errors import BrainfmError, ManifestError, ScanError
from brainfm.imaging import anatomy, nifti
from brainfm.specs import PreprocessSpec
from brainfm.synthesis import contrast
from brainfm.tasks.segmentation.cases import LabelledCase, class_indices
from brainfm.volume import Volume

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from foundation_data import LISTS, read_split

SALT = "evidence 1"
MASKS = ("*_lesion_mask.nii.gz", "*_seg-tumour*.nii.gz", "*_infarct_mask.nii.gz")
CONTRASTS = {"t1": ("T1w",), "t2": ("T2w", "inplaneT2"), "flair": ("FLAIR",), "t1c": ("T1c",)}  # as the sets write them
RENDERED = ("t2", "flair")
REAL = ("openms_cross/patient19", "upenn_gbm/UPENN-GBM-00006", "tcga_lgg/TCGA-DU-7294", "ds000011/sub-04")
TISSUES = ("csf", "grey", "white")
_MARGIN_MM = 8.0  # around the brain, where tissues are tested


@dataclass(frozen=True)
class Setting:
    """How the runs of a family are trained and tested; chosen by what a CPU can do, never by a score.

    Attributes:
        target, values, names: label column without its ending, its values with 0 first, and their names without it.
        contrast: of the scans.
        spacing_mm, align, patch_vox, overlap, batch: of the store, the windows and a step.
        datasets: where the people come from.
        trial: people of the side ``train`` that rates are tried on, and how many of them a trial is trained on.
        rates_of: the family whose trials choose the rates.
        tested: people of the side ``held`` that are tested at most.
        pool: people at most that shots are drawn from.
        boxed: whether tests look at the box around the labelled part alone.
    """

    target: str
    values: tuple[int, ...]
    names: tuple[str, ...]
    contrast: str
    spacing_mm: float
    datasets: tuple[str, ...]
    trial: tuple[int, int]
    rates_of: str
    tested: int
    overlap: float = 0.25
    align: str = "header"
    boxed: bool = False
    patch_vox: tuple[int, int, int] = (32, 32, 32)
    batch: int = 2
    pool: int = 30


SETTINGS = {
    "hippocampus": Setting("hippocampus", (0, 1, 2), ("anterior", "posterior"), "t1", 1.0, ("msd_hippocampus",),
                           (12, 5), "hippocampus", 20, overlap=0.5),
    "lesions": Setting("lesion", (0, 1), ("lesion",), "flair", 1.5,
                       ("openms_cross", "upenn_gbm", "tcga_lgg", "isles22"), (0, 0), "hippocampus", 4, align="rigid"),
    "tissues": Setting("tissues", (0, 1, 2, 3), TISSUES, "t1", 2.0, ("ixi2mm",), (9, 5), "tissues", 6, boxed=True),
}  # fmt: skip


def people_of(sides: Mapping[tuple[str, str], str], setting: Setting) -> People:
    """Who does what, by hash: nobody twice. ``sides``: (dataset, subject) -> ``train`` or ``held``."""
    keys = {f"{d}/{s}": side for (d, s), side in sides.items() if d in setting.datasets}
    return dealt(keys, SALT, trial=setting.trial[0], pool=setting.pool, held=setting.tested)


def sides() -> dict[tuple[str, str], str]:
    return read_split(LISTS / "split.csv")


# ---- stores ----------------------------------------------------------------------------------------------------------


def store_of(name: str, setting: Setting, data: Path, out: Path, people: People) -> Store:
    """The prepared scans of a family; what is there already stays."""
    everyone = [*people.trial, *people.pool, *people.held]
    scans = {"hippocampus": _hippocampus, "lesions": _lesions, "tissues": tissue_scans}[name](
        data, out, everyone, people
    )
    return prepared(out / name, scans, setting.spacing_mm, setting.align)


def pairs_store(data: Path, out: Path) -> Store:
    """Real scans of several contrasts of held people, moved onto one another where that is trusted, and the atlas's
    tissues of the T1 where these are trusted."""
    scans = []
    for key in REAL:
        dataset, subject = key.split("/")
        t1 = _file(data, key, "*_T1w.nii.gz")
        assert t1 is not None
        columns = {"atlas_labels": str(found)} if (found := _atlas(t1, out / "atlas" / f"{subject}.nii.gz")) else {}
        for word, endings in CONTRASTS.items():
            for file in (_file(data, key, f"*_{ending}.nii.gz", True) for ending in endings):
                if file is not None:
                    scans.append(Scan(dataset, subject, "", word, str(file), columns))
    return prepared(out / "pairs", scans, SETTINGS["tissues"].spacing_mm, "rigid")


def prepared(folder: Path, scans: Sequence[Scan], spacing_mm: float, align: str) -> Store:
    """The store of some scans; what is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder / "manifest.csv", scans)
    spec = PreprocessSpec(spacing_mm=(spacing_mm,) * 3, align=align, labels="nearest")
    report = prepare(read_manifest(folder / "manifest.csv"), folder / "store", spec, workers=1)
    for failure in report.failed:
        print(f"left out: {failure.path}: {failure.reason}")
    return Store.open(folder / "store")


def _file(data: Path, key: str, pattern: str, optional: bool = False) -> Path | None:
    """The one file of a person with such a name, as an absolute path."""
    dataset, subject = key.split("/")
    found = sorted((data / dataset).glob(f"{subject}*/**/{pattern}"))
    if len(found) == 1:
        return found[0].absolute()
    if not found and optional:
        return None
    raise ManifestError(f"{data / dataset}: found {len(found)} files {pattern} of {subject}, expected one")


def _hippocampus(data: Path, out: Path, everyone: Iterable[str], people: People) -> list[Scan]:
    scans = []
    for key in everyone:
        dataset, subject = key.split("/")
        image, label = (str((data / dataset / of / f"{subject}.nii.gz").absolute()) for of in ("imagesTr", "labelsTr"))
        scans.append(Scan(dataset, subject, "", "t1", image, {"hippocampus_labels": label}))
    return scans


def _lesions(data: Path, out: Path, everyone: Iterable[str], people: People) -> list[Scan]:
    scans = []
    for key in everyone:
        dataset, subject = key.split("/")
        mask = next(file for pattern in MASKS if (file := _file(data, key, pattern, True)) is not None)
        columns = {"lesion_mask": str(mask)}
        scans.append(Scan(dataset, subject, "", "flair", str(_file(data, key, "*_FLAIR.nii.gz")), columns))
        if dataset == "isles22":  # whose infarct is drawn on the grid of the diffusion scan
            scans.append(Scan(dataset, subject, "", "dwi", str(_file(data, key, "*_DWI.nii.gz")), columns))
    return scans


def tissue_scans(data: Path, out: Path, everyone: Iterable[str], people: People) -> list[Scan]:
    """T1s with their parcellation and its tissues; of those who are tested also a T2 and a FLAIR that
    synthesis/contrast renders, which is not what training renders with."""
    scans = []
    for key in everyone:
        dataset, subject = key.split("/")
        t1, parcels = (_file(data, key, f"*_{ending}.nii.gz") for ending in ("T1w", "DLMUSE_dseg"))
        assert t1 is not None and parcels is not None
        labels, _ = nifti.read(parcels, labels=True)
        tissues = out / "made" / f"{subject}_tissues.nii.gz"
        if not tissues.exists():
            found = to_groups(labels.voxels, "dlmuse", str(parcels), level="tissues", unknown="ignore")
            tissues.parent.mkdir(parents=True, exist_ok=True)
            nifti.write(tissues, Volume(np.maximum(found, 0).astype(np.uint8), labels.affine_mm))
        columns = {"dlmuse_labels": str(parcels), "tissues_labels": str(tissues.absolute())}
        scans.append(Scan(dataset, subject, "", "t1", str(t1), columns))
        if key in people.held:
            for word in RENDERED:
                file = out / "made" / f"{subject}_{word}.nii.gz"
                if file.exists() or _rendered(t1, labels, word, file):
                    scans.append(Scan(dataset, subject, "", word, str(file.absolute()), columns))
    return scans


def _rendered(t1: Path, labels: Volume, word: str, file: Path) -> bool:
    number = int(2**31 * seeds.unit_hash(file.name, SALT))
    try:
        look = contrast.draw(seeds.stream(0, f"contrast.{word}", number), word, MUSE)
        volume = contrast.render(nifti.read(t1)[0], labels, MUSE, look)
    except BrainfmError as error:
        print(f"left out: {file.name}: {error}")
        return False
    nifti.write(file, Volume(volume.voxels.round().clip(0, 32767).astype(np.int16), volume.affine_mm))
    return True


def _atlas(t1: Path, file: Path) -> Path | None:
    """CSF, grey and white matter of a T1 as `brainfm anatomy` tells them, or None where it does not trust them, and why
    in a file beside."""
    refused = file.with_name(f"{file.name}.txt")
    if not file.exists() and not refused.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = anatomy.segment(nifti.read(t1)[0])
            reason = found.reason
        except ScanError as error:
            reason = str(error)
        if reason:
            refused.write_text(f"{reason}\n")
        else:
            nifti.write_labels(file, found.labels, t1)
    if refused.exists():
        print(f"left out: tissues of {t1.name}: {refused.read_text().strip()}")
        return None
    return file.absolute()


# ---- what is tested --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Test:
    """A scan to answer, [X, Y, Z] float16, and the true class indices of its voxels where they are known."""

    part: str
    subject: str
    image: np.ndarray
    truth: np.ndarray | None


def tests_of(
    store: Store, cases: Iterable[LabelledCase], keys: Iterable[str], part: str, setting: Setting
) -> list[Test]:
    """The cases of these people, one contrast each, in the order of their keys."""
    wanted, tests = set(keys), []
    for case in sorted(cases, key=lambda case: case.session.subject_key):
        if case.session.subject_key in wanted:
            image = store.volume(case.session, case.scans[0][0])
            truth = class_indices(store.volume(case.session, case.label), setting.values).astype(np.uint8)
            margin = round(_MARGIN_MM / setting.spacing_mm)
            box = box_around(truth != 0, margin) if setting.boxed else (slice(None),) * 3
            tests.append(Test(part, case.session.subject_key, image[box].copy(), truth[box].copy()))
    return tests


def pair_tests(store: Store) -> list[Test]:
    """Of each person the T1 and the other contrasts, on one grid, which begins 160 mm below the top of the head."""
    tests, edge = [], round(160 / store.spec.spacing_mm[2])
    for session in store.sessions:
        top = slice(max(0, session.shape[2] - edge), None)
        there = [label.name for label in session.labels]
        truth = store.volume(session, "atlas_labels")[..., top].astype(np.uint8) if "atlas_labels" in there else None
        for scan in session.scans:
            image = store.volume(session, scan.name)[..., top].copy()
            tests.append(Test(scan.contrast, session.subject_key, image, truth))
    return tests


def box_around(mask: np.ndarray, margin_vox: int) -> tuple[slice, ...]:
    """The smallest box of an array that holds a mask and its margin, as far as the array reaches."""
    box = []
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(0, int(used[0]) - margin_vox), int(used[-1]) + 1 + margin_vox))
    return tuple(box)
