"""What every backend of random projections is held to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

import flashcoreset as fc

KINDS = ["rademacher", "gaussian", "sjlt", "srht", "gaussian-boxmuller"]
NORMAL = ("gaussian", "gaussian-boxmuller")
CHOICES = ["mask", "grass"]  # of columns: dim <= D, no offset


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# (rows of x, D, dim, nnz, offset): odd sizes, dim above and below a vector, a random block, a Hadamard block and D.
SIZES = [
    (1, 1, 1, 1, 0),
    (2, 7, 5, 1, 3),
    (5, 97, 130, 3, 11),
    (9, 3001, 64, 4, 1000),
    (17, 1025, 513, 513, 4097),
    (3, 600, 5000, 2, 2**40),
    (33, 9000, 3, 2, 5),
]


# For Triton's interpreter, whose tiles take ten milliseconds: several tiles of each, a piece more, all sizes of Hadamard blocks, large
# offsets.
FEW_SIZES = [
    (1, 1, 1, 1, 0),
    (2, 7, 5, 1, 3),
    (5, 97, 130, 3, 11),
    (9, 4500, 64, 4, 1000),
    (35, 300, 129, 129, 4097),
    (3, 40, 4500, 2, 2**40),
    (2, 130, 2000, 1, 5),
]


# (rows of x, D, dim, nnz, offset) for choices: all columns, one of them, parts of several sizes.
CHOICE_SIZES = [
    (1, 1, 1, 1, 0),
    (2, 7, 5, 1, 0),
    (5, 97, 97, 3, 0),
    (9, 3001, 64, 4, 0),
    (17, 1025, 300, 33, 0),
    (33, 9000, 1, 1, 0),
]


# |sketch(x) - x P| as a share of the largest entry of the product. Worst seen: float32 2e-6 (sjlt with dim = 1), float64 7e-15;
# half types are converted to float32, exactly.
ERROR = {torch.float64: 1e-12}


def rows(batch: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert (found.double() - expected).abs().max() <= ERROR.get(dtype, 1e-5) * expected.abs().max()


def check_product(backend: str, device: str, kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    batch, d, dim, nnz, offset = size
    x = rows(batch, d, dtype)
    options: dict[str, Any] = {"kind": kind, "seed": 2**40 + 3, "nnz": nnz, "offset": offset}
    matrix = fc.projection_matrix(d, dim, dtype=torch.float64, backend="torch", **options)
    found = fc.sketch(x.to(device), dim, backend=backend, **options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.device.type == device
    assert found.shape == (batch, dim)
    check_close(found.cpu(), x.double() @ matrix, dtype)


def check_matrix(backend: str, device: str, kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    _, d, dim, nnz, offset = size
    options: dict[str, Any] = {
        "kind": kind,
        "seed": -(2**50) - 7,
        "nnz": nnz,
        "offset": offset,
        "dtype": dtype,
    }
    expected = fc.projection_matrix(d, dim, backend="torch", **options)
    found = fc.projection_matrix(d, dim, backend=backend, device=device, **options)
    assert found.device.type == device
    assert found.dtype == dtype
    found = found.cpu()
    if kind in NORMAL:
        # Numbers are float32's, whatever the dtype they are given in.
        slack = 2 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        assert ((found.double() - expected.double()).abs() <= slack * expected.double().abs()).all()
    else:
        assert torch.equal(found, expected)


GOLDEN = Path(__file__).parent.parent / "golden_sketches.json"


def check_stays(backend: str, device: str, kind: str, case: int) -> None:
    """Stored sketches have to mean the same in later releases."""
    golden = json.loads(GOLDEN.read_text())[kind][case]
    options = {name: golden[name] for name in ("seed", "offset", "nnz")}
    matrix = fc.projection_matrix(
        golden["D"], golden["dim"], kind=kind, backend=backend, device=device, dtype=torch.float64, **options
    ).cpu()
    expected = torch.tensor(golden["matrix"], dtype=torch.float64)
    if kind in CHOICES:  # squares, with the signs of grass
        squares = matrix.sign() * matrix.square() * (golden["nnz"] if kind == "grass" else 1)
        assert torch.allclose(squares, expected, rtol=1e-14, atol=0)
        return
    scale = math.sqrt(golden["nnz"] if kind == "sjlt" else golden["dim"])
    slack = 3e-7 if kind in NORMAL else 1e-15
    assert torch.allclose(matrix * scale, expected, rtol=slack, atol=0)
