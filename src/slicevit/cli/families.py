"""slicevit families"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import timm
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from slicevit.cli.options import parse
from slicevit.files import write_text
from slicevit.registry import COUNTED, Architecture, examine, representatives, share, table_text


@dataclass
class FamiliesArgs:
    """Which of timm's architectures are sliceable, on what grids, or why not. Takes minutes for all of them."""

    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """Names to look at, such as "swin*"."""
    check: bool = False
    """Prove it on a small model of each class: a slice is timm's model of that width, to the bit."""
    names: bool = False
    """A line for every name, not one for every class."""
    json: bool = False
    """Print a JSON object a line, one for every name."""
    out: Path | None = None
    """Write the list as a CSV file too."""


def run(arguments: list[str]) -> None:
    args = parse(FamiliesArgs, arguments, "families")
    names = timm.list_models(args.pattern)
    if not names:
        raise ValueError(f"no architecture of timm fits {args.pattern!r}")
    progress = Console(stderr=True)
    found = [examine(name) for name in track(names, "on meta", console=progress, transient=True)]
    if args.out:
        write_text(args.out, table_text(found))
    proofs = dict(_proofs(found, progress)) if args.check else {}
    if args.json:
        for entry in found:
            print(json.dumps(asdict(entry) | ({"check": proofs.get(entry.model)} if args.check else {})))
    else:
        console = Console()
        console.print(_by_name(found) if args.names else _by_class(found, proofs))
        sliceable, counted = share(found)
        if counted:
            console.print(f"{sliceable} of {counted} ({sliceable / counted:.1%}) of {', '.join(COUNTED)}: sliceable")
    wrong = sorted(model for model, proof in proofs.items() if proof != "exact")
    if wrong:
        raise ValueError("not proven: " + "; ".join(f"{model} ({proofs[model]})" for model in wrong))


def _proofs(found: list[Architecture], progress: Console) -> Iterable[tuple[str, str]]:
    """(class, "exact" or what is wrong) of every class that is sliceable, by one of its names."""
    from slicevit.exactness import prove

    names, grids = representatives(found), {entry.name: entry.grid for entry in found}
    for model, name in track(names.items(), "small models", console=progress, transient=True):
        yield model, prove(name, grids[name]) or "exact"


def _by_class(found: list[Architecture], proofs: dict[str, str]) -> Table:
    table = Table("class", "kind", "names", "sliceable", "finest grids", "why not")
    if proofs:
        table.add_column("check")
    for model in sorted({entry.model for entry in found}, key=str.lower):
        entries = [entry for entry in found if entry.model == model]
        grids = Counter(entry.grid for entry in entries if entry.grid)
        reasons = dict.fromkeys(entry.reason for entry in entries if entry.reason)
        cells = (
            model,
            entries[0].kind,
            str(len(entries)),
            str(sum(grids.values())),
            ", ".join(grids),
            next(iter(reasons), ""),
        )
        table.add_row(*cells, *([proofs.get(model, "")] if proofs else []))
    return table


def _by_name(found: list[Architecture]) -> Table:
    table = Table("name", "class", "kind", "finest grid", "why not")
    for entry in found:
        table.add_row(entry.name, entry.model, entry.kind, entry.grid, entry.reason)
    return table
