"""The verbs of the command line. The only file that knows hydra; heavy imports wait for the verb that needs them."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from brainfm import __version__
from brainfm.files import check_writable
from brainfm.specs import BrainfmError, BrainfmWarning, ConfigError

VERBS = {
    "demo": "a synthetic cohort taken through every step below, and a report with pictures",
    "manifest": "find the scans under a folder: one row a scan",
    "doctor": "read every scan and say what is wrong with it",
    "prepare": "bring every session to one grid, in a store of random patches",
    "anatomy": "label and measure brain regions, or tissues by an atlas, in scans of any contrast",
    "pretrain": "pre-train a backbone without labels",
    "finetune": "fine-tune a backbone on labelled cases; leaves a bundle",
    "predict": "apply a bundle; masks lie on the scans that came in",
    "embed": "frozen features of whole heads, a row a scan",
    "probe": "what frozen features know of a column: kNN, logistic and ridge regression",
    "evaluate": "compare masks with labels: Dice, surface Dice, volumes, intervals",
    "explain": "where in the head a bundle's answer comes from: a map on the scan, and a picture",
    "report": "write the report of a finished fine-tuning again",
}

# Values of these keys are text as it stands: a path may hold blanks, brackets or '=' without quoting for hydra.
_TEXT = re.compile(
    r"^(root|class|out|store|run|manifest|bundle|participants|predictions|backbone_from|features|target|finish\.from|data\.targets\.(volumes|lesion_shapes)|(masks|labels|input)\..+)$"
)
_MOST_SAID = 10  # sessions of one kind that are named
_OPEN = ("masks.", "labels.", "input.")  # groups whose keys the user names


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb. Returns the exit code: 0 done, 1 faults found (doctor), 2 the user can mend it.

    Who reads what is printed may go away (``| head``): the work is done all the same.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _patient("stdout"), _patient("stderr"):
            return _main(words)
    except OSError as error:  # of a verb, or from printing its last lines
        if error.errno is None or "debug=true" in words:
            raise
        return _complain(_of_the_system(error))


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    verb, *rest = words
    warnings.simplefilter("always", BrainfmWarning)
    warnings.showwarning = _note
    debug = "debug=true" in rest
    try:
        if verb not in VERBS:
            raise ConfigError(f"unknown verb {verb!r}, expected one of {', '.join(VERBS)}")
        if any(word in ("-h", "--help") for word in rest):
            print(_verb_help(verb))
            return 0
        config = resolve(verb, rest)
        if verb == "finetune":
            config["command"] = shlex.join(["brainfm", *words])
        return _RUN[verb](config)
    except BrainfmError as error:
        if debug:
            raise
        return _complain(str(error))
    except KeyboardInterrupt:
        print("brainfm: interrupted; the same command goes on from what is done", file=sys.stderr)
        return 130


_show_warning = warnings.showwarning


def _note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Our own warnings as one sentence, those of others as ever."""
    if issubclass(category, BrainfmWarning):
        print(f"brainfm: note: {message}", file=sys.stderr)
    else:
        _show_warning(message, category, *where, **more)


def _of_the_system(error: OSError) -> str:
    """What the operating system refused, as a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk for {error.filename or 'the output'}: free some and run again"
    return f"{error.filename or 'the output'}: {(error.strerror or type(error).__name__).lower()}"


# What a stream says whose reader went away: the other end of a pipe, a terminal, what was closed by the caller.
_NOBODY = (errno.EPIPE, errno.EIO, errno.EBADF)


class _Patient:
    """A stream that goes on taking text when nobody reads it any more, and escapes what its encoding cannot hold."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        """What follows is written to nowhere; a second try to flush what is buffered must not fail either."""
        if error.errno not in _NOBODY:
            raise error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()


@contextmanager
def _patient(name: str) -> Iterator[None]:
    stream = getattr(sys, name)
    if isinstance(stream, _Patient):
        yield
        return
    if stream is None:  # the caller has closed it: what is printed goes nowhere, and no file of ours takes its number
        stream = open(os.devnull, "w")  # noqa: SIM115
    patient = _Patient(stream)
    setattr(sys, name, patient)
    try:
        yield
        patient.flush()
    finally:
        if getattr(sys, name) is patient:
            setattr(sys, name, stream)


def _complain(sentence: str) -> int:
    print(f"brainfm: {sentence}", file=sys.stderr)
    return 2


def configs() -> Path:
    """The folder of the YAML files: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            f"brainfm {__version__}: compact 3D brain-MRI foundation models",
            "",
            "usage: brainfm VERB key=value ...      (brainfm VERB --help lists the keys)",
            "",
            *lines,
        ]
    )


