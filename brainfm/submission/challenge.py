"""Challenges as frozen data: what an organiser calls, what he expects back, how he scores it.

One YAML a challenge lies in ``challenges/NAME/challenge.yaml``; a container carries its task alone, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from brainfm.data.manifest import contrast_of
from brainfm.errors import ConfigError

KINDS = ("classification", "segmentation", "regression", "embedding")
ENDINGS = {"classification": ".txt", "segmentation": ".nii.gz", "regression": ".txt", "embedding": ".npy"}
METRICS = (
    "auroc", "dice", "nsd", "mae", "correlation", "ovr_auroc", "ovr_f1", "fairness_f1", "fairness_auroc",
)  # fmt: skip
LOWER_IS_BETTER = ("mae",)
IMAGES = (".nii.gz", ".nii")  # endings of scans as organisers hand them out


@dataclass(frozen=True)
class Input:
    """One scan that the organiser passes.

    Attributes:
        flag: of ``/app/predict.py``, without the dashes.
        contrast: what it shows, a word of the manifest.
        file: its name in the fine-tuning data, without the ending.
        group: of inputs with one group exactly one is passed; empty: always passed.
    """

    flag: str
    contrast: str
    file: str
    group: str = ""


@dataclass(frozen=True)
class ChallengeTask:
    """One task of a challenge.

    Attributes:
        challenge, name, title: e.g. ``fomo26``, ``task2``, for people.
        kind: classification (the probability of the one class), segmentation, regression or embedding.
        target: column of the manifest, or of a segmentation the label volume's name.
        inputs: what is passed.
        ending: of the file that is asked for.
        metrics: what the organiser scores; each is ranked, and the mean of the ranks is the task's.
        weight: of the task in the overall rank.
        low, high: range of the probability or value, or of the label values.
        blank: what is answered where the scans show nothing; None of a mask (all background) and an embedding (zeros).
        empty: ``legal`` or ``refused``: whether a mask may be without any voxel.
        answers: names of the file with the answer in the fine-tuning data, the first that is there counts.
        mask: name of the label volume there.
        folders: names of the task's folder there.
        cases: how many there are.
        shape_vox, spacing_mm: of a typical scan, for timings.
    """

    challenge: str
    name: str
    title: str
    kind: str
    target: str
    inputs: tuple[Input, ...]
    ending: str
    metrics: tuple[str, ...]
    weight: float
    low: float = 0.0
    high: float = 0.0
    blank: float | None = None
    empty: str = "legal"
    answers: tuple[str, ...] = ()
    mask: str = ""
    folders: tuple[str, ...] = ()
    cases: int = 0
    shape_vox: tuple[int, int, int] = (192, 256, 256)
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        where = f"{self.challenge} {self.name}"
        if self.kind not in KINDS:
            raise ConfigError(f"{where}: kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.ending != ENDINGS[self.kind]:
            kind = with_article(self.kind)
            raise ConfigError(f"{where}: ending {self.ending!r}, expected {ENDINGS[self.kind]} of {kind}")
        strange = [name for name in self.metrics if name not in METRICS]
        if strange or not self.metrics:
            raise ConfigError(f"{where}: metric {strange[0] if strange else 'none'}, expected of {', '.join(METRICS)}")
        flags = [one.flag for one in self.inputs]
        if not flags or len(set(flags)) != len(flags):
            raise ConfigError(f"{where}: flags {', '.join(flags) or 'none'}, expected one or more, each once")
        for name in ("low", "high", "weight"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def id(self) -> str:
        return f"{self.challenge}_{self.name}"

    @property
    def groups(self) -> dict[str, tuple[Input, ...]]:
        """The alternatives: of each group exactly one is passed."""
        names = dict.fromkeys(one.group for one in self.inputs if one.group)
        return {name: tuple(one for one in self.inputs if one.group == name) for name in names}

    def calls(self) -> list[tuple[Input, ...]]:
        """Every set of inputs that an organiser passes: one for each choice among the alternatives."""
        found: list[tuple[Input, ...]] = [tuple(one for one in self.inputs if not one.group)]
        for choices in self.groups.values():
            found = [(*chosen, one) for chosen in found for one in choices]
        return found

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Raises: ConfigError where a key is unknown or missing; ``where`` names the source."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}, expected one of {', '.join(sorted(known))}")
        try:
            inputs = tuple(Input(**one) for one in values["inputs"])
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**plain | {"inputs": inputs})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{where}: incomplete ({error})") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of the JSON that a container carries. Raises: ConfigError where it cannot be used."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as the task of a container ({error})") from None
        return cls.from_dict(values, str(path))


@dataclass(frozen=True)
class Challenge:
    """A challenge with its tasks.

    Attributes:
        limit_s: how long one case may take.
    """

    name: str
    title: str
    limit_s: float
    tasks: tuple[ChallengeTask, ...]

    def task(self, name: str) -> ChallengeTask:
        """Raises: ConfigError where there is no such task."""
        found = next((task for task in self.tasks if task.name == name), None)
        if found is None:
            names = ", ".join(task.name for task in self.tasks)
            raise ConfigError(f"task={name}: {self.name} has no such task, expected one of {names}")
        return found


def input_of(task: ChallengeTask, name: str) -> Input | None:
    """By the organiser's name, else by what the name says the scan shows."""
    stem = next(name.removesuffix(ending) for ending in IMAGES if name.endswith(ending))
    for one in task.inputs:
        if stem.lower() in (one.file, one.flag):
            return one
    shown = contrast_of(stem)
    return next((one for one in task.inputs if one.contrast == shown), None)


def challenges() -> Path:
    """The folder of the challenges: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "challenges"
    return inside if inside.is_dir() else package.parent / "challenges"


def names() -> list[str]:
    """Of the challenges that are known."""
    return sorted(path.parent.name for path in challenges().glob("*/challenge.yaml"))


def read_challenge(name: str) -> Challenge:
    """Raises: ConfigError where there is no such challenge, or its file cannot be used."""
    path = challenges() / name / "challenge.yaml"
    if name not in names():
        raise ConfigError(f"challenge={name}: expected one of {', '.join(names())}")
    import yaml  # a container reads the JSON of its task and needs no YAML

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        tasks = tuple(
            ChallengeTask.from_dict({"challenge": name, "name": task, **described}, f"{path}: {task}")
            for task, described in values["tasks"].items()
        )
        return Challenge(str(values["name"]), str(values["title"]), float(values["limit_s"]), tasks)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: incomplete ({error})") from None


def with_article(kind: str) -> str:
    """A kind of task in a sentence: ``a segmentation``, ``an embedding``."""
    return f"{'an' if kind[:1] in tuple('aeiou') else 'a'} {kind}"


def task_of(name: str) -> ChallengeTask:
    """The task of a name such as ``fomo26_task2``. Raises: ConfigError where there is none."""
    challenge, _, task = name.rpartition("_")
    if challenge not in names():
        known = ", ".join(f"{each}_taskN" for each in names())
        raise ConfigError(f"challenge={name}: expected {known.replace(', ', ' or ')}")
    return read_challenge(challenge).task(task)
