"""Weights to nnU-Net and back, through the released packages themselves.

    python scripts/evidence/nnssl_round_trip.py --work DIR

Makes an environment of its own that sees the packages of the one it is started from and installs nnunetv2, its network
package and what these import beside, each at a fixed version and without dependencies. timm imports names
of torchvision, which has no build for every build of torch: a package of that name whose modules hold empty classes
stands in for it.

Then, each step a process of that environment:
  load      `brainfm export` of resenc_l fills the published network, strictly, and gives brainfm's features
  primus    the change of token order is exact on the published transformer; `brainfm export` of a Primus fills it,
            strictly, and gives brainfm's features; `brainfm import` of its weights in nnssl's order gives them again
  dataset   `brainfm export format=nnunet` of generated heads; nnU-Net plans and prepares it
  released  `nnUNetv2_train -pretrained_weights`, one short epoch from our file, and nnUNetv2_predict with what it left
  encoder   the same epoch as fine-tuning of nnssl's checkpoints has it (encoder and stem found by the plan's keys,
            decoder fresh, no deep supervision); nnU-Net's own trainers for it are in no release up to 2.8.1
  back      `brainfm import` of what nnU-Net left
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

PACKAGES = (
    "nnunetv2==2.8.1", "dynamic-network-architectures==0.4.4", "batchgenerators==0.25.5", "batchgeneratorsv2==0.3.6",
    "acvl-utils==0.2.6", "timm<1.0.23", "einops", "connected-components-3d", "scikit-image", "lazy_loader", "imageio",
    "tifffile", "seaborn", "graphviz", "yacs", "imagecodecs", "future",
)  # fmt: skip
STUB = """
import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0"