def _verb_help(verb: str) -> str:
    """The verb's YAML as it stands, comments included, and the options of each group it uses."""
    text = (configs() / f"{verb}.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("debug:")]
    for group, chosen in _groups(verb).items():
        lines.append(f"\n{group}={'|'.join(options(group))}   (default {chosen})")
        if chosen != "null":
            lines += [
                f"  {group}.{line}" if re.match(r"\w", line) else f"  {line}"
                for line in (configs() / group / f"{chosen}.yaml").read_text().splitlines()
            ]
    return "\n".join([f"usage: brainfm {verb} key=value ...   (??? must be given)", "", *lines])


def _groups(verb: str) -> dict[str, str]:
    """The groups that a verb chooses from, with its choice."""
    text = (configs() / f"{verb}.yaml").read_text()
    return dict(re.findall(r"^  - (?:optional )?(\w+): (\w+)", text, flags=re.MULTILINE))


def options(group: str) -> list[str]:
    """What may follow ``group=``."""
    return sorted(path.stem for path in (configs() / group).glob("*.yaml"))


def resolve(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The verb's configuration with the overrides applied, as plain values.

    Raises:
        ConfigError: for a key given twice, unknown or missing, or an option that does not exist.
    """
    seen: dict[str, str] = {}
    groups = _groups(verb)
    for word in overrides:
        key, separator, value = word.partition("=")
        if not separator:
            raise ConfigError(f"found {word!r}, expected key=value")
        if key in seen:
            raise ConfigError(f"{key} is given twice ({seen[key]} and {value}), expected once")
        seen[key] = value
        if key in groups and value not in [*options(key), "null"]:
            raise ConfigError(f"{key}={value}: expected one of {', '.join(options(key))}")
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # A key of this verb that elsewhere names a group (backbone=FILE): hydra would look the file up among the options.
    plain = {key: value for key, value in seen.items() if key not in groups and (configs() / key).is_dir()}
    try:
        with initialize_config_dir(str(configs().resolve()), version_base="1.3"):
            composed = compose(verb, [_for_hydra(key, value) for key, value in seen.items() if key not in plain])
            for key, value in plain.items():
                if key not in composed.keys():  # noqa: SIM118 (what must be given is not "in" it)
                    raise ConfigError(f"brainfm {verb} has no key {key!r}; `brainfm {verb} --help` lists them")
                composed[key] = None if value == "null" else value
            missing = sorted(OmegaConf.missing_keys(composed))
            if missing:
                raise ConfigError(f"brainfm {verb}: {', '.join(missing)} must be given, e.g. {missing[0]}=...")
            return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_hydra_sentence(verb, error)) from error


def _for_hydra(key: str, value: str) -> str:
    if _TEXT.match(key) and value != "null":
        quoted = value.replace("\\", "\\\\").replace("'", "\\'") if "'" in value or value.endswith("\\") else value
        return f"{'++' if key.startswith(_OPEN) else ''}{key}='{quoted}'"
    return f"{key}={value}"


def _hydra_sentence(verb: str, error: Exception) -> str:
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct|No match in the defaults", text)
    if unknown:
        key = unknown.group(1) or unknown.group(2) or "a key"
        return f"brainfm {verb} has no key {key!r}; `brainfm {verb} --help` lists them"
    return f"brainfm {verb}: {text.splitlines()[0]}"


def _workers(config: dict[str, Any]) -> int:
    if int(config["workers"]) > 0:
        return int(config["workers"])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _manifest(config: dict[str, Any]) -> int:
    from brainfm.data.layouts import find
    from brainfm.data.manifest import write_left_out, write_manifest

    participants = config["participants"]
    found = find(
        Path(config["root"]),
        config["layout"],
        masks=config["masks"],
        labels=config["labels"],
        participants=Path(participants) if participants and participants != "none" else None,
        own_tables=participants != "none",
    )
    out = Path(config["out"])
    write_manifest(out, found.scans)
    write_left_out(out, found.left_out)
    for note in found.notes:
        print(note)
    subjects = {(s.dataset, s.subject) for s in found.scans}
    sessions = {(s.dataset, s.subject, s.session) for s in found.scans}
    print(f"{out}: {len(found.scans)} scans, {len(sessions)} sessions, {len(subjects)} subjects")
    return 0


def _doctor(config: dict[str, Any]) -> int:
    from brainfm.data.doctor import examine, write_faults
    from brainfm.data.manifest import read_manifest
    from brainfm.training.monitor import Progress

    manifest = read_manifest(Path(config["manifest"]))
    out = Path(config["out"]) if config["out"] else manifest.path.with_suffix(".doctor.csv")
    check_writable(out.parent)  # now, and not after hours of reading
    with Progress("doctor", len(manifest.scans)) as bar:
        found = examine(manifest, _workers(config), lambda done, total: _move(bar, done, total))
    faults = found.faults
    write_faults(out, faults)
    for fault in faults:
        print(f"{fault.path}: {fault.fault}")
    for note in found.notes:
        print(f"note: {note}")
    bad = len({fault.path for fault in faults})
    print(f"{out}: {len(faults)} faults in {bad} files of {len(manifest.scans)} scans")
    return 1 if faults else 0


def _move(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.done = done - 1
    bar.advance()


def _prepare(config: dict[str, Any]) -> int:
    from brainfm.data.fingerprint import settled_spacing
    from brainfm.data.manifest import read_manifest
    from brainfm.data.prepare import prepare
    from brainfm.data.store import Share
    from brainfm.training.monitor import Progress

    share = Share.parse(config["shard"])
    manifest = read_manifest(Path(config["manifest"]))
    if config["preprocess"]["spacing_mm"] == "auto":
        spacing_mm = settled_spacing(manifest, Path(config["store"]))
        print(f"preprocess.spacing_mm={list(spacing_mm)}")
        config["preprocess"]["spacing_mm"] = list(spacing_mm)
    spec = preprocess_spec(config["preprocess"])
    with Progress("prepare", len(manifest.sessions())) as bar:
        report = prepare(
            manifest, Path(config["store"]), spec, _workers(config), lambda done, total: _move(bar, done, total),
            share=share, scheduler=config["scheduler"],
        )  # fmt: skip
    for failure in report.failed:
        print(f"left out: {failure.reason if failure.path in failure.reason else f'{failure.path}: {failure.reason}'}")
    for key, changed in report.again[:_MOST_SAID]:
        print(f"prepared again: {'/'.join(filter(None, key))}, for {changed} has changed")
    if len(report.again) > _MOST_SAID:
        print(f"prepared again: {len(report.again) - _MOST_SAID} more")
    for label, (empty, labelled) in report.empty.items():
        print(f"{label}: {empty} of {labelled} are empty")
    print(
        f"{config['store']}: {report.done} sessions prepared, {report.skipped} were there, "
        f"{len(report.failed)} files left out"
    )
    return 0


def _anatomy(config: dict[str, Any]) -> int:
    from brainfm.data.anatomize import anatomize
    from brainfm.data.manifest import read_manifest
    from brainfm.inference.anatomy import describe, label_files, label_regions
    from brainfm.training.monitor import Progress

    method, out, fuse = _anatomy_method(config), config["out"], bool(config["fuse"])
    contrasts = config["contrasts"] if isinstance(config["contrasts"], list) else [config["contrasts"]]
    if config["input"]:
        print(describe(label_files(_labeller(config), config["input"], out, contrasts, fuse=fuse)))
        return 0
    manifest = read_manifest(Path(config["manifest"]))
    labeller = _labeller(config) if method == "network" else None
    with Progress("anatomy", len(manifest.sessions())) as bar:
        if labeller is None:
            report = anatomize(
                manifest, out, contrasts, _workers(config), lambda done, total: _move(bar, done, total)
            )
        else:
            report = label_regions(
                labeller, manifest, out, contrasts, fuse=fuse, progress=lambda done, total: _move(bar, done, total)
            )
    for flagged in report.flagged:
        print(f"not trusted: {flagged.path}: {flagged.reason}")
    none = f", {report.without} sessions without a scan of {', '.join(contrasts)}" if report.without else ""
    print(
        f"{Path(out) / 'manifest.csv'}: {report.done} scans segmented, {report.skipped} were there, "
        f"{len(report.flagged)} of them not trusted{none}"
    )
    return 0


def _anatomy_method(config: dict[str, Any]) -> str:
    """Raises: ConfigError for what does not go together."""
    method = config["method"] or ("network" if config["backbone"] else "atlas")
    if method not in ("network", "atlas"):
        raise ConfigError(f"method={method}: expected network or atlas")
    if bool(config["input"]) == bool(config["manifest"]):
        raise ConfigError("brainfm anatomy: expected either input.CONTRAST=FILE or manifest=FILE")
    given = {"backbone": config["backbone"], "input.CONTRAST": config["input"], "fuse": config["fuse"]}
    alien = [key for key, value in given.items() if value]
    if method == "atlas" and alien:
        raise ConfigError(f"method=atlas takes a manifest and no network, found {alien[0]}=; use method=network")
    return str(method)


def _labeller(config: dict[str, Any]) -> Any:
    from brainfm.inference.anatomy import Labeller

    return Labeller.load(
        config["backbone"], spacing_mm=float(config["spacing_mm"]), patch_vox=config["patch_vox"],
        overlap=float(config["overlap"]), device=config["device"], precision=config["precision"],
    )  # fmt: skip


def preprocess_spec(values: dict[str, Any]) -> Any:
    """A PreprocessSpec from a configuration, where one spacing may stand for three."""
    from brainfm.specs import PreprocessSpec

    spacing = values["spacing_mm"]
    return PreprocessSpec.from_dict(values | {"spacing_mm": spacing if isinstance(spacing, list) else [spacing] * 3})


def _pretrain(config: dict[str, Any]) -> int:
    return _train("pretrain", config)


def _finetune(config: dict[str, Any]) -> int:
    return _train("finetune", config)


def _train(verb: str, config: dict[str, Any]) -> int:
    """Here and now, or into the queue of a cluster."""
    from brainfm.training.launch import run, submit

    how = config.pop("launch")
    if how["cluster"] is None:
        finished = run(verb, config)
        if finished is not None and config.get("report") and _is_first():
            return _report(config)
    else:
        job = submit(verb, config, how)
        print(f"{config['run']}: submitted as job {job.job_id}, logs in {job.paths.folder}")
    return 0


def _is_first() -> bool:
    """Whether this is the first process of a run, the one that writes."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _report(config: dict[str, Any]) -> int:
    from brainfm.inference.study_report import write_study_report

    print(write_study_report(config["run"], store=config["store"]))
    return 0


def _predict(config: dict[str, Any]) -> int:
    from brainfm.inference.predict import predict, predict_manifest
    from brainfm.training.monitor import Progress

    how = {"device": config["device"], "precision": config["precision"], "overlap": float(config["overlap"])}
    if bool(config["input"]) == bool(config["manifest"]):
        raise ConfigError("brainfm predict: expected either input.CONTRAST=FILE or manifest=FILE")
    if not config["manifest"]:
        predict(config["bundle"], config["input"], config["out"], config["grid"], labels=config["labels"], **how)
        print(config["out"])
        return 0
    with Progress("predict", 0) as bar:
        report = predict_manifest(
            config["bundle"], config["manifest"], config["out"],
            progress=lambda done, total: _move(bar, done, total), **how,
        )  # fmt: skip
    if report.again:
        print(f"made again, for their files have changed: {len(report.again)} of those that were there")
    for key, reason in report.failures.items():
        print(f"left out: {'/'.join(key)}: {reason}")
    print(f"{config['out']}: {report.done} masks made, {report.kept} were there, {len(report.failures)} failed")
    return 0


def _evaluate(config: dict[str, Any]) -> int:
    from brainfm.inference.evaluate import describe, evaluate
    from brainfm.training.monitor import Progress

    with Progress("evaluate", 0) as bar:
        found = evaluate(
            config["manifest"], config["out"], bundle=config["bundle"], predictions=config["predictions"],
            seed=int(config["seed"]), device=config["device"], precision=config["precision"],
            overlap=float(config["overlap"]), empty=str(config["empty"]),
            progress=lambda done, total: _move(bar, done, total),
        )  # fmt: skip
    print("\n".join(describe(found.summary)))
    return 0


def _embed(config: dict[str, Any]) -> int:
    from brainfm.inference.embed import check_format, embed, write
    from brainfm.training.monitor import Progress

    if bool(config["input"]) == bool(config["store"]):
        raise ConfigError("brainfm embed: expected either store=DIR or input.CONTRAST=FILE")
    out = check_format(config["out"])
    with Progress("embed", 0) as bar:
        found = embed(
            config["backbone"], config["store"] or config["input"], contrasts=config["contrasts"],
            parts=config["parts"], extent=_extent(config), device=config["device"],
            progress=lambda done, total: _move(bar, done, total),
        )  # fmt: skip
    if "note" in found.about:
        print(f"note: {found.about['note']}")
    files = write(found, out)
    parts = ", ".join(f"{part} {values.shape[1]}" for part, values in found.parts.items())
    print(f"{', '.join(map(str, files))}: {len(found.rows)} scans; features: {parts}")
    return 0


def _probe(config: dict[str, Any]) -> int:
    from brainfm.inference.probe import ProbeSpec, describe, probe
    from brainfm.training.monitor import Progress

    spec = ProbeSpec(
        target=str(config["target"]), kind=config["kind"], folds=int(config["folds"]), repeats=int(config["repeats"]),
        seed=int(config["seed"]), random=bool(config["random"]),
    )  # fmt: skip
    with Progress("probe", 0) as bar:
        found = probe(
            config["store"], config["out"], spec, backbone=config["backbone"], features=config["features"],
            contrasts=config["contrasts"], parts=config["parts"], extent=_extent(config), device=config["device"],
            progress=lambda done, total: _move(bar, done, total),
        )  # fmt: skip
    print("\n".join(describe(found)))
    return 0


def _extent(config: dict[str, Any]) -> Any:
    from brainfm.inference.embed import Extent

    x, y, z = config["window_vox"]
    return Extent(float(config["whole_mvox"]), (int(x), int(y), int(z)))


def _explain(config: dict[str, Any]) -> int:
    from brainfm.inference.explain import describe, explain
    from brainfm.tasks.bundle import read_bundle
    from brainfm.training.monitor import Progress

    bundle = read_bundle(config["bundle"])
    with Progress("explain", 0) as bar:
        found = explain(
            bundle, config["input"], config["out"], config["class"],
            on=config["grid"], labels=config["labels"], method=config["method"], layer=config["layer"],
            device=config["device"], overlap=float(config["overlap"]), cube_mm=float(config["cube_mm"]),
            step_mm=None if config["step_mm"] is None else float(config["step_mm"]),
            progress=lambda done, total: _move(bar, done, total),
        )  # fmt: skip
    print(f"{config['out']}: {describe(found, bundle.task)}")
    if not found.heat.any():
        print("the map is empty: nothing in these scans speaks for it")
    return 0


def _demo(config: dict[str, Any]) -> int:
    from brainfm.demo import demo

    summary = demo(config, main)
    print(
        f"{Path(config['out']) / 'report.html'}: {summary['n_cases']} test subjects, "
        f"Dice {summary['dice_pretrained']:.3f} pre-trained, {summary['dice_scratch']:.3f} from scratch, "
        f"{summary['seconds']['in all'] / 60:.1f} min"
    )
    return 0


_RUN: dict[str, Callable[[dict[str, Any]], int]] = {
    "demo": _demo,
    "manifest": _manifest,
    "doctor": _doctor,
    "prepare": _prepare,
    "anatomy": _anatomy,
    "pretrain": _pretrain,
    "finetune": _finetune,
    "predict": _predict,
    "embed": _embed,
    "probe": _probe,
    "evaluate": _evaluate,
    "explain": _explain,
    "report": _report,
}


if __name__ == "__main__":
    sys.exit(main())
