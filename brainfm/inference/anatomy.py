"""Label maps, brain masks and region volumes of scans of any contrast, by the regions head of a backbone file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from brainfm.data.labelling import (
    PRIORITY,
    FoundLabels,
    LabelJob,
    LabellingReport,
    Method,
    check_contrasts,
    doubt,
    label_manifest,
    ranked_scans,
    record_of,
    settle,
    write_found,
    write_volumes,
)
from brainfm.data.manifest import CONTRASTS, Manifest, Scan
from brainfm.data.regions import REGIONS, TISSUE_OF, TISSUES
from brainfm.errors import BrainfmWarning, ConfigError, ScanError, WeightsError
from brainfm.files import check_writable, write_table
from brainfm.imaging import nifti, scope
from brainfm.imaging.components import largest_component
from brainfm.imaging.endings import strip_ending
from brainfm.imaging.preprocess import prepare_session, restore_probabilities
from brainfm.inference.scope import of_answer
from brainfm.nets.backbone import Backbone
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone
from brainfm.nets.cpu import keep_freed_memory
from brainfm.nets.decoders import DenseDecoder, DenseHead
from brainfm.specs import PreprocessSpec
from brainfm.tasks.engine import PathLike, settle_device, settle_precision
from brainfm.tasks.windows import predict_windows
from brainfm.volume import spacing_of

COLUMN, MASK_COLUMN = "regions_labels", "brain_mask"
OUTSIDE = ("background", "head")  # all other regions are within the skull
VOLUMES = (*(name for name in REGIONS if name not in OUTSIDE), "icv")
VERSION = 2  # raised when the same weights would give other labels
# In every whole head: the ids by which data/schemes.py tells such a map.
_ALWAYS = ("frontal_white", "superior_frontal", "thalamus")
_OWN_MM = (1.5, 2.0)  # voxels that the network sees of a finer and of a coarser scan
_AROUND_MM = 3.0  # of the largest connected part within the skull, in which what it nearly touches is kept
_SHARE = 1e-6  # of a voxel: less is nothing
_WHOLE_VOXELS, _WINDOW_VOX = 4_000_000, 128  # a larger head passes in windows: unet_s takes 4 GB at this size
_ENDINGS = (".nii.gz", ".nii")


class RegionNetwork(nn.Module):
    """Encoder, skip decoder and regions head in one: what tasks/windows puts windows through.

    Several scans pass one by one; their probabilities are averaged.
    """

    def __init__(self, backbone: Backbone, decoder: DenseDecoder, head: DenseHead) -> None:
        super().__init__()
        self.backbone, self.decoder, self.head = backbone, decoder, head

    def forward(self, image: Tensor, present: Tensor) -> Tensor:
        """[B, M, X, Y, Z] and [B, M], all present -> [B, K, X, Y, Z] logits."""
        if image.shape[1] == 1:
            return self._logits(image)
        total: Tensor | None = None
        for scan in image.split(1, dim=1):
            logged = self._logits(scan).float().log_softmax(dim=1)
            total = logged if total is None else torch.logaddexp(total, logged)
        assert total is not None  # there is a scan
        return total

    def _logits(self, scan: Tensor) -> Tensor:
        parts = self.decoder.split(self.decoder(self.backbone.features(scan)))
        logits: Tensor = self.head(parts[self.head.part])
        return logits


@dataclass(frozen=True)
class Labeller:
    """What turns scans into regions.

    Attributes:
        network: on its device.
        names: of its K classes, ``background`` first.
        preprocess: how scans are prepared for it.
        device: where it is.
        autocast: the precision it computes in, None for float32.
        patch_vox: edge lengths of its windows; None: a head passes in one piece, where memory allows.
        overlap: share of a window that its neighbour repeats, in [0, 1).
        fingerprint: of the backbone file.
        own_mm: smallest and largest edge of the voxels that the network sees, where those are the scan's own; None: as
            ``preprocess`` says.
        release: what the weights say of themselves; tells what is out of their scope.
    """

    network: RegionNetwork
    names: tuple[str, ...]
    preprocess: PreprocessSpec
    device: torch.device
    autocast: torch.dtype | None
    patch_vox: tuple[int, int, int] | None
    overlap: float
    fingerprint: str
    own_mm: tuple[float, float] | None = None
    release: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        backbone: PathLike | None,
        *,
        spacing_mm: float | None = None,
        patch_vox: int | Sequence[int] | None = None,
        overlap: float = 0.5,
        device: str = "auto",
        precision: str = "auto",
    ) -> Labeller:
        """From a backbone file with a decoder and a head ``regions``; other voxels than it saw are warned of.

        Args:
            spacing_mm: edge of the voxels that the network sees; None: the scan's own, from 1.5 to 2 mm as far as the
                file was trained on those: a scan is not made finer than it is, nor seen finer than is quick.
            patch_vox: of windows, one length or three; None: a head passes in one piece up to 4 million voxels.

        Raises:
            ConfigError: no file was given, or impossible values.
            WeightsError: the file is missing, damaged or tells no regions.
        """
        if backbone is None:
            raise ConfigError("method=network needs backbone=FILE, a file with a regions head; method=atlas needs none")
        if not 0 <= overlap < 1:
            raise ConfigError(f"overlap={overlap}: expected 0 or more and less than 1")
        place = settle_device(device)
        dtype = settle_precision(precision, place)
        loaded = load_backbone(backbone, needs_decoder=True)
        decoder, head = _what_tells_regions(backbone, loaded)
        patch = _settled_patch(patch_vox, loaded.backbone)
        low, high = loaded.voxel_mm or (min(loaded.preprocess.spacing_mm), max(loaded.preprocess.spacing_mm))
        own_mm = None
        if spacing_mm is None:
            fine, coarse = loaded.release.get("look_mm", _OWN_MM)
            own_mm = (min(max(fine, low), high), min(max(coarse, low), high))
            spacing_mm = own_mm[0]
        if not low - 1e-6 <= spacing_mm <= high + 1e-6:
            warnings.warn(
                f"spacing_mm={spacing_mm:g}: {backbone} was trained on voxels of {low:g} to {high:g} mm; its answer "
                "may be worse",
                BrainfmWarning,
                stacklevel=2,
            )
        if place.type == "cpu":
            keep_freed_memory()
        network = RegionNetwork(loaded.backbone, decoder, head).to(place).eval()
        preprocess = replace(loaded.preprocess, spacing_mm=(spacing_mm,) * 3)
        return cls(
            network, head.names, preprocess, place, dtype, patch, overlap, loaded.fingerprint, own_mm, loaded.release
        )  # fmt: skip

    def method(self, fuse: bool) -> Method:
        """What a run over a manifest leaves behind, and what would make it anew."""
        identity = {
            "version": VERSION, "backbone": self.fingerprint,
            "spacing_mm": list(self.own_mm) if self.own_mm else self.preprocess.spacing_mm[0],
            "patch_vox": list(self.patch_vox) if self.patch_vox else None, "overlap": self.overlap,
        }  # fmt: skip
        return Method(COLUMN, "dseg", VOLUMES, identity, MASK_COLUMN, together=fuse)

    def probabilities(self, image: Tensor) -> Tensor:
        """[M, X, Y, Z] standardised scans of one head -> [K, X, Y, Z] float32 in main memory."""
        patch = self.patch_vox or self._whole(image.shape[1:])
        return predict_windows(
            self.network, image, torch.ones(len(image), dtype=torch.bool), patch, overlap=self.overlap, batch=1,
            device=self.device, autocast=self.autocast,
        )  # fmt: skip

    def _whole(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """One window for all of a head, or the largest for which there is memory."""
        stride = self.network.backbone.strides[-1]
        x, y, z = (max(2, math.ceil(size / stride)) * stride for size in shape)
        if x * y * z <= _WHOLE_VOXELS:
            return x, y, z
        edge = math.ceil(_WINDOW_VOX / stride) * stride
        return edge, edge, edge

    def find(self, files: Mapping[str, Path], scan: Scan | None = None) -> FoundLabels:
        """Regions of one head, on the grid of the first file.

        Args:
            files: by the name of the scan; of several the probabilities are averaged.
            scan: the first file's row of a manifest, for what is known of it.

        Raises: ScanError where any of them cannot be used.
        """
        first = next(iter(files))
        spec = self.spec_for(files[first])
        prepared = prepare_session(files, {}, spec, reference=first)
        if prepared.failures:
            raise ScanError(next(iter(prepared.failures.values())))
        image = torch.stack([torch.from_numpy(prepared.scans.pop(name)) for name in files])
        recipe = prepared.recipes[first]
        probabilities = self.probabilities(image).numpy()
        outside = [place for place, name in enumerate(self.names) if name in OUTSIDE]
        keep_one_head(probabilities, outside, spec.spacing_mm[0])
        volumes_ml = self._volumes_ml(probabilities, spec.spacing_mm[0])
        sure = probabilities.max(axis=0)[~np.isin(probabilities.argmax(axis=0), outside)]
        classes = recipe.file.to_ras(restore_probabilities(probabilities, recipe, shares=True))
        seen = {self.names[place] for place in np.unique(classes)}
        ids = np.array([REGIONS[name] for name in self.names], np.uint16)
        lacking = [name for name in _ALWAYS if name in self.names and name not in seen]
        reason = doubt(volumes_ml["icv"]) or (f"found no {lacking[0].replace('_', ' ')}" if lacking else "")
        found = FoundLabels(
            ids[classes], volumes_ml, float(sure.mean()) if sure.size else 0.0, {"regions": float(len(seen))}, reason,
            ndimage.binary_fill_holes(~np.isin(classes, outside)),
        )  # fmt: skip
        contrast, age = (scan.contrast, scan.columns.get("age")) if scan is not None else ("unknown", None)
        said = [*scope.strange(nifti.read(files[first])[0]), *of_answer(found, self.release, [contrast], age)]
        return replace(found, out_of_scope="; ".join(said))

    def spec_for(self, scan: Path) -> PreprocessSpec:
        """How a scan is prepared: on voxels of its own size (the cube of the same volume) where those are asked for."""
        if self.own_mm is None:
            return self.preprocess
        low, high = self.own_mm
        own = float(np.prod(spacing_of(nifti.read_header(scan).grid.ras_affine()))) ** (1 / 3)
        return replace(self.preprocess, spacing_mm=(min(max(own, low), high),) * 3)

    def _volumes_ml(self, probabilities: np.ndarray, spacing_mm: float) -> dict[str, float]:
        """Soft: a voxel that is half of a region counts by half. ``icv`` is all within the skull."""
        voxel_ml = spacing_mm**3 / 1000
        sums = probabilities.sum(axis=(1, 2, 3), dtype=np.float64) * voxel_ml
        found = {name: float(ml) for name, ml in zip(self.names, sums, strict=True) if name not in OUTSIDE}
        return found | {"icv": math.fsum(found.values())}


def _what_tells_regions(path: PathLike, loaded: LoadedBackbone) -> tuple[DenseDecoder, DenseHead]:
    """Raises: WeightsError where there is no such head, or it tells what is no region."""
    head = loaded.heads.get("regions")
    if head is None or loaded.decoder is None:
        raise WeightsError(
            f"{path}: has no head that tells regions, found {', '.join(loaded.heads) or 'none'}; expected a file of "
            "objective=dense_split that was trained with label maps"
        )
    strange = [name for name in head.names if name not in REGIONS]
    if strange or head.names[0] != "background":
        first = f"a class {strange[0]!r}" if strange else f"{head.names[0]!r} as its first class"
        raise WeightsError(f"{path}: its regions head has {first}, expected regions of brainfm, background first")
    return loaded.decoder, head


def _settled_patch(patch_vox: int | Sequence[int] | None, backbone: Backbone) -> tuple[int, int, int] | None:
    """Raises: ConfigError for edges that the backbone cannot take."""
    if patch_vox is None:
        return None
    edges = [patch_vox] * 3 if isinstance(patch_vox, int) else list(patch_vox)
    stride = backbone.strides[-1]
    if len(edges) != 3 or any(not isinstance(e, int) or e < 2 * stride or e % stride for e in edges):
        raise ConfigError(
            f"patch_vox={patch_vox}: expected one length or three, multiples of {stride} from {2 * stride} on, or null"
        )
    x, y, z = edges
    return x, y, z


def keep_one_head(probabilities: np.ndarray, outside: Sequence[int], spacing_mm: float) -> None:
    """Takes regions away from what is not connected with the largest part within the skull; in place.

    What is taken goes to the classes outside, by their shares.

    Args:
        probabilities: [K, X, Y, Z].
        outside: indices of the classes outside the skull.

    Source: as SynthSeg does (Billot et al. 2023, arXiv 2107.09559): posteriors outside the dilated largest part are 0.
    """
    beyond = probabilities[list(outside)].sum(axis=0)
    inside = (beyond < 0.5).astype(np.uint8)
    if not inside.any():
        return
    times = max(1, round(_AROUND_MM / spacing_mm))
    kept = ndimage.binary_dilation(largest_component(inside) > 0, iterations=times)
    scale = np.where(kept, 1, 1 / np.maximum(beyond, _SHARE)).astype(np.float32)
    for place in range(len(probabilities)):
        probabilities[place] *= scale if place in outside else kept
    probabilities[outside[0]][~kept & (beyond < _SHARE)] = 1


# ---- a whole manifest ------------------------------------------------------------------------------------------------


def label_regions(
    labeller: Labeller,
    manifest: Manifest,
    out: PathLike,
    contrasts: Sequence[str] = PRIORITY,
    *,
    fuse: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LabellingReport:
    """Leaves label maps and brain masks in ``labels/``, and ``dseg.tsv``, ``volumes.csv`` and ``manifest.csv``.

    The manifest has the columns regions_labels and, unless it has brain masks already, brain_mask. Interrupted, the
    same call goes on. A scan that cannot be used is a row with a reason.

    Args:
        contrasts: of a session's scans the one that comes first here is labelled; ``others`` stands for all that are
            not named.
        fuse: whether the answers to all these scans of a session are averaged, on the grid of the first.
        progress: called with the number of scans that are settled and their total.

    Raises:
        ManifestError: files are missing, or the manifest has label maps of its own in that column.
        ConfigError: a contrast is unknown.
        FileError: the folder cannot be written.
    """
    folder = Path(out)
    check_writable(folder)

    def work(todo: Sequence[LabelJob]) -> Generator[Any, None, None]:
        write_legend(folder / "dseg.tsv", labeller.names)
        for job in todo:
            settle(job, lambda job: labeller.find(job.files, job.scan))
            yield job

    return label_manifest(manifest, folder, labeller.method(fuse), contrasts, work, progress)


def write_legend(path: Path, names: Sequence[str]) -> None:
    """What the ids of a label map mean, as BIDS wants it: index and name, tab-separated, by index."""
    rows = sorted((REGIONS[name], name) for name in names)
    write_table(path, ("index", "name"), rows, delimiter="\t")


# ---- one session -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What was found of one session, and the files that tell it."""

    found: FoundLabels
    like: Path
    labels: Path
    mask: Path
    tissues: Path
    volumes: Path
    legend: Path


