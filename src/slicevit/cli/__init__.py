"""The command line: parse, call, print. Errors are one sentence and exit status 2.

A sub-command is a module here with a function `run`, which takes the arguments after its name.
"""

from __future__ import annotations

import importlib
import sys

from slicevit.cli.options import speaks

COMMANDS = {
    "train": "train a model that is every narrower one too",
    "eval": "accuracy, costs and latency at every width of a run",
    "calibrate": "BatchNorm statistics of every width, from training images",
    "probe": "what the features of every width are worth on another data set",
    "segment": "train a segmenter that is every narrower one too, on images with masks",
    "detect": "train a detector that is every narrower one too, on images with boxes",
    "report": "several runs on one picture and page",
    "export": "cut a width out",
    "profile": "latency and memory of every width on this machine",
    "serve": "answer images over HTTP, at the width that keeps a latency target",
    "predict": "the classes of a folder of images, or of a data set, into a table",
    "families": "which of timm's architectures are sliceable, on what grids, or why not",
    "import": "convert a published Scala checkpoint",
}
_MODULES = {"eval": "evaluate", "import": "import_"}  # where it is not the command's name


def _usage() -> str:
    lines = "\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items())
    return f"usage: slicevit COMMAND [options]\n\n{lines}\n\nslicevit COMMAND --help says more.\n"


def main(argv: list[str] | None = None) -> None:
    """The entry point; exits with 0, 2 after bad input, or 128 + a signal's number."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(), end="")
        return
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        from slicevit.version import __version__

        print(__version__)
        return
    if command not in COMMANDS:
        _fail(f"{command} is no command; there are {', '.join(COMMANDS)}")
    from slicevit.training.ranks import RankLost
    from slicevit.training.signals import Interrupted

    try:
        importlib.import_module(f"slicevit.cli.{_MODULES.get(command, command)}").run(rest)
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or command}: {error.strerror or error}; what was saved before is kept")
    except Interrupted as stop:
        _say(str(stop))
        sys.exit(stop.exit_status)
    except RankLost as lost:
        if not lost.said:
            _say(f"slicevit: {lost}")
        sys.exit(lost.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    _say(f"slicevit: {message}")
    sys.exit(2)


def _say(message: str) -> None:
    """On standard error, once: of several processes of a run the first speaks."""
    if speaks():
        print(message, file=sys.stderr, flush=True)
