"""Weights that ship: a backbone file of the long training in half precision, with all that its card says.

    python scripts/weights.py RUN_OR_FILE NAME --data DATA3D [--earlier RUN_OR_FILE ...] [--commit COMMIT] [--out DIR]

Writes OUT/NAME.safetensors (OUT: brainfm/weights). Kept are encoder, decoder, the heads `regions` and `lesion`, and
the objective's own few tensors, with which the demo draws a scan in another contrast. Beside them stand how scans are
prepared, provenance (steps, hours, commit, seed; paths are cut to their last name), the voxel sizes seen, salted hashes
of the people, and the release: sources with licences and attributions, people, ages, curves, what half precision costs
on one held head, and what the answers to ordinary heads measure: N scans of the training side (--ordinary N) are
labelled, and beyond the ranges of their answers `anatomy` calls another one out of scope (inference/scope.py). Of
trainings that it went on from (`pretrain backbone_from=`), named by --earlier, the curves are there too, each at the
steps that all before it had taken.

Refused: a file of more than 11 MB; a person of foundation/split.csv's side `held` among those seen; a source without
an attribution; answers of the half file that are not those of the whole one within _LEAST_COSINE and _LEAST_DICE.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from brainfm.data.manifest import read_manifest
from brainfm.errors import BrainfmError, WeightsError
from brainfm.files import write_whole
from brainfm.imaging.preprocess import prepare_session
from brainfm.imaging.scope import widened
from brainfm.inference.anatomy import Labeller
from brainfm.inference.scope import answer_measures
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone, save_backbone
from brainfm.nets.lengths import restore_lengths
from brainfm.nets.shipped import FOLDER, MOST_BYTES
from brainfm.training.warm_start import so_far, voxels_seen

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "foundation"
KEPT_HEADS = ("regions", "lesion")
CHECK_MM = 2.0  # voxels of the held head on which half precision is tried
_LEAST_COSINE, _LEAST_DICE = 0.999, 0.97  # of the half file's features and regions with the whole file's
_WORTH = 0.002  # Dice that restored lengths must bring
_LEAST_VOXELS = 50  # of a region; below, one voxel decides its Dice
_MOST_POINTS = 40  # of a curve
CURVES = ("val_total", "val_regions", "val_self", "val_cross", "val_match", "val_lesion", "val_volumes",
          *(f"probe_level{level}_dice" for level in range(5)), "probe_unseen_map_dice", "probe_unseen_whole_map_dice",
          "probe_fewshot_dice")  # fmt: skip


# ---- what the card says ----------------------------------------------------------------------------------------------


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sources_of(
    rows: Iterable[Mapping[str, str]], attributions: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """A row a data set: what was learnt from, under which licences, and whom to name.

    Args:
        rows: of sources.csv.
        attributions: of attributions.csv, by data set.

    Raises: WeightsError for a set without an attribution.
    """
    sets: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        if row["variant"] != "none":
            sets[row["dataset"]].append(row)
    found = []
    for name, files in sorted(sets.items()):
        if name not in attributions:
            raise WeightsError(f"{LISTS / 'attributions.csv'}: has no row for {name}, expected one for every source")
        found.append({
            "dataset": name, "files": len(files), "people": len({row["subject"] for row in files if row["subject"]}),
            "licences": sorted({row["licence"] for row in files}),
            "share_alike": any(row["share_alike"] == "yes" for row in files),
            "used_for": sorted({part for row in files for part in row["used_for"].split("; ")}),
            **{key: attributions[name][key] for key in ("title", "attribution", "address")},
        })  # fmt: skip
    return found


def licence_of(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The licence of weights that learnt from these sets, and the terms that travel with it."""
    sources = list(sources)
    share_alike = sorted(source["dataset"] for source in sources if source["share_alike"])
    terms = sorted({source["dataset"] for source in sources if any("SBIA" in text for text in source["licences"])})
    because = f"share-alike of {', '.join(share_alike)}" if share_alike else "attribution is asked for by some sources"
    return {
        "name": "CC-BY-SA-4.0" if share_alike else "CC-BY-4.0", "because": because,
        "terms": {"SBIA Software License 1.1": terms} if terms else {},
        "use": "research and teaching; no medical device, not reviewed by any agency; clinical use is neither "
        "recommended nor advised",
    }  # fmt: skip


