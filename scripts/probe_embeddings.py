"""The linear probe of FOMO26 tasks 6 and 7 on real heads: what the scale of an embedding does to it.

python scripts/probe_embeddings.py DATA3D [--backbone FILE] [--splits 20] [--cache FEATURES.npz]

Heads of IXI (DATA3D/ixi2mm) are asked for sex and for the decade of age, raw, at unit length, and with every feature
brought to one spread over heads of another site (DATA3D/ds002748_2mm), which is what `container` stores as scale.npy.
Without a backbone file the weights are random. Batches are a quarter of the training heads, so that 20 epochs are 80
steps as in the challenge. Splits are of people: 40 % train, 10 % choose the rate, 50 % are told.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brainfm.imaging.preprocess import prepare_session
from brainfm.probing.features import WHOLE_HEADS, Encoder, pool
from brainfm.specs import PreprocessSpec
from brainfm.submission.linear_probe import SPREAD, ProbeSpec, probe, scale_of, split
from brainfm.submission.metrics import ovr_auroc, ovr_f1

GRID = PreprocessSpec(spacing_mm=(2.0, 2.0, 2.0))  # of these files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data3d", type=Path)
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--cache", type=Path, help="where features are kept between calls")
    asked = parser.parse_args()
    names, heads, reference = features(asked.data3d, asked.backbone, asked.cache)
    people = _people(asked.data3d / "ixi2mm" / "participants_age_sex.csv")
    known = [i for i, name in enumerate(names) if name in people]
    heads = heads[known]
    age = np.array([people[names[i]][0] for i in known])
    sex = [people[names[i]][1] for i in known]
    decade = np.clip(age // 10, 2, 6).astype(int) - 2  # 20s to 60 and above
    spread = heads.std(axis=0)
    print(
        f"{len(heads)} heads, {heads.shape[1]} features, mean length {np.linalg.norm(heads, axis=1).mean():.2f}, "
        f"typical spread of a feature {np.median(spread):.4f}"
    )
    print(f"{'asked':<8}{'embedding':<26}{'AUROC':>15}{'F1':>15}  rate chosen (range)")
    for name, labels in (("sex", sex), ("decade", decade.tolist())):
        for what, values in variants(heads, reference).items():
            aurocs, f1s, rates = tried(values, labels, asked.splits)
            low, high = min(rates), max(rates)
            print(f"{name:<8}{what:<26}{_shown(aurocs):>15}{_shown(f1s):>15}  {np.median(rates):g} ({low:g}-{high:g})")


def variants(heads: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
    centre, factor = scale_of(reference, spread=1.0)
    unit = (heads - centre) * factor
    return {
        "raw": heads,
        "unit length": heads / np.linalg.norm(heads, axis=1, keepdims=True),
        "spread 0.1": 0.1 * unit,
        "spread 1": unit,
        f"spread {SPREAD:g} (scale.npy)": SPREAD * unit,
        "spread 10": 10 * unit,
    }


def tried(values: np.ndarray, labels: Sequence[int], splits: int) -> tuple[list[float], list[float], list[float]]:
    """AUROC, F1 and the rate that was chosen, a split each."""
    truth = np.array(labels)
    aurocs, f1s, rates = [], [], []
    for seed in range(splits):
        train, validation, test = split(labels, seed)
        spec = ProbeSpec(batch=-(-len(train) // 4), seed=seed)
        found = probe(
            values[train], truth[train].tolist(), values[validation], truth[validation].tolist(), values[test], spec
        )
        rows, told = found.scores.tolist(), truth[test].tolist()
        aurocs.append(ovr_auroc(told, rows))
        f1s.append(ovr_f1(told, rows))
        rates.append(found.rate)
    return aurocs, f1s, rates


def features(data3d: Path, backbone: Path | None, cache: Path | None) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names and features of IXI, and features of the other site."""
    if cache is not None and cache.is_file():
        with np.load(cache, allow_pickle=False) as kept:
            return kept["names"].tolist(), kept["heads"], kept["reference"]
    encoder = Encoder.random({"name": "unet_s"}, 0) if backbone is None else Encoder.load(backbone)
    files = sorted((data3d / "ixi2mm").glob("IXI*/*_T1w.nii.gz"))
    others = sorted((data3d / "ds002748_2mm").rglob("*_T1w.nii.gz"))
    names = [path.parent.name for path in files]
    heads, reference = (np.stack([_embedded(encoder, path) for path in paths]) for paths in (files, others))
    if cache is not None:
        np.savez(cache, names=np.array(names), heads=heads, reference=reference)
    return names, heads, reference


def _embedded(encoder: Encoder, path: Path) -> np.ndarray:
    prepared = prepare_session({"t1": path}, {}, GRID)
    parts = pool(encoder, prepared.scans["t1"], prepared.foreground, WHOLE_HEADS)
    return np.concatenate(list(parts.values()))


def _people(table: Path) -> dict[str, tuple[float, int]]:
    """Age and sex (1: male) by name, of those that have both."""
    with table.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["Age"] and row["Sex"]]
    return {row["MRID"]: (float(row["Age"]), int(row["Sex"] == "M")) for row in rows}


def _shown(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} +- {np.std(values):.3f}"


if __name__ == "__main__":
    main()
