"""A few weights of each matrix, by which a model is recognised in any dtype, in memory or on disk."""

import hashlib

import torch

from lib.models.decoder import Decoder

VALUES = 16  # weights of each matrix


def of_block(decoder: Decoder, i: int) -> dict[str, torch.Tensor]:
    """A few weights of each matrix of block `i`, evenly spaced, fp32 on the CPU: {matrix: (VALUES,)}."""
    matrices = decoder.matrices(i)
    if not matrices:
        return {}
    places = [_evenly(matrix.shape) for matrix in matrices.values()]
    read: dict[str, torch.Tensor] = {}
    if decoder.source is None:
        places = torch.stack(places).to(decoder.device, non_blocking=True)  # (matrices, 2, values)
    values = []
    for matrix, (row, column) in zip(matrices.values(), places, strict=True):
        weight = matrix.weight.detach()
        if decoder.source is not None:
            if matrix.tensor_name not in read:  # a stack is read once for all its matrices
                read = {matrix.tensor_name: decoder.source[decoder.prefixes[i] + matrix.tensor_name]}
            weight = matrix.of(read[matrix.tensor_name])
        values.append(weight[row, column].float())
    return dict(zip(matrices, torch.stack(values).cpu(), strict=True))


def checksum(decoder: Decoder) -> str:
    """SHA-256 of the fingerprints of all blocks: it tells which weights these are."""
    digest = hashlib.sha256()
    for i in range(len(decoder)):
        for values in of_block(decoder, i).values():
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _evenly(shape: torch.Size) -> torch.Tensor:
    """Rows and columns of VALUES weights of a matrix: (2, values)."""
    flat = torch.linspace(0, shape.numel() - 1, VALUES, dtype=torch.float64).long()
    return torch.stack([flat // shape[1], flat % shape[1]])
