import csv
import errno
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.data import prepare as prepare_module
from brainfm.data import store as store_module
from brainfm.data.manifest import Manifest, Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Share, Store
from brainfm.errors import ConfigError, ManifestError, StoreError
from brainfm.imaging.preprocess import Recipe
from brainfm.specs import PreprocessSpec
from tests import phantoms

SPEC = PreprocessSpec()
RUN = """
import sys
from brainfm.data.manifest import read_manifest
from brainfm.data.prepare import prepare
from brainfm.specs import PreprocessSpec
if __name__ == "__main__":
    prepare(read_manifest(sys.argv[1]), sys.argv[2], PreprocessSpec(), workers=2)
"""


def head(path: Path, seed: int, spacing_mm=(1.0, 1.0, 1.5), shape=(34, 32, 22)) -> np.ndarray:
    """Writes a ball with noise in it, and returns its mask."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    ball = (grid**2).sum(0) < 0.7
    voxels = np.where(ball, 100 + 50 * grid[0] + 10 * rng.standard_normal(shape), 0).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([*spacing_mm, 1])), path)
    return ball


def cohort(folder: Path, subjects: int = 3) -> Manifest:
    scans = []
    for i in range(subjects):
        here = folder / f"sub-{i:02}"
        for seed, contrast in enumerate(("t1", "flair")):
            ball = head(here / f"{contrast}.nii.gz", 10 * i + seed)
            columns = {"lesion_mask": str(here / "lesion.nii.gz"), "age": str(30 + i)}
            scans.append(Scan("ds", f"sub-{i:02}", "", contrast, str(here / f"{contrast}.nii.gz"), columns))
        lesion = (ball & (np.arange(34)[:, None, None] < 12)).astype(np.uint8)
        nib.save(nib.Nifti1Image(lesion, np.diag([1, 1, 1.5, 1])), here / "lesion.nii.gz")
    write_manifest(folder / "manifest.csv", scans)
    return read_manifest(folder / "manifest.csv")


def tree(path: Path) -> dict[str, str]:
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in path.rglob("*") if f.is_file()
    }


def test_prepare(tmp_path):
    manifest = cohort(tmp_path / "data")
    seen = []
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1, progress=lambda n, total: seen.append((n, total)))
    assert (report.done, report.skipped, report.failed) == (3, 0, ())
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    store = Store.open(tmp_path / "store")
    assert [s.subject for s in store.sessions] == ["sub-00", "sub-01", "sub-02"]
    for entry in store.sessions:
        store.verify(entry)
        assert [s.name for s in entry.scans] == ["flair", "t1"] and [s.name for s in entry.labels] == ["lesion_mask"]
        for name in ("t1", "flair", "lesion_mask"):
            assert store.volume(entry, name).shape == entry.shape
            recipe = store.recipe(entry, name)
            assert isinstance(recipe, Recipe) and recipe.spec == SPEC.fingerprint() and recipe.shape == entry.shape
        labelled = store.volume(entry, "lesion_mask")[tuple(store.label_points(entry, "lesion_mask").T.astype(int))]
        assert len(labelled) and (labelled == 1).all()
        points = store.foreground(entry)
        assert len(points) and (points >= 0).all() and (points < entry.shape).all()
        assert entry.columns["age"] == str(30 + int(entry.subject[-2:]))


def test_prepare__again_does_only_what_is_missing(tmp_path, monkeypatch):
    manifest = cohort(tmp_path / "data")
    prepare(manifest, tmp_path / "store", SPEC, workers=1)
    before = tree(tmp_path / "store")
    worked = []
    work = prepare_module._work
    monkeypatch.setattr(prepare_module, "_work", lambda store, s: worked.append(s[0].key[1]) or work(store, s))
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (report.done, report.skipped) == (0, 3) and worked == []
    assert tree(tmp_path / "store") == before

    head(tmp_path / "data" / "sub-01" / "t1.nii.gz", 77)  # a source changes
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (report.done, report.skipped) == (1, 2) and worked == ["sub-01"]
    after = tree(tmp_path / "store")
    changed = {name for name in after if after[name] != before[name]}
    assert all("sub-01" in name or name == "index.csv" for name in changed) and len(changed) > 2

    rows = [s for s in manifest.scans if (s.subject, s.contrast) != ("sub-02", "flair")]  # a row goes
    write_manifest(tmp_path / "data" / "manifest.csv", rows)
    report = prepare(read_manifest(tmp_path / "data" / "manifest.csv"), tmp_path / "store", SPEC, workers=1)
    assert (report.done, report.skipped) == (1, 2)
    assert [len(s.scans) for s in Store.open(tmp_path / "store").sessions] == [2, 2, 1]


def test_prepare__same_store_for_any_number_of_workers_and_after_kill(tmp_path):
    manifest = cohort(tmp_path / "data", subjects=8)
    prepare(manifest, tmp_path / "one", SPEC, workers=1)
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(manifest.path), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare_module.__file__).parents[2])}
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    sessions = tmp_path / "two" / "sessions"
    while not (sessions.is_dir() and len(list(sessions.iterdir())) >= 2):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(500):  # the workers end with their parent
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        raise AssertionError("a worker outlived its parent")
    there = len(list(sessions.iterdir()))
    assert 2 <= there < 8
    with pytest.raises(StoreError, match="prepare was interrupted; run prepare again"):
        Store.open(tmp_path / "two")
    report = prepare(manifest, tmp_path / "two", SPEC, workers=2)
    assert (report.done, report.skipped) == (8 - there, there)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert (tmp_path / "two").joinpath("index.csv").exists()


def test_prepare__failures_are_reported_and_skipped(tmp_path):
    manifest = cohort(tmp_path / "data")
    (tmp_path / "data" / "sub-00" / "t1.nii.gz").write_bytes(b"not an image")
    for name in ("t1", "flair"):
        (tmp_path / "data" / "sub-02" / f"{name}.nii.gz").write_bytes(b"")
    head(tmp_path / "data" / "sub-01" / "lesion.nii.gz", 1, shape=(10, 10, 10))
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert [(f.subject, f.contrast, Path(f.path).name) for f in report.failed] == [
        ("sub-00", "t1", "t1.nii.gz"),
        ("sub-01", "", "lesion.nii.gz"),
        ("sub-02", "flair", "flair.nii.gz"),
        ("sub-02", "t1", "t1.nii.gz"),
    ]
    assert all(f.reason and "\n" not in f.reason for f in report.failed)
    assert [(s.subject, len(s.scans), len(s.labels)) for s in Store.open(tmp_path / "store").sessions] == [
        ("sub-00", 1, 1),
        ("sub-01", 2, 0),
    ]
    again = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (again.done, again.skipped, again.failed) == (0, 3, report.failed)
    head(tmp_path / "data" / "sub-02" / "t1.nii.gz", 5)  # mended
    mended = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (mended.done, mended.skipped, len(mended.failed)) == (1, 2, 3)


def test_prepare__refusals_write_nothing(tmp_path):
    manifest = cohort(tmp_path / "data", subjects=1)
    with pytest.raises(ConfigError, match="workers=-1"):
        prepare(manifest, tmp_path / "store", SPEC, workers=-1)
    (tmp_path / "data" / "sub-00" / "t1.nii.gz").rename(tmp_path / "elsewhere.nii.gz")
    with pytest.raises(ManifestError, match="missing"):
        prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert not (tmp_path / "store").exists()
    (tmp_path / "elsewhere.nii.gz").rename(tmp_path / "data" / "sub-00" / "t1.nii.gz")
    prepare(manifest, tmp_path / "store", SPEC, workers=1)
    before = tree(tmp_path / "store")
    with pytest.raises(StoreError, match=r"made with preprocess\.margin_mm=2\.0, now preprocess\.margin_mm=3\.0"):
        prepare(manifest, tmp_path / "store", PreprocessSpec(margin_mm=3), workers=1)
    with Store.open(tmp_path / "store").locked(), pytest.raises(StoreError, match="another prepare"):
        prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert tree(tmp_path / "store") == before


def test_prepare__disk_full_keeps_what_was_done(tmp_path, monkeypatch):
    manifest = cohort(tmp_path / "data")
    write, count = store_module.write_synced, []

    def full(file, content):
        count.append(file)
        if sum(f.name == "session.json" for f in count) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, content)

    monkeypatch.setattr(store_module, "write_synced", full)
    with pytest.raises(StoreError, match="no space is left on the disk"):
        prepare(manifest, tmp_path / "store", SPEC, workers=1)
    monkeypatch.undo()
    assert len(list((tmp_path / "store" / "sessions").iterdir())) == 1
    assert not list((tmp_path / "store").glob("tmp-*"))
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (report.done, report.skipped) == (2, 1)


def test_prepare__killed_worker(tmp_path):
    """What the system does when memory runs out: one worker is gone, the run says so and can be taken up again."""
    manifest = cohort(tmp_path / "data", subjects=6)

    def kill_a_worker(done: int, total: int) -> None:
        if done == 1:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(StoreError, match=r"a worker was killed.*fewer than workers=2"):
        prepare(manifest, tmp_path / "store", SPEC, workers=2, progress=kill_a_worker)
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert report.skipped >= 1 and report.done + report.skipped == 6


def test_prepare__interrupted_by_the_user(tmp_path):
    manifest = cohort(tmp_path / "data", subjects=5)

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(manifest, tmp_path / "store", SPEC, workers=2, progress=stop)
    left = {p.name for p in (tmp_path / "store").iterdir()}
    assert left == {"spec.json", ".lock", "sessions"}  # no temporary folder, no index
    assert prepare(manifest, tmp_path / "store", SPEC, workers=1).skipped >= 1


def visits(folder: Path) -> Manifest:
    """Subject a with three visits, the second 7 mm and some degrees off, the third noise; subject b with one visit."""
    scans = []
    for subject, session in (("a", "1"), ("a", "2"), ("a", "3"), ("b", "1")):
        path = folder / f"{subject}{session}.nii.gz"
        if session == "3":
            voxels = 100 * np.random.default_rng(3).random((44, 52, 44)).astype(np.float32)
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([2, 2, 2, 1])), path)
        else:
            folded(path, seed=ord(subject) + int(session), moved=session == "2")
        scans.append(Scan("ds", subject, session, "t1", path.name, {}))
    write_manifest(folder / "manifest.csv", scans)
    return read_manifest(folder / "manifest.csv")


def folded(path: Path, seed: int, moved: bool) -> None:
    affine = phantoms.centred(np.eye(3), (2, 2, 2), (44, 52, 44))
    motion = np.eye(4)
    if moved:
        motion[:3, :3], motion[:3, 3] = phantoms.rotation(5, 4), (3, -5, 4)
    place = np.linalg.inv(motion) @ affine
    x, y, z = np.moveaxis(phantoms.world_mm((44, 52, 44), place), -1, 0)
    folds = 40 * np.sin(x / 5) * np.cos(y / 7 + 1) + 30 * np.sin(z / 6 + y / 11)
    voxels = phantoms.head((44, 52, 44), place, np.random.default_rng(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.where((voxels > 50) & (voxels < 250), voxels + folds, voxels), affine), path)


def frames(store: Path) -> dict[tuple[str, str], str]:
    return {(s.subject, s.session): s.frame for s in Store.open(store).sessions}


def test_prepare__visits_share_a_frame(tmp_path):
    pytest.importorskip("SimpleITK")
    spec, store = PreprocessSpec(spacing_mm=(2, 2, 2), align="rigid"), tmp_path / "store"
    manifest = visits(tmp_path / "data")
    seen = []
    report = prepare(manifest, store, spec, workers=1, progress=lambda n, total: seen.append((n, total)))
    assert (report.done, report.skipped) == (4, 0) and seen == [(0, 4), (3, 4), (4, 4)]
    assert frames(store) == {("a", "1"): "ds/a/1", ("a", "2"): "ds/a/1", ("a", "3"): "ds/a/3", ("b", "1"): "ds/b/1"}
    with open(store / "alignment.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(r["session"], r["scan"], r["to"], r["kept"]) for r in rows] == [
        ("2", "t1", "first visit", "1"),
        ("3", "t1", "first visit", "0"),
    ]
    assert float(rows[0]["score_after"]) > float(rows[0]["score_before"]) and 5 < float(rows[0]["moved_mm"]) < 12
    assert rows[1]["reason"] and rows[1]["trusted"] == "0"
    opened = Store.open(store)
    one, two = opened.sessions[:2]
    shift = np.array(two.offset_vox) - one.offset_vox
    points = opened.foreground(one).astype(int)
    there = points - shift
    inside = ((there >= 0) & (there < two.shape)).all(axis=1)
    ours, theirs = opened.volume(one, "t1")[tuple(points.T)], opened.volume(two, "t1")[tuple(there[inside].T)]
    assert inside.mean() > 0.95 and np.corrcoef(ours[inside], theirs)[0, 1] > 0.9

    again = prepare(manifest, store, spec, workers=1)
    assert (again.done, again.skipped) == (0, 4)
    before = tree(store)
    folded(tmp_path / "data" / "a1.nii.gz", seed=50, moved=False)  # another file, another size
    report = prepare(manifest, store, spec, workers=1)
    assert (report.done, report.skipped) == (3, 1), "the later visits depend on the first"
    assert {n for n, digest in tree(store).items() if digest == before.get(n) and "/ds-b" in n}

    (tmp_path / "data" / "a1.nii.gz").write_bytes(b"not an image")
    report = prepare(manifest, store, spec, workers=2)
    assert report.done == 3 and [f.session for f in report.failed] == ["1"]
    assert frames(store) == {("a", "2"): "ds/a/2", ("a", "3"): "ds/a/3", ("b", "1"): "ds/b/1"}


def test_prepare__shares(tmp_path):
    manifest = cohort(tmp_path / "data", subjects=5)
    prepare(manifest, tmp_path / "one", SPEC, workers=1)
    whole = tree(tmp_path / "one")
    shares = [Share(number, 2) for number in (1, 2)]
    held = [{s.subject for s in manifest.scans if share.holds(s.dataset, s.subject)} for share in shares]
    assert all(held) and not held[0] & held[1] and len(held[0] | held[1]) == 5
    for share, subjects in zip(shares, held):
        report = prepare(manifest, tmp_path / "two", SPEC, workers=1, share=share)
        assert (report.done, report.skipped) == (len(subjects), 0)
    assert tree(tmp_path / "two") == whole

    run = RUN.replace("workers=2", "workers=1, share=Share.parse(sys.argv[3])").replace(
        "import sys\n", "import sys\nfrom brainfm.data.store import Share\n"
    )
    (tmp_path / "run.py").write_text(run)
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare_module.__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "run.py"), str(manifest.path), str(tmp_path / "three")]
    at_once = [subprocess.Popen([*command, share], env=environment) for share in ("1/3", "2/3", "3/3")]
    assert [process.wait(timeout=60) for process in at_once] == [0, 0, 0]
    assert tree(tmp_path / "three") == whole
    assert prepare(manifest, tmp_path / "three", SPEC, workers=1).skipped == 5


def test_prepare__shares_exclude_whom_they_could_meet(tmp_path):
    manifest = cohort(tmp_path / "data", subjects=2)
    with Store.create(tmp_path / "store", SPEC, Share(1, 2)).locked():
        (tmp_path / "store" / "tmp-1of2-x").mkdir()
        for other in (Share(), Share(1, 2), Share(2, 3), Share(1, 4)):
            with pytest.raises(StoreError, match="another prepare is writing to this store"):
                prepare(manifest, tmp_path / "store", SPEC, workers=1, share=other)
        prepare(manifest, tmp_path / "store", SPEC, workers=1, share=Share(2, 2))
        assert (tmp_path / "store" / "tmp-1of2-x").is_dir(), "another share's work in progress"
    prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert not list((tmp_path / "store").glob("tmp-*"))
    for bad in ("3/2", "0/2", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(ConfigError, match=rf"shard={bad}: expected i/n with i from 1 to n"):
            Share.parse(bad)


def test_prepare__dask(tmp_path):
    pytest.importorskip("distributed")
    manifest = cohort(tmp_path / "data")
    prepare(manifest, tmp_path / "one", SPEC, workers=1)
    report = prepare(manifest, tmp_path / "two", SPEC, workers=2, scheduler="local")
    assert (report.done, report.skipped) == (3, 0) and tree(tmp_path / "two") == tree(tmp_path / "one")
    head(tmp_path / "data" / "sub-00" / "t1.nii.gz", 99)
    with pytest.raises(ConfigError, match=r"scheduler=127\.0\.0\.1:9: no Dask scheduler answers there"):
        prepare(manifest, tmp_path / "two", SPEC, scheduler="127.0.0.1:9")


def test_prepare__without_dask(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    manifest = cohort(tmp_path / "data", subjects=1)
    with pytest.raises(ConfigError, match=r"pip install 'brainfm-mri\[dask\]'$"):
        prepare(manifest, tmp_path / "store", SPEC, scheduler="local")


def test_prepare__real_scans(tmp_path, data3d):
    here = data3d / "openms_cross" / "patient07"
    columns = {"lesion_mask": str(here / "patient07_lesion_mask.nii.gz")}
    scans = [Scan("openms", "07", "", "flair", str(here / "patient07_FLAIR.nii.gz"), columns)]
    write_manifest(tmp_path / "manifest.csv", scans)
    report = prepare(read_manifest(tmp_path / "manifest.csv"), tmp_path / "store", SPEC, workers=1)
    assert report.failed == ()
    store = Store.open(tmp_path / "store")
    (entry,) = store.sessions
    file = tmp_path / "store" / "sessions" / entry.folder / "flair.b2nd"
    assert file.stat().st_size < 0.25 * 4 * np.prod(entry.shape)
    lesion = nib.load(columns["lesion_mask"]).get_fdata() > 0
    assert abs(store.volume(entry, "lesion_mask").sum() - lesion.sum()) < 0.02 * lesion.sum()


# ---- files that are corrected in place -------------------------------------------------------------------------------


def lesion_centre(store_path: Path, subject: str) -> np.ndarray:
    store = Store.open(store_path)
    (entry,) = [s for s in store.sessions if s.subject == subject]
    return np.argwhere(store.volume(entry, "lesion_mask")).mean(axis=0)


def uncompressed(folder: Path) -> Manifest:
    """Two subjects whose files keep their size whatever is in them."""
    scans = []
    for subject in ("a", "b"):
        ball = head(folder / f"{subject}.nii", 1 if subject == "a" else 2)
        mask = (ball & (np.arange(34)[:, None, None] < 12)).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, np.diag([1, 1, 1.5, 1])), folder / f"{subject}_mask.nii")
        columns = {"lesion_mask": f"{subject}_mask.nii"}
        scans.append(Scan("ds", subject, "", "t1", f"{subject}.nii", columns))
    write_manifest(folder / "manifest.csv", scans)
    return read_manifest(folder / "manifest.csv")


def correct(path: Path, keep_time: bool) -> None:
    """Mirrors a mask in place: same size, and where asked for the same time of change."""
    before = path.stat()
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine), path)
    assert path.stat().st_size == before.st_size
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_label_corrected_in_place_is_taken_over_and_told(tmp_path: Path, keep_time: bool) -> None:
    manifest = uncompressed(tmp_path)
    prepare(manifest, tmp_path / "store", SPEC, workers=1)
    wrong = lesion_centre(tmp_path / "store", "a")
    correct(tmp_path / "a_mask.nii", keep_time)
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (report.done, report.skipped, report.again) == (1, 1, ((("ds", "a", ""), "a_mask.nii"),))
    prepare(manifest, tmp_path / "fresh", SPEC, workers=1)
    np.testing.assert_array_equal(lesion_centre(tmp_path / "store", "a"), lesion_centre(tmp_path / "fresh", "a"))
    assert abs(lesion_centre(tmp_path / "store", "a")[0] - wrong[0]) > 5
    assert Store.open(tmp_path / "store").fingerprint() == Store.open(tmp_path / "fresh").fingerprint()


def test_a_copy_of_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    manifest = uncompressed(tmp_path)
    prepare(manifest, tmp_path / "store", SPEC, workers=1)
    before = tree(tmp_path / "store")
    for path in tmp_path.glob("*.nii"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, (1, 1))
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert (report.done, report.again) == (0, ()) and tree(tmp_path / "store") == before


def test_the_header_file_of_a_pair_counts_too(tmp_path: Path) -> None:
    voxels = np.asarray(nib.load(uncompressed(tmp_path).resolve("a.nii")).dataobj)
    for spacing in (1.0, 2.0):  # the numbers stay, the header says something else
        nib.save(nib.Nifti1Pair(voxels, np.diag([spacing, 1, 1.5, 1])), tmp_path / "p.img")
        write_manifest(tmp_path / "m.csv", [Scan("ds", "p", "", "t1", "p.img", {})])
        report = prepare(read_manifest(tmp_path / "m.csv"), tmp_path / "store", SPEC, workers=1)
        assert report.done == 1
    assert report.again == ((("ds", "p", ""), "p.hdr"),)


# ---- one session's trouble is its own --------------------------------------------------------------------------------


def test_one_bad_scan_never_costs_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = cohort(tmp_path / "data", subjects=4)
    image = nib.load(tmp_path / "data" / "sub-01" / "t1.nii.gz")
    voxels = np.asarray(image.dataobj).copy()
    voxels[voxels > np.quantile(voxels[voxels > 0], 0.98)] = 3e38
    nib.save(nib.Nifti1Image(voxels, image.affine), tmp_path / "data" / "sub-01" / "t1.nii.gz")
    real = prepare_module.prepare_session

    def unforeseen(scans, *arguments, **options):
        if "sub-02" in str(scans["t1"]):
            raise ZeroDivisionError("nobody thought of this")
        return real(scans, *arguments, **options)

    monkeypatch.setattr(prepare_module, "prepare_session", unforeseen)
    report = prepare(manifest, tmp_path / "store", SPEC, workers=1)
    assert [(s.subject, len(s.scans)) for s in Store.open(tmp_path / "store").sessions] == [
        ("sub-00", 2), ("sub-01", 1), ("sub-03", 2)
    ]  # fmt: skip
    reasons = {f.subject: f.reason for f in report.failed}
    assert "outliers from" in reasons["sub-01"] and "t1.nii.gz" in reasons["sub-01"]
    assert reasons["sub-02"] == "cannot be prepared (ZeroDivisionError: nobody thought of this)"


def test_empty_labels_are_counted(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "data")
    assert prepare(manifest, tmp_path / "store", SPEC, workers=1).empty == {}
    for subject in ("sub-00", "sub-02"):
        empty = np.zeros((34, 32, 22), np.uint8)
        nib.save(nib.Nifti1Image(empty, np.diag([1, 1, 1.5, 1])), tmp_path / "data" / subject / "lesion.nii.gz")
    assert prepare(manifest, tmp_path / "store", SPEC, workers=1).empty == {"lesion_mask": (2, 3)}


def test_without_locks_between_processes_all_is_done_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from brainfm.data import workers as workers_module
    from brainfm.errors import BrainfmWarning

    class NoLocks:
        def Lock(self):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(workers_module.multiprocessing, "get_context", lambda kind=None: NoLocks())
    with pytest.warns(BrainfmWarning, match=r"shared memory cannot be used \(Read-only file system\).*one process"):
        report = prepare(cohort(tmp_path / "data"), tmp_path / "store", SPEC, workers=2)
    assert (report.done, report.failed) == (3, ())
