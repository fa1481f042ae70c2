"""One run of scripts/evidence/foundation.py: a start is fine-tuned at a constant rate, and the moving average of its
weights is tested after so many steps. Everything drawn follows from the run's seed, so that starts are paired: the same
people, the same patches in the same order, the same fresh weights where weights are fresh.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foundation_people import Setting, Test
from lightning.fabric import Fabric

from brainfm.batch import Batch, Terms
from brainfm.data.augment import AugmentSpec, augment_spec
from brainfm.data.loader import StepSampler, make_loader
from brainfm.data.patches import Sample
from brainfm.data.regions import RENDERED, RENDERED_FAMILIES, outside_by_intensity, renders_of
from brainfm.data.store import Store
from brainfm.errors import ConfigError, TrainingError
from brainfm.files import write_whole
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.backbone_file import LoadedBackbone
from brainfm.nets.cpu import swap_in
from brainfm.nets.lengths import restore_lengths
from brainfm.nets.transfer import transfer
from brainfm.scoring.masks import dice
from brainfm.seeds import stream
from brainfm.synthesis.render import render_views
from brainfm.synthesis.settings import LookSpec
from brainfm.tasks.segmentation.cases import LabelledCase, TaskPatches
from brainfm.tasks.segmentation.study import SegmentationStudy
from brainfm.tasks.task import Task
from brainfm.tasks.windows import predict_windows, window_slices
from brainfm.training.adapt import adapted_optimizer, learning_parts
from brainfm.training.loop import LoopSpec, Run, train
from brainfm.training.optim import Wsd
from brainfm.training.settings import AdaptSpec
from brainfm.training.supervised import Supervised

AUGMENT = {"flip": 0.5, "affine": 0.3, "rotate_deg": 15, "scale": 0.15, "intensity": 0.3}  # configs/finetune.yaml
ARTEFACTS = {"preset": "full", "intensity": 0.3, "bias": 0.5, "low_res": 0.3}  # configs/experiment/dense_split_s.yaml
AVERAGE = 0.999
WARMUP_STEPS = 10
CHECKPOINT_EVERY = 200
_GIVEN_UP = "; left as it is"


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        name: scratch | encoder | decoder | rendered.
        mark: 8 hexadecimal digits of what it depends on: runs from scratch serve every file of one network.
        network: configuration of the encoder.
        file: the backbone file that weights are taken from.
        recipe: of the renderings that replace part of the training patches.
    """

    name: str
    mark: str
    network: dict[str, Any]
    file: LoadedBackbone | None = None
    recipe: dict[str, Any] | None = None


def starts_of(loaded: LoadedBackbone) -> dict[str, Start]:
    """Fresh weights, the file's encoder, its encoder and decoder where it has one, and fresh weights that see
    renderings of their own label maps as the file's pre-training made them."""
    network = dict(loaded.backbone.config)
    data = loaded.provenance.config.get("data", {})
    recipe = {
        "share": data.get("rendered", 0.6), "looks": data.get("looks", {}), "augment": data.get("augment") or ARTEFACTS,
    }  # fmt: skip
    found = [
        Start("scratch", _mark(network), network),
        Start("encoder", loaded.fingerprint[:8], network, loaded),
        Start("rendered", _mark([network, recipe]), network, recipe=recipe),
    ]
    if loaded.decoder is not None:
        found.insert(2, Start("decoder", loaded.fingerprint[:8], network, loaded))
    return {start.name: start for start in found}


