"""The layers of docs/architecture.md, held by reading every import of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "brainfm"
ROOT = {"extras", "volume", "specs", "settings", "batch", "seeds", "seen", "errors", "files", "progress", "curves"}
TOP = {"cli", "demo", "verbs"}  # may import everything; nobody else imports them

# A room of a kind is imported by nobody: the registry names it as text, and it is asked through its Kind.
ROOMS = {"tasks.segmentation", "tasks.whole_head"}
LIGHT = {"data.columns", "data.manifest", "data.settings", "data.store"}  # of data what contracts speak of

MAY_IMPORT: dict[str, set[str]] = {
    "root": set(),
    "imaging": {"root"},
    "nets": {"root"},
    "scoring": {"root"},
    "synthesis": {"root", "imaging"},
    "data": {"root", "imaging", "synthesis", "scoring"},
    "objectives": {"root", "nets"},
    "tasks": {"root", "imaging", "nets", "scoring", *LIGHT},
    "study": {"root", "imaging", "data", "nets", "scoring", "tasks"},
    "probing": {"root", "imaging", "data", "nets", "objectives.objective", "scoring", "tasks"},
    "rooms": {"root", "imaging", "data", "nets", "scoring", "tasks", "study", "reports"},
    "crossdomain": {
        "root",
        "nets",
        "scoring",
        "data.workers",
        "reports.charts",
        "reports.page",
        "reports.style",
        "reports.wording",
    },
    "training": {"root", "data", "nets", "objectives", "scoring", "tasks", "study", "probing", "synthesis.settings"},
    "comparison": {"root", "data", "nets", "probing", "scoring", "study", "tasks", "training"},
    "inference": {
        "root",
        "imaging",
        "data.labelling",
        "data.manifest",
        "data.regions",
        "data.sources",
        "data.store",
        "nets",
        "scoring",
        "tasks",
    },
    "reports": {"root", "imaging", "data.manifest", "data.store", "tasks", "inference"},
    "submission": {"root", "imaging", "data.manifest", "nets", "scoring", "tasks", "inference", "probing"},
}
# third party -> the modules that may import it
FENCES: dict[str, set[str]] = {
    "nibabel": {"imaging.nifti", "imaging.formats", "submission.outputs"},
    "SimpleITK": {"imaging.register", "imaging.geometry", "imaging.anatomy"},
    "pydicom": {"imaging.dicom"},
    "highdicom": {"imaging.dicom"},
    "dcm2niix": {"imaging.dicom"},
    "lightning": {"training"},
    "hydra": {"verbs.compose"},
    "omegaconf": {"verbs.compose"},
    "jinja2": {"reports.page"},
    "h5py": {"crossdomain.images", "crossdomain.additions"},
    "torchio": {"data.torchio_transforms"},
    "timm": {"probing.frozen"},
    "PIL": {"crossdomain.images", "crossdomain.additions", "crossdomain.medimeta"},
}
NEVER = {"torchvision", "pickle", "wandb", "requests", "urllib.request"}
NO_TORCH = {
    "errors",
    "files",
    "progress",
    "scoring",
    "imaging",
    "data.anatomize",
    "data.fingerprint",
    "data.labelling",
    "data.manifest",
    "data.layouts",
    "data.levels",
    "data.derived",
    "data.participants",
    "data.sources",
    "data.tables",
    "data.tree",
    "data.workers",
    "data.doctor",
    "data.prepare",
    "data.store",
}

MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not {"configs", "challenges"} & set(p.parts))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer_of(module: str) -> str:
    first = module.split(".")[0]
    if any(module == room or module.startswith(f"{room}.") for room in ROOMS):
        return "rooms"
    return "root" if first in ROOT or module == "" else "top" if first in TOP else first


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports_of(path: Path, at_top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = ast.iter_child_nodes(tree) if at_top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """Modules of brainfm that a file imports, anywhere in it, without the leading package name."""
    modules = {name_of(p) for p in MODULES}
    return {name.removeprefix("brainfm.") for name in imports_of(path)} & (modules - {""})


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_layers_point_one_way(path: Path) -> None:
    module = name_of(path)
    layer = layer_of(module)
    if layer == "top" or module == "":  # the root __init__ names modules as text, imported when first used
        return
    for imported in ours(path):
        target = layer_of(imported)
        legal = target == layer or target in MAY_IMPORT[layer] or imported in MAY_IMPORT[layer]
        if target == layer == "rooms":
            legal = room_of(module) == room_of(imported)
        assert legal, f"{module} (layer {layer}) imports {imported} (layer {target})"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_third_parties_stay_behind_their_fences(path: Path) -> None:
    module = name_of(path)
    roots = {name.split(".")[0] for name in imports_of(path)} | imports_of(path)
    for package, places in FENCES.items():
        if package in roots:
            assert any(module == place or module.startswith(f"{place}.") for place in places), f"{module}: {package}"
    assert not roots & NEVER, f"{module} imports {roots & NEVER}"
    if any(module == place or module.startswith(f"{place}.") for place in NO_TORCH):
        assert "torch" not in roots, f"{module} imports torch: workers of prepare would start slowly"


def test_settings_wait_for_nothing_heavy() -> None:
    """Help is made of them, and comes at once."""
    names = ["settings", *(name_of(path) for path in MODULES if path.name == "settings.py" and path.parent != PACKAGE)]
    code = f"import sys, {', '.join(f'brainfm.{name}' for name in names)}; print(sorted(sys.modules))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(names) >= 6 and not [p for p in ("torch", "numpy", "hydra", "yaml") if f"'{p}'" in listed]


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows = {name_of(path): ours(path) - {name_of(path)} for path in MODULES if name_of(path)}
    while arrows:
        ends = {name for name, targets in arrows.items() if not targets & set(arrows)}
        assert ends, f"circles among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in ends}


def test_heavy_optional_packages_are_imported_when_used() -> None:
    for path in MODULES:
        heavy = {"SimpleITK", "monai", "nilearn", "matplotlib", "h5py", "PIL", "sklearn"} & {
            n.split(".")[0] for n in imports_of(path, True)
        }
        assert not heavy, f"{name_of(path)} imports {heavy} at its top"


def test_the_table_knows_every_package() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    rooms = {p.name for p in (PACKAGE / "tasks").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert {f"tasks.{name}" for name in rooms} == ROOMS
    assert folders <= {*MAY_IMPORT, *TOP}, folders - set(MAY_IMPORT)
    assert not {p.stem for p in MODULES} & {"utils", "helpers", "common", "misc", "base", "core"}
