"""Sketches and norms of per-sample gradients, from hooks on one ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.tensor import as_integer, compute_dtype, one_of
from flashcoreset.gradients.hooks import ACTIVE, Hooks, node_of
from flashcoreset.gradients.layers import batch_statistics
from flashcoreset.gradients.scaling import check_scale, find_scales
from flashcoreset.gradients.uses import Pass, Target
from flashcoreset.gradients.wanted import (
    advice,
    check_places,
    find_places,
    one_device,
    wanted_parameters,
)
from flashcoreset.sketch import check_projection
from flashcoreset.sketch.backend import choose
from flashcoreset.sketch.kinds import KINDS

REDUCTIONS = ("mean", "sum")
VERIFY = ("first", "always", "never")
PER = ("sample", "module", "token")
NONFINITE = ("raise", "nan")


class GradientSketcher(Hooks):
    """Sketches and norms of the gradient of each sample of a batch, from one ordinary forward and
    backward pass over the batch; the B x D matrix of these gradients is never formed.

    Within `with sketcher:`, hooks keep the inputs of the layers that own the wanted parameters (by autograd's own means:
    the inputs are released, recomputed or offloaded like anything that autograd saves), and when the gradient of a layer's output
    arrives, each sample's gradient sum_t g_t a_t^T is sketched and dropped.

    Everything between the first call of a forward pass and the next forward pass after a backward pass adds up: several
    backward passes, several calls of a model, parameters that several layers share. `.sketches` and `.norms` belong to the
    last such pass.

    Args:
        model: the module. If torch.compile compiled it, its layers run one by one inside the block (the hooks break the graph).
        dim: columns of the sketches, 1 to 2^31; None for norms alone.
        kind, seed, nnz: the projection, as for `sketch`, but for the kinds that choose columns, "mask" and "grass".
        parameters: which parameters' gradients: a name or glob pattern of `model.named_parameters()` or several of them, those that
            begin with "!" to leave out, or a function (name, parameter) -> bool; None for all. Only those that require gradients count.
        reduction: how the loss reduces over the samples: "mean" (gradients are multiplied by B) or "sum". For a mean over all
            tokens, a sample's gradient is that of its own tokens' share, times B. A scaled loss, as with a
            GradScaler, gives scaled gradients.
        norms: whether norms are computed; without norms, sketches cost less.
        backend: None, "cpu", "cuda", "triton" or "torch", for the sketches.
        verify: "first" checks the first batch of each form of calls (same kinds of inputs, same layers): that row b of each layer
            belongs to sample b, by forward passes with the samples in other places (two to four), and that the
            samples' gradients add up to the one that autograd computes. "always" checks every batch, "never" none.
        batch_dim: the dimension of the samples in the model's inputs, 0 or 1 (torch's transformers and recurrent layers with
            batch_first=False). Layers inside may have them in the other, or flattened with positions; the check finds out.
        per: "sample"; "module": results are dicts, name of a module -> results of its own parameters, whose sketches add up to the
            samples'; "token": results are [B, T, ...], one for each position of the layers' rows, whose sketches add up over T to the samples'
            (not the norms). The gradient of a token is what its own rows of each layer contribute.
        nonfinite: what a gradient with NaN or infinity does: "raise" when results are read; "nan": NaN in the rows of that sample alone.
        scale: factors of the gradients' entries before they are sketched and measured: a tensor [D], a dict: name of a parameter ->
            tensor of its shape, or an optimizer (Adam and its kin, RMSprop, Adagrad), for 1 / (sqrt(v) + eps) with its v, corrected for its
            first steps, when the block begins. Such sketches form each gradient matrix, some rows at a time.

    Layers: Linear, Conv1d to 3d, ConvTranspose1d to 3d, Embedding, LayerNorm, RMSNorm, GroupNorm, InstanceNorm, BatchNorm in eval mode,
    PReLU, Bilinear, MultiheadAttention, transformers' Conv1D, and other modules without children whose class is called ...RMSNorm or
    ...LayerNorm, or is a Norm of transformers; parameters that a module uses itself in sums, products, copies for all samples, linear
    layers and look-ups; layers, and matrices of one parameter, that are given rows picked out of the tokens of all samples (experts);
    types with a rule (`register_gradient_rule`). For everything else (recurrent layers, parametrised weights, DoRA, ...) the smallest
    module around that treats samples apart is run again on each sample, with a `SlowPathWarning`. An output of size 1 in dimension 0
    may be added to others, expanded or repeated over the batch.

    Attributes:
        offsets: dict: name of each wanted parameter -> where it begins in the flattened gradient.
        numel: D, the length of the flattened gradient of the wanted parameters, in the order of `named_parameters()`.

    Raises:
        TypeError: for arguments of a wrong type, or parameters that are not floating.
        ValueError: for an option that does not exist, a pattern that matches nothing, a wanted parameter of a module whose forward was
            replaced; in the forward pass for parameters whose samples cannot be told apart, samples that influence each other, or a
            BatchNorm in training mode. The message names all of them, and patterns that leave them out.
        RuntimeError: for `.sketches` or `.norms` before a backward pass; when the results are read or `with` ends, for a backward
            pass without a forward pass inside `with`, parameters that are used outside of supported layers, and per-sample
            gradients that do not add up to autograd's.
        BackendUnavailableError: if `backend` cannot run here.

    Sources: Goodfellow, "Efficient per-example gradient computations", 2015; Li, Tramer, Liang and Hashimoto, "Large language
    models can be strong differentially private learners", 2022 (norms of sequence models by Gram matrices).

    Example:
        >>> import torch, flashcoreset as fc
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> sketcher = fc.GradientSketcher(model, 64)
        >>> with sketcher:
        ...     loss = torch.nn.functional.cross_entropy(model(torch.randn(5, 8)), torch.tensor([0, 1, 2, 0, 1]))
        ...     loss.backward()
        >>> sketcher.sketches.shape, sketcher.norms.shape
        (torch.Size([5, 64]), torch.Size([5]))
    """

    def __init__(
        self,
        model: nn.Module,
        dim: int | None,
        *,
        kind: str = "sjlt",
        seed: int = 0,
        nnz: int = 1,
        parameters: str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        reduction: str = "mean",
        norms: bool = True,
        backend: str | None = None,
        verify: str = "first",
        batch_dim: int = 0,
        per: str = "sample",
        nonfinite: str = "raise",
        scale: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model must not be a DataParallel, whose replicas live for one call; use DistributedDataParallel"
            )
        one_of(reduction, "reduction", REDUCTIONS)
        one_of(verify, "verify", VERIFY)
        one_of(per, "per", PER)
        one_of(nonfinite, "nonfinite", NONFINITE)
        check_scale(scale)
        batch_dim = as_integer(batch_dim, "batch_dim")
        if batch_dim not in (0, 1):
            raise ValueError(f"batch_dim must be 0 or 1, got {batch_dim}")
        if not isinstance(norms, bool):
            raise TypeError(f"norms must be a bool, got {norms!r} of type {type(norms).__name__}")
        if dim is None and not norms:
            raise ValueError("dim must be a number if norms is False, got None: nothing would be computed")
        super().__init__()
        if isinstance(parameters, Iterable) and not isinstance(parameters, (str, Mapping)):
            parameters = list(parameters)  # an iterator is read twice
        wanted = wanted_parameters(model, parameters)
        owners = {id(p): name.rpartition(".")[0] for name, p in reversed(list(model.named_parameters()))}
        self.offsets: dict[str, int] = {}
        self.numel = 0
        self._targets = {}
        for name, parameter in wanted.items():
            self._targets[id(parameter)] = Target(name, parameter, self.numel, owners[id(parameter)])
            self.offsets[name] = self.numel
            self.numel += parameter.numel()
        columns = 1 if dim is None else dim
        # Gradients are sketched layer by layer, so a choice among all entries is not for them.
        columns, seed, _, nnz = check_projection(self.numel, columns, kind, seed, 0, nnz, kinds=KINDS)
        check_backend(backend)
        self._device = one_device(wanted)
        self._model, self._dim = model, None if dim is None else columns
        self._options = {"kind": kind, "seed": seed, "nnz": nnz}
        self._norms, self._mean, self._verify = norms, reduction == "mean", verify
        self._batch_dim, self._per, self._nonfinite, self._scale = batch_dim, per, nonfinite, scale
        self._parameters = parameters
        check_places(model, self._targets, self._parameters)
        self._places, self._ruled = find_places(model, self._targets)
        found = {compute_dtype(parameter.dtype) for parameter in wanted.values()}
        self._dtype = torch.float64 if torch.float64 in found else torch.float32
        self._kernels = choose(backend, self._device)
        self._handles = []
        self._done = None
        self._scales = {}
        self._begin()
        if not isinstance(scale, torch.optim.Optimizer):  # whose state is that of each block
            self._scales = self.scales()

    @property
    def dim(self) -> int | None:
        """The columns of the sketches; None if there are norms alone."""
        return self._dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the results."""
        return self._dtype

    # ---- results

    @property
    def sketches(self) -> Any:
        """The sketches [B, dim] float32 (float64 for float64 parameters): `sketch` of each sample's flattened gradient. [B, T, dim] for
        per="token", and a dict: module -> [B, dim] for per="module"."""
        done = self._result()
        if self._dim is None:
            raise RuntimeError("there are no sketches with dim=None; make the GradientSketcher with a dim")
        return self._shaped(done, {group: self._out(done, group) for group in self._groups()}, "sketches")

    @property
    def norms(self) -> Any:
        """The norms [B] float32 (float64 for float64 parameters) of the samples' gradients. [B, T] for per="token", and a dict:
        module -> [B] for per="module"."""
        done = self._result()
        if not self._norms:
            raise RuntimeError(
                "there are no norms with norms=False; make the GradientSketcher with norms=True"
            )
        if done.repeated:
            raise RuntimeError(
                "norms are not known after several backward passes through one graph (sketches are); add the losses "
                "and call backward() once"
            )
        found = {group: self._squares_in(done.squares, done, group).copy() for group in self._groups()}
        self._add_shared(done, found)
        return self._shaped(done, {group: one.norms() for group, one in found.items()}, "norms")

    def _shaped(self, done: Pass, found: dict[str, Tensor], name: str) -> Any:
        assert done.batch is not None
        out = {}
        bad = torch.zeros(done.batch, dtype=torch.bool, device=self._device)
        for group, values in found.items():
            own = (values * (done.batch if self._mean else 1)).to(self._dtype)
            if self._per == "token":
                own = own.unflatten(0, (done.batch, done.positions or 0))
            out[group] = own
            bad |= ~torch.isfinite(own.reshape(done.batch, -1)).all(1) if own.numel() else False
        if bool(bad.any()):
            if self._nonfinite == "raise":
                raise ValueError(
                    f"{name}: the gradient of sample {int(bad.nonzero()[0])} is not finite; find out why, or set nonfinite='nan'"
                )
            for own in out.values():
                own[bad] = torch.nan
        return out if self._per == "module" else out[""]

    def _result(self) -> Pass:
        self._check()
        if self._done is None:
            raise RuntimeError(
                "there has been no backward pass yet: call the model and loss.backward() inside `with sketcher:` first"
            )
        return self._done

    def _check(self) -> None:
        """Raises RuntimeError for gradients that were missed, wholly or in part."""
        if self._direct:
            texts = [
                f"parameter {name!r} is used outside of a call of its module, by {function}"
                for name, function in self._direct.items()
            ]
            raise RuntimeError(
                f"{'; '.join(texts)}: per-sample gradients are not known there; use it through its module alone (in a checkpoint, set "
                f"use_reentrant=False), or "
                f"{self._advice(self._direct)}"
            )
        if self._lost:
            texts = [
                f"parameter {name!r}: an output of {owner} has size 1 in dimension 0 and goes into {function}, whose gradient is "
                "summed over the samples"
                for name, (owner, function) in self._lost.items()
            ]
            raise RuntimeError(
                f"{'; '.join(texts)}; add it to other tensors, expand or repeat it over the batch right away, or "
                f"{self._advice(self._lost)}"
            )
        if self._missed:
            names = ", ".join(map(repr, self._missed))
            raise RuntimeError(
                f"the gradient of parameter {names} came from no call of its module in the block: "
                "run the forward pass inside `with sketcher:`, call modules rather than their forward() (where torch.compile has left "
                "the hooks out, call the model uncompiled), and set use_reentrant=False where they are used in a checkpoint, or "
                f"{self._advice(self._missed)}"
            )
        if self._differs:
            texts = [
                f"parameter {name!r} of {owner}: the samples' gradients do not add up to the gradient that autograd computed; "
                f"they are off by {off:.2g} times its length"
                for name, (owner, off) in self._differs.items()
            ]
            raise RuntimeError(
                f"{'; '.join(texts)}. The layer, or a hook on it or on the parameter, computes something "
                f"else than its class says; {self._advice(self._differs)}"
            )

    def _advice(self, names: Iterable[str]) -> str:
        out = [target for target in self._targets.values() if target.name in set(names)]
        return advice(out, self._targets, self._parameters)

    def scales(self) -> dict[str, Tensor]:
        """The factors of the gradients' entries, flattened, by the parameters' names; none without `scale`."""
        return find_scales(self._scale, list(self._targets.values()), self.numel, self._dtype)

    # ---- the block

    def __enter__(self) -> GradientSketcher:
        if self._handles:
            raise RuntimeError("this GradientSketcher is already active; leave its `with` block first")
        texts = [
            f"{type(module).__name__} {name!r}"
            for name, module in self._model.named_modules()
            if batch_statistics(module)
        ]
        if texts:
            raise ValueError(
                f"{', '.join(texts)} normalises over the batch, so that samples have no gradients of their own; "
                "put it in eval mode: .eval()"
            )
        frozen = [
            repr(target.name) for target in self._targets.values() if not target.parameter.requires_grad
        ]
        if frozen:
            raise ValueError(
                f"parameter {', '.join(frozen)} no longer requires gradients; make a new GradientSketcher"
            )
        check_places(self._model, self._targets, self._parameters)
        if isinstance(self._scale, torch.optim.Optimizer):
            self._scales = self.scales()
        self._begin()
        self._nodes = {key: node_of(target.parameter) for key, target in self._targets.items()}
        self._add_hooks()
        ACTIVE.append(self)
        self._watch.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._watch.__exit__(kind, *_)
        self._watch.clear()
        ACTIVE.remove(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        self._single.clear()
        self._sums.clear()
        self._frames.clear()
        self._call = self._record = None
        if kind is None:
            self._check()
            if self._done is not None and self._norms:
                self._add_shared(self._done, self._done.squares)
                self._done.tied.clear()
                self._done.kept.clear()
