"""The bundle, a finished model as a folder: written whole or not at all, read only if every byte is as it was written.

    task.json preprocess.json provenance.json backbone.json   what it answers, and how to rebuild it
    decisions.json                                            what cross-validation decided about its answers, if it did
    members.json seen.json                                    how members differ in build; whom their backbone has seen
    reads.json                                                what answers for whole heads are made of
    member0.safetensors ...                                   weights, one file a member of the ensemble
    README.md                                                 the model card
    checksums.json                                            SHA-256 of every other file

No pickle is ever opened. The checksums detect damage and edits, not a forger who also rewrites checksums.json.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from brainfm.errors import BundleError, ConfigError, WeightsError
from brainfm.files import write_folder
from brainfm.nets.backbone import build_backbone
from brainfm.nets.cpu import keep_freed_memory
from brainfm.nets.transfer import transfer
from brainfm.seen import SeenSubjects
from brainfm.specs import Decisions, PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.engine import Engine, PathLike, settle_device, settle_precision
from brainfm.tasks.registry import build_task, kind_of
from brainfm.tasks.task import Task

FORMAT = 1
CHECKSUMS = "checksums.json"
DECISIONS = "decisions.json"
MEMBERS = "members.json"
SEEN = "seen.json"
READS = "reads.json"
_DESCRIPTIONS = ("task.json", "preprocess.json", "provenance.json", "backbone.json")


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and verified.

    Attributes:
        path: its folder.
        task: what it answers.
        preprocess: how a scan must be prepared for it.
        provenance: where it comes from.
        networks: its members in eval mode on the CPU; their probabilities are averaged.
        fingerprint: 16 hexadecimal digits that change with any byte of any file.
        decisions: what is done to its answers.
        seen: the people of the pre-training that its members began with; None where nobody knows.
    """

    path: Path
    task: TaskSpec
    preprocess: PreprocessSpec
    provenance: Provenance
    networks: tuple[Task, ...]
    fingerprint: str
    decisions: Decisions
    seen: SeenSubjects | None = None


def write_bundle(
    directory: str | os.PathLike[str],
    *,
    task: TaskSpec,
    backbone_config: Mapping[str, Any],
    members: Sequence[Mapping[str, Tensor]],
    preprocess: PreprocessSpec,
    provenance: Provenance,
    decisions: Decisions | None = None,
    reads: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    settings: Sequence[Mapping[str, Any]] | None = None,
    seen: SeenSubjects | None = None,
    licence: str = "as its training data allow; state it here before passing the bundle on",
) -> str:
    """Writes a bundle beside its place and moves it there when it is complete. Returns its fingerprint.

    Args:
        directory: the bundle's folder; an existing bundle is replaced, any other folder with content is refused.
        backbone_config: ``Backbone.config``.
        members: ``Task.state_dict()`` of each member of the ensemble.
        decisions: what is done to its answers; None leaves them as they are.
        reads: of an answer for a whole head, ``Reads.to_dict()``; None: the network's features alone.
        scores: for the model card; JSON-able.
        settings: ``Task.settings()`` of each member, where they have any.
        seen: see Bundle.
        licence: one line for the model card.

    Raises:
        BundleError: where the folder holds something else than a bundle, or a member does not fit the task.
    """
    directory = Path(directory).absolute()
    foreign = directory.is_dir() and any(directory.iterdir()) and not (directory / CHECKSUMS).exists()
    if foreign or directory.is_file():
        raise BundleError(f"{directory} exists and is not a bundle; expected a free place for the bundle")
    if not members:
        raise BundleError(f"a bundle needs the weights of at least one member, found none for {directory}")
    contents: dict[str, bytes] = {
        "task.json": _json({"format": FORMAT, **task.to_dict()}),
        "preprocess.json": _json(preprocess.to_dict()),
        "provenance.json": _json(provenance.to_dict()),
        "backbone.json": _json(dict(backbone_config)),
        "README.md": model_card(
            task,
            preprocess,
            provenance,
            len(members),
            scores or {},
            licence,
            decisions or Decisions(),
            labels=str((reads or {}).get("labels", "")),
        ).encode(),
    }
    if decisions is not None:
        contents[DECISIONS] = _json(decisions.to_dict())
    built = [dict(own) for own in settings or [{}] * len(members)]
    if any(built):
        contents[MEMBERS] = _json({f"member{number}": own for number, own in enumerate(built)})
    if seen is not None:
        contents[SEEN] = _json(seen.to_dict())
    if reads is not None:
        contents[READS] = _json(dict(reads))
    for number, (state, own) in enumerate(zip(members, built, strict=True)):
        _member(task, backbone_config, own | _read(reads), state, f"member {number}")
        # clone: safetensors refuses tensors that share storage
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        contents[f"member{number}.safetensors"] = save_tensors(tensors)
    checksums = _json({name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())})
    contents[CHECKSUMS] = checksums
    write_folder(directory, contents)
    return hashlib.sha256(checksums).hexdigest()[:16]


