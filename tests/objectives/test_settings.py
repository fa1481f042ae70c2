"""What it takes to add an objective: its file, its settings, its test. No YAML, no trainer, no command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from brainfm.objectives.settings import OBJECTIVES
from brainfm.settings import keys_of, plain

PACKAGE = Path(__file__).parents[2] / "brainfm"
TOY = '''"""Maps pulled to a number."""

from brainfm.batch import Terms
from brainfm.objectives.objective import Objective
from brainfm.specs import ViewSpec


class Pull(Objective):
    name = "pull"

    def __init__(self, backbone, settings, *, patch_vox, seed):
        super().__init__(backbone, ViewSpec(patch_vox), seed, settings)
        self.to = settings.to

    def forward(self, batch, progress):
        total = (self.backbone.features(batch.image)[-1] - self.to).square().mean()
        return Terms(total, {"pull": total.detach()})

    def pictures(self, batch):
        return {"input": batch.image}
'''
SETTINGS = '''

@dataclass(frozen=True)
class PullSettings(ObjectiveSettings):
    """Maps pulled to a number."""

    name: Annotated[str, "which objective"] = "pull"
    to: Annotated[float, "the number"] = 2.0


'''
TRIED = """
import torch
from brainfm.batch import Batch
from brainfm.cli import main
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.objective import make_objective
from brainfm.verbs.compose import resolve
settings = resolve("pretrain", ["store=s", "run=r", "objective=pull", "objective.to=3"])
asked = make_objective(settings.objective, build_backbone("unet_tiny"), patch_vox=(16, 16, 16), seed=0)
asked(Batch(torch.zeros(1, 1, 16, 16, 16), torch.arange(1)), 0.0).total.backward()
print(asked.config, main(["pretrain", "objective=pull", "--help"]))
print(main(["pretrain", "store=s", "run=r", "objective=pull", "objective.too=3"]))
"""


def test_an_objective_is_a_file_and_its_settings(tmp_path: Path) -> None:
    copy = tmp_path / "brainfm"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE.parent / "configs", tmp_path / "configs")
    (copy / "objectives" / "pull.py").write_text(TOY)
    file = copy / "objectives" / "settings.py"
    text = file.read_text().replace("\n\n# name: its settings", f"{SETTINGS}# name: its settings", 1)
    text = text.replace('    "mae": (', '    "pull": (PullSettings, "brainfm.objectives.pull:Pull"),\n    "mae": (', 1)
    file.write_text(text)
    touched = [
        path for path in sorted(copy.rglob("*.py"))
        if not (here := PACKAGE / path.relative_to(copy)).exists() or here.read_text() != path.read_text()
    ]  # fmt: skip
    assert [str(path.relative_to(copy)) for path in touched] == ["objectives/pull.py", "objectives/settings.py"]
    done = subprocess.run(
        [sys.executable, "-c", TRIED], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "{'to': 3}" in done.stdout and "objective.to=2.0 " in done.stdout and "the number" in done.stdout
    assert "no key 'objective.too'; did you mean objective.to?" in done.stderr


def test_every_objective_names_itself() -> None:
    for name, (kind, place) in OBJECTIVES.items():
        assert plain(kind())["name"] == name and place.startswith("brainfm.objectives.")
        assert all(key.doc for key in keys_of(kind).values())
