"""A study of a segmentation: Dice of whole volumes; mirroring and clean-up only where held-out cases gain."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch.utils.data import Dataset

from brainfm.data.fingerprint import choose_patch, fingerprint
from brainfm.data.patches import collate
from brainfm.data.store import Store
from brainfm.data.targets import LESION_NAME
from brainfm.errors import ConfigError, ManifestError
from brainfm.files import write_arrays
from brainfm.nets.backbone import Backbone
from brainfm.nets.backbone_file import LoadedBackbone
from brainfm.nets.decoders import DenseHead
from brainfm.nets.transfer import transfer
from brainfm.scoring.intervals import bootstrap, paired_bootstrap, paired_permutation
from brainfm.scoring.masks import dice, instance_scores, volume_ml
from brainfm.seeds import stream
from brainfm.specs import Decisions, TaskSpec
from brainfm.study.shortcuts import audit
from brainfm.tasks import place
from brainfm.tasks.segmentation import baselines, cleanup
from brainfm.tasks.segmentation.cases import LabelledCase, TaskPatches, class_shares, find_cases, whole_case
from brainfm.tasks.segmentation.losses import SegmentationLoss
from brainfm.tasks.segmentation.network import SegmentationTask
from brainfm.tasks.segmentation.settings import SegmentationSettings
from brainfm.tasks.settings import FinetuneData
from brainfm.tasks.study import Decided, Place, Row, Scored, Split, Study, cases_of, fold_key, identity, subjects_of
from brainfm.tasks.task import Task
from brainfm.tasks.windows import predict_windows

_WORTH = 0.002  # Dice that a change must bring on held-out cases before it is kept
_LONGEST_NAME = 180  # bytes
_PROBED, _PROBED_VOXELS = 16, 2500  # patches, and voxels of each, that a linear start looks at
_SCORES = ("dice", "lesion_f1", "false_positives", "volume_error_ml")


class SegmentationStudy(Study):
    """See Study.

    Args:
        store: prepared scans with labels.
        settings: of the task.
        mirror: axes along which mirroring is tried; empty: not at all.
        clean: whether post-processing is tried.

    Raises:
        BrainfmError: where no session has the label, or a setting is impossible.
    """

    settings: SegmentationSettings
    primary, larger_is_better, takes_decoder = "dice", True, True
    cases: tuple[Any, ...] = ()

    def __init__(
        self, store: Store, settings: SegmentationSettings, mirror: Sequence[int] = (), clean: bool = True
    ) -> None:
        self.store, self.settings = store, settings
        target, contrasts = settings.target, settings.contrasts
        if contrasts is None:
            names = {f"{target}_mask", f"{target}_labels"}
            labelled = [s for s in store.sessions if any(entry.name in names for entry in s.labels)]
            contrasts = tuple(sorted({scan.contrast for session in labelled for scan in session.scans}))
        cases, left_out = find_cases(store, contrasts, target)
        _refuse_one_value(store, cases, target)
        self.cases, self.left_out = tuple(cases), tuple(left_out)
        self.loss = SegmentationLoss(settings.loss)
        self.mirror, self.clean = tuple(mirror), clean
        self.instances = all(case.label.endswith("_mask") for case in cases)
        self.spec = TaskSpec(
            kind="segmentation",
            target=target,
            contrasts=contrasts,
            values=_values_of(store, cases, settings.values),
            patch_vox=(0, 0, 0),
            fusion=settings.fusion,
        )

    def patch(self, backbone: Backbone, most_voxels: int) -> tuple[int, int, int]:
        if self.settings.patch_vox != "auto":
            return self.settings.patch_vox
        return choose_patch(fingerprint(self.store, self.cases), backbone.strides[-1], most_voxels)

    def settle(self, patch_vox: tuple[int, int, int]) -> None:
        self.spec = replace(self.spec, patch_vox=patch_vox)

    def task(self, backbone: Backbone, trained: Sequence[Any], pretrained: LoadedBackbone | None = None) -> Task:
        decoder = pretrained.decoder if pretrained is not None else None
        task = SegmentationTask(
            self.spec,
            backbone,
            loss=self.loss,
            deep_supervision=self.settings.deep_supervision,
            shares=class_shares(self.store, trained, self.spec.values, self.spec.patch_vox),
            dense_channels=sum(decoder.parts.values()) if decoder is not None else 0,
        )
        if pretrained is not None and decoder is not None:
            transfer(task.decoder, decoder.state_dict(), origin="the decoder of the backbone file")
            head = self.row_of(pretrained)
            if head is None:
                task.begin_fresh()
            else:
                parts = list(decoder.parts)
                task.begin_as(head, sum(decoder.parts[part] for part in parts[: parts.index(head.part)]))
        return task

    def row_of(self, pretrained: LoadedBackbone) -> DenseHead | None:
        """The pre-trained head that the last layer begins as: of a task about a lesion the file's ``lesion``."""
        head = pretrained.heads.get("lesion")
        asked = self.spec.classes == 2 and LESION_NAME.search(self.spec.target.lower())
        return head if head is not None and head.out_channels == 1 and asked else None

    @torch.no_grad()
    def start(self, task: Task, trained: Sequence[Any], device: torch.device) -> None:
        """The last layer begins as a linear probe of the features before it: what a pre-trained decoder knows would
        else not be heard before a hundred steps, and fresh features tell something, too. Scratch gets it as well, so
        that both are compared on equal terms. A last layer that began as a head of the file stays so where its loss is
        the lower one, in patches that the probe was not fitted to."""
        assert isinstance(task, SegmentationTask)
        if self.settings.head_start == "fresh":
            return
        patches = TaskPatches(self.store, trained, self.spec.values, self.spec.patch_vox, 0, 0.5, 0.0)
        task.eval().to(device)
        features, classes = [], []
        for number in range(_PROBED):
            batch = collate([patches[number]]).to(device)
            assert batch.present is not None and batch.label is not None
            voxels = task.climb(batch.image.float(), batch.present)[-1][0].flatten(1).t()
            drawn = stream(0, "linear start", number).integers(len(voxels), size=_PROBED_VOXELS)
            chosen = torch.from_numpy(drawn).to(device)
            features.append(voxels[chosen])
            classes.append(batch.label[0].flatten()[chosen])
        if task.began != "fresh":
            half, probe = _PROBED // 2, copy.deepcopy(task)
            probe.begin_linear(torch.cat(features[:half]), torch.cat(classes[:half]))
            asked = torch.cat(features[half:]), torch.cat(classes[half:])
            if task.loss_of(*asked) <= probe.loss_of(*asked):
                return
        task.begin_linear(torch.cat(features), torch.cat(classes))

    def patches(self, trained: Sequence[Any], seed: int, data: FinetuneData) -> Dataset:
        return TaskPatches(
            self.store,
            trained,
            self.spec.values,
            self.spec.patch_vox,
            seed,
            data.foreground_share,
            data.contrast_dropout,
        )

    def watch(self, task: Task, cases: Sequence[Any], place: Place) -> float:
        return float(np.mean(self.each(task, cases, place)))

    def each(self, task: Task, cases: Sequence[Any], place: Place) -> list[float]:
        scores = []
        for case in cases:
            probabilities, true = self._probabilities(task, case, place, ())
            scores.append(self._dice(probabilities.argmax(0), true)[0])
        return scores

    def answer(self, task: Task, split: Split, place: Place, folder: Path) -> list[Row]:
        rows = []
        for case in split.held:
            row = identity(case.session, split)
            variants, indices = [], []
            for mirror in [(), self.mirror] if self.mirror else [()]:
                probabilities, true = self._probabilities(task, case, place, mirror)
                labels = probabilities.argmax(0)
                indices.append(labels.astype(np.uint8))
                for candidate in cleanup.candidates() if self.clean else [Decisions()]:
                    decisions = replace(candidate, mirror=mirror)
                    cleaned = cleanup.apply(labels, decisions, self.store.spec.spacing_mm)
                    variants.append({"decisions": decisions.to_dict(), **self._scores(cleaned, true)})
            file = folder / "held" / _file_name(case.session.key)
            _save_array(file, np.stack(indices))  # [1 | 2, X, Y, Z]: as it stands, and with mirroring
            rows.append(row | {"variants": variants, "file": f"{folder.name}/held/{file.name}"})
        return rows

    def decide(self, rows: Sequence[Row]) -> Decided:
        folds = sorted({fold_key(row) for row in rows})
        count = len(rows[0]["variants"])
        table = np.array([[v["dice"] for v in row["variants"]] for row in rows])
        of_fold, subject = np.array([fold_key(row) for row in rows]), np.array(subjects_of(rows))
        chosen = _best(table) if len(folds) > 1 else 0
        reported = []
        for row, fold in zip(rows, of_fold):
            others = table[~np.isin(subject, subject[of_fold == fold])]  # nor its subjects in another repeat
            variant = row["variants"][_best(others) if len(others) else 0]
            reported.append({k: v for k, v in row.items() if k != "variants"} | variant)
        said = []
        for number in range(1, count):
            decisions = Decisions.from_dict(rows[0]["variants"][number]["decisions"])
            gain = float((table[:, number] - table[:, 0]).mean())
            kept = " (kept)" if number == chosen else ""
            said.append(f"{_words(decisions)}: {gain:+.4f} Dice on held-out cases{kept}")
        if len(folds) < 2 and count > 1:
            said.append("nothing is decided on one fold")
        decisions = Decisions.from_dict(rows[0]["variants"][chosen]["decisions"])
        return Decided(replace(decisions, region=self._region), reported, tuple(filter(None, (*said, self._place()))))

    def score(self, rows: Sequence[Row], seed: int) -> Scored:
        groups = subjects_of(rows)
        names = [n for n in rows[0] if n in _SCORES or n.startswith("dice_")]
        metrics = {}
        for name in names:
            values = np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=np.float64)
            known = np.isfinite(values)
            if known.any():
                metrics[name] = bootstrap(
                    np.mean, values[known], groups=[g for g, k in zip(groups, known) if k], seed=seed
                )
        return Scored(metrics, list(rows))

    def baseline(self, name: str, backbone: Backbone, splits: Sequence[Split], seed: int) -> list[Row]:
        rows = []
        for split in splits:
            predict: Callable[[LabelledCase], np.ndarray]
            if name == "features":
                predict = baselines.voxel_baseline(self.store, split.trained, self.spec, seed)
            else:
                predict = baselines.random_linear_voxels(self.store, split.trained, self.spec, backbone.config, seed)
            for case in split.held:
                true = whole_case(self.store, case, self.spec.values)[2]
                rows.append(identity(case.session, split) | self._scores(predict(case), true))
        return rows

    def audit(self, rows: Sequence[Row], columns: Sequence[str], seed: int) -> dict[str, Any] | None:
        """Of the volume, as a logarithm: a lesion map has no one answer that a site could tell."""
        first = [row for row in rows if row["repeat"] == 0]
        truth, answers = (np.log1p([row[name] for row in first]) for name in ("true_ml", "predicted_ml"))
        if len(set(truth.tolist())) < 2:
            return None
        spec = replace(self.spec, kind="regression", target=f"log volume of {self.spec.target}", values=())
        return audit(self.store, cases_of(first, self.cases), truth, answers, spec, seed, columns=columns).to_dict()

    def strata(self) -> dict[str, str] | None:
        """Whether a subject has any labelled voxel, where some have none."""
        lesions: dict[str, bool] = {}
        for case in self.cases:
            has = len(self.store.label_points(case.session, case.label)) > 0
            lesions[case.session.subject_key] = lesions.get(case.session.subject_key, False) or has
        if len(set(lesions.values())) < 2:
            return None
        return {subject: "lesion" if has else "none" for subject, has in lesions.items()}

    def _compare(self, mine: Sequence[Row], theirs: Sequence[Row], seed: int) -> dict[str, Any]:
        a, b = (np.array([row["dice"] for row in rows]) for rows in (mine, theirs))
        groups = subjects_of(mine)

        def mean(truth: np.ndarray, values: np.ndarray) -> float:
            return float(np.mean(values))

        difference = paired_bootstrap(mean, a, a, b, groups=groups, seed=seed)
        p = paired_permutation(mean, a, a, b, groups=groups, seed=seed)
        return {
            "metric": "dice", "difference": difference.mean, "low": difference.low, "high": difference.high,
            "p": p, "n": len(mine),
        }  # fmt: skip

    @cached_property
    def _region(self) -> tuple[float, ...]:
        """Where in the heads the structure lies, where that is one place."""
        if not self.cases:
            return ()
        boxes = []
        for case in self.cases:
            found = ndimage.find_objects((self.store.volume(case.session, case.label) != 0).astype(np.uint8))
            boxes.append(found[0] if found else None)
        people = [case.session.subject_key for case in self.cases]
        return place.learned([case.session.shape for case in self.cases], boxes, people, self.store.spec.spacing_mm)

    def _place(self) -> str:
        words = place.words(self._region)
        return words and f"{self.spec.target}: {words}"

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _probabilities(
        self, task: Task, case: LabelledCase, place: Place, mirror: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        image, present, label = whole_case(self.store, case, self.spec.values)
        found = predict_windows(
            task,
            torch.from_numpy(image),
            torch.from_numpy(present),
            self.spec.patch_vox,
            device=place.device,
            autocast=place.autocast,
            mirror=mirror,
        )
        return found.numpy(), label

    def _dice(self, predicted: np.ndarray, true: np.ndarray) -> tuple[float, dict[str, float]]:
        each = {f"dice_{self.spec.values[k]}": dice(predicted == k, true == k) for k in range(1, self.spec.classes)}
        return float(np.mean(list(each.values()))), each if len(each) > 1 else {}

    def _scores(self, predicted: np.ndarray, true: np.ndarray) -> Row:
        spacing = self.store.spec.spacing_mm
        mean, each = self._dice(predicted, true)
        volumes = volume_ml(true > 0, spacing), volume_ml(predicted > 0, spacing)
        row: Row = {"dice": mean, **each}
        if self.instances:
            found = instance_scores(predicted > 0, true > 0, spacing)
            row |= {f"lesion_{k}" if k == "f1" else k: v for k, v in found.items()}
        return row | {
            "true_ml": volumes[0],
            "predicted_ml": volumes[1],
            "volume_error_ml": abs(volumes[0] - volumes[1]),
        }


def _best(table: np.ndarray) -> int:
    """The column with the largest mean, or the first where no other is worth it."""
    means = table.mean(axis=0)
    best = int(means.argmax())
    return best if means[best] >= means[0] + _WORTH else 0


def _words(decisions: Decisions) -> str:
    words = []
    if decisions.mirror:
        words.append("mirroring along " + ", ".join("XYZ"[axis] for axis in decisions.mirror))
    if decisions.largest_component:
        words.append("largest component only")
    if decisions.min_ml:
        words.append(f"components below {decisions.min_ml:g} ml removed")
    return " and ".join(words) or "as it is"


def _file_name(key: Sequence[str]) -> str:
    """Of a held-out answer: the session's key, cut where it is longer than a file may be called, and then marked."""
    name = "__".join(part for part in key if part).replace("/", "-")
    if len(name.encode()) > _LONGEST_NAME:
        digest = hashlib.blake2b("\0".join(key).encode(), digest_size=4).hexdigest()
        name = f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{digest}"
    return f"{name}.npz"


def _refuse_one_value(store: Store, cases: Sequence[LabelledCase], target: str) -> None:
    """Raises: ConfigError where there is nothing to tell apart: no case has a labelled voxel, or none has any other."""
    if not any(len(store.label_points(case.session, case.label)) for case in cases):
        raise ConfigError(f"{store.path}: none of the {len(cases)} sessions has a voxel of {target}, expected some")
    if all(store.volume(case.session, case.label).all() for case in cases):
        raise ConfigError(f"{store.path}: {target} fills all of the {len(cases)} sessions, expected some background")


def _values_of(store: Store, cases: Sequence[LabelledCase], given: Sequence[int] | None) -> tuple[int, ...]:
    """The label values of the classes, background first: those given, 0 and 1 for masks, or those found.

    Raises:
        ManifestError: where a case has another value than those given.
    """
    if all(case.label.endswith("_mask") for case in cases):
        return tuple(given or (0, 1))
    found: set[int] = {0}
    for case in cases:
        there = set(np.unique(store.volume(case.session, case.label)).tolist())
        strange = sorted(there - set(given or there))
        if strange:  # now, and not in the middle of a training
            expected = ", ".join(map(str, given or ()))
            raise ManifestError(
                f"session {'/'.join(p for p in case.session.key if p)}: {case.label} has the value {strange[0]}, "
                f"expected one of task.values={expected}"
            )
        found |= there
    return tuple(given or sorted(found))


def _save_array(file: Path, array: np.ndarray) -> None:
    write_arrays(file, {"indices": array}, compressed=True)