def read_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Reads a bundle after comparing every file with its checksum.

    Raises:
        BundleError: naming the file that is missing, extra, changed, or does not fit the others.
    """
    directory = Path(directory)
    contents, fingerprint = _verified(directory)
    described = {name: _parsed(directory / name, contents[name]) for name in _DESCRIPTIONS}
    found = described["task.json"].pop("format", None)
    if found != FORMAT:
        raise BundleError(f"{directory / 'task.json'}: format {found}, this brainfm reads {FORMAT}")
    try:
        task = TaskSpec.from_dict(described["task.json"])
        preprocess = PreprocessSpec.from_dict(described["preprocess.json"])
        provenance = Provenance.from_dict(described["provenance.json"])
        decided = _parsed(directory / DECISIONS, contents[DECISIONS]) if DECISIONS in contents else {}
        decisions = Decisions.from_dict(decided)
        seen = SeenSubjects.from_dict(_parsed(directory / SEEN, contents[SEEN])) if SEEN in contents else None
    except (ConfigError, TypeError, ValueError) as error:
        raise BundleError(f"{directory}: its description cannot be used: {error}") from None
    built = _parsed(directory / MEMBERS, contents[MEMBERS]) if MEMBERS in contents else {}
    reads = _parsed(directory / READS, contents[READS]) if READS in contents else None
    networks = []
    for name in sorted((n for n in contents if n.endswith(".safetensors")), key=lambda n: (len(n), n)):
        try:
            state = load_tensors(contents.pop(name))
        except SafetensorError as error:
            raise BundleError(f"{directory / name}: cannot be read as safetensors ({error})") from None
        own = built.get(name.removesuffix(".safetensors"), {}) | _read(reads)
        networks.append(_member(task, described["backbone.json"], own, state, str(directory / name)).eval())
    if not networks:
        raise BundleError(f"{directory}: holds no member*.safetensors, expected at least one")
    return Bundle(directory, task, preprocess, provenance, tuple(networks), fingerprint, decisions, seen)


def load_engine(
    bundle: PathLike | Bundle, device: str = "auto", precision: str = "auto", overlap: float = 0.5
) -> Engine:
    """A bundle on a device. On a CPU the process keeps from here on what memory it frees (nets/cpu.keep_freed_memory).

    Raises: BundleError where the bundle is not whole; ConfigError for impossible values.
    """
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap={overlap}: expected 0 or more and less than 1")
    place = settle_device(device)
    dtype = settle_precision(precision, place)
    read = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    if place.type == "cpu":
        keep_freed_memory()
    networks = tuple(network.to(place) for network in read.networks)
    return Engine(
        networks, read.task, read.preprocess, place, dtype, read.fingerprint, overlap, read.decisions, read.seen
    )


def _read(reads: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if reads is None else {"reads": reads}


def _member(
    task: TaskSpec,
    backbone_config: Mapping[str, Any],
    settings: Mapping[str, Any],
    state: Mapping[str, Tensor],
    origin: str,
) -> Task:
    """The network with these weights. Raises: BundleError where they do not fit."""
    try:
        network = build_task(task, build_backbone(**backbone_config), **settings)
        transfer(network, state, origin=origin)
    except (ConfigError, WeightsError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"the bundle's task, backbone and weights do not fit together: {error}") from None
    return network


# ---- files -----------------------------------------------------------------------------------------------------------


def _verified(directory: Path) -> tuple[dict[str, bytes], str]:
    """The bytes of every file but the checksums, and the bundle's fingerprint."""
    if not directory.is_dir():
        raise BundleError(f"no bundle at {directory}, expected a folder that brainfm finetune wrote")
    try:
        listed_bytes = (directory / CHECKSUMS).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{directory} has no {CHECKSUMS}; expected a bundle that brainfm finetune wrote") from None
    listed = _parsed(directory / CHECKSUMS, listed_bytes)
    missing = sorted((set(listed) | set(_DESCRIPTIONS)) - {p.name for p in directory.iterdir()})
    if missing:
        raise BundleError(f"{directory / missing[0]} is missing; the bundle is incomplete")
    extra = sorted({p.name for p in directory.iterdir()} - set(listed) - {CHECKSUMS})
    if extra:
        raise BundleError(f"{directory / extra[0]} does not belong to the bundle; {CHECKSUMS} does not list it")
    contents = {}
    for name, expected in listed.items():
        path = directory / name
        if not path.is_file():
            raise BundleError(f"{path} is not a file; expected one as {CHECKSUMS} lists it")
        contents[name] = path.read_bytes()  # read once: what was checked is what is used
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise BundleError(f"{path} was changed or damaged; it does not match {CHECKSUMS}")
    return contents, hashlib.sha256(listed_bytes).hexdigest()[:16]


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise BundleError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


