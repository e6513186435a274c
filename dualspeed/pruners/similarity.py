"""Similarity matrices between the tokens of each image.

B images, N tokens per image, D width of the vectors.
"""

import torch
from torch import Tensor

STRIP_ROWS = 128
"""Rows of a similarity matrix computed at once: enough for a fast matrix product."""


def inner_products(vectors: Tensor) -> Tensor:
    """(B, N, D) vectors -> (B, N, N) inner products in float32, symmetric but for rounding.

    Computes strips of rows from the diagonal rightwards and mirrors them: little more than half of the operations of
    the full product.
    """
    vectors = vectors.float()
    columns = vectors.transpose(1, 2)
    products = vectors.new_empty(*vectors.shape[:2], vectors.shape[1])
    for start in range(0, vectors.shape[1], STRIP_ROWS):
        end = start + STRIP_ROWS
        strip = vectors[:, start:end] @ columns[:, :, start:]
        products[:, start:end, start:] = strip
        products[:, end:, start:end] = strip[:, :, STRIP_ROWS:].transpose(1, 2)
    return products


def inverse_norms(products: Tensor) -> Tensor:
    """(B, N, N) inner products -> (B, N) 1 / norm of each vector, 0 for a zero vector."""
    squared_norms = products.diagonal(dim1=1, dim2=2)
    return torch.where(squared_norms > 0, squared_norms.rsqrt(), 0.0)


def cosine_similarity(vectors: Tensor) -> Tensor:
    """(B, N, D) vectors -> (B, N, N) cosines in float32; a zero vector has similarity 0 to all vectors.

    Norms are read from the diagonal of the products: a normalised copy of the features would be a pruner's largest
    tensor.
    """
    products = inner_products(vectors)
    scale = inverse_norms(products)
    return products.mul_(scale[:, :, None]).mul_(scale[:, None])


def submatrix(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, R, C) entries of each (B, N, N) matrix at `rows` (B, R) and `columns` (B, C)."""
    # Whole rows first, because they are contiguous: much faster than gathering single entries.
    picked = matrix[torch.arange(len(matrix), device=matrix.device)[:, None], rows]
    return picked.gather(2, columns[:, None].expand(-1, rows.shape[1], -1))
