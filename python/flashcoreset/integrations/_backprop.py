"""Exact per-sample gradients of matrices of a model's last layers, from one forward pass and a backward pass that ends at them.

Autograd is off until the first of the matrices' modules runs; then it records with the outputs of these modules as leaves, while no
parameter requires a gradient. So it keeps what comes after them alone: the rest of the last layer, the final norm and the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashcoreset._core.tensor import compute_dtype
from flashcoreset.gradients.outer_products import OuterProductGradients, shortened
from flashcoreset.integrations._batches import ROUNDING, logits_of, loss_gradients
from flashcoreset.integrations._sharded import Processes, is_distributed, stored

_ROWS = 3  # how many rows' losses are looked at alone on the first batch: those of the most tokens


@dataclass(eq=False)
class Matrix:
    """A matrix whose gradients are wanted.

    Attributes:
        name: its full name.
        module: the linear layer that owns it as `weight`.
        view: takes the wanted part [rows, columns] of the weight; None for all of it.
        layouts: whether activations are [T, B, ...] and not [B, T, ...]; both before it was found out.
    """

    name: str
    module: nn.Module
    view: Callable[[Tensor], Tensor] | None = None
    layouts: list[bool] = field(default_factory=lambda: [False, True])
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # inputs and outputs of the module
    # The weights that the module ran with: not its parameter, if fully_shard puts that together for a pass.
    weights: list[Tensor] = field(default_factory=list)

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is [in, out]."""
        return type(self.module).__name__ == "Conv1D"

    def pair(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the wanted part's gradient, of those of the whole weight."""
        if self.view is not None:
            out = torch.arange(g.shape[2], device=g.device)
            rows = self.view(out[None] if self.is_transposed else out[:, None]).flatten()
            return a, g[:, :, rows]
        return (g, a) if self.is_transposed else (a, g)


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies its input by its `weight`; transformers' Conv1D does, by the transposed one."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix_of(model: nn.Module, name: str, view: Callable[[Tensor], Tensor] | None) -> Matrix:
    """The matrix of this name.

    Raises:
        ValueError: for a parameter that is not the weight of a linear layer.
    """
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = getattr(module, "weight", None)
    if last != "weight" or not is_linear(module) or not isinstance(weight, Tensor):
        raise ValueError(
            f"parameter must be the weight of a linear layer with gradients='backprop', got {name} of {type(module).__name__}; "
            "gradients='zeroth_order' takes any parameter"
        )
    return Matrix(name, module, view)


class LastLayerGradients:
    """Runs a model and returns the exact gradients of each row's loss."""

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix]) -> None:
        self._model, self._matrices = model, list(matrices)
        self._is_checked = False  # whether the matrices' uses and the rows' dimension were found

    def __call__(
        self, inputs: dict[str, Any], labels: Tensor, shift_labels: bool, processes: Processes
    ) -> OuterProductGradients:
        """The gradients for inputs without labels; NaN for rows whose loss is not finite. `processes` run the model together.

        Raises:
            ValueError: if a matrix is used otherwise than by its module, if its module runs on something else than rows, or if the
                output does not depend on it.
        """
        try:
            return self._run(inputs, labels, shift_labels, processes)
        finally:
            for matrix in self._matrices:
                matrix.calls.clear()  # which hold the graph
                matrix.weights.clear()

    def _run(
        self, inputs: dict[str, Any], labels: Tensor, shift_labels: bool, processes: Processes
    ) -> OuterProductGradients:
        check = not self._is_checked
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            wanted = [stored(self._model, matrix.name) for matrix in self._matrices] if check else []
            stack.enter_context(_frozen(self._model, wanted))
            stack.enter_context(_recorded(self._matrices))
            logits = logits_of(self._model(**inputs))
            for matrix in self._matrices:
                if not matrix.calls:
                    raise ValueError(
                        f"the module of {matrix.name} must run in the model's forward pass, but it did not (merged adapters, or a matrix "
                        "that the model uses by itself?); gradients='zeroth_order' takes it"
                    )
            if not logits.requires_grad:
                raise ValueError(
                    f"the model's logits must depend on {self._matrices[0].name} by operations that autograd records, but they do not "
                    "(is the forward pass in torch.no_grad, or in a reentrant checkpoint?)"
                )
            sums, counts, outer = loss_gradients(logits.detach(), labels, shift_labels)
            bad = ~torch.isfinite(sums)
            has_bad = bool(bad.any())
            outer.masked_fill_(bad.view(-1, *[1] * (outer.dim() - 1)), 0)
            if check:
                self._check(logits, outer, processes)
                self._is_checked = processes.all(self._is_checked and not has_bad)
            found = self._backward(logits, outer, [])
        factors = []
        for matrix, grads in zip(self._matrices, found, strict=True):
            a, g = self._joined(matrix, grads, len(labels))
            # A row's loss is a mean over its tokens, and the pass above is that of sums, which half precision does not round to 0.
            g = g / counts.clamp(min=1).to(g)[:, None, None]
            g = g.masked_fill(bad[:, None, None], torch.nan)
            factors.append(shortened(*matrix.pair(a, g)))
        return OuterProductGradients(tuple(factors))

    def _backward(
        self, logits: Tensor, outer: Tensor, weights: list[Tensor], retain: bool = False
    ) -> list[list[Tensor]]:
        """The gradients of each matrix's outputs, and in a last list those of `weights`."""
        outputs = [output for matrix in self._matrices for _, output in matrix.calls]
        found = list(
            torch.autograd.grad(
                logits,
                [*outputs, *weights],
                outer,
                retain_graph=retain,
                allow_unused=True,
                materialize_grads=True,
            )
        )
        grads = [[found.pop(0) for _ in matrix.calls] for matrix in self._matrices]
        return [*grads, found] if weights else grads

    def _joined(self, matrix: Matrix, grads: list[Tensor], rows: int) -> tuple[Tensor, Tensor]:
        """The inputs and outputs' gradients of all calls as [B, T, columns] and [B, T, rows of the matrix]."""
        dtype = compute_dtype(grads[0].dtype)

        def by_row(x: Tensor) -> Tensor:
            return _by_row(x, rows, matrix, matrix.layouts[0]).to(dtype)

        pairs = [(by_row(a), by_row(g)) for (a, _), g in zip(matrix.calls, grads, strict=True)]
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([a for a, _ in pairs], 1), torch.cat([g for _, g in pairs], 1)

    def _check(self, logits: Tensor, outer: Tensor, processes: Processes) -> None:
        """Finds which dimension of the activations is that of rows, by the gradient of one row's loss alone, which is 0 elsewhere; and
        compares the sum over all rows with autograd's gradient of the whole matrix."""
        rows = len(outer)
        positions = outer.flatten(1, -2).any(-1).sum(1) if outer.dim() > 2 else outer.any(1).long()
        count = processes.least(min(_ROWS, int((positions > 0).sum())))
        for row in positions.sort(descending=True, stable=True).indices[:count].tolist():
            alone = torch.zeros_like(outer)
            alone[row] = outer[row]
            for matrix, grads in zip(self._matrices, self._backward(logits, alone, [], True), strict=True):
                matrix.layouts = [
                    time_first for time_first in matrix.layouts if _fits(matrix, grads, row, rows, time_first)
                ]
                if not matrix.layouts:
                    raise ValueError(_not_rows(matrix, grads[0], rows))
        weights = [weight for matrix in self._matrices for weight in matrix.weights]
        *found, whole = self._backward(logits, outer, weights, True)
        for matrix, grads in zip(self._matrices, found, strict=True):
            exact = sum([whole.pop(0) for _ in matrix.weights[1:]], whole.pop(0))
            a, g = self._joined(matrix, grads, rows)
            total = torch.einsum("bti,bto->io" if matrix.is_transposed else "bti,bto->oi", a, g)
            norm = float(torch.linalg.vector_norm(exact.to(total)))
            if float(torch.linalg.vector_norm(total - exact.to(total))) > _tolerance(logits, exact) * norm:
                raise ValueError(
                    f"the gradient of {matrix.name} is not what passes through its module: the model uses the matrix elsewhere too (a tied "
                    "weight, or F.linear with it), or under another one's name; gradients='zeroth_order' takes it"
                )
        # One row, or one position, says nothing of which dimension is the rows'; then both layouts come to the same here.
        self._is_checked = all(len(matrix.layouts) == 1 for matrix in self._matrices)


