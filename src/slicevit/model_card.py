"""The README.md of a saved model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slicevit.costs import width_costs

if TYPE_CHECKING:
    from slicevit.elastic import ElasticModel

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

| width | channels | parameters | MACs |
|---|---|---|---|
{rows}

Slicing: {settings}. Method: *Slicing Vision Transformer for Flexible Inference* (Scala, NeurIPS 2024,
arXiv 2412.04786).
"""

_STOCK = """timm alone loads the full width: `timm.create_model("hf-hub:{name}", pretrained=True)`."""
_CHANGED = """Its LayerNorm epsilon is not timm's: for timm alone, cut a width out with `slicevit export`."""


def model_card(model: ElasticModel, config: dict[str, Any], name: str | None = None) -> str:
    """A model card with how to load the model and what every width costs."""
    rows = []
    for width in model.widths:
        costs = width_costs(model, width)
        rows.append(f"| {width} | {costs.channels} | {costs.params / 1e6:.3f} M | {costs.macs / 1e6:,.1f} M |")
    described = config["slicevit"]
    channels, height, width_px = config["pretrained_cfg"]["input_size"]
    settings = ", ".join(f"{key} `{described[key]}`" for key in ("layout", "isolation", "attn_scale", "heads", "scope"))
    return _CARD.format(
        architecture=config["architecture"],
        grid=described["grid"],
        classes=config["num_classes"],
        size=f"{height} x {width_px} pixels, {channels} channel{'s' if channels > 1 else ''}",
        name=name or "owner/name",
        timm=_STOCK.format(name=name or "owner/name") if model.settings.norm_eps is None else _CHANGED,
        smallest=model.widths[0],
        widths=", ".join(map(str, model.widths)),
        rows="\n".join(rows),
        settings=settings,
    )
