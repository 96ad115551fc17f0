"""The README.md of a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slicevit.costs import width_costs
from slicevit.files import write_text
from slicevit.registry import is_timms

if TYPE_CHECKING:
    from slicevit.elastic import ElasticModel

CARD, PICTURE = "README.md", "frontier.png"
_START, _END = "<!-- widths -->", "<!-- /widths -->"

_CARD = """---
library_name: slicevit
pipeline_tag: image-classification
tags: [slicevit, timm, image-classification, elastic, slimmable]
---
# {architecture}, sliceable

One Vision Transformer checkpoint that is every narrower one too: widths {grid} of `{architecture}`,
{classes} classes, images of {size}.

```python
import slicevit

model = slicevit.from_pretrained("{name}")
logits = model(images, width="{smallest}")   # any of: {widths}
small = model.to_timm("{smallest}")          # a stock timm module of its own
```

{timm}

{table}

Slicing: {settings}. Method: *Slicing Vision Transformer for Flexible Inference* (Scala, NeurIPS 2024,
arXiv 2412.04786).
"""

_STOCK = """timm alone loads the full width: `timm.create_model("hf-hub:{name}", pretrained=True)`."""
_OWN = """After `import slicevit` timm loads the full width: `timm.create_model("hf-hub:{name}", pretrained=True)`."""
_CHANGED = """Its LayerNorm epsilon is not timm's: for timm alone, cut a width out with `slicevit export`."""


class Scored(Protocol):
    """A width that was evaluated: what the card needs of `slicevit.evaluation.results.WidthResult`."""

    @property
    def width(self) -> str: ...
    @property
    def channels(self) -> int: ...
    @property
    def param_count(self) -> float: ...
    @property
    def gmacs(self) -> float: ...
    @property
    def top1(self) -> float | None: ...
    @property
    def latency_ms(self) -> float | None: ...


@dataclass(frozen=True)
class _Counted:
    """A width that was not evaluated yet."""

    width: str
    channels: int
    param_count: float
    gmacs: float
    top1: None = None
    latency_ms: None = None


def model_card(model: ElasticModel, config: dict[str, Any], name: str | None = None) -> str:
    """A model card with how to load the model and what every width costs."""
    rows = []
    for width in model.widths:
        costs = width_costs(model, width)
        rows.append(_Counted(str(width), costs.channels, costs.params / 1e6, costs.macs / 1e9))
    described = config["slicevit"]
    channels, height, width_px = config["pretrained_cfg"]["input_size"]
    settings = ", ".join(f"{key} `{described[key]}`" for key in ("layout", "isolation", "attn_scale", "heads", "scope"))
    stock = _STOCK if is_timms(config["architecture"]) else _OWN
    return _CARD.format(
        architecture=config["architecture"],
        grid=described["grid"],
        classes=config["num_classes"],
        size=f"{height} x {width_px} pixels, {channels} channel{'s' if channels > 1 else ''}",
        name=name or "owner/name",
        timm=stock.format(name=name or "owner/name") if model.settings.norm_eps is None else _CHANGED,
        smallest=model.widths[0],
        widths=", ".join(map(str, model.widths)),
        table=_section(rows),
        settings=settings,
    )


def show_results(folder: Path, rows: Sequence[Scored]) -> None:
    """Put what every width scored, and frontier.png if the folder has it, into its model card.

    Only what lies between the card's two marks is written anew. A folder without a card, or whose card has no marks,
    is left as it is. Raises ValueError when the disk does not take it.
    """
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    before, start, rest = text.partition(_START)
    _, end, after = rest.partition(_END)
    if start and end:
        write_text(card, before + _section(rows, (folder / PICTURE).exists()) + after)


def _section(rows: Sequence[Scored], picture: bool = False) -> str:
    """The frontier: a table of the widths, and a picture."""
    columns = {
        "width": [row.width for row in rows],
        "channels": [str(row.channels) for row in rows],
        "parameters": [f"{row.param_count:.3f} M" for row in rows],
        "MACs": [f"{row.gmacs * 1e3:,.1f} M" for row in rows],
        "top-1": ["" if row.top1 is None else f"{row.top1:.2f} %" for row in rows],
        "latency": ["" if row.latency_ms is None else f"{row.latency_ms:.3g} ms" for row in rows],
    }
    known = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [list(known), ["---"] * len(known), *zip(*known.values(), strict=True)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = ""
    if "latency" in known:
        notes += "\n\nLatency is that of one image on the machine that evaluated it."
    if picture:
        notes += f"\n\n![Accuracy of every width against what it costs]({PICTURE})"
    return f"{_START}\n{table}{notes}\n{_END}"