def label_files(
    labeller: Labeller,
    inputs: Mapping[str, PathLike],
    out: PathLike,
    contrasts: Sequence[str] = PRIORITY,
    *,
    fuse: bool = False,
) -> Written:
    """Regions of one session, written even where they are not to be trusted, which is warned of.

    Args:
        inputs: file by contrast; several only where their answers are averaged.
        out: a folder, which gets ``CONTRAST_dseg.nii.gz``, ``CONTRAST_brain_mask.nii.gz``, ``CONTRAST_tissues.nii.gz``
            (1 fluid, 2 grey, 3 white matter), ``volumes.csv`` and ``dseg.tsv``; or the label map's own name, after
            which the other files are named.
        contrasts: the first of these that is among the inputs gives the grid.

    Raises:
        ConfigError: an unknown contrast, several inputs without ``fuse``, or an output that cannot be.
        ScanError: an input is missing or cannot be used.
    """
    check_contrasts(contrasts)
    files = _checked_inputs(inputs, fuse)
    ranked = ranked_scans([Scan("", "", "", contrast, str(path)) for contrast, path in files.items()], contrasts)
    if not ranked:
        raise ConfigError(f"input.{next(iter(files))}: none of contrasts={', '.join(contrasts)}, expected one of them")
    ordered = {scan.contrast: files[scan.contrast] for scan in ranked}
    scan, like = replace(ranked[0], subject=strip_ending(Path(ranked[0].path).name)), Path(ranked[0].path)
    labels, mask, tissues, volumes, legend = _places(Path(out), scan.contrast)
    if any(path.exists() and path.samefile(file) for file in files.values() for path in (labels, mask, tissues)):
        raise ConfigError(f"out={out} would replace one of the inputs, expected another place")
    found = labeller.find(ordered, scan)
    if found.reason:
        warnings.warn(f"{like}: its labels are not to be trusted: {found.reason}", BrainfmWarning, stacklevel=2)
    if found.out_of_scope:
        warnings.warn(f"{like}: out of scope: {found.out_of_scope}", BrainfmWarning, stacklevel=2)
    labels.parent.mkdir(parents=True, exist_ok=True)
    write_legend(legend, labeller.names)
    write_found(found, (labels, mask), like)
    nifti.write_labels(tissues, tissues_of(found.labels), like=like)
    write_volumes(volumes, VOLUMES, [(scan, like, record_of(found))])
    return Written(found, like, labels, mask, tissues, volumes, legend)