def people_of(manifest: Path, loaded: LoadedBackbone) -> list[dict[str, Any]]:
    """A row a data set: the people that the file was trained on, as its salted hashes tell, with what is known of them.

    Raises: WeightsError where somebody of the side held is among them, or the file does not say whom it saw.
    """
    if loaded.subjects is None:
        raise WeightsError(f"{manifest}: the file does not say whom it was trained on, expected hashes of its people")
    held = [f"{row['dataset']}/{row['subject']}" for row in table(LISTS / "split.csv") if row["side"] == "held"]
    leaked = loaded.subjects.among(held)
    if leaked:
        raise WeightsError(
            f"{leaked[0]} is held out by {LISTS / 'split.csv'} and was trained on, expected nobody of it"
        )
    scans = [scan for scan in read_manifest(manifest).scans if scan.columns.get("side") != "held"]
    seen = set(loaded.subjects.among(f"{scan.dataset}/{scan.subject}" for scan in scans))
    sets = defaultdict(list)
    for scan in scans:
        if f"{scan.dataset}/{scan.subject}" in seen:
            sets[scan.dataset].append(scan)
    found = []
    for name, of in sorted(sets.items()):
        persons = {scan.subject: scan for scan in of}
        ages = sorted(float(p.columns["age"]) for p in persons.values() if p.columns.get("age"))
        sexes = Counter(p.columns.get("sex") or "unknown" for p in persons.values())
        contrasts = Counter(scan.contrast for scan in of)
        found.append({
            "dataset": name, "people": len(persons), "scans": len(of),
            "contrasts": dict(sorted(contrasts.items())), "sex": dict(sorted(sexes.items())),
            "ages": [ages[0], float(np.median(ages)), ages[-1]] if ages else None,
        })  # fmt: skip
    return found


def curves_of(source: Path) -> dict[str, list[list[float]]]:
    """[step, value] of what was measured on held-out people; empty where nothing tells.

    Args:
        source: a run's folder, or a file that ships. Steps of trainings that it went on from are counted.
    """
    loaded = load_backbone(_file_of(source))
    shift, path = (loaded.provenance.config.get("before") or {}).get("steps", 0), _file_of(source).parent / "curves.csv"
    if not path.is_file():
        return dict(loaded.release.get("curves", {}))
    found = defaultdict(list)
    for row in table(path):
        if row["name"] in CURVES:
            found[row["name"]].append([shift + int(row["step"]), round(float(row["value"]), 4)])
    return dict(found)


def voxels_of(loaded: LoadedBackbone, earlier: Iterable[Path]) -> tuple[float, float] | None:
    """The smallest and largest edge of a voxel that it, or what it went on from, was trained on."""
    found = loaded.voxel_mm
    for one in earlier:
        found = found and voxels_seen(load_backbone(_file_of(one)), found)
    return found


def joined(curves: Iterable[Mapping[str, list[list[float]]]]) -> dict[str, list[list[float]]]:
    """Curves one after the other, at most 40 points each."""
    found = defaultdict(list)
    for one in curves:
        for name, points in one.items():
            found[name] += points
    ordered = {name: sorted(points) for name, points in found.items()}
    return {name: [points[i] for i in _spread(len(points))] for name, points in ordered.items()}


def _file_of(source: Path) -> Path:
    return source / "backbone.safetensors" if source.is_dir() else source


def _spread(count: int, most: int = _MOST_POINTS) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def ordinary_of(file: Path, manifest: Path, count: int) -> dict[str, Any]:
    """Ranges of what the answers to ordinary heads measure, widened: of people of the training side, T1s and others.

    Args:
        file: the finished weights.
        count: of scans at most, spread over the manifest; scans that a backbone calls wrong are left out.
    """
    read = read_manifest(manifest)
    scans = [s for s in read.scans if s.columns.get("side") != "held" and s.contrast != "rendered"]
    labeller = Labeller.load(file)
    rows = []
    for scan in (scans[place] for place in _spread(len(scans), count)):
        found = labeller.find({scan.contrast: read.resolve(scan.path)})
        rows += [answer_measures(found)] if not found.reason else []
        print(f"{scan.subject} {scan.contrast} {found.reason}", flush=True)
    if not rows:
        raise WeightsError(f"{file}: labels no ordinary head of {manifest} in a way that can be trusted")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    ranges = {name: [round(edge, 5) for edge in widened(min(v), max(v))] for name, v in columns.items()}
    for name in ranges:  # nobody is too symmetric, no answer too sure
        if name.startswith("asymmetry"):
            ranges[name][0] = 0.0
    ranges["mean probability"][1] = 1.0
    return {"heads": len(rows), "ranges": ranges}