class _Names(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        inner = name.startswith("torchvision.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if inner else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())
for _name in ("transforms", "ops", "datasets", "models"):
    globals()[_name] = importlib.import_module(f"torchvision.{_name}")
"""
STEPS = ("load", "primus", "dataset", "released", "encoder", "back")
DATASET, PLANS, EDGE = "Dataset501_lesion", "brainfmPlans", 64
TRAINERS = '''
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class ShortTrainer(nnUNetTrainer):
    """One epoch of a few steps."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, {steps}, 1


class ShortEncoderTrainer(ShortTrainer):
    """The same from the encoder and the stem of a checkpoint, found by its plan; the rest is fresh."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision, self.initial_lr = False, 1e-3

    def initialize(self):
        super().initialize()
        held = torch.load({checkpoint!r}, weights_only=True)
        plan, weights = held["nnssl_adaptation_plan"], held["network_weights"]
        for key in (plan["key_to_encoder"], plan["key_to_stem"]):
            part = {{n.removeprefix(key + "."): v for n, v in weights.items() if n.startswith(key + ".")}}
            self.network.get_submodule(key).load_state_dict(part, strict=True)
            self.print_to_log_file(f"{{len(part)}} tensors of {{key}} loaded strictly")
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for everything, the environment included")
    parser.add_argument("--backbone", type=Path, help="a backbone file of resenc_l; default: fresh weights")
    parser.add_argument("--steps", type=int, default=4, help="of the short epoch")
    parser.add_argument("--only", choices=STEPS, nargs="+", default=list(STEPS))
    parser.add_argument("--inside", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = given.work.resolve()
    if given.inside:
        globals()[f"step_{given.inside}"](work, given.steps)
        return
    work.mkdir(parents=True, exist_ok=True)
    python = environment(work)
    _export(work, given.backbone)
    for step in given.only:
        began = time.perf_counter()
        command = [str(python), __file__, "--work", str(work), "--steps", str(given.steps), "--inside", step]
        done = subprocess.run(command, env=_variables(work), capture_output=True, text=True)
        (work / f"{step}.log").write_text(done.stdout + done.stderr)
        told = [line for line in done.stdout.splitlines() if line.startswith("> ")]
        state = "done" if done.returncode == 0 else f"FAILED, see {work / f'{step}.log'}"
        print(f"{step:<9} {state}, {time.perf_counter() - began:.0f} s", *told, sep="\n  ", flush=True)
        if done.returncode:
            sys.exit(1)


def environment(work: Path) -> Path:
    """The Python of a throwaway environment with nnU-Net in it."""
    home = work / "environment"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        venv.create(home, with_pip=True)
        inner = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                                    capture_output=True, text=True, check=True).stdout.strip())  # fmt: skip
        seen = [sysconfig.get_path("purelib"), str(Path(__file__).resolve().parents[2])]
        (inner / "host.pth").write_text("\n".join(seen) + "\n")
        (inner / "torchvision").mkdir()
        (inner / "torchvision" / "__init__.py").write_text(STUB)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *PACKAGES]
        subprocess.run(pip, check=True)
        (home / "ready").touch()
    return python


def _variables(work: Path) -> dict[str, str]:
    """The process' environment, with nnU-Net's folders."""
    own = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
    own |= {"nnUNet_extTrainer": str(work / "trainers"), "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    own |= {"nnUNet_compile": "false", "MPLBACKEND": "Agg"}
    own["PATH"] = f"{work / 'environment' / 'bin'}:{os.environ['PATH']}"
    for name in ("raw", "preprocessed", "results", "trainers"):
        (work / name).mkdir(exist_ok=True)
    return os.environ | own


def _export(work: Path, backbone: Path | None) -> None:
    import torch

    from brainfm.cli import main as brainfm
    from brainfm.nets.backbone import build_backbone
    from brainfm.nets.backbone_file import save_backbone
    from brainfm.nets.decoders import decoder_for
    from brainfm.specs import PreprocessSpec, Provenance

    if backbone is None:
        backbone = work / "backbone.safetensors"
        torch.manual_seed(0)
        encoder = build_backbone("resenc_l")
        save_backbone(
            backbone, encoder, objective={"name": "none", "config": {}}, objective_state={}, patch_vox=(160,) * 3,
            preprocess=PreprocessSpec(), provenance=Provenance("0", "", ""), decoder=decoder_for(encoder, {"image": 1}),
        )  # fmt: skip
    if brainfm(["export", "format=nnssl", f"backbone={backbone}", f"out={work / 'export.pth'}"]):
        sys.exit(2)
    (work / "trainers").mkdir(exist_ok=True)
    (work / "source.json").write_text(json.dumps({"backbone": str(backbone.resolve())}))


def _ran(*words: str) -> None:
    """A command of nnU-Net or brainfm; the log takes what it says."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}")


# ---- inside ----------------------------------------------------------------------------------------------------------


def step_load(work: Path, _steps: int) -> None:
    """Strict loading, and equal features for the same head read as Z, Y, X."""
    import torch
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    from torch import nn

    from brainfm.nets.backbone_file import load_backbone

    held = torch.load(work / "export.pth", weights_only=True)
    plan, weights = held["nnssl_adaptation_plan"], held["network_weights"]
    network = ResidualEncoderUNet(
        1, 6, [32, 64, 128, 256, 320, 320], nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], [1, 3, 4, 6, 6, 6], 1, [1] * 5,
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=False,
    )  # fmt: skip
    network.load_state_dict(weights, strict=True)
    print(f"> {len(weights)} tensors loaded strictly into {plan['architecture_plans']['arch_class_name']}")
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {n.removeprefix(key + "."): v for n, v in weights.items() if n.startswith(key + ".")}
        network.get_submodule(key).load_state_dict(part, strict=True)
        print(f"> {len(part)} tensors loaded strictly into {key}")
    assert plan["key_to_encoder"] == network.key_to_encoder and plan["key_to_stem"] == network.key_to_stem
    assert set(plan["keys_to_in_proj"]) == set(network.keys_to_in_proj) and network.key_to_lpe is plan["key_to_lpe"]
    loaded = load_backbone(json.loads((work / "source.json").read_text())["backbone"])
    image = torch.randn(1, 1, 64, 32, 64, dtype=torch.float64)  # in float32 instance norm on small maps blurs the sum
    with torch.no_grad():
        theirs = network.double().eval().encoder(image.permute(0, 1, 4, 3, 2))
        ours = loaded.backbone.double()(image)
        turned = [map_.permute(0, 1, 4, 3, 2) for map_ in theirs]
        apart = [float((a - b).abs().max() / b.std()) for a, b in zip(ours, turned, strict=True)]
        print(
            f"> features of an array read as Z, Y, X against ours: {max(apart):.1e} deviations of a map apart at most"
        )
        assert max(apart) < 1e-5
        if loaded.decoder is not None and loaded.decoder.parts == {"image": 1}:
            answer = network(image.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
            apart_most = float((loaded.decoder.double()(ours) - answer).abs().max() / answer.std())
            print(f"> the decoder's answers: {apart_most:.1e} apart")


def step_primus(work: Path, _steps: int) -> None:
    """Released weights in the network of before June 2025, and changed ones in today's."""
    import torch
    from dynamic_network_architectures.architectures.primus import Primus
    from einops import rearrange

    from brainfm.nets.exchange.primus import token_grid, with_axes_swapped

    torch.manual_seed(0)
    network = Primus(
        1, 144, (8, 8, 8), 1, eva_depth=3, eva_numheads=2, input_shape=(32, 32, 32), init_values=0.1,
        scale_attn_inner=True,
    ).eval()  # fmt: skip
    state = network.state_dict()
    for name, value in state.items():  # biases and gains start at 0 and 1: nothing would be seen to move
        if value.is_floating_point() and "mask_token" not in name:
            value += 0.3 * torch.randn_like(value)
    network.load_state_dict(state)
    released = {name: value.clone() for name, value in state.items()}
    image = torch.randn(2, 1, 32, 32, 32)

    def answer(order: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        network.load_state_dict(weights, strict=True)
        map_ = network.down_projection(image)
        tokens, _ = network.eva(rearrange(map_, f"b c w h d -> b ({order}) c"))
        return rearrange(tokens, f"b ({order}) c -> b c w h d", w=4, h=4, d=4)

    with torch.no_grad():
        trained = answer("h w d", released)
        grid = token_grid(released["eva.pos_embed"])
        changed = with_axes_swapped(released, grid, head=72)
        alone = released | {"eva.pos_embed": changed["eva.pos_embed"]}
        found = {
            "unchanged": released, "positions alone": alone, "changed": changed,
        }  # fmt: skip
        apart = {name: float((answer("w h d", weights) - trained).abs().max()) for name, weights in found.items()}
    print("> largest difference of tokens: " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    assert apart["changed"] < 1e-4 < apart["positions alone"]
    _primus_there_and_back(work)


def _primus_there_and_back(work: Path) -> None:
    """A Primus of ours in the published network, whose array is read as Z, Y, X, and back from nnssl's order."""
    import torch
    from dynamic_network_architectures.architectures.primus import Primus

    from brainfm.cli import main as brainfm
    from brainfm.nets.backbone import build_backbone
    from brainfm.nets.backbone_file import load_backbone, save_backbone
    from brainfm.specs import PreprocessSpec, Provenance

    edges = (16, 24, 24)
    ours = build_backbone("primus", width=144, depth=3, heads=2, grid_vox=list(edges)).eval()
    with torch.no_grad():
        for value in ours.parameters():
            value += 0.1 * torch.randn_like(value)
    save_backbone(
        work / "primus.safetensors", ours, objective={"name": "none", "config": {}}, objective_state={},
        preprocess=PreprocessSpec(), patch_vox=edges, provenance=Provenance("0", "", ""),
    )  # fmt: skip
    words = ["export", "format=nnssl", f"backbone={work / 'primus.safetensors'}"]
    assert brainfm([*words, f"out={work / 'primus.pth'}"]) == 0
    held = torch.load(work / "primus.pth", weights_only=True)
    told = dict(held["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"])
    told = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    theirs = Primus(1, num_classes=1, **told)
    theirs.load_state_dict(held["network_weights"], strict=True)
    image = torch.randn(1, 1, *edges)
    with torch.no_grad():
        map_ = theirs.eval().down_projection(image.permute(0, 1, 4, 3, 2))
        tokens, _ = theirs.eva(map_.flatten(2).transpose(1, 2))
        turned = tokens.transpose(1, 2).reshape(map_.shape).permute(0, 1, 4, 3, 2)
        apart = float((turned - ours(image)[-1]).abs().max())
    print(
        f"> {len(held['network_weights'])} tensors loaded strictly by the plan's arguments; features {apart:.1e} apart"
    )
    assert apart < 1e-4
    assert brainfm([*words, f"out={work / 'primus_hwd.pth'}", "order=hwd"]) == 0
    back = work / "primus_back.safetensors"
    assert brainfm(["import", f"checkpoint={work / 'primus_hwd.pth'}", f"out={back}"]) == 0
    with torch.no_grad():
        again = float((load_backbone(back).backbone(image)[-1] - ours(image)[-1]).abs().max())
    print(f"> back from nnssl's order of tokens: {again:.1e} apart")
    assert again < 1e-5


def step_dataset(work: Path, _steps: int) -> None:
    """Generated heads with lesions, planned and prepared with the pre-training's patch and network."""
    from brainfm.cli import main as brainfm
    from brainfm.synthesis.phantom import write_cohort

    write_cohort(work / "cohort", 5, seed=3, spacing_mm=3.0)
    root, manifest = work / "cohort", work / "cohort.csv"
    assert brainfm(["manifest", f"root={root}", f"out={manifest}", "masks.lesion=**/*_lesion_mask.nii.gz"]) == 0
    out = work / "raw" / DATASET
    words = [f"manifest={manifest}", f"out={out}", "target=lesion", "contrasts=[t1]"]
    assert brainfm(["export", "format=nnunet", *words]) == 0
    _ran("nnUNetv2_extract_fingerprint", "-d", "501", "-np", "1", "--verify_dataset_integrity")
    _ran("nnUNetv2_plan_experiment", "-d", "501")
    folder = work / "preprocessed" / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    chosen = plans["configurations"]["3d_fullres"]
    chosen |= {"batch_size": 2, "patch_size": [EDGE] * 3, "normalization_schemes": ["ZScoreNormalization"]}
    chosen["data_identifier"] = PLANS
    chosen["architecture"] = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": 6, "features_per_stage": [32, 64, 128, 256, 320, 320],
            "conv_op": "torch.nn.modules.conv.Conv3d", "kernel_sizes": [[3, 3, 3]] * 6,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5, "conv_bias": True,
            "n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": [1] * 5,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip
    plans |= {"plans_name": PLANS, "configurations": {"3d_fullres": chosen}}
    (folder / f"{PLANS}.json").write_text(json.dumps(plans))
    _ran("nnUNetv2_preprocess", "-d", "501", "-plans_name", PLANS, "-c", "3d_fullres", "-np", "1")
    cases = len(list((out / "imagesTr").glob("*.nii.gz")))
    print(f"> {cases} cases, integrity verified by nnU-Net, spacing {chosen['spacing']}, patch {EDGE}")


def step_released(work: Path, steps: int) -> None:
    """The path of release 2.8.1: all but the last layers come from the file."""
    _train(work, "ShortTrainer", steps, "-pretrained_weights", str(work / "export.pth"))
    images = work / "images"
    images.mkdir(exist_ok=True)
    first = min((work / "raw" / DATASET / "imagesTr").glob("*_0000.nii.gz"))
    (images / first.name).write_bytes(first.read_bytes())
    _ran(
        "nnUNetv2_predict", "-i", str(images), "-o", str(work / "predicted"), "-d", "501", "-c", "3d_fullres",
        "-f", "0", "-tr", "ShortTrainer", "-p", PLANS, "-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1",
    )  # fmt: skip
    print(f"> nnUNetv2_predict wrote {len(list((work / 'predicted').glob('*.nii.gz')))} label map")


def step_encoder(work: Path, steps: int) -> None:
    """Encoder and stem by the plan's keys."""
    _train(work, "ShortEncoderTrainer", steps)


def _train(work: Path, trainer: str, steps: int, *words: str) -> None:
    checkpoint = str(work / "export.pth")
    (work / "trainers" / "short_trainers.py").write_text(TRAINERS.format(steps=steps, checkpoint=checkpoint))
    _ran("nnUNetv2_train", "501", "3d_fullres", "0", "-tr", trainer, "-p", PLANS, "-device", "cpu", *words)
    log = max((_results(work, trainer)).glob("training_log*.txt")).read_text()
    for line in re.findall(r"(\d+ tensors of .* strictly|train_loss .*|val_loss .*|Mean Validation Dice.*)", log):
        print(f"> {line}")
    left = _results(work, trainer) / "checkpoint_final.pth"
    print(f"> one epoch of {steps} steps left {left.name}, {left.stat().st_size / 1e6:.0f} MB")


def _results(work: Path, trainer: str) -> Path:
    return work / "results" / DATASET / f"{trainer}__{PLANS}__3d_fullres" / "fold_0"


def step_back(work: Path, _steps: int) -> None:
    """What nnU-Net left, as a backbone file; its encoder moved by a few steps and no more."""
    import torch

    from brainfm.nets.backbone_file import load_backbone

    trained = _results(work, "ShortTrainer") / "checkpoint_final.pth"
    _ran(sys.executable, "-m", "brainfm.cli", "import", f"checkpoint={trained}", f"out={work / 'back.safetensors'}")
    back = load_backbone(work / "back.safetensors")
    source = load_backbone(json.loads((work / "source.json").read_text())["backbone"])
    before, after = source.backbone.state_dict(), back.backbone.state_dict()
    moved = {name: float((after[name] - value).norm() / value.norm().clamp_min(1e-9)) for name, value in before.items()}
    kernels = [value for name, value in moved.items() if before[name].ndim == 5]
    assert all(torch.isfinite(value).all() for value in after.values())
    print(f"> {back.backbone.config['name']}; kernels moved by {max(kernels):.3f} of their norm at most")
    assert max(kernels) < 0.5


if __name__ == "__main__":
    main()
