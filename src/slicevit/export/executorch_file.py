"""A width as an ExecuTorch program for XNNPACK, model.pte: for telephones and other small machines.

ExecuTorch plans a program's memory beforehand, so that there is a largest batch. It is below 16, where torch chooses
other convolutions and ExecuTorch 1.5 would make that choice a limit of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slicevit.export.artefact import Format, Quantizer, hushed
from slicevit.export.check import Predictor
from slicevit.export.torch_program import traced

FILE = "model.pte"
LARGEST_BATCH = 8


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by matrix products, which XNNPACK has: torch's own decomposition looks for rows that are all masked."""
    assert not is_causal
    assert not enable_gqa
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


def _split(whole: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    """torch.split as slices: ExecuTorch 1.5 fixes the batch at the example's size where its verifier meets a split."""
    return _split_with_sizes(whole, [min(size, whole.shape[dim] - i) for i in range(0, whole.shape[dim], size)], dim)


def _split_with_sizes(whole: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    return [whole.narrow(dim, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _bounded(program: ExportedProgram) -> ExportedProgram:
    """`program` for up to `LARGEST_BATCH` images, in operators that ExecuTorch and XNNPACK are best with."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    (images_BCHW,), _ = program.example_inputs
    again = traced(program.module(), images_BCHW.shape[1:], LARGEST_BATCH)
    aten = torch.ops.aten
    table = {
        aten.scaled_dot_product_attention.default: _attention,
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split_with_sizes,
    }
    return constant_prop_pass(again.run_decompositions(table))


def _write(program: ExportedProgram, folder: Path) -> None:
    with hushed():
        _lower(_bounded(program), folder)


def _lower(program: ExportedProgram, folder: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    (folder / FILE).write_bytes(lowered.to_executorch().buffer)


def _quantize(program: ExportedProgram, images_NCHW: Tensor, folder: Path) -> None:
    """By XNNPACK's own quantizer: weights to int8 a channel, activations to int8 a tensor."""
    with hushed():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        observed = prepare_pt2e(_bounded(program).module(), quantizer)
        for batch_BCHW in images_NCHW.split(LARGEST_BATCH):
            observed(batch_BCHW)
        _lower(traced(convert_pt2e(observed), images_NCHW.shape[1:], LARGEST_BATCH), folder)


def _load(folder: Path) -> Predictor:
    """Raises ValueError for more images than `LARGEST_BATCH`."""
    with hushed():
        from executorch.runtime import Runtime

    method = Runtime.get().load_program(folder / FILE).load_method("forward")

    def predict(images_BCHW: Tensor) -> Tensor:
        if len(images_BCHW) > LARGEST_BATCH:
            raise ValueError(f"{folder / FILE} takes up to {LARGEST_BATCH} images at once, got {len(images_BCHW)}")
        (logits_BK,) = method.execute([images_BCHW.contiguous()])
        return torch.as_tensor(logits_BK).clone()  # its memory is the program's

    return predict


FORMAT = Format(
    files=(FILE,),
    packages=("executorch",),
    extra="executorch",
    write=_write,
    load=_load,
    casts=("fp32", "fp16"),  # XNNPACK has no bfloat16
    quantizer=Quantizer(_quantize),
    largest_batch=LARGEST_BATCH,
    dense=False,
)