# ---- card ------------------------------------------------------------------------------------------------------------


def model_card(
    task: TaskSpec,
    preprocess: PreprocessSpec,
    provenance: Provenance,
    members: int,
    scores: Mapping[str, Any],
    licence: str,
    decisions: Decisions,
    labels: str = "",
) -> str:
    """README.md of a bundle: what it is, what it saw, how it scored, how to run it, what it is not for."""
    kind = kind_of(task.kind)
    averaged, out = kind.averaged, f"{task.target}{kind.ending}"
    done = _done(decisions, task.unit)
    rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in scores.items() if name != "note")
    note = f"\n{scores['note']}\n" if scores.get("note") else ""
    table = f"| | |\n|---|---|\n{rows}\n{note}" if rows else "None were recorded; evaluate it on your own data first.\n"
    inputs = " ".join(f"input.{contrast}={contrast}.nii.gz" for contrast in task.contrasts)
    mapped = ""
    if labels:
        name = labels.removesuffix("_labels")
        inputs += f" labels.{name}={name}.nii.gz"
        mapped = f" With the label map `{name}` those members that were chosen so answer from its volumes."
    return f"""# {task.target}: {task.kind}

A brainfm bundle: {members} network{"s" if members != 1 else ""}{f" whose {averaged} are averaged" * (members > 1)}.

- Answers: {kind.promise(task)}.
- Reads: {", ".join(task.contrasts)}. Any of them may be missing; what is given must lie in one scanner space.{mapped}
- Looks: {_looks(task, preprocess)}.
- What is done to the answers, as held-out cases decided: {done or "nothing"}.
- Made by brainfm {provenance.version}, commit {provenance.commit or "unknown"}, data {provenance.data or "unknown"}, \
{provenance.steps} steps, seed {provenance.seed}, {provenance.hours:.2f} h on {provenance.device}.
- Licence: {licence}

## Scores

{table}
## Use

    brainfm predict bundle=THIS_FOLDER {inputs} out={out}
    brainfm explain bundle=THIS_FOLDER {inputs} out=why.nii.gz
    brainfm evaluate bundle=THIS_FOLDER manifest=manifest.csv out=scores

Files are checked against `checksums.json`; an edited or incomplete bundle is refused.

## Limits

For research. Not a medical device: no diagnosis or treatment may rest on its output. Expect lower scores on scanners,
sequences, ages and diseases that its training data did not hold, and evaluate it on your own cases first.
"""


def _looks(task: TaskSpec, preprocess: PreprocessSpec) -> str:
    spacing = " x ".join(f"{s:g}" for s in preprocess.spacing_mm)
    patch = " x ".join(str(p) for p in task.patch_vox)
    windows = f"at windows of {patch} voxels that cover the head, at {spacing} mm"
    if not task.view_mm:
        return windows
    whole = f"at the whole head in {patch} voxels of {task.view_mm:g} mm, made from {spacing} mm"
    return f"{whole}, and {windows}" if task.crops else whole


def _done(decisions: Decisions, unit: str) -> str:
    a, b = decisions.bias
    parts = [
        ("the mean over volumes mirrored along " + ", ".join("XYZ"[axis] for axis in decisions.mirror))
        if decisions.mirror else "",
        "only the largest connected part of each label" if decisions.largest_component else "",
        f"no connected part below {decisions.min_ml:g} ml" if decisions.min_ml else "",
        f"logits divided by a temperature of {decisions.temperature:.3g}" if decisions.temperature != 1 else "",
        f"(answer - {a:.4g}{f' {unit}' if unit else ''}) / {b:.4g}" if (a, b) != (0, 1) else "",
    ]  # fmt: skip
    return "; ".join(part for part in parts if part)


def _shown(value: Any) -> str:
    if value is None:
        return "undefined"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(v)}" for name, v in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(_shown(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
