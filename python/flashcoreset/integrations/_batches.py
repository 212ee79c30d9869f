"""The loss of each sample as a model counts it, and the entries of a batch with a row per sample: found from the model, not guessed."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashcoreset._core.tensor import FLOATING

IGNORED = -100  # the label of tokens that do not count, as everywhere in torch

# Relative differences that count as rounding between two ways to one number, by the type of the logits.
ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
_APART = 8  # how many times farther off than the right way the other way must be
_OPEN = 6  # the most entries that are checked together for rows

# Entries that transformers' models take with a row per sample, and their dimensions. Other entries are checked on the first batch.
_ROWS = {
    "input_ids": (2,),
    "attention_mask": (2, 4),
    "token_type_ids": (2,),
    "position_ids": (2,),
    "inputs_embeds": (3,),
    "decoder_input_ids": (2,),
    "decoder_attention_mask": (2,),
}


def sample_losses(output: Any, labels: Tensor, shift_labels: bool = True) -> Tensor:
    """The cross-entropy of each sample, averaged over its own tokens.

    Args:
        output: a model's output, that has logits as `logits` or first, or the logits: [B, T, C] for labels [B, T], [B, C] for
            labels [B].
        labels: [B, T] or [B] integers. -100 does not count.
        shift_labels: whether position t of labels [B, T] is predicted from the logits at t - 1, as by causal language models, or
            from those at t.

    Returns:
        [B] float32 (float64 for float64 logits); 0 for a sample without labels.

    Raises:
        TypeError, ValueError: for logits that do not fit the labels.

    Example:
        >>> import torch, flashcoreset as fc
        >>> labels = torch.tensor([[0, 1, 1], [0, 1, -100]])
        >>> fc.integrations.torch.sample_losses(torch.zeros(2, 3, 2), labels)
        tensor([0.6931, 0.6931])
    """
    losses, counts = _loss_sums(logits_of(output), labels, shift_labels)
    return losses / counts.clamp(min=1)


def logits_of(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)):
        # With labels, the output tuple begins with the loss.
        logits = next((part for part in logits if not isinstance(part, Tensor) or part.dim()), None)
    if logits is None and getattr(output, "loss", None) is not None:
        raise TypeError(
            "the model must return logits, got a loss alone: a fused loss (such as Liger's fused_linear_cross_entropy, or trl's chunked_nll) "
            "computes the loss without them; turn it off"
        )
    if not isinstance(logits, Tensor) or logits.dtype not in FLOATING:
        raise TypeError(f"the model must return logits or have them first, got {type(logits).__name__}")
    return logits


def _loss_sums(logits: Tensor, labels: Tensor, shift_labels: bool) -> tuple[Tensor, Tensor]:
    """The sums [B] of losses over the tokens of each sample, and the numbers of these tokens."""
    if logits.dim() != labels.dim() + 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"the model's logits must have shape {[*labels.shape, 'C']} as the labels have, got {tuple(logits.shape)}"
        )
    if labels.dim() == 1:
        logits, labels = logits[:, None], labels[:, None]
    elif shift_labels:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    targets = labels.to(logits.device, torch.int64)
    losses = F.cross_entropy(wide.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return losses.sum(1), (targets != IGNORED).sum(1)


def loss_gradients(logits: Tensor, labels: Tensor, shift_labels: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `_loss_sums` returns, and the gradients of these sums with respect to the logits, like the logits."""
    sums, counts = _loss_sums(logits, labels, shift_labels)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    gradients = torch.softmax(wide, -1)
    del wide
    targets = labels.to(logits.device, torch.int64)
    if labels.dim() == 2 and shift_labels:
        targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], 1)
    counted = (targets != IGNORED)[..., None]
    places = targets.masked_fill(targets == IGNORED, 0)[..., None]
    gradients.scatter_add_(-1, places, torch.full_like(gradients[..., :1], -1))
    return sums, counts, gradients.masked_fill_(~counted, 0).to(logits.dtype)


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, Any]:
    """The loss that the model itself computes for a batch with labels (None if it computes none), and its output."""
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    parameters = inspect.signature(model.forward).parameters
    takes = "labels" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes:
        return None, model(**unlabelled)
    try:
        output = model(**batch)
    except TypeError as error:
        if "'labels'" not in str(error):  # from models that pass on whatever they are given
            raise
        return None, model(**unlabelled)
    loss = getattr(output, "loss", None)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor) and not output[0].dim():
        loss = output[0]
    has_logits = getattr(output, "logits", None) is not None or isinstance(output, (Tensor, tuple, list))
    return loss, output if has_logits else model(**unlabelled)


