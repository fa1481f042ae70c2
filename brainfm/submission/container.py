"""A container for a challenge: the folder that becomes ``/app``, Apptainer.def and Dockerfile, built where one can.

``OUT/app`` holds predict.py, the task, the weights and those modules of brainfm that prediction reaches, nothing else;
``python OUT/app/predict.py`` answers on any machine that has the five packages of ``OUT/requirements.txt``.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from brainfm import __version__
from brainfm.errors import BundleError, ConfigError
from brainfm.files import npy_bytes, write_whole, writing_folder
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.shipped import located
from brainfm.specs import TaskSpec
from brainfm.submission.challenge import ChallengeTask, with_article
from brainfm.submission.predict import BACKBONE, BUNDLE, SCALE, SETTINGS, TASK, AppSettings
from brainfm.submission.sandbox import succeeds
from brainfm.tasks.bundle import read_bundle

PACKAGES = ("torch", "numpy", "scipy", "nibabel", "safetensors")
EMBEDDING_PACKAGES = (*PACKAGES, "blosc2")  # of the store, which features are read from as well
ENGINES = ("auto", "apptainer", "docker", "none")
TORCH = ("cpu", "cu126", "cu128", "cu130")
_PACKAGE = Path(__file__).parents[1]

# Where programs keep what they would else write below HOME, which is another user's or absent in a container.
CACHES = {
    "HOME": "", "XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "TORCH_HOME": "torch", "MPLCONFIGDIR": "mpl",
    "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda",
}  # fmt: skip

_SCRIPT = '''"""The case that an organiser passes: see brainfm/submission/predict.py. Caches go where one may write."""

import os
import sys
import tempfile

_place = os.path.join(tempfile.gettempdir(), "brainfm")
for _name, _folder in {caches}.items():
    os.environ[_name] = os.path.join(_place, _folder)
sys.dont_write_bytecode = True
sys.modules["pydicom"] = None  # nibabel would import it where it is installed, and with it a socket is opened

from brainfm.submission.predict import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(os.path.dirname(os.path.abspath(__file__))))
'''

_DEFINITION = """Bootstrap: docker
From: {base}

# apptainer build --arch amd64 --fakeroot {name}.sif Apptainer.def     (in this folder)
%labels
    Title {title}
    Made-by brainfm {version}

%files
    app /app
    requirements.txt /app/requirements.txt

%post
    mkdir -p /input /output
    pip install --no-cache-dir --no-compile{index} -r /app/requirements.txt
    python -m compileall -q /app /usr/local/lib/python{minor}/site-packages || true
    chmod -R a+rX /app

%environment
    export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 LC_ALL=C.UTF-8

%runscript
    exec python /app/predict.py "$@"

%help
    python /app/predict.py {usage}
"""

_DOCKERFILE = """# docker build --platform linux/amd64 -t {name} .     (in this folder)
FROM --platform=linux/amd64 {base}
LABEL org.opencontainers.image.title="{title}" org.opencontainers.image.version="{version}"
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 LC_ALL=C.UTF-8
COPY requirements.txt /app/requirements.txt
RUN mkdir -p /input /output \\
 && pip install --no-cache-dir --no-compile{index} -r /app/requirements.txt \\
 && (python -m compileall -q /usr/local/lib/python{minor}/site-packages || true)
