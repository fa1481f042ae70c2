"""The long pre-training of the backbones that ship: in the background, from a frozen copy of the code, resumable.

    python scripts/foundation_train.py start --store STORE [--run runs/foundation] [--experiment NAME] [KEY=VALUE ...]
    python scripts/foundation_train.py status [--run runs/foundation]
    python scripts/foundation_train.py stop [--run runs/foundation]

`start` also resumes, with the keys it was started with: the code of the commit that the run began with lies in RUN/code
and goes on being used, whatever the checkout holds by then. One thread, the lowest priority. `stop` waits until the run
has saved. Everything lies in RUN, which git ignores.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("val_regions", "val_match_right", "val_cross", "val_lesion")


def freeze(code: Path, commit: str) -> None:
    """The files of a commit, and its name in COMMIT."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(code, filter="data")
    named = subprocess.run(["git", "rev-parse", commit], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (code / "COMMIT").write_text(named)


def running(run: Path) -> int | None:
    """The process that trains in this folder, or None."""
    try:
        number = int((run / "pid").read_text())
        os.kill(number, 0)
    except (OSError, ValueError):
        return None
    return number


def start(run: Path, store: Path, nice: int, experiment: str, keys: list[str]) -> str:
    if number := running(run):
        return f"{run}: process {number} is training already"
    code, kept = run / "code", run / "keys"
    keys = keys or (kept.read_text().splitlines() if kept.exists() else [])
    if not any(key.startswith("experiment=") for key in keys):
        keys = [f"experiment={experiment}", *keys]
    kept.write_text("".join(f"{key}\n" for key in keys))
    if not (code / "COMMIT").exists():
        freeze(code, "HEAD")
    lesions = store.parent / "lesion_shapes"
    command = [
        sys.executable, "-m", "brainfm.cli", "pretrain", f"store={store.resolve()}",
        f"run={(run / 'run').resolve()}", *([f"data.targets.lesion_shapes={lesions.resolve()}"] * lesions.is_dir()),
        *keys,
    ]  # fmt: skip
    with open(run / "log", "a") as log:
        print("$", *command, file=log, flush=True)
        process = subprocess.Popen(
            ["nice", "-n", str(nice), *command], cwd=code, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(code.resolve()), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    (run / "pid").write_text(str(process.pid))
    return f"{run}: process {process.pid}, code of commit {(code / 'COMMIT').read_text()[:8]}; its log is {run / 'log'}"


def status(run: Path) -> str:
    """Whether it runs, where it stands, and the last values of its curves."""
    number = running(run)
    lines = [f"{run}: " + (f"process {number} is training" if number else "not training")]
    log = run / "log"
    if log.exists():
        lines += log.read_text(errors="replace").splitlines()[-1:]
    curves = run / "run" / "curves.csv"
    if curves.exists():
        with curves.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        wanted = {}
        for step, name, value in (row for row in rows if len(row) == 3):
            if name in SHOWN or name.startswith("probe_level") or name.endswith("dice"):
                wanted[name] = f"{name} {float(value):.3f} (step {step})"
        lines += list(wanted.values())
    return "\n".join(lines)


def stop(run: Path) -> str:
    number = running(run)
    if number is None:
        return f"{run}: not training"
    os.kill(number, signal.SIGTERM)
    for _ in range(600):
        if running(run) is None:
            break
        time.sleep(0.5)
    return status(run)


def say(text: str) -> None:
    """Prints; who reads may have gone away (``| head -1``)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["start", "status", "stop"])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "foundation")
    parser.add_argument("--store", type=Path, default=ROOT / "runs" / "foundation_data" / "store")
    parser.add_argument("--experiment", default="dense_split_s", help="of a run that begins")
    parser.add_argument("--nice", type=int, default=19)
    parser.add_argument("keys", nargs="*", help="further keys of `brainfm pretrain`, e.g. optim.lr=1e-3")
    asked = parser.parse_intermixed_args()
    asked.run.mkdir(parents=True, exist_ok=True)
    if asked.what == "start":
        say(start(asked.run, asked.store, asked.nice, asked.experiment, asked.keys))
    else:
        say(status(asked.run) if asked.what == "status" else stop(asked.run))


if __name__ == "__main__":
    main()