def shifts_labels(
    model: nn.Module, batch: Mapping[str, Any], on_any: Callable[[bool], bool] = bool
) -> bool | None:
    """Whether the model's loss is that of the next token: by comparison with the model's own loss, or, if it has none, from the labels.

    Args:
        on_any: whether something is so on any of the processes that run the model together.

    Returns None if the batch does not show it: no label counts, or no row is finite.

    Raises:
        ValueError: if the answer stays open, and for a loss of another kind.
    """
    labels = batch["labels"]
    own, output = own_loss(model, batch)
    logits = logits_of(output)
    if own is not None and on_any(not torch.isfinite(own)):
        # The loss is taken over the rows that have a finite one; other rows are masked.
        both = torch.stack([_loss_sums(logits, labels, shifted)[0] for shifted in (True, False)])
        broken = ~torch.isfinite(both).all(0)
        if on_any(bool(broken.any())):
            where = broken.view(-1, *[1] * (labels.dim() - 1)).to(labels.device)
            batch = {**batch, "labels": labels.masked_fill(where, IGNORED)}
            own, output = own_loss(model, batch)
            logits, labels = logits_of(output), batch["labels"]
    means, counted = [], 0
    for shifted in (True, False):
        sums, counts = _loss_sums(logits, labels, shifted)
        means.append(float(sums[counts > 0].double().sum() / counts.sum()))  # nan if no label counts
        counted += int(counts.sum())
    if not counted:
        return None
    name = type(model).__name__
    if own is None:
        return labels.dim() == 2 and _labels_are_tokens(name, batch)
    loss = float(own)
    dtype = min(logits.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    allowed = ROUNDING[dtype]
    if labels.dim() == 1:
        if _differ(means[0], loss) <= allowed:
            return False
    else:
        # If no label counts in the model's way, its loss is nan, as the mean of nothing.
        far = [0.0 if mean != mean and loss != loss else _differ(mean, loss) for mean in means]
        nearest = far.index(min(far))
        if far[nearest] <= allowed:
            if far[1 - nearest] >= _APART * max(far[nearest], torch.finfo(dtype).eps):
                return nearest == 0
            return _labels_are_tokens(name, batch)
    kinds = (
        f"{means[0]:.6g} (next token) nor {means[1]:.6g} (same token)"
        if labels.dim() == 2
        else f"{means[0]:.6g}"
    )
    raise ValueError(
        f"the loss of {name} must be the mean cross-entropy of its labels, got {loss:.6g}, which is neither {kinds}; pass "
        "shift_labels=True or False to select by cross-entropies all the same"
    )


def _differ(a: float, b: float) -> float:
    """The relative difference; infinite if one number is not finite."""
    distance = abs(a - b) / max(abs(a), abs(b), 1e-30)
    return distance if distance == distance else float("inf")


def _labels_are_tokens(name: str, batch: Mapping[str, Any]) -> bool:
    """Whether labels are the tokens themselves, so that a model that sees them must predict the next one; False if they are already the
    next tokens."""
    labels, tokens = batch["labels"], batch.get("input_ids")
    if isinstance(tokens, Tensor) and tokens.shape == labels.shape:
        tokens = tokens.to(labels.device)
        counted = labels != IGNORED
        own, following = (labels == tokens)[counted], (labels[:, :-1] == tokens[:, 1:])[counted[:, :-1]]
        if bool(own.all()) != bool(following.all()):
            return bool(own.all())
    raise ValueError(
        f"whether {name} predicts the token itself or the next one cannot be told: its own loss does not say, and its labels are "
        "neither the input_ids nor the following ones; pass shift_labels=True (next token) or False"
    )


def known_rows(model: nn.Module, batch: Mapping[str, Any], keys: frozenset[str] | None) -> dict[str, bool]:
    """Which entries have rows, for entries that need no check: `keys` if they are given, else what transformers' models
    document, and plain values, which have no rows."""
    rows, is_documented = len(batch["labels"]), _is_of_transformers(model)
    found = {"labels": True}
    for name, value in batch.items():
        if name == "labels":
            continue
        if keys is not None:
            found[name] = name in keys
        elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            found[name] = False
        elif isinstance(value, Tensor):
            if value.numel() == 1 and rows > 1:
                found[name] = False
            elif is_documented and value.dim() in _ROWS.get(name, ()) and len(value) in (1, rows):
                found[name] = len(value) == rows
    return found


def find_rows(
    model: nn.Module, batch: Mapping[str, Any], known: Mapping[str, bool], step: int, run: Callable[..., Any]
) -> dict[str, bool]:
    """Which entries have rows: a part of the batch, cut along these entries and run alone, has the same losses as in the whole batch.

    Args:
        known: the entries for which this is known already.
        step: the number of rows of a part.
        run: runs the model on a batch.

    Raises:
        ValueError: if the answer stays open, with the entries' names.
    """
    rows = len(batch["labels"])
    open_ = [name for name in batch if name not in known]
    if not open_:
        return dict(known)
    if len(open_) > _OPEN:
        raise ValueError(_stays_open(open_, batch, rows))
    choices = [(True, False) if _length(batch[name]) == rows else (False,) for name in open_]
    whole, dtype = _signature(run(batch), batch["labels"])
    end = slice(rows - min(step, rows), rows)
    right = whole[:, end]
    distances: dict[tuple[bool, ...], float] = {}
    failure: Exception | None = None
    for choice in itertools.product(*choices):
        part = cut(batch, {**known, **dict(zip(open_, choice, strict=True))}, end)
        try:
            found, _ = _signature(run(part), part["labels"])
        except Exception as error:  # a model may raise anything for a part that does not fit together
            failure = error
            continue
        unlike = (found - right).abs() / right.abs().clamp(min=1e-30)
        # Rows that are broken are broken in both runs.
        same_gaps = torch.equal(torch.isfinite(found), torch.isfinite(right))
        distances[choice] = float(unlike.nan_to_num(0, 0, 0).max()) if same_gaps else float("inf")
    nearest = min(distances.values(), default=float("inf"))
    if nearest > ROUNDING[dtype]:
        raise ValueError(_stays_open(open_, batch, rows, fits=False)) from failure
    limit = _APART * max(nearest, torch.finfo(dtype).eps)
    fitting = [choice for choice, distance in distances.items() if distance <= limit]
    unclear = [name for i, name in enumerate(open_) if len({choice[i] for choice in fitting}) > 1]
    if unclear:
        raise ValueError(_stays_open(unclear, batch, rows))
    return {**known, **dict(zip(open_, fitting[0], strict=True))}


def cut(batch: Mapping[str, Any], has_rows: Mapping[str, bool], part: slice) -> dict[str, Any]:
    """The rows `part` of a batch.

    Raises:
        ValueError: for an entry that does not have a row for each sample, as it had before or should have.
    """
    rows = len(batch["labels"])
    found = {}
    for name, value in batch.items():
        if not has_rows[name]:
            found[name] = value
            continue
        if _length(value) != rows:
            raise ValueError(
                f"batch[{name!r}] must have {rows} rows, as the labels have, got {_described(value)}; batch_size=None runs all rows "
                "at once"
            )
        found[name] = value[part]
    return found


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor) or hasattr(value, "__array_interface__"):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, (list, tuple)) else None