COPY app /app
RUN python -m compileall -q /app && chmod -R a+rX /app
ENTRYPOINT ["python", "/app/predict.py"]
"""


@dataclass(frozen=True)
class Layer:
    """One part of an image, in bytes before compression. ``estimated`` where it was measured on this machine's copy."""

    name: str
    size: int
    estimated: bool = False


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
        folder: with ``app/``, Apptainer.def, Dockerfile and requirements.txt.
        layers: of the image on top of its base.
        image: the file or tag that was built; empty where none was.
        said: why no image was built, or how.
    """

    folder: Path
    layers: tuple[Layer, ...]
    image: str
    said: str


def container(
    task: ChallengeTask,
    weights: Path,
    out: Path,
    *,
    settings: AppSettings | None = None,
    scale: np.ndarray | None = None,
    torch: str = "cpu",
    build: str = "auto",
) -> Made:
    """Stages a submission and builds its image where an engine is there.

    Args:
        weights: a bundle, or for an embedding a backbone file.
        out: a folder of its own; what was staged there before is replaced.
        scale: [2, F] centre and factor of an embedding (linear_probe.scale_of); None: as it is.
        torch: ``cpu``, or the CUDA version of the wheels, e.g. ``cu126``.
        build: ``auto``, ``apptainer``, ``docker`` or ``none``.

    Raises:
        BundleError, WeightsError: the weights cannot be used, or answer another question.
        ConfigError: an unknown option, or an engine that is asked for and fails.
    """
    if torch not in TORCH:
        raise ConfigError(f"torch={torch}: expected one of {', '.join(TORCH)}")
    if build not in ENGINES:
        raise ConfigError(f"build={build}: expected one of {', '.join(ENGINES)}")
    stage(task, weights, out / "app", settings=settings, scale=scale)
    for name, text in _recipes(task, torch).items():
        write_whole(out / name, text.encode())
    image, said = _build(task.id, out, build)
    return Made(out, tuple(layers(task, out / "app", torch)), image, said)


def stage(
    task: ChallengeTask,
    weights: Path,
    app: Path,
    *,
    settings: AppSettings | None = None,
    scale: np.ndarray | None = None,
) -> Path:
    """Writes the folder that becomes ``/app``. Returns it. Raises: as container."""
    if app.exists() and not (app / TASK).is_file() and any(app.iterdir()):
        raise ConfigError(f"{app} holds something else than a staged submission, expected a free place")
    settings = settings or AppSettings()
    features = check_weights(task, weights, settings.parts)
    if scale is not None and scale.shape != (2, features):
        raise ConfigError(f"the scale has the shape {scale.shape}, expected (2, {features}) as {weights} gives")
    with writing_folder(app) as part:  # an interrupted staging leaves nothing in the place of a whole one
        for module in reached("brainfm.submission.predict"):
            place = part / "brainfm" / module.relative_to(_PACKAGE)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(module.read_bytes())
        (part / "predict.py").write_text(_SCRIPT.format(caches=CACHES), encoding="utf-8")
        (part / SETTINGS).write_text(settings.to_json(), encoding="utf-8")
        if task.kind == "embedding":
            shutil.copyfile(located(weights), part / BACKBONE)
            given = np.stack([np.zeros(features), np.ones(features)]) if scale is None else scale
            (part / SCALE).write_bytes(npy_bytes(given.astype(np.float32)))
        else:
            shutil.copytree(weights, part / BUNDLE)
        (part / TASK).write_text(task.to_json(), encoding="utf-8")
    return app


def check_weights(task: ChallengeTask, weights: Path, parts: Sequence[str] = ()) -> int:
    """Whether the weights answer the task's question. Returns the length of an embedding, else 0.

    Args:
        parts: of a backbone that are embedded; none: all there are.

    Raises:
        BundleError, WeightsError: they cannot be read.
        ConfigError: they answer another question, or have no such part.
    """
    if task.kind == "embedding":
        from brainfm.probing.features import Encoder

        encoder = Encoder.load(load_backbone(weights), parts or None)
        sizes = encoder.latents.sizes if encoder.latents is not None else {}
        return 2 * sum(sizes.get(part, encoder.backbone.widths[-1]) for part in encoder.parts)
    if parts:
        raise ConfigError(f"parts={', '.join(parts)}: {task.id} is {with_article(task.kind)}, expected none")
    try:
        found = read_bundle(weights).task
    except BundleError as error:
        raise BundleError(f"{error}; {task.id} needs the bundle of {with_article(task.kind)}") from None
    reason = _misfit(task, found)
    if reason:
        raise ConfigError(f"{weights} does not fit {task.id}: {reason}")
    return 0


def _misfit(task: ChallengeTask, found: TaskSpec) -> str:
    """Why a bundle's task is not the challenge's; empty where it is."""
    asked = [one.contrast for one in task.inputs]
    if found.kind != task.kind:
        return f"it is {with_article(found.kind)}, expected {with_article(task.kind)}"
    if not set(asked) & set(found.contrasts):
        return f"it was trained on {', '.join(found.contrasts)}, expected one of {', '.join(asked)}"
    if found.kind == "segmentation" and not set(found.values) <= set(range(int(task.high) + 1)):
        return f"it marks {', '.join(map(str, found.values))}, expected values from 0 to {task.high:g}"
    if found.kind == "classification" and (found.classes != 2 or found.mode == "multilabel"):
        return f"it tells {found.classes} classes apart ({found.mode}), expected two, of which the second is probable"
    return ""


# ---- what an image holds ---------------------------------------------------------------------------------------------


def reached(module: str) -> list[Path]:
    """The files of brainfm that a module imports, directly or not, now or later; packages on the way included."""
    found: dict[Path, None] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        for path in _files(name):
            if path not in found:
                found[path] = None
                waiting += _imported(path)
    return sorted(found)


def _files(name: str) -> list[Path]:
    """Of a module of ours and of the packages above it; none where the name is a function or another's."""
    parts = name.split(".")
    if parts[0] != "brainfm":
        return []
    folders = [_PACKAGE.joinpath(*parts[1:depth], "__init__.py") for depth in range(1, len(parts) + 1)]
    file = _PACKAGE.joinpath(*parts[1:]).with_suffix(".py")
    return [path for path in (*folders, file) if path.is_file() and (path != file or len(parts) > 1)]


