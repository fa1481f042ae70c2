"""The command line: finds the verb, runs it, and turns what goes wrong into one sentence."""

from __future__ import annotations

import atexit
import errno
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

from brainfm import __version__
from brainfm import verbs as verbs_folder
from brainfm.errors import BrainfmError, BrainfmWarning, ConfigError
from brainfm.extras import translated
from brainfm.progress import on_one_line
from brainfm.settings import keys_of


def command(arguments: Sequence[str] | None = None) -> NoReturn:
    """What ``brainfm`` on a command line runs: :func:`main`, then the end of the process with its code.

    After a run of several processes Python's own ending is left out: a thread of gloo that still lets go of a tensor
    asks for an interpreter that is gone, and the process dies of SIGABRT, once in some hundred runs, its work done.
    """
    code = main(arguments)
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


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
        if not _is_verb(verb):
            raise ConfigError(f"unknown verb {verb!r}, expected one of {', '.join(verbs())}")
        from brainfm.verbs import compose

        if any(word in ("-h", "--help") for word in rest):
            print(compose.help_of(verb, rest))
            return 0
        settings = compose.resolve(verb, rest)
        if hasattr(settings, "command") and "command" not in keys_of(compose.settings_of(verb)):  # set by code
            settings = replace(settings, command=shlex.join(["brainfm", *words]))
        code: int = import_module(f"{verbs_folder.__name__}.{verb}").run(settings)
        return code
    except BrainfmError as error:
        if debug:
            raise
        return _complain(str(error))
    except ModuleNotFoundError as error:
        lacking = translated(error, f"brainfm {verb}")
        if lacking is None or debug:
            raise
        return _complain(str(lacking))
    except KeyboardInterrupt:
        print("brainfm: interrupted; the same command goes on from what is done", file=sys.stderr)
        return 130


_show_warning = warnings.showwarning


def _note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Our own warnings as one sentence, those of others as ever."""
    if issubclass(category, BrainfmWarning):
        print(f"brainfm: note: {on_one_line(str(message))}", file=sys.stderr)
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
    print(f"brainfm: {on_one_line(sentence)}", file=sys.stderr)
    return 2


def _is_verb(word: str) -> bool:
    there = word.isidentifier() and any(Path(folder, f"{word}.py").is_file() for folder in verbs_folder.__path__)
    return there and hasattr(import_module(f"{verbs_folder.__name__}.{word}"), "Settings")


def verbs() -> dict[str, str]:
    """Every verb with what it does, in the order in which one comes to need them: the files of brainfm/verbs/."""
    found = []
    for path in (file for folder in verbs_folder.__path__ for file in Path(folder).glob("[!_]*.py")):
        module = import_module(f"{verbs_folder.__name__}.{path.stem}")
        if hasattr(module, "Settings"):
            about = str(module.__doc__).splitlines()[0].rstrip(".")
            found.append((module.PLACE, path.stem, about[0].lower() + about[1:]))
    return {verb: about for _, verb, about in sorted(found)}


def _usage() -> str:
    listed = verbs()
    width = max(map(len, listed))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in listed.items()]
    return "\n".join(
        [
            f"brainfm {__version__}: compact 3D brain-MRI foundation models",
            "",
            "usage: brainfm VERB key=value ...      (brainfm VERB --help lists the keys)",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    command()
