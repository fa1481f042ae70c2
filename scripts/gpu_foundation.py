"""A backbone of the size unet_b from one call of at most nine minutes on a lent GPU.

    python scripts/gpu_foundation.py pack --store STORE --out heads.zip [--only variant=permissive+everything]
    python scripts/gpu_foundation.py train --data heads.zip --out DIR --minutes 8.5 [--warm DIR_OR_FILE]    (there)
    python scripts/gpu_foundation.py join --pieces DIR --out backbone.safetensors

`pack` writes the training side of a store, and a few held-out heads to be asked at the end, into one file of at most
60 MiB, together with the configuration `experiment=dense_split`. `train` needs torch, numpy, scipy and safetensors, but
no nibabel, blosc2 or hydra: all voxels go to the device, which reads windows, renders and augments them; lesions are
drawn on the host while the device computes. It first measures: the batch, then steps with and without compiler and
channels-last weights. It leaves the averaged weights in half precision in pieces of at most 16 MiB, and run.json; both
also every few minutes on the way. `join` makes a backbone file of them. With --warm a later call starts from such
weights, with a fresh optimiser and a new warm-up; the file then names its parent.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from brainfm import __version__
from brainfm.batch import Batch
from brainfm.data.augment import AugmentSpec, apply, augment_spec, draw, render
from brainfm.data.device_windows import DeviceWindows
from brainfm.data.packed import PackedStore, PackedWindows, write_packed
from brainfm.data.regions import REGIONS, merged_members
from brainfm.data.settings import WindowSpec
from brainfm.data.store import SessionEntry, Store
from brainfm.data.windows import WindowPatches
from brainfm.errors import BrainfmError, ConfigError, WeightsError
from brainfm.files import write_whole
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone, save_backbone
from brainfm.objectives.dense_split import DenseSplit
from brainfm.objectives.objective import build_objective
from brainfm.seeds import unit_hash
from brainfm.seen import SeenSubjects
from brainfm.settings import build, plain
from brainfm.specs import PreprocessSpec, Provenance, ViewSpec
from brainfm.synthesis.settings import LookSpec
from brainfm.training.average import WeightAverage
from brainfm.training.optim import build_optimizer, lr_factor
from brainfm.training.region_dice import RegionDice
from brainfm.training.settings import PretrainData, TrainerSettings
from brainfm.training.speed import quicken
from brainfm.training.warm_start import so_far, take_weights

BEGAN = time.monotonic()
MOST_MIB = 60.0  # of a packed file: what travels beside the code
PIECE_BYTES = 15 * 2**20  # of a piece: what comes back in one file, with some room
RUN_FILE = "run.json"
COARSE, SETTLED = 0.25, 0.6  # parts of the run after which windows join the whole heads, and after which all is settled
WORTHWHILE = 1.1  # a way of computing must be so much faster to be taken
ASKED = 24  # held-out windows of each kind


# ---- pack ------------------------------------------------------------------------------------------------------------


def pack(asked: argparse.Namespace) -> None:
    """Raises: BrainfmError; StoreError where the file comes out too large."""
    from brainfm.data.targets import find_targets
    from brainfm.training.pretrain import sides_of
    from brainfm.verbs.compose import resolve

    shapes = asked.shapes or asked.store.parent / "lesion_shapes"
    keys = [f"data.targets.lesion_shapes={shapes.resolve()}"] * shapes.is_dir()
    settings = resolve("pretrain", ["experiment=dense_split", f"store={asked.store}", "run=none", *keys, *asked.keys])
    only = dict(pair.split("=", 1) for pair in asked.only)
    store = Store.open(asked.store)
    data = dataclasses.replace(settings.data, side_column=asked.side_column, only=only)
    trained, held = sides_of(store, data)
    spec = dataclasses.replace(data.targets, level="regions")
    targets = find_targets(store, spec, {session.subject_key for session in trained})
    chosen = few(sorted((s for s in held if s.key in targets.maps), key=lambda s: s.key), asked.held)
    views = ViewSpec((64, 64, 64), pairs=True, windows=True)
    patches = WindowPatches(store, [*trained, *chosen], views, 0, WindowSpec(mapped_share=None), 1, targets)
    config = plain(settings)
    objective = config["objective"] | {"classes": list(REGIONS), "merged": merged_members()}
    objective["volumes"] = len(targets.regions)
    travelling = {"store": store.path.name, "only": only, "seed": config["seed"], "average": config["average"]}
    travelling |= {"objective": objective, "optim": config["optim"], "data": {**config["data"], "targets": {}}}
    write_packed(asked.out, patches, [s.key for s in chosen], travelling)
    size = asked.out.stat().st_size / 2**20
    print(f"{asked.out}: {len(trained)} sessions to train on, {len(chosen)} held out, {size:.1f} MiB")
    for note in targets.notes:
        print(note)
    if size > MOST_MIB:
        raise ConfigError(f"{asked.out}: {size:.1f} MiB, expected at most {MOST_MIB:g}; pack fewer heads (--only)")


def few(sessions: Sequence[SessionEntry], count: int) -> list[SessionEntry]:
    """So many sessions by hash, of each data set in turn."""
    ranks: dict[str, int] = {}
    placed = []
    for session in sorted(sessions, key=lambda s: (unit_hash(s.subject_key, "asked"), s.key)):
        placed.append((ranks.setdefault(session.dataset, 0), session.dataset, session))
        ranks[session.dataset] += 1
    return [session for _, _, session in sorted(placed, key=lambda p: p[:2])[:count]]


# ---- train -----------------------------------------------------------------------------------------------------------


@dataclass
class Course:
    """A network on its way, and what is done to its batches.

    Attributes:
        objective: what learns; ``average`` follows it.
        looks, artefacts: how windows are rendered and augmented.
        rate: the highest; ``clip`` the largest norm of a gradient.
        seed: of looks and artefacts.
        device: of all.
    """

    objective: DenseSplit
    looks: LookSpec
    artefacts: AugmentSpec | None
    optim: Mapping[str, Any]
    seed: int
    device: torch.device
    decay: float
    clip: float = 1.0

    def __post_init__(self) -> None:
        self.average = WeightAverage(self.objective, self.decay)
        self.rate = float(self.optim["lr"])
        self.optimizer = build_optimizer(
            self.objective, lr=self.rate, weight_decay=float(self.optim["weight_decay"]),
            betas=tuple(self.optim["betas"]),
        )  # fmt: skip

    def autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def shown(self, batch: Batch) -> Batch:
        """Windows as two views, rendered where they are to be."""
        return render(batch, self.looks, self.objective.views.patch_vox, self.seed)

    def step(self, batch: Batch, factor: float) -> dict[str, torch.Tensor]:
        """One step of the optimiser at ``factor`` of the highest rate; the terms, on the device."""
        batch = self.shown(batch)
        if self.artefacts is not None:
            batch = apply(batch, draw(batch, self.artefacts, self.seed))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            terms = self.objective(batch, 1.0)
        terms.total.backward()
        nn.utils.clip_grad_norm_(self.objective.parameters(), self.clip)
        self.optimizer.step()
        return {"total": terms.total.detach(), **terms.parts}


class Session:
    """One call: what it was asked for, the heads, and the network it trains."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.ends = BEGAN + 60 * asked.minutes
        cuda = torch.cuda.is_available()
        self.device = torch.device(asked.device or ("cuda" if cuda else "cpu"))
        self.device_name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.store = PackedStore.open(asked.data)
        self.config = dict(self.store.about["config"])
        self.seed = int(self.config["seed"] if asked.seed is None else asked.seed)
        data = build(PretrainData, self.config["data"], "data.")
        self.looks = data.looks
        artefacts = augment_spec(data.augment)
        # windows are moved already; artefacts change their intensities alone
        self.artefacts = artefacts and dataclasses.replace(artefacts, flip=0.0, affine=0.0, elastic=0.0)
        self.spec = dataclasses.replace(data.windows, rendered=data.rendered)
        self.views = ViewSpec((asked.patch,) * 3, pairs=True, regions=True, volumes=True, lesions=True, windows=True)
        self.targets = self.store.targets()
        self.trained = [s for s in self.store.sessions if s.key not in self.store.held]
        self.held = [s for s in self.store.sessions if s.key in self.store.held]
        self.settled = self.spec.settle_steps
        self.source = DeviceWindows(self.windows(self.trained, self.spec, from_step=self.settled), self.device)
        self.parents: tuple[str, ...] = ()
        self.before: dict[str, float] = {}
        self.earlier: SeenSubjects | None = None
        self.objective = self.fresh()
        if asked.warm is not None:
            self.warm(asked.warm)
        self.trials: list[dict[str, Any]] = []
        self.way = "eager"
        torch.backends.cudnn.benchmark = True  # all batches have one shape

    def windows(self, sessions: Sequence[SessionEntry], spec: WindowSpec, **more: Any) -> PackedWindows:
        return PackedWindows(self.store, sessions, self.views, **{
            "seed": self.seed, "spec": spec, "steps_of": 1, "targets": self.targets, **more
        })  # fmt: skip

    def fresh(self) -> DenseSplit:
        torch.manual_seed(self.seed)
        objective = build_objective(
            **self.config["objective"], backbone=build_backbone(self.asked.backbone), patch_vox=self.views.patch_vox,
            seed=self.seed,
        )  # fmt: skip
        assert isinstance(objective, DenseSplit)
        return objective.to(self.device)

    def warm(self, source: Path) -> None:
        """Takes the weights of a backbone file or of pieces of one. Raises: WeightsError where they do not fit."""
        with tempfile.TemporaryDirectory() as folder:
            file = source
            if source.is_dir():
                file = Path(folder) / "joined.safetensors"
                join(source, file)
            loaded = load_backbone(file, needs_decoder=True)
        report = take_weights(self.objective, loaded, str(source))
        say(f"{source}: {report}")
        self.parents, self.before = (loaded.fingerprint,), so_far(loaded)
        self.earlier = loaded.subjects

    def course(self, channels_last: bool = False, compiled: bool = False) -> Course:
        """A copy of the network with an optimiser of its own, to be computed in this way."""
        objective = copy.deepcopy(self.objective)
        course = Course(
            objective, self.looks, self.artefacts, self.config["optim"], self.seed, self.device,
            float(self.config["average"] or 0.999),
        )  # fmt: skip
        quicken(objective, TrainerSettings(channels_last=channels_last, compile="default" if compiled else None))
        return course

    def left(self) -> float:
        """Seconds that may still be trained in."""
        return self.ends - time.monotonic() - self.asked.reserve

    # ---- measuring ----

    def timed(self, course: Course, batch_size: int, steps: int, warm_up: int = 2) -> dict[str, float]:
        """Seconds a step without and with the making of its batch, and the most memory in GB."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        batch = self.source.finish(self.source.begin(range(batch_size)))
        course.step(batch, 0.0)
        self.wait()
        first = time.perf_counter() - begun
        for _ in range(warm_up - 1):
            course.step(batch, 0.0)
        self.wait()
        begun = time.perf_counter()
        for _ in range(steps):
            course.step(batch, 0.0)
        self.wait()
        alone = (time.perf_counter() - begun) / steps
        begun = time.perf_counter()
        for batch in self.batches(batch_size, steps):
            course.step(batch, 0.0)
        self.wait()
        whole = (time.perf_counter() - begun) / steps
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else float("nan")
        return {"first_s": first, "step_s": alone, "with_data_s": whole, "pairs_s": batch_size / whole, "peak_gb": peak}

    def batches(self, batch_size: int, steps: int, first: int = 0) -> Iterator[Batch]:
        """The batches of so many steps; the next one's reading is queued before a step, its lesions are drawn behind
        it."""
        begun = self.source.begin(range(first * batch_size, (first + 1) * batch_size))
        for step in range(first, first + steps):
            batch = self.source.finish(begun)
            begun = self.source.begin(range((step + 1) * batch_size, (step + 2) * batch_size))
            yield batch

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def find_batch(self) -> int:
        """The smallest batch whose throughput is within a tenth of the best, as memory allows."""
        if self.asked.batch:
            return int(self.asked.batch)
        if self.device.type != "cuda":
            return 1
        course, found = self.course(), {}
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        for size in (1, 2, 4, 8, 16, 32):
            try:
                found[size] = self.timed(course, size, 3)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            say(f"batch {size}: " + told(found[size]))
            if found[size]["peak_gb"] > 0.45 * total:
                break
        best = max(one["pairs_s"] for one in found.values())
        return min(size for size, one in found.items() if one["pairs_s"] >= 0.9 * best)

    def try_ways(self, batch_size: int) -> tuple[Course, float]:
        """Times each way of computing for a few steps; the course that is trained, and its seconds a step.

        Weights in channels-last order are only measured, unless they are asked for: 3D instance norm falls back there.
        """
        ways = {"eager": {}, "channels_last": {"channels_last": True}, "compiled": {"compiled": True}}
        best, seconds = None, math.inf
        for name in self.asked.ways.split(","):
            if name not in ways:
                raise ConfigError(f"--ways {name}: expected some of {', '.join(ways)}")
            course = self.course(**ways[name])
            try:
                found = self.timed(course, batch_size, self.asked.trial_steps)
            except RuntimeError as error:  # a compiler that is missing or fails must not cost the call
                say(f"{name} fails: {str(error).splitlines()[0]}")
                continue
            self.trials.append({"way": name, "batch": batch_size, **found})
            say(f"{name}, batch {batch_size}: " + told(found))
            usable = name != "channels_last" or self.asked.ways == "channels_last"
            if usable and found["with_data_s"] * (WORTHWHILE if best else 1.0) < seconds:
                best, seconds, self.way = course, found["with_data_s"], name
        if best is None:
            best = self.course()
            seconds = self.timed(best, batch_size, self.asked.trial_steps)["with_data_s"]
        best.optimizer.state.clear()  # the trials' steps had the rate 0: they moved no weight
        return best, seconds

    # ---- training ----

    def train(self) -> None:
        say(f"{self.asked.data}: {len(self.trained)} heads, {self.source.gigabytes:.2f} GB on {self.device_name}")
        batch_size = self.find_batch()
        course, seconds = self.try_ways(batch_size)
        steps = max(1, int(self.left() / seconds)) if not self.asked.steps else int(self.asked.steps)
        spec = self.spec
        if not self.parents:
            spec = dataclasses.replace(
                self.spec, coarse_steps=round(COARSE * steps), settle_steps=round(SETTLED * steps)
            )
        settled = {"from_step": self.settled} if self.parents else {}
        self.source.windows = self.windows(self.trained, spec, steps_of=batch_size, **settled)
        warm_up = min(1000, max(1, steps // 10))
        say(f"about {steps} steps of {batch_size} pairs, {self.way}; warm-up {warm_up}; {self.left():.0f} s left")
        begun, saved, logged, step = time.monotonic(), time.monotonic(), 0, 0
        for batch in self.batches(batch_size, 10**9 if not self.asked.steps else steps):
            terms = course.step(batch, lr_factor(min(step, warm_up), warm_up + 1, warm_up))
            step += 1
            course.average.update(step)
            if step == 1 or step - logged >= self.asked.log_every:
                shown = " ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
                if not math.isfinite(float(terms["total"])):
                    raise BrainfmError(f"the loss is {float(terms['total'])} at step {step}; the last pieces are good")
                rate = step * batch_size / (time.monotonic() - begun)
                say(f"step {step} ({time.monotonic() - begun:.0f} s, {rate:.1f} pairs/s): {shown}")
                logged = step
            if self.left() <= 0:
                break
            if time.monotonic() - saved > 60 * self.asked.save_minutes:
                self.save(course, step, batch_size, time.monotonic() - begun, warm_up, {})
                saved = time.monotonic()
        self.wait()
        trained = time.monotonic() - begun
        self.save(course, step, batch_size, trained, warm_up, {})
        self.save(course, step, batch_size, trained, warm_up, self.ask(course))

    @torch.no_grad()
    def ask(self, course: Course) -> dict[str, float]:
        """Mean Dice of the fine classes on windows and whole heads of people who were held out, real and rendered."""
        answers: dict[str, float] = {}
        if not self.held:
            return answers
        held = copy.copy(self.source)
        for kind, share in (("windows", 0.0), ("whole", 1.0)):
            for look, rendered in (("real", 0.0), ("rendered", 1.0)):
                real = [s for s in self.held if look == "rendered" or any(c.contrast != "rendered" for c in s.scans)]
                if not real:
                    continue
                spec = dataclasses.replace(self.spec, whole_share=share, rendered=rendered)
                held.windows = self.windows(real, spec, seed=self.seed + 1, from_step=self.settled)
                score = RegionDice(list(REGIONS), merged_members())
                for number in range(self.asked.held_windows):
                    batch = course.shown(held.finish(held.begin([number])))
                    with course.autocast():
                        predicted = course.average.network.predict_regions(batch.image)
                    assert batch.regions is not None
                    score.add(predicted.argmax(dim=1), batch.regions)
                answers[f"{kind}_{look}"] = score.mean()
        say("held-out Dice: " + ", ".join(f"{name} {value:.3f}" for name, value in answers.items()))
        return answers

    def save(
        self, course: Course, step: int, batch_size: int, seconds: float, warm_up: int, dice: Mapping[str, float]
    ) -> None:
        windows = self.source.windows
        own = self.config | {
            "backbone": {"name": self.asked.backbone}, "patch_vox": list(self.views.patch_vox),
            "batch_size": batch_size, "warmup_steps": warm_up, "way": self.way, "before": self.before,
            "windows_spec": dataclasses.asdict(windows.spec), "dice": dict(dice),
        }  # fmt: skip
        about = {
            "version": __version__, "backbone": self.asked.backbone, "patch_vox": list(self.views.patch_vox),
            "preprocess": self.store.spec.to_dict(), "voxel_mm": list(windows.voxel_mm), "config": own,
            "data": self.store.fingerprint(), "seed": self.seed, "steps": step, "samples": step * batch_size,
            "seconds": round(seconds, 1), "device": f"1 x {self.device_name}", "parents": list(self.parents),
            "subjects": SeenSubjects.of((s.subject_key for s in self.trained), self.seed).to_dict(),
            "trials": self.trials, "dice": dict(dice), "called_for_s": round(time.monotonic() - BEGAN, 1),
        }  # fmt: skip
        if self.earlier is not None:
            about["subjects"] = self.earlier.with_more(s.subject_key for s in self.trained).to_dict()
        sizes = write_pieces(self.asked.out, course.average.weights(), about)
        say(f"{self.asked.out}: step {step}, {len(sizes)} pieces of at most {max(sizes) / 2**20:.1f} MiB")


def told(found: Mapping[str, float]) -> str:
    return (
        f"{1000 * found['step_s']:.0f} ms a step, {1000 * found['with_data_s']:.0f} ms with its data, "
        f"{found['pairs_s']:.1f} pairs/s, {found['peak_gb']:.1f} GB, first step {found['first_s']:.1f} s"
    )


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:5.0f} s] {text}", flush=True)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def write_pieces(folder: Path, weights: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> list[int]:
    """Weights in half precision, in files of at most 16 MiB, and what they are; returns the files' bytes.

    run.json is written last and names the pieces with their checksums: older pieces beside it are never taken for new.
    Raises: WeightsError for a tensor that no piece can hold, or weights that half precision cannot.
    """
    groups: list[dict[str, np.ndarray]] = [{}]
    room = PIECE_BYTES
    for name, value in weights.items():
        half = value.detach().cpu().to(torch.float16).numpy() if value.is_floating_point() else value.cpu().numpy()
        if half.nbytes > PIECE_BYTES or not np.isfinite(half).all():
            found = f"{half.nbytes} bytes in half precision, expected at most {PIECE_BYTES}, all of them finite"
            raise WeightsError(f"weights {name}: {found}")
        if half.nbytes > room:
            groups.append({})
            room = PIECE_BYTES
        groups[-1][name] = half
        room -= half.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    for number, group in enumerate(groups):
        path = folder / f"piece{number}.npz"
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            np.savez(Path(scratch) / "piece.npz", **group)
            content = (Path(scratch) / "piece.npz").read_bytes()
        write_whole(path, content)
        pieces.append({"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    write_whole(folder / RUN_FILE, (json.dumps({**about, "pieces": pieces}, indent=1) + "\n").encode())
    return [piece["bytes"] for piece in pieces]


def read_pieces(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Float32 weights and what run.json says. Raises: WeightsError where a piece is missing or another one."""
    try:
        about = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / RUN_FILE}: cannot be read ({error}), expected what `train` left") from None
    weights = {}
    for piece in about["pieces"]:
        path = folder / piece["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != piece["sha256"]:
            raise WeightsError(f"{path}: missing or not what {RUN_FILE} names, expected all pieces of one save")
        with np.load(path, allow_pickle=False) as arrays:
            weights |= {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}, about


def join(pieces: Path, out: Path) -> str:
    """A backbone file out of pieces. Returns its fingerprint."""
    weights, about = read_pieces(pieces)
    x, y, z = about["patch_vox"]
    objective = build_objective(
        **about["config"]["objective"], backbone=build_backbone(about["backbone"]), patch_vox=(x, y, z),
        seed=about["seed"],
    )  # fmt: skip
    try:
        objective.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsError(f"{pieces}: the pieces do not fit {about['backbone']}: {error}") from None
    low, high = about["voxel_mm"]
    return save_backbone(
        out,
        objective.backbone,
        objective={"name": objective.name, "config": objective.config},
        objective_state=objective.state_for_file(),
        preprocess=PreprocessSpec.from_dict(about["preprocess"]),
        patch_vox=(x, y, z),
        provenance=Provenance(
            version=about["version"],
            commit="",
            data=about["data"],
            config=about["config"],
            seed=about["seed"],
            steps=about["steps"],
            samples=about["samples"],
            hours=round(about["seconds"] / 3600, 4),
            device=about["device"],
            parents=tuple(about["parents"]),
        ),
        decoder=objective.dense,
        heads=objective.heads,
        voxel_mm=(low, high),
        subjects=SeenSubjects.from_dict(about["subjects"]),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="heads of a store into one file")
    packing.add_argument("--store", type=Path, required=True)
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--shapes", type=Path, help="folder of lesion masks; lesion_shapes beside the store")
    packing.add_argument("--side-column", default="side", help="says train or held")
    packing.add_argument("--held", type=int, default=6, help="held-out heads that are asked at the end")
    packing.add_argument("--only", nargs="*", default=[], help="COLUMN=VALUE of the sessions that are packed")
    packing.add_argument("--keys", nargs="*", default=[], help="further keys of `brainfm pretrain`")
    training = verbs.add_parser("train", help="on the lent machine")
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--minutes", type=float, default=8.5, help="from the end of the imports to the end of all")
    training.add_argument("--warm", type=Path, help="a backbone file or a folder of pieces to start from")
    training.add_argument("--backbone", default="unet_b")
    training.add_argument("--patch", type=int, default=64, help="edge of a view in voxels")
    training.add_argument("--batch", type=int, default=0, help="pairs a step; 0: measured")
    training.add_argument("--ways", default="eager,channels_last,compiled", help="which are timed; the best is trained")
    training.add_argument("--trial-steps", type=int, default=10)
    training.add_argument("--steps", type=int, default=0, help="so many steps at most; 0: as time allows")
    training.add_argument("--reserve", type=float, default=25, help="seconds kept for the questions and the last save")
    training.add_argument("--save-minutes", type=float, default=2.5)
    training.add_argument("--log-every", type=int, default=100, help="steps")
    training.add_argument("--held-windows", type=int, default=ASKED)
    training.add_argument("--seed", type=int)
    training.add_argument("--device", help="cuda or cpu; what there is")
    joining = verbs.add_parser("join", help="pieces to a backbone file")
    joining.add_argument("--pieces", type=Path, required=True)
    joining.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    try:
        if asked.verb == "pack":
            pack(asked)
        elif asked.verb == "train":
            Session(asked).train()
        else:
            print(f"{asked.out}: fingerprint {join(asked.pieces, asked.out)}")
    except BrainfmError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
