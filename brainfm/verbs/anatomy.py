"""Label and measure brain regions, or tissues by an atlas, in scans of any contrast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from brainfm.errors import ConfigError
from brainfm.nets.shipped import USUAL, names
from brainfm.verbs.running import bar, processes

if TYPE_CHECKING:
    from brainfm.inference.anatomy import Labeller, Written

PLACE = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Label and measure where a user has no labels. Interrupted, the same command goes on.
    method=network: 45 brain regions of a scan of any contrast, by weights that were pre-trained with them
    (objective=dense_split): brainfm_s where it ships, or backbone=. Leaves DIR/labels (*_dseg.nii.gz, FreeSurfer ids,
    both sides under the left one's, and *_brain_mask.nii.gz), dseg.tsv, volumes.csv, and manifest.csv with the columns
    regions_labels and brain_mask; of one session also *_tissues.nii.gz and a picture.

      brainfm anatomy input.t1=t1.nii.gz out=anatomy     (or out=t1_dseg.nii.gz)
      brainfm anatomy manifest=manifest.csv out=anatomy backbone=backbone.safetensors

    method=atlas: CSF (1), grey (2) and white matter (3), without a network. Needs brainfm-mri[anatomy]. Leaves labels,
    volumes.csv, and manifest.csv with the column tissue_labels.

      brainfm anatomy manifest=manifest.csv out=anatomy method=atlas
    """

    manifest: Annotated[Path | None, "what to label: this, or one session as input.CONTRAST=FILE"] = None
    input: Annotated[Mapping[str, Path], "input.CONTRAST=FILE of one session"] = field(default_factory=dict)
    out: Annotated[Path, "folder of what is made; of one session also the label map itself"]
    method: Annotated[Literal["network", "atlas"] | None, "null: network where a backbone is given or ships"] = None
    backbone: Annotated[
        Path | None, "a file with a regions head, or a name; null: brainfm_s"
    ] = None  # fmt: skip
    contrasts: Annotated[
        tuple[str, ...], "the scan of a session that is labelled is the first of these"
    ] = ("t1", "t2", "flair", "pd", "others")  # fmt: skip
    fuse: Annotated[bool, "network: average the answers to all these scans of a session, on the grid of the first"] = (
        False
    )
    spacing_mm: Annotated[
        float | None, "network: edge of the voxels it sees; null: the scan's own, from 1.5 to 2"
    ] = None  # fmt: skip
    patch_vox: Annotated[
        int | None, "network: edge of its windows; null: a head in one pass, above 4 million voxels windows of 128"
    ] = None
    overlap: Annotated[float, "network: share of a window that the next one repeats"] = 0.5
    device: Annotated[str, "network: auto | cpu | cuda | cuda:N"] = "auto"
    precision: Annotated[Literal["auto", "32-true", "bf16-mixed", "16-mixed"], "network"] = "auto"
    picture: Annotated[bool, "network, one session: a picture of it beside; needs brainfm-mri[report]"] = True
    workers: Annotated[int, "atlas: processes; 0: one a core"] = 0
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if bool(self.input) == bool(self.manifest):
            raise ConfigError("brainfm anatomy: expected either input.CONTRAST=FILE or manifest=FILE")
        given = {"backbone": self.backbone, "input.CONTRAST": self.input, "fuse": self.fuse}
        alien = [key for key, value in given.items() if value]
        if self.way == "atlas" and alien:
            raise ConfigError(f"method=atlas takes a manifest and no network, found {alien[0]}=; use method=network")

    @property
    def way(self) -> str:
        """network or atlas."""
        return self.method or ("network" if self.weights else "atlas")

    @property
    def weights(self) -> Path | None:
        """What is to label: the file or name given, else the weights that ship, if they do."""
        return self.backbone or (Path(USUAL) if USUAL in names() else None)

    def labeller(self) -> Labeller:
        from brainfm.inference.anatomy import Labeller

        return Labeller.load(
            self.weights, spacing_mm=self.spacing_mm, patch_vox=self.patch_vox, overlap=self.overlap,
            device=self.device, precision=self.precision,
        )  # fmt: skip


def run(settings: Settings) -> int:
    from brainfm.data.anatomize import anatomize
    from brainfm.data.manifest import read_manifest
    from brainfm.inference.anatomy import describe, label_files, label_regions

    out, contrasts, fuse = settings.out, settings.contrasts, settings.fuse
    if settings.manifest is None:
        written = label_files(settings.labeller(), settings.input, out, contrasts, fuse=fuse)
        print(describe(written))
        if settings.picture:
            _draw(written)
        return 0
    if settings.method is None and settings.way == "atlas":
        print(f"note: no weights named {USUAL} ship with this copy and no backbone= was given: method=atlas")
    manifest = read_manifest(settings.manifest)
    labeller = settings.labeller() if settings.way == "network" else None
    with bar("anatomy", len(manifest.sessions())) as move:
        report: Any
        if labeller is None:
            report = anatomize(manifest, out, contrasts, processes(settings.workers), move)
        else:
            report = label_regions(labeller, manifest, out, contrasts, fuse=fuse, progress=move)
    for flagged in report.flagged:
        print(f"not trusted: {flagged.path}: {flagged.reason}")
    for strange in report.strange:
        print(f"out of scope: {strange.path}: {strange.reason}")
    none = f", {report.without} sessions without a scan of {', '.join(contrasts)}" if report.without else ""
    print(
        f"{out / 'manifest.csv'}: {report.done} scans segmented, {report.skipped} were there, "
        f"{len(report.flagged)} of them not trusted{none}"
    )
    return 0


def _draw(written: Written) -> None:
    """The picture beside the label map, where what it takes is installed."""
    from brainfm.extras import demand
    from brainfm.reports.anatomy import write_picture

    try:
        demand("matplotlib", "a picture")
    except ConfigError as error:
        print(f"note: {error}")
        return
    print(write_picture(written))