def _tolerance(logits: Tensor, exact: Tensor) -> float:
    return max(ROUNDING[logits.dtype], ROUNDING[exact.dtype])


def _by_row(x: Tensor, rows: int, matrix: Matrix, time_first: bool) -> Tensor:
    """Activations [..., width] as [B, T, width]."""
    x = x.detach()
    if x.numel() // x.shape[-1] % rows:
        raise ValueError(_not_rows(matrix, x, rows))
    if time_first:
        return x.reshape(-1, rows, x.shape[-1]).transpose(0, 1)
    return x.reshape(rows, -1, x.shape[-1])


def _fits(matrix: Matrix, grads: list[Tensor], row: int, rows: int, time_first: bool) -> bool:
    """Whether the gradients `grads` of the loss of row `row` alone are 0 at all other rows, if activations have this layout."""
    for g in grads:
        largest = _by_row(g, rows, matrix, time_first).abs().amax((1, 2)).nan_to_num(0)
        largest[row] = 0
        if bool(largest.any()):
            return False
    return True


def _not_rows(matrix: Matrix, x: Tensor, rows: int) -> str:
    return (
        f"the activations of {matrix.name} must be those of {rows} rows one by one, got shape {tuple(x.shape)}, in which rows are mixed (an "
        "expert's tokens, or samples that are put one after the other?); name another matrix with parameter=, or take "
        "gradients='zeroth_order'"
    )