def tissues_of(labels: np.ndarray) -> np.ndarray:
    """Fluid (1), grey (2) and white matter (3) of a map of regions; 0 elsewhere."""
    table = np.zeros(1 + max(REGIONS.values()), np.uint8)
    for name, tissue in TISSUE_OF.items():
        table[REGIONS[name]] = TISSUES[tissue]
    found: np.ndarray = table[labels]
    return found


def describe(written: Written) -> str:
    """One line: where it lies and how large the brain's cavity is."""
    found, regions = written.found, int(written.found.checks["regions"])
    return (
        f"{written.labels}: {regions} labels, {found.volumes_ml['icv']:.0f} ml within the skull; beside it "
        f"{written.mask.name}, {written.tissues.name}, {written.volumes.name}, {written.legend.name}"
    )


def _checked_inputs(inputs: Mapping[str, PathLike], fuse: bool) -> dict[str, Path]:
    if not inputs:
        raise ConfigError("no input was given, expected input.CONTRAST=FILE")
    unknown = [contrast for contrast in inputs if contrast not in CONTRASTS]
    if unknown:
        raise ConfigError(f"input.{unknown[0]}: unknown contrast, expected one of {', '.join(CONTRASTS)}")
    if len(inputs) > 1 and not fuse:
        raise ConfigError(f"found inputs {', '.join(inputs)}; expected one of them, or fuse=true for their mean")
    files = {contrast: Path(text) for contrast, text in inputs.items()}
    for contrast, path in files.items():
        if not path.is_file():
            raise ScanError(f"{path}: no such file, given as input.{contrast}")
    return files


def _places(out: Path, contrast: str) -> tuple[Path, Path, Path, Path, Path]:
    """Label map, brain mask, tissues, volumes and legend."""
    ending = next((e for e in _ENDINGS if out.name.endswith(e) and out.name != e), None)
    if ending is None:
        check_writable(out)
        labels, mask, tissues = (out / f"{contrast}_{what}.nii.gz" for what in ("dseg", "brain_mask", "tissues"))
        return labels, mask, tissues, out / "volumes.csv", out / "dseg.tsv"
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder with the name of a file, expected a folder or a file")
    check_writable(out.parent)
    stem = out.name.removesuffix(ending)
    short = stem.removesuffix("_dseg")
    mask, tissues = (out.with_name(f"{short}_{what}{ending}") for what in ("brain_mask", "tissues"))
    return out, mask, tissues, out.with_name(f"{short}_volumes.csv"), out.with_name(f"{stem}.tsv")
