"""Frozen answers: what linear models of a network's maps, or of region volumes, know; nothing of it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.data.region_volumes import find_volumes
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.untrained import random_backbone
from brainfm.probing.features import WHOLE, Encoder, embed, read, write
from brainfm.probing.levels import Crop, joined_answers, level_maps, near_level
from brainfm.scoring import linear
from brainfm.scoring.masks import dice
from brainfm.tasks.engine import settle_device
from brainfm.tasks.study import Row, Study

_MARGIN_MM, _MOST_VOX = 8.0, 128  # around what is labelled; edge of what passes the network at once
Key = tuple[str, str, str]


def column_answers(
    study: Study,
    network: Mapping[str, Any] | None,
    file: Path | None,
    seed: int,
    people: tuple[Sequence[str], Sequence[str]],
    kept: Path,
    device: str = "auto",
) -> list[Row]:
    """Of a ridge or a logistic regression, whose penalty is chosen among the people that it is fitted on.

    Args:
        network: configuration of the encoder; None: region volumes are read.
        file: the backbone file; None: fresh weights of this seed.
        people: to fit on, and to answer.
        kept: file of the features of all whole heads, made once.

    Raises: ConfigError where no label column of the store tells volumes.
    """
    values = _volumes(study) if network is None else _features(study.store, network, file, seed, kept, device, study)
    cases = [[case for case in study.cases if case.session.subject_key in who] for who in people]
    fitted, asked = (np.stack([values[case.session.key] for case in side]) for side in cases)
    answers = [np.array([float(case.answer[0]) for case in side]) for side in cases]
    classes = len(study.spec.values) or None
    model, truth = ("ridge", answers[0]) if classes is None else ("logistic", answers[0].astype(np.int64))
    groups = [case.session.subject_key for case in cases[0]]
    found = linear.tuned(fitted, truth, groups, asked, model, seed, classes=classes).answers
    return [
        {
            "subject": case.session.subject_key, "session": case.session.session, "truth": [float(true)],
            "answer": np.atleast_1d(said).tolist(),
        } for case, true, said in zip(cases[1], answers[1], found)
    ]  # fmt: skip


def _volumes(study: Study) -> Mapping[Key, np.ndarray]:
    found, notes = find_volumes(study.store, [case.session for case in study.cases], study.spec.target)
    if found is None:
        raise ConfigError(
            f"models: volumes need a label column of every session with {study.spec.target}, or leave them out; found "
            f"{'; '.join(notes) or 'none'}"
        )
    return found.values


def _features(
    store: Store, network: Mapping[str, Any], file: Path | None, seed: int, kept: Path, device: str, study: Study
) -> dict[Key, np.ndarray]:
    """Of each session the mean over its scans."""
    if not kept.is_file():
        encoder = Encoder.random(network, seed) if file is None else Encoder.load(file, [WHOLE])
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(embed(encoder, store, contrasts=study.spec.contrasts, device=device), kept)
    found = read(kept)
    rows: dict[Key, list[np.ndarray]] = {}
    for (dataset, subject, session, *_), values in zip(found.rows, found.parts[WHOLE]):
        rows.setdefault((dataset, subject, session), []).append(values.astype(np.float64))
    return {key: np.mean(of, axis=0) for key, of in rows.items()}


def mask_answers(
    study: Study,
    network: Mapping[str, Any],
    file: Path | None,
    seed: int,
    people: tuple[Sequence[str], Sequence[str]],
    device: str = "auto",
) -> list[Row]:
    """Of one linear discriminant of all maps together, with those of a decoder that the file has, at voxels of 2 mm in
    the box around what is labelled, of the first scan of each session.

    Args: as `column_answers`.

    Returns:
        Dice of each session, the mean over the classes.
    """
    place = settle_device(device)
    loaded = None if file is None else load_backbone(file)
    backbone = (random_backbone(network, seed) if loaded is None else loaded.backbone).to(place)
    decoder = None if loaded is None or loaded.decoder is None else loaded.decoder.to(place)
    stride, classes = backbone.strides[-1], len(study.spec.values)
    fitted = list(_crops(study, people[0], stride))
    truths: list[tuple[Any, torch.Tensor]] = []

    def tested() -> Iterator[Crop]:
        for case, crop in zip(_of(study, people[1]), _crops(study, people[1], stride)):
            assert crop.truth is not None
            truths.append((case, crop.truth))
            yield crop

    rows = []
    for said in joined_answers(level_maps(backbone, decoder), fitted, tested(), classes, place):
        case, truth = truths[-1]
        each = [dice(said == value, truth.numpy() == value) for value in range(1, classes)]
        rows.append(
            {
                "subject": case.session.subject_key, "session": case.session.session, "score": float(np.mean(each)),
            }
        )  # fmt: skip
    return rows


def _of(study: Study, people: Sequence[str]) -> list[Any]:
    return [case for case in study.cases if case.session.subject_key in people]


def _crops(study: Study, people: Sequence[str], stride: int) -> Iterator[Crop]:
    store, values = study.store, np.array(study.spec.values, np.int64)
    table = np.full(int(values.max()) + 1, -1)
    table[values] = np.arange(len(values))
    for number, case in enumerate(_of(study, people)):
        level = near_level(store, case.session)
        shape = store.shape(case.session, level)
        labels = store.block(case.session, case.label, (0, 0, 0), shape, level=level)
        margin = round(_MARGIN_MM / (store.spec.spacing_mm[0] * 2**level))
        corner, size = _box(labels != 0, margin, stride)
        scan = next(names[0] for names in case.scans if names)
        image = store.block(case.session, scan, corner, size, level=level).astype(np.float32)
        truth = table[store.block(case.session, case.label, corner, size, level=level)].astype(np.int64)
        yield Crop(number, False, torch.from_numpy(image)[None, None], truth=torch.from_numpy(truth))


def _box(mask: np.ndarray, margin: int, stride: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Corner and size of the box around a mask, the whole array where it is empty; edges are multiples of the
    stride."""
    corner, size = [], []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (used[0] - margin, used[-1] + 1 + margin) if used.size else (0, mask.shape[axis])
        edge = max(2 * stride, min(-(-int(high - low) // stride) * stride, max(_MOST_VOX // stride, 2) * stride))
        corner.append(int(low + high - edge) // 2)
        size.append(edge)
    return tuple(corner), tuple(size)