@contextmanager
def _frozen(model: nn.Module, wanted: Sequence[Tensor]) -> Iterator[None]:
    """No parameter but `wanted` requires a gradient; afterwards all are as they were."""
    chosen = {id(tensor) for tensor in wanted}
    before = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
    try:
        for _, parameter, _ in before:
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(id(parameter) in chosen)
        torch.clear_autocast_cache()
        yield
    finally:
        # Under fully_shard, a pass that ended early leaves whole parameters in the place of their parts.
        current = dict(model.named_parameters())
        for name, parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
            if name in current:
                current[name].requires_grad_(requires_grad)
        torch.clear_autocast_cache()


@contextmanager
def _recorded(matrices: Sequence[Matrix]) -> Iterator[None]:
    """Records each matrix's inputs, outputs and weights, and makes autograd's graph begin at these outputs."""
    handles = []

    def begin_of(matrix: Matrix) -> Callable[..., None]:
        def begin(module: nn.Module, _: Any) -> None:
            torch.set_grad_enabled(True)  # until the context in which the model runs ends
            weight = module.weight
            assert isinstance(weight, Tensor)
            if is_distributed(weight):
                raise ValueError(
                    f"{matrix.name} must run as a whole matrix with gradients='backprop', got a DTensor of which each process multiplies a part "
                    "(tensor parallelism); gradients='zeroth_order' takes it"
                )
            if not any(weight is other for other in matrix.weights):
                matrix.weights.append(weight)

        return begin

    def hook_of(matrix: Matrix) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            given = args[0] if args else next(iter(kwargs.values()))
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            matrix.calls.append((given.detach(), output))
            return output.clone()  # which the model may write into

        return hook

    try:
        for matrix in matrices:
            matrix.calls.clear()
            matrix.weights.clear()
            handles.append(matrix.module.register_forward_pre_hook(begin_of(matrix)))
            handles.append(matrix.module.register_forward_hook(hook_of(matrix), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
