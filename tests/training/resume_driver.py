"""Runs slicevit's command line in forks of this process, which has imported it once: one fault or signal a run.

One job a line on stdin, its outcome on stdout. A job's `fault` strikes inside a call of os.replace (onto a file of
that name), os.fsync, torch.save or Tensor.backward, the nth time; a `signal` comes from outside.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from warm import warm_up

from slicevit import cli
from slicevit.training import loop, runs

OWNERS = {"replace": os, "fsync": os, "save": torch, "backward": torch.Tensor}


def strike(do: str) -> None:
    if do == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), signal.SIGTERM if do == "sigterm" else signal.SIGKILL)


def plant(fault: dict[str, Any]) -> None:
    owner, name = OWNERS[fault["call"]], fault["call"]
    real, calls, do = getattr(owner, name), [0], fault["do"]

    def planted(*args: Any, **kwargs: Any) -> Any:
        if "file" in fault and os.path.basename(os.fspath(args[1])) != fault["file"]:
            return real(*args, **kwargs)
        calls[0] += 1
        if calls[0] != fault["nth"]:
            return real(*args, **kwargs)
        if fault["call"] == "save":  # half of it reaches the disk
            whole = io.BytesIO()
            real(args[0], whole)
            file = args[1] if hasattr(args[1], "write") else open(args[1], "wb")  # noqa: SIM115
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
        if fault.get("after"):
            real(*args, **kwargs)
            return strike(do)
        strike(do)
        return real(*args, **kwargs)

    setattr(owner, name, planted)


def child(job: dict[str, Any]) -> None:
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if not job.get("slow_end"):
        loop.LATENCY_SECONDS = 0.0
        runs.write_pictures = lambda *args, **kwargs: None  # type: ignore[assignment]
    if "largest_file" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    if "fault" in job:
        plant(job["fault"])
    status: Any = 0
    try:
        cli.main(job["argv"])
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def reached(job: dict[str, Any]) -> bool:
    if "rows" in job:
        try:
            return Path(job["path"]).read_text().count("\n") > job["rows"]
        except FileNotFoundError:
            return False
    return "path" not in job or os.path.exists(job["path"])


def run(job: dict[str, Any]) -> dict[str, Any]:
    begin = time.monotonic()
    pid = os.fork()
    if not pid:
        child(job)
    sent, due, status = "signal" not in job, None, None
    while status is None:
        done, code = os.waitpid(pid, os.WNOHANG)
        now = time.monotonic()
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif now - begin > 90:
            os.kill(pid, signal.SIGKILL)
        elif not sent and due is None and reached(job):
            due = now + job["delay"]
        elif not sent and due is not None and now >= due:
            (os.killpg if job.get("group") else os.kill)(pid, job["signal"])
            sent = True
        else:
            time.sleep(0.002)
    seconds = time.monotonic() - begin
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # the orphaned loader workers of a killed run
    log = Path(job["log"])
    text = log.read_text(errors="replace") if log.exists() else ""
    return {"status": status, "seconds": seconds, "text": text}


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