def _imported(path: Path) -> list[str]:
    """Names that a file imports, and those that it writes as text for an import by name."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("brainfm."):
            names.append(node.value)
    return names


def layers(task: ChallengeTask, app: Path, torch: str = "cpu") -> list[Layer]:
    """Sizes of what lies on the base image: code and weights as staged, packages as installed here."""
    code = sum(p.stat().st_size for p in (app / "brainfm").rglob("*") if p.is_file())
    whole = sum(p.stat().st_size for p in app.rglob("*") if p.is_file())
    found = [Layer("brainfm, predict.py", code), Layer("weights", whole - code)]
    for name in _packages(task):
        size = _installed(name)
        note = "" if name != "torch" or torch == "cpu" else f" (the {torch} wheel and its CUDA libraries are larger)"
        found.append(Layer(name + note, size, estimated=True))
    return found


def _installed(name: str) -> int:
    """Bytes of a package on this machine; 0 where it is not installed."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return 0
    return sum(path.stat().st_size for path in (Path(str(f.locate())) for f in files) if path.is_file())


def _packages(task: ChallengeTask) -> Sequence[str]:
    return EMBEDDING_PACKAGES if task.kind == "embedding" else PACKAGES


def requirements(task: ChallengeTask) -> str:
    """The packages, pinned to the versions that are installed here: those that the weights were tested with.

    Raises: ConfigError where one is not installed.
    """
    lines = []
    for name in _packages(task):
        try:
            lines.append(f"{name}=={metadata.version(name).split('+')[0]}")
        except metadata.PackageNotFoundError:
            raise ConfigError(f"{name} is not installed; a container pins the versions of this environment") from None
    return "\n".join(lines) + "\n"


def _recipes(task: ChallengeTask, torch: str) -> Mapping[str, str]:
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    usage = " ".join(f"--{one.flag} FILE" for one in task.inputs)
    values = {
        "base": f"python:{minor}-slim-bookworm",
        "minor": minor,
        "name": task.id,
        "title": f"{task.id}: {task.title}",
        "version": __version__,
        "index": f" --extra-index-url https://download.pytorch.org/whl/{torch}",
        "usage": f"{usage} --output FILE{task.ending}",
    }
    pinned = [f"{line}+{torch}" if line.startswith("torch==") else line for line in requirements(task).splitlines()]
    return {
        "Apptainer.def": _DEFINITION.format(**values),
        "Dockerfile": _DOCKERFILE.format(**values),
        "requirements.txt": "\n".join(pinned) + "\n",
        "challenge.json": json.dumps({"challenge": task.challenge, "task": task.name, "torch": torch}) + "\n",
    }


# ---- engines ---------------------------------------------------------------------------------------------------------


def engine() -> tuple[str, str]:
    """The container engine of this machine and, where there is none, why: (``apptainer``|``docker``|``""``, reason)."""
    if shutil.which("apptainer"):
        return "apptainer", ""
    if not shutil.which("docker"):
        return "", "neither apptainer nor docker is installed"
    if succeeds(["docker", "info"]):
        return "docker", ""
    return "", "docker is installed but its daemon does not answer, and no apptainer"


def _build(name: str, folder: Path, how: str) -> tuple[str, str]:
    """(image, what was done). Raises: ConfigError where a build fails."""
    if how == "none":
        return "", "no image was asked for"
    found, why = engine() if how == "auto" else (how, "")
    if not found:
        return "", f"no image was built: {why}; build it elsewhere with the first line of Apptainer.def or Dockerfile"
    image = str(folder / f"{name}.sif") if found == "apptainer" else name
    words = {
        "apptainer": ["apptainer", "build", "--force", "--arch", "amd64", image, "Apptainer.def"],
        "docker": ["docker", "build", "--platform", "linux/amd64", "-t", image, "."],
    }[found]
    try:
        ran = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"build={how}: {found} cannot be run ({error.strerror or error})") from None
    if ran.returncode:
        last = (ran.stderr.strip() or ran.stdout.strip() or "nothing was printed").splitlines()[-1]
        raise ConfigError(f"{' '.join(words)} in {folder} ended with {ran.returncode}: {last}")
    return image, f"built with {found}"


def describe(made: Made) -> list[str]:
    """Lines for people: layers with their sizes, and what was built."""
    lines = [
        f"{layer.size / 2**20:9.1f} MB  {layer.name}{' (as installed here)' if layer.estimated else ''}"
        for layer in made.layers
    ]
    total = sum(layer.size for layer in made.layers)
    return [*lines, f"{total / 2**20:9.1f} MB  on top of the base image", f"{made.folder}: {made.image or made.said}"]