def _mark(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Family:
    """What the runs of a family share.

    Attributes:
        question: with the cases that may be trained on.
        tests, trials: what runs and trials of rates are tested on.
        others: the same people in other contrasts, and
        pairs: real scans of several contrasts; both are asked of wide runs, after every second read.
    """

    name: str
    setting: Setting
    store: Store
    question: SegmentationStudy
    tests: tuple[Test, ...]
    trials: tuple[Test, ...] = ()
    others: tuple[Test, ...] = ()
    pairs: tuple[Test, ...] = ()


@dataclass(frozen=True)
class Job:
    """A run, or a trial of a rate.

    Attributes:
        trained: keys of the people.
        reads: steps after which the average is tested; the last ends the run.
        trial: whether it is a trial, which is tested on the people of trials.
        wide: whether other contrasts are tested as well.
    """

    family: str
    start: str
    mark: str
    seed: int
    trained: tuple[str, ...]
    reads: tuple[int, ...]
    rate: float = 0.0
    trial: bool = False
    wide: bool = False

    @property
    def wide_reads(self) -> tuple[int, ...]:
        return self.reads[1::2] if self.wide else ()

    @property
    def name(self) -> str:
        words = (self.family, self.start, self.mark, f"{len(self.trained)}shots", f"seed{self.seed}")
        return "_".join(words) + (f"_rate{self.rate:g}" if self.trial else "")

    def file(self, out: Path) -> Path:
        return out / ("trials" if self.trial else "runs") / f"{self.name}.json"


def tests_for(job: Job, family: Family) -> list[Test]:
    """What a job is tested on: a trial on those of its people that it was not trained on."""
    return [test for test in (family.trials if job.trial else family.tests) if test.subject not in job.trained]


def setting_of(job: Job, family: Family) -> dict[str, Any]:
    """All that a score depends on beside the code."""
    s = family.setting
    values = {
        "rate": job.rate, "seed": job.seed, "reads": list(job.reads), "trained": sorted(job.trained),
        "tested": [f"{test.part} {test.subject}" for test in tests_for(job, family)], "mark": job.mark,
        "others": [f"{test.part} {test.subject}" for test in family.others if job.wide],
        "wide_reads": list(job.wide_reads), "patch_vox": list(s.patch_vox), "batch": s.batch,
        "spacing_mm": s.spacing_mm, "overlap": s.overlap, "store": family.store.fingerprint(),
    }  # fmt: skip
    return json.loads(json.dumps(values))


def recorded(job: Job, out: Path) -> dict[str, Any] | None:
    """What a finished run has left, whatever its setting was."""
    file = job.file(out)
    return json.loads(file.read_text()) if file.exists() else None


def is_done(job: Job, family: Family, out: Path) -> bool:
    """Raises: ConfigError where the run was made with another setting."""
    record = recorded(job, out)
    if record is None:
        return False
    for key, wanted in setting_of(job, family).items():
        if record["setting"].get(key) != wanted:
            raise ConfigError(
                f"{job.file(out)}: was made with {key}={record['setting'].get(key)}, now {key}={wanted}; expected the "
                "same, or another folder"
            )
    return True


def score_of(record: dict[str, Any]) -> float:
    """Of a trial: the mean Dice over its reads and people, 0 for reads that are missing."""
    found = [v["dice"] for read in record["reads"].values() for part in read.values() for v in part.values()]
    return sum(found) / (len(record["setting"]["reads"]) * len(record["setting"]["tested"]))


def best_rate(trials: Sequence[Job], out: Path) -> float:
    """The rate whose trials score best, the smaller one where two do. Raises: ConfigError where some are not there."""
    scores: dict[float, list[float]] = {}
    for job in trials:
        record = recorded(job, out)
        if record is None:
            raise ConfigError(f"{job.file(out)} is not there, expected the trials of the rates to be run first")
        scores.setdefault(job.rate, []).append(score_of(record))
    return max(sorted(scores), key=lambda rate: sum(scores[rate]) / len(scores[rate]))


# ---- patches that are rendered ---------------------------------------------------------------------------------------


@dataclass
class RenderedPatches(TaskPatches):
    """The patches of TaskPatches, each with the render classes of its voxels, so that a share of them is painted anew.

    Args:
        share: of the patches that are renderings.
        parcels: name of the label volume that tells the render classes (DLMUSE).
    """

    share: float = 0.6
    parcels: str = "dlmuse_labels"
    _tissue: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __getitem__(self, i: int) -> Sample:
        sample = super().__getitem__(i)
        case, _, corner = self._drawn(i)
        tissue, shares = self.of(case)
        low, edge = np.minimum(corner, 0), self.patch_vox  # a head thinner than the patch is padded on both sides
        padded = np.pad(tissue, [(-int(b), max(0, p - n)) for b, p, n in zip(low, edge, tissue.shape)])
        box = tuple(slice(c - int(b), c - int(b) + p) for c, b, p in zip(corner, low, edge))
        rendered = stream(self.seed, "evidence rendered", i).random() < self.share
        return replace(
            sample, partner=sample.image, corners=np.zeros((2, 3), np.int64), tissue=padded[box], tissue_shares=shares,
            rendered=np.array([rendered, False]), real=True,
        )  # fmt: skip

    def of(self, case: LabelledCase) -> tuple[np.ndarray, np.ndarray]:
        """Render classes of a head [X, Y, Z] uint8, and the share of each in what is not air [R] float32."""
        key = case.session.subject_key
        if key not in self._tissue:
            ids, table = self.store.volume(case.session, self.parcels), renders_of("dlmuse")
            scan = self.store.volume(case.session, case.scans[0][0]).astype(np.float32)
            tissue = outside_by_intensity(table[np.where(ids < len(table), ids, 0)], scan)
            counts = np.bincount(tissue.ravel(), minlength=len(RENDERED))
            counts[0] = 0
            self._tissue[key] = tissue, (counts / max(counts.sum(), 1)).astype(np.float32)
        return self._tissue[key]


class RenderedSupervised(Supervised):
    """A task whose training patches are painted as drawn before they are augmented."""

    def __init__(self, task: Task, augment: AugmentSpec | None, seed: int, max_steps: int, looks: LookSpec) -> None:
        super().__init__(task, augment, seed, AVERAGE, max_steps)
        self.looks = looks

    def forward(self, batch: Batch, progress: float) -> Terms:
        if batch.tissue is not None:
            batch = render_views(batch, RENDERED_FAMILIES, self.looks, tuple(batch.image.shape[2:]), self.seed)
            batch = replace(batch, partner=None)
        return super().forward(batch, progress)


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A run before its first step."""

    module: Supervised
    optimizer: torch.optim.Optimizer
    patches: TaskPatches


def encoder_of(start: Start, seed: int) -> Backbone:
    """The encoder of a start: the file's, or fresh from the seed. Whatever is made next is drawn alike for all."""
    torch.manual_seed(seed)
    encoder = build_backbone(**start.network)
    if start.file is not None:
        transfer(encoder, start.file.backbone.state_dict(), origin="the backbone file")
    return encoder


def prepared(job: Job, family: Family, start: Start) -> Prepared:
    """The network, its optimiser and its patches: functions of the job and the start."""
    encoder, decoder = encoder_of(start, job.seed), start.name == "decoder"
    cases = [c for c in family.question.cases if c.session.subject_key in job.trained]
    if len(cases) != len(job.trained):
        raise ConfigError(f"{family.store.path}: {len(cases)} of the people {', '.join(job.trained)} are there")
    task = swap_in(family.question.task(encoder, cases, start.file if decoder else None))
    adapt = AdaptSpec(start.name, decoder=decoder)
    for part in learning_parts(task, adapt, decoder) if start.file is not None else ():
        restore_lengths(part)
    family.question.start(task, cases, torch.device("cpu"))  # of scratch too, as in fine-tuning
    steps, spec = job.reads[-1], family.question.spec
    optimizer = adapted_optimizer(task, adapt, lr=job.rate, weight_decay=3e-5, max_steps=steps)
    if start.recipe is None:
        module = Supervised(task, augment_spec(AUGMENT), job.seed, AVERAGE, steps)
        return Prepared(module, optimizer, TaskPatches(family.store, cases, spec.values, spec.patch_vox, job.seed))
    looks = LookSpec(**start.recipe["looks"])
    module = RenderedSupervised(task, augment_spec(start.recipe["augment"]), job.seed, steps, looks)
    share = float(start.recipe["share"])
    patches = RenderedPatches(family.store, cases, spec.values, spec.patch_vox, job.seed, share=share)
    return Prepared(module, optimizer, patches)


def perform(job: Job, family: Family, start: Start, out: Path, fabric: Fabric) -> dict[str, Any] | None:
    """Runs or resumes a job and writes its record; None where it was interrupted and has saved.

    A run whose loss breaks is recorded with its reads up to there, and scores 0 in those that are missing.
    """
    folder, cpu = out / "unfinished" / job.name, time.process_time()
    made = prepared(job, family, start)
    kept = folder / "reads.json"
    state: dict[str, Any] = {"reads": {}, "notes": [], "core_seconds": 0.0}
    if kept.exists() and (folder / "last.ckpt").exists():
        state = json.loads(kept.read_text())
    spent = state["core_seconds"]

    def after(step: int, progress: float) -> None:
        assert made.module.average is not None
        made.module.average.update(step)
        _look(made, fabric, step, state["notes"])
        if step in job.reads:
            state["reads"][str(step)] = read(made.module.answering, job, family, step, fabric.device)
        if step in job.reads or step % CHECKPOINT_EVERY == 0:
            state["core_seconds"] = spent + time.process_time() - cpu
            write_whole(kept, json.dumps(state).encode())

    steps = job.reads[-1]
    spec = LoopSpec(
        steps, 0, log_every=100, checkpoint_every=CHECKPOINT_EVERY, wsd=Wsd(WARMUP_STEPS, horizon_steps=steps)
    )

    def loader_from(step: int) -> Any:
        return make_loader(made.patches, StepSampler(step, steps, family.setting.batch), workers=0)

    run = Run(
        fabric, folder, setting_of(job, family), made.module, made.optimizer, loader_from, spec, after_step=after,
        title=job.name,
    )  # fmt: skip
    try:
        if train(run).step < steps:
            return None
    except TrainingError as error:
        state["notes"].append(str(error))
    record = {"setting": setting_of(job, family), "job": job.name, **state}
    record["core_seconds"] = spent + time.process_time() - cpu
    write_whole(job.file(out), (json.dumps(record, indent=1) + "\n").encode())
    shutil.rmtree(folder, ignore_errors=True)
    return record


def _look(made: Prepared, fabric: Fabric, step: int, notes: list[str]) -> None:
    """A collapse to background is lifted as in fine-tuning; a second one is noted, and the run goes on as it is."""
    watch = made.module.foreground
    if watch is None or any(note.endswith(_GIVEN_UP) for note in notes):
        return
    try:
        said = watch.look(made.module.task, made.optimizer, lambda counts: counts, step)
    except TrainingError as error:
        said = f"{error}{_GIVEN_UP}"
    if said is not None:
        notes.append(said)


# ---- reads -----------------------------------------------------------------------------------------------------------


def read(network: Task, job: Job, family: Family, step: int, device: torch.device) -> dict[str, Any]:
    """part -> subject -> ``dice`` (mean over the classes) and each class's; of pairs see `read_pairs`."""
    found: dict[str, Any] = {}
    wide = step in job.wide_reads
    for test in (*tests_for(job, family), *(family.others if wide else ())):
        assert test.truth is not None
        answer = answered(network, test.image, family.setting, device)
        found.setdefault(test.part, {})[test.subject] = class_dice(answer, test.truth, family.setting.names)
    if family.pairs and wide:
        answers = {(t.subject, t.part): answered(network, t.image, family.setting, device) for t in family.pairs}
        found["pairs"] = read_pairs(family.pairs, answers, family.setting.names)
    return found


@torch.no_grad()
def answered(network: Task, image: np.ndarray, setting: Setting, device: torch.device) -> np.ndarray:
    """[X, Y, Z] uint8 class indices of a standardised scan."""
    scan = torch.from_numpy(image.astype(np.float32))[None]
    there = torch.ones(1, dtype=torch.bool)
    found = predict_windows(network, scan, there, setting.patch_vox, overlap=setting.overlap, device=device)
    return found.argmax(dim=0).numpy().astype(np.uint8)


def class_dice(one: np.ndarray, other: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Dice of each class (1, 2, ... in the order of the names) and ``dice``, their mean."""
    each = {name: dice(one == k, other == k) for k, name in enumerate(names, start=1)}
    return {"dice": float(np.mean(list(each.values()))), **each}


def read_pairs(
    pairs: Sequence[Test], answers: Mapping[tuple[str, str], np.ndarray], names: Sequence[str]
) -> dict[str, Any]:
    """How alike one model answers the contrasts of one person, and how alike those of different people.

    Returns:
        ``agreement``: contrast -> subject -> Dice between its answer and that to the T1, mean over classes.
        ``accuracy``: contrast -> subject -> Dice with the atlas's tissues of the T1, of those that have them.
        ``floor``: ``one & other`` -> Dice between the T1 answers of two people, moved onto one another.
    """
    agreement: dict[str, dict[str, float]] = {}
    accuracy: dict[str, dict[str, float]] = {}
    for test in pairs:
        own = answers[test.subject, test.part]
        if test.part != "t1":
            first = answers[test.subject, "t1"]
            agreement.setdefault(test.part, {})[test.subject] = class_dice(own, first, names)["dice"]
        if test.truth is not None:
            accuracy.setdefault(test.part, {})[test.subject] = class_dice(own, test.truth, names)["dice"]
    people = sorted({subject for subject, _ in answers})
    floor = {
        f"{a} & {b}": class_dice(answers[a, "t1"], moved_onto(answers[b, "t1"], answers[a, "t1"]), names)["dice"]
        for place, a in enumerate(people) for b in people[place + 1 :]
    }  # fmt: skip
    return {"agreement": agreement, "accuracy": accuracy, "floor": floor}


def moved_onto(moving: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """A label map on another's grid, shifted by whole voxels so that the middles of what is labelled meet."""
    out = np.zeros_like(fixed)
    if not moving.any() or not fixed.any():
        return out
    shift = [round(float(a.mean() - b.mean())) for a, b in zip(np.nonzero(fixed), np.nonzero(moving))]
    to = tuple(slice(max(0, s), max(0, min(n, m + s))) for s, n, m in zip(shift, fixed.shape, moving.shape))
    taken = tuple(slice(part.start - s, part.stop - s) for part, s in zip(to, shift))
    if all(part.stop > part.start for part in to):
        out[to] = moving[taken]
    return out


# ---- what it will cost -----------------------------------------------------------------------------------------------


def measured(family: Family, start: Start, pool: Sequence[str]) -> tuple[float, float]:
    """Core seconds of a step and of a window, on this machine as it is now."""
    made = prepared(Job(family.name, start.name, start.mark, 0, tuple(pool), (1,), rate=1e-6), family, start)
    made.module.train()
    loader = iter(make_loader(made.patches, StepSampler(0, 8, family.setting.batch), workers=0))

    def step() -> None:
        made.module(next(loader).to("cpu"), 0.0).total.backward()
        made.optimizer.step()
        made.optimizer.zero_grad(set_to_none=True)
        assert made.module.average is not None
        made.module.average.update(1)

    x, y, z = family.setting.patch_vox
    image = np.resize(family.tests[0].image, (x + int(x * (1 - family.setting.overlap)), y, z))  # two windows
    windows = windows_of(image.shape, family.setting)
    step()
    seconds = _middle(step, 5)
    answering = made.module.answering
    return seconds, _middle(lambda: answered(answering, image, family.setting, torch.device("cpu")), 3) / windows


def windows_of(shape: Sequence[int], setting: Setting) -> int:
    grown = tuple(max(n, p) for n, p in zip(shape, setting.patch_vox))
    return len(list(window_slices(grown, setting.patch_vox, setting.overlap)))


def cost(job: Job, family: Family, step: float, window: float) -> float:
    """Core seconds of a job, given those of a step and of a window."""
    tests = sum(windows_of(test.image.shape, family.setting) for test in tests_for(job, family))
    wide = sum(windows_of(test.image.shape, family.setting) for test in (*family.others, *family.pairs))
    return job.reads[-1] * step + window * (len(job.reads) * tests + len(job.wide_reads) * wide)


def _middle(work: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return sorted(found)[times // 2]