def without_paths(value: Any) -> Any:
    """A configuration in which a path of a machine is its last name alone."""
    if isinstance(value, Mapping):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


# ---- half precision --------------------------------------------------------------------------------------------------


def halved(loaded: LoadedBackbone, restored: bool) -> LoadedBackbone:
    """The networks with the values that half precision leaves of them, computed with in float32.

    Args:
        restored: whether the filters get the length of fresh ones first (nets/lengths.py).
    """
    parts = copy.deepcopy(nn.ModuleList([loaded.backbone, loaded.decoder or nn.Identity(), *loaded.heads.values()]))
    backbone, decoder, *heads = parts
    if restored:
        for part in (backbone, decoder):
            restore_lengths(part)
    with torch.no_grad():
        for value in (*parts.parameters(), *parts.buffers()):
            value.copy_(value.half())
    named = dict(zip(loaded.heads, heads))
    return replace(loaded, backbone=backbone, decoder=decoder if loaded.decoder is not None else None, heads=named)


@torch.inference_mode()
def answers(loaded: LoadedBackbone, image: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Feature maps of encoder and decoder, and the class of every voxel: [1, 1, X, Y, Z] -> maps, [X, Y, Z]."""
    maps = loaded.backbone.features(image)
    assert loaded.decoder is not None
    dense = loaded.decoder(maps)
    head = loaded.heads["regions"]
    return [*maps, dense], head(loaded.decoder.split(dense)[head.part])[0].argmax(dim=0)


def likeness(whole: LoadedBackbone, half: LoadedBackbone, image: torch.Tensor) -> dict[str, Any]:
    """How alike two networks answer about a scan: cosine of features a level, and Dice of regions."""
    (maps, classes), (others, found) = answers(whole, image), answers(half, image)
    cosines = [float(nn.functional.cosine_similarity(a, b, dim=1).mean()) for a, b in zip(maps, others)]
    names, dice = whole.heads["regions"].names, {}
    for place, name in enumerate(names):
        one, other = classes == place, found == place
        if one.sum() >= _LEAST_VOXELS:
            dice[name] = 2 * float((one & other).sum()) / float(one.sum() + other.sum())
    return {
        "cosine": [round(value, 6) for value in cosines], "dice_mean": round(float(np.mean(list(dice.values()))), 5),
        "dice_least": min(((round(value, 5), name) for name, value in dice.items())), "regions": len(dice),
        "voxels_alike": round(float((classes == found).float().mean()), 6),
    }  # fmt: skip


def held_head(data: Path, loaded: LoadedBackbone) -> tuple[str, torch.Tensor]:
    """Name and image [1, 1, X, Y, Z] of the first T1 of a held person at 2 mm, padded to the network's stride."""
    people = sorted(
        row["subject"] for row in table(LISTS / "split.csv") if row["side"] == "held" and row["dataset"] == "ixi2mm"
    )
    files = (path for name in people for path in sorted((data / "ixi2mm" / name).glob("*_T1w.nii.gz")))
    file = next(files, None)
    if file is None:
        raise WeightsError(f"{data}: has no T1 of a held person of ixi2mm, expected the folder of data sets")
    spec = replace(loaded.preprocess, spacing_mm=(CHECK_MM,) * 3)
    image = torch.from_numpy(prepare_session({"t1": file}, {}, spec).scans["t1"])[None, None].float()
    stride = loaded.backbone.strides[-1]
    pads = [n for size in reversed(image.shape[2:]) for n in (0, -size % stride)]
    return file.parent.name, nn.functional.pad(image, pads, value=float(image.min()))


# ---- all of it -------------------------------------------------------------------------------------------------------


def make(given: argparse.Namespace) -> dict[str, Any]:
    """Writes the file. Returns the release. Raises: WeightsError (see the module)."""
    source = _file_of(given.source)
    loaded = load_backbone(source, needs_decoder=True)
    loaded = replace(loaded, heads={name: head for name, head in loaded.heads.items() if name in KEPT_HEADS})
    if set(loaded.heads) != set(KEPT_HEADS):
        raise WeightsError(f"{source}: has the heads {', '.join(loaded.heads) or 'none'}, expected {KEPT_HEADS}")
    sources = sources_of(
        table(LISTS / "sources.csv"), {row["dataset"]: row for row in table(LISTS / "attributions.csv")}
    )
    manifest = given.manifest or Path(loaded.provenance.config["store"]).parent / "manifest.csv"
    release: dict[str, Any] = {
        "name": given.name, "licence": licence_of(sources), "sources": sources, "people": people_of(manifest, loaded),
        "curves": joined(curves_of(one) for one in (*given.earlier, source)),
    }  # fmt: skip
    person, image = held_head(given.data, loaded)
    tried = {restored: (half := halved(loaded, restored), likeness(loaded, half, image)) for restored in (False, True)}
    for restored, (_, alike) in tried.items():
        print(f"half precision, lengths {'restored' if restored else 'as trained'}: {alike}")
    best = tried[True][1]["dice_mean"] > tried[False][1]["dice_mean"] + _WORTH
    half, alike = tried[best]
    release["half_precision"] = {"head": f"ixi2mm/{person}", "voxels_mm": CHECK_MM, "lengths_restored": best, **alike}
    if min(alike["cosine"]) < _LEAST_COSINE or alike["dice_mean"] < _LEAST_DICE:
        least = f"a cosine of {_LEAST_COSINE} and a mean Dice of {_LEAST_DICE} at least"
        raise WeightsError(f"{source}: half precision changes its answers ({alike}), expected {least}")
    provenance = replace(
        loaded.provenance, config=without_paths(loaded.provenance.config),
        commit=given.commit or loaded.provenance.commit, parents=(*loaded.provenance.parents, loaded.fingerprint),
    )  # fmt: skip
    if not provenance.commit:
        raise WeightsError(f"{source}: does not say by which commit it was trained, expected --commit")
    if given.look_mm:
        release["look_mm"] = list(given.look_mm)
    out = given.out / f"{given.name}.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / out.name

        def save() -> None:
            save_backbone(
                made, half.backbone, objective=loaded.objective, objective_state=loaded.extra,
                preprocess=loaded.preprocess, patch_vox=loaded.patch_vox, provenance=provenance,
                decoder=half.decoder, heads=half.heads,
                voxel_mm=voxels_of(loaded, given.earlier), subjects=loaded.subjects, half=True, release=release,
            )  # fmt: skip

        save()
        if given.ordinary:
            release["ordinary"] = ordinary_of(made, manifest, given.ordinary)
            save()
        size = made.stat().st_size
        if size > MOST_BYTES:
            raise WeightsError(f"{out.name} would have {size} bytes, expected at most {MOST_BYTES}")
        again = likeness(half, load_backbone(made, needs_decoder=True), image)
        if again["voxels_alike"] < 1 or min(again["cosine"]) < 1 - 1e-5:
            raise WeightsError(f"{out.name}: read again it answers otherwise ({again})")
        write_whole(out, made.read_bytes())
    told, licence = so_far(replace(loaded, provenance=provenance)), release["licence"]["name"]
    print(f"{out}: {size / 1e6:.2f} MB, {told['steps']} steps, {told['cpu_hours']:.1f} core-hours in all, {licence}")
    return release


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument("name", help="e.g. brainfm_s")
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--manifest", type=Path, help="of scripts/foundation_data.py; else beside the run's store")
    parser.add_argument(
        "--earlier",
        type=Path,
        nargs="*",
        default=[],
        metavar="RUN_OR_FILE",
        help="what it went on from, for the curves",
    )
    parser.add_argument("--commit", help="of the code that trained, where the file does not say")
    parser.add_argument("--ordinary", type=int, default=40, help="scans of the training side to label; 0: none")
    parser.add_argument("--look-mm", type=float, nargs=2, metavar=("LOW", "HIGH"), help="voxels that anatomy sees")
    parser.add_argument("--out", type=Path, default=FOLDER)
    try:
        make(parser.parse_args())
    except BrainfmError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