def _described(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"shape {tuple(value.shape)}"
    length = _length(value)
    return type(value).__name__ if length is None else f"a {type(value).__name__} of {length}"


def _signature(output: Any, labels: Tensor) -> tuple[Tensor, torch.dtype]:
    """The losses [., B] float64 of each sample in each way of counting, and the type of the logits."""
    logits = logits_of(output)
    ways = (True, False) if labels.dim() == 2 else (False,)
    return torch.stack([sample_losses(logits, labels, way).double() for way in ways]), logits.dtype


def _stays_open(names: list[str], batch: Mapping[str, Any], rows: int, fits: bool = True) -> str:
    listed = ", ".join(f"batch[{name!r}] ({_described(batch[name])})" for name in names)
    why = (
        "cannot be told from the first batch"
        if fits
        else f"is open: some of the {rows} rows, run alone, have other losses than among all of them, or fail, either way"
    )
    return (
        f"whether {listed} has a row for each sample {why}; name all entries that have with batch_keys=, or run all rows at once "
        "with batch_size=None"
    )


def _is_of_transformers(model: nn.Module) -> bool:
    """Whether the model is one of transformers, also behind peft's wrapper; found without importing transformers."""
    unwrapped: Any = getattr(model, "get_base_model", None)
    base = unwrapped() if callable(unwrapped) else model
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(base).__mro__
    )
