"""What must be touched to add something: a file each, and a line in a registry. What is added here is no part of
brainfm and goes through it all the same; an objective is added in tests/objectives/test_settings.py, a backbone in
tests/test_toy_backbone.py."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from brainfm import verbs
from brainfm.cli import main
from brainfm.data.layouts import LAYOUTS, _Place
from brainfm.data.manifest import contrast_of, read_manifest
from brainfm.data.store import Store
from brainfm.nets.backbone import BACKBONES
from brainfm.objectives.settings import OBJECTIVES
from brainfm.tasks.bundle import read_bundle
from brainfm.tasks.registry import KINDS, kind_of
from tests.tasks.toy_kind import table
from tests.test_layers import MODULES, PACKAGE, layer_of, name_of
from tests.training.test_finetune_contracts import small_store

TOY_VERB = '''"""Count the scans of a manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

PLACE = 99


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Count the scans of a manifest."""

    manifest: Annotated[Path, "what to count"]
    least: Annotated[int, "fewer are a fault"] = 1


def run(settings: Settings) -> int:
    from brainfm.data.manifest import read_manifest

    found = len(read_manifest(settings.manifest).scans)
    print(f"{found} scans")
    return int(found < settings.least)
'''


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.mktemp("small"))


def test_a_kind_of_task_is_a_room_and_a_line(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registered = {"load": ("tests.tasks.toy_kind", "Load")}
    for name, place in registered.items():
        monkeypatch.setitem(KINDS, name, place)
    run, root = tmp_path / "run", store.path.parent
    words = [
        "task=load", "task.target=lesion", f"store={store.path}", f"run={run}", "backbone_from=none",
        "backbone=unet_tiny", "trainer=cpu", "folds=2", "trainer.max_steps=2", "trainer.batch_size=2",
        "trainer.workers=0", "trainer.threads=1", "baselines=[features]", "report=false", "data.augment=null",
    ]  # fmt: skip
    assert main(["finetune", *words]) == 0
    bundle = read_bundle(run / "bundle")
    assert (bundle.task.kind, len(bundle.networks)) == ("load", 2)
    assert "how many ml of `lesion` there are" in (run / "bundle" / "README.md").read_text()
    results = json.loads((run / "results.json").read_text())
    assert set(results["scores"]) == {"model", "features"} and results["scores"]["model"]["mae"]["n"] == 8
    # answered one by one, for a manifest, and held against it
    one, many = tmp_path / "one.json", tmp_path / "many"
    assert main(["predict", f"bundle={run / 'bundle'}", f"input.t1={root / '0_t1.nii.gz'}", f"out={one}"]) == 0
    assert json.loads(one.read_text())["ml"] == pytest.approx(float(results["cases"][0]["truth"]), rel=0.5)
    assert main(["predict", f"bundle={run / 'bundle'}", f"manifest={root / 'm.csv'}", f"out={many}"]) == 0
    assert len(table(many / "predictions.csv")) == 8 and (many / "toy__0_lesion.json").exists()
    assert main(["evaluate", f"bundle={run / 'bundle'}", f"manifest={root / 'm.csv'}", f"out={tmp_path / 'e'}"]) == 0
    assert len(table(tmp_path / "e" / "cases.csv")) == 8
    capsys.readouterr()
    assert main(["finetune", "task=load", "--help"]) == 0 and "task.edge_vox=16" in capsys.readouterr().out
    assert len(registered) == 1


def test_a_layout_is_a_function_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_manifest: Path) -> None:
    def reader(tree):
        """Files are called CONTRAST@SUBJECT.nii.gz."""
        names = [parts[-1].split(".")[0].split("@") for parts in tree.files]
        return [_Place(tree.name, subject, "", contrast_of(contrast)) for contrast, subject in names], ["toy read it"]

    monkeypatch.setitem(LAYOUTS, "toy", reader)
    scans = read_manifest(toy_manifest)
    root = tmp_path / "data"
    root.mkdir()
    for number, contrast in enumerate(("t1", "flair")):
        (root / f"{contrast}@p{number}.nii.gz").write_bytes(scans.resolve(scans.scans[0].path).read_bytes())
    assert main(["manifest", f"root={root}", f"out={tmp_path / 'm.csv'}", "layout=toy"]) == 0
    found = [(scan.subject, scan.contrast) for scan in read_manifest(tmp_path / "m.csv").scans]
    assert sorted(found) == [("p0", "t1"), ("p1", "flair")]


def test_a_verb_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "count.py").write_text(TOY_VERB)
    monkeypatch.setattr(verbs, "__path__", [*verbs.__path__, str(tmp_path)])
    scans = len(read_manifest(toy_manifest).scans)
    assert main(["count", f"manifest={toy_manifest}"]) == 0
    assert capsys.readouterr().out == f"{scans} scans\n"
    assert main(["count", f"manifest={toy_manifest}", f"least={scans + 1}"]) == 1
    assert main(["count", "--help"]) == 0 and "fewer are a fault" in capsys.readouterr().out
    assert main([]) == 0 and re.search("count +count the scans of a manifest", capsys.readouterr().out)
    assert main(["count", f"manifest={toy_manifest}", "leest=1"]) == 2
    assert "did you mean least?" in capsys.readouterr().err


# ---- what keeps it so ------------------------------------------------------------------------------------------------


def test_only_rooms_and_registry_know_the_names_of_kinds() -> None:
    """Elsewhere the registered object is asked. What a challenge asks for (submission) has kinds of its own, the
    settings name a default, and the help of probe says what may be given."""
    allowed = {"training.settings": 1, "verbs.probe": 2}
    for path in MODULES:
        module = name_of(path)
        if layer_of(module) in ("rooms", "submission") or module in ("tasks.registry", "verbs.container"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in tuple(KINDS)]
        assert len(named) <= allowed.get(module, 0), f"{module} names a kind in lines {named}"
        modes = [
            node.lineno for node in ast.walk(tree) if isinstance(node, ast.Compare)
            for part in ast.walk(node) if isinstance(part, ast.Attribute) and part.attr in ("kind", "mode")
            and ast.unparse(part.value).split(".")[-1] in ("spec", "task", "engine", "bundle")
        ]  # fmt: skip
        assert not modes, f"{module} compares the kind or the mode of a task in lines {modes}"


def test_every_kind_is_registered_under_its_own_name() -> None:
    for name, place in KINDS.items():
        kind = kind_of(name)
        assert kind.name == name and kind.settings(target="t").kind == name
        assert place[0].rsplit(".", 1)[0] in {"brainfm.tasks.segmentation", "brainfm.tasks.whole_head"}
        assert kind.column in ("", "classes", "values") and bool(kind.column) == bool(kind.second)


def test_no_two_classes_share_a_name() -> None:
    """But for the verbs' ``Settings``, for which the command line asks each verb by that name."""
    found: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not (node.name == "Settings" and path.parent.name == "verbs"):
                found.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: files for name, files in found.items() if len(files) > 1}


# modules that name an entry of a registry for a reason of their own: a default, or what another tool's weights become
ELSEWHERE = {
    "training.memory",
    "probing.frozen",
    "training.settings",
    "crossdomain.transfer",
    "verbs.medimeta",
    "verbs.export",
}
WORDS = {"mae", "folder"}  # a score and a directory are called so, too


@pytest.mark.parametrize(
    ("registry", "home", "files"),
    [(BACKBONES, "nets.backbone", 2), (OBJECTIVES, "objectives.settings", 2), (LAYOUTS, "data.layouts", 1)],
    ids=["a backbone", "an objective", "a layout"],
)
def test_who_adds_a_name_touches_its_registry_and_its_own_file(registry: dict, home: str, files: int) -> None:
    """Counted for every entry that is there: the modules in which its name stands."""
    where: dict[str, set[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in registry:
                where.setdefault(node.value, set()).add(name_of(path))
    for name in registry.keys() - WORDS:
        touched = {m for m in where[name] - ELSEWHERE if not m.startswith("nets.exchange.")}
        assert home in touched and len(touched) <= files, f"{name} stands in {sorted(touched)}"
