"""The selection step of CoLM for any training loop: from a large batch to the rows that are worth a backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashcoreset._core.errors import SlowPathWarning, warn_caller
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import FLOATING, as_int64, as_integer, as_number, one_of
from flashcoreset.gradients.outer_products import OuterProductGradients, joined
from flashcoreset.gradients.zeroth_order import LowRankGradients, seed_of_call, zeroth_order_gradients
from flashcoreset.integrations._backprop import LastLayerGradients, is_linear, matrix_of
from flashcoreset.integrations._batches import cut, find_rows, known_rows, sample_losses, shifts_labels
from flashcoreset.integrations._sharded import (
    Processes,
    is_distributed,
    is_flat,
    whole_parameters,
    whole_shape,
)

# Coefficients of shortened passes equal those of whole passes except for rounding, which is large in half precision.
_NEAR = 0.05

_GRADIENTS = ("zeroth_order", "backprop")

# Modules that project to queries, keys or values alone, by the last part of their names: one style of names a column.
_SEPARATE = {
    "q": ("q_proj", "query", "wq", "q"),
    "k": ("k_proj", "key", "wk", "k"),
    "v": ("v_proj", "value", "wv", "v"),
}
_OUTPUTS = ("o_proj", "out_proj", "wo", "o", "dense", "c_proj", "proj")  # attention's last projection
_MATRICES = ("q", "k", "v", "o")
# Parts of names of what sees and hears beside a language model, whose layers are not the last ones.
_SENSES = ("vision", "visual", "audio", "image", "qformer")


def _third(weight: Tensor, config: Any, which: str) -> Tensor:
    """The rows of [q | k | v], all three equally wide."""
    third = len(weight) // 3
    return weight.narrow(0, "qkv".index(which) * third, third)


def _heads(weight: Tensor, config: Any, which: str) -> Tensor:
    """The rows of [q | k | v] with fewer heads in k and v than in q."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    few = config.num_key_value_heads * head
    if which == "q":
        return weight[: -2 * few]
    return weight[-2 * few : -few] if which == "k" else weight[-few:]


def _third_of_each_head(weight: Tensor, config: Any, which: str) -> Tensor:
    """The rows in each head of [q | k | v], head by head."""
    return weight.view(config.num_attention_heads, 3, -1, weight.shape[1])[:, "qkv".index(which)]


def _latent(weight: Tensor, config: Any, which: str) -> Tensor:
    """The rows in each head of [k | v], which multi-head latent attention makes from a compressed state."""
    heads = weight.view(config.num_attention_heads, -1, weight.shape[1])
    place = config.qk_nope_head_dim
    return heads[:, :place] if which == "k" else heads[:, place:]


# Modules that project to several of them at once: which rows of [out, in] are whose, by the name and by `model_type` of the
# configuration. Other models use the same name for other layouts.
_FUSED: dict[str, dict[str, Callable[[Tensor, Any, str], Tensor]]] = {
    "c_attn": {"gpt2": _third},
    "qkv_proj": {"phi3": _heads},
    "query_key_value": dict.fromkeys(("bloom", "gpt_neox", "persimmon"), _third_of_each_head),
    "Wqkv": {"mpt": _third},
    "kv_b_proj": dict.fromkeys(("deepseek_v2", "deepseek_v3"), _latent),
}


class BatchSelector:
    """Chooses the rows of a batch that a training step is made on, by each row's gradient of the last V-projection or of other matrices.

    `gradients="backprop"` takes the exact gradients: one forward pass of the model, and a backward pass that ends at the last layer's
    matrices. A row's gradient stays a product of the matrix's inputs and its outputs' gradients (`OuterProductGradients`); nothing of the
    size rows x parameters is formed. On the first batch, the sum over the rows is compared with autograd's gradient of the matrix.

    `gradients="zeroth_order"`, as CoLM's paper has it, estimates them without a backward pass. One forward pass runs the model with the parameter moved by +eps along a random direction and keeps the last decoder
    layer's input; another one with -eps runs that layer, the final norm and the head alone (with more directions, all passes but the
    first do). On the first batch, whole passes check whether that is enough; if a model uses its earlier layers for more than
    the last one's input, all passes are whole passes, and a `SlowPathWarning` reports it. The losses of each sample are averaged over
    its own tokens. Whether the losses are those of the next token or of the token itself is found on the first batch, from the
    model's own loss. The model runs in eval mode, without gradients; afterwards its parameters, modes and hooks are as they
    were, whatever happens, and so is the state of the global random numbers.

    Args:
        model: called with a batch's entries as keywords, with an output that is the logits [B, T, C] or [B, C], has
            them as `logits`, or has them first: causal and masked language models, encoder-decoders and classifiers of tokens,
            texts and images of transformers, with or without peft's adapters. Layers are
            members of an `nn.ModuleList`. A model wrapped by DistributedDataParallel is unwrapped.
            Processes may share the parameters by fully_shard or DeepSpeed, and for "zeroth_order" as other DTensors or by
            FullyShardedDataParallel (use_orig_params=True). Then every process makes the selector with the same arguments and calls it
            together with the others; each has rows of its own, in the same number of parts. Meanwhile a process holds two whole copies of `parameters`.
        method: what chooses rows by gradients and groups: an `fc.CoLM`, or any object with its `select`. None: `gradients` alone
            can be called. For an `fc.CoLM` with method "random" the model does not run.
        gradients: "zeroth_order" or "backprop".
        parameter: name of the parameter, or several names. None: the weights of the last layer's projections `matrices` (of a fused
            projection only their rows), or the matrices B of their LoRA adapters where they have active ones. "backprop" takes weights of
            linear layers.
        matrices: which projections of the last layer's attention: "q", "k", "v" and "o", one or several; for `parameter=None`.
        sketch_dim: for "backprop": `gradients` returns sketches (`OuterProductGradients.sketch`) of this many dimensions, in place of
            the factors. None: factors.
        eps: the size of the step, > 0. LoRA starts with B = 0, so `eps` is not relative to the weights. It has to change the parameters in
            the type that passes run in (under a MixedPrecisionPolicy that is not their own).
        seed: a 64-bit integer, the seed of the directions.
        n_perturbations: the number of directions. With one, all rows' gradients are multiples of one direction.
        resample: False: the same directions in every step, as in CoLM's published code. True: other directions in every step, by the
            number of the step.
        batch_size: how many rows run at a time; None: all. Coefficients depend on it only by rounding.
        shift_labels: True: labels are the tokens, each of which is predicted from those before it. False: each label is predicted
            in its own place. None: whichever of the two is the model's own loss on the first batch; for a model without a loss,
            a comparison of the labels with `input_ids` decides.
        batch_keys: names of the entries of a batch that have a row for each sample and are cut if `batch_size` is below the
            batch's; the labels are always cut. None: the entries that transformers' models document; other entries are checked
            on the first batch: a part of it, run alone, must have the losses that it has within the whole batch, which
            runs once for this check.

    Attributes:
        parameter_names: the names of the parameters whose gradients are taken.
        parameters: these tensors: parameters themselves, or views of them; in a sharded model the parameters as this process has them.
        parameter_name, parameter: the first of both.
        layer_name: the layer that is run again.
        method: the argument `method`.
        shift_labels: the argument, or what was found; None before.
        steps: how many batches have been evaluated.

    Raises:
        TypeError: for arguments of a wrong type, and a parameter that is not floating (quantised).
        ValueError: for a wrong value; options of one kind of gradients with the other; a model in which no V-projection is found, the
            message names what was looked for; a fused projection whose layout is not known; a model wrapped by FullyShardedDataParallel
            with "backprop", or wrapped only after the selector was made; processes that do not call it alike.

    Source: Nguyen et al., "Mini-batch coresets for memory-efficient language model training on data mixtures" (CoLM),
    ICLR 2025. Its published code averages losses over the padded width, so that a sample's gradient depends on its batch.

    Example:
        >>> import torch, flashcoreset as fc
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=2))
        >>> selector = fc.integrations.torch.BatchSelector(model)
        >>> selector.parameter_name, tuple(selector.parameter.shape)
        ('model.layers.1.self_attn.v_proj.weight', (16, 16))
        >>> tokens = torch.randint(0, 50, (8, 12))
        >>> selector.gradients({"input_ids": tokens, "labels": tokens}).coefficients.shape
        torch.Size([8, 1])
        >>> selector = fc.integrations.torch.BatchSelector(model, fc.CoLM(4, method="omp"), gradients="backprop")
        >>> len(selector.select({"input_ids": tokens, "labels": tokens}).indices) <= 4
        True
    """

    def __init__(
        self,
        model: nn.Module,
        method: Any = None,
        *,
        gradients: str = "zeroth_order",
        parameter: str | Iterable[str] | None = None,
        matrices: Iterable[str] = ("v",),
        sketch_dim: int | None = None,
        eps: float = 1e-3,
        seed: int = 0,
        n_perturbations: int = 1,
        resample: bool = False,
        batch_size: int | None = None,
        shift_labels: bool | None = None,
        batch_keys: Iterable[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        if method is not None and not callable(getattr(method, "select", None)):
            raise TypeError(
                f"method must have select(grads, groups), as fc.CoLM has, got {type(method).__name__}"
            )
        one_of(gradients, "gradients", _GRADIENTS)
        self._kind = gradients
        self._eps = as_number(eps, "eps")
        if self._eps <= 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        self._seed = as_int64(seed, "seed")
        self._count = _at_least_one(n_perturbations, "n_perturbations")
        if not isinstance(resample, bool):
            raise TypeError(f"resample must be a bool, got {resample!r} of type {type(resample).__name__}")
        self._resample = resample
        if sketch_dim is not None:
            sketch_dim = _at_least_one(sketch_dim, "sketch_dim")
        self._sketch_dim = sketch_dim
        self._refuse_mixed()
        self._batch_size = None if batch_size is None else _at_least_one(batch_size, "batch_size")
        if shift_labels is not None and not isinstance(shift_labels, bool):
            raise TypeError(
                f"shift_labels must be a bool or None, got {shift_labels!r} of type {type(shift_labels).__name__}"
            )
        self.shift_labels = shift_labels
        self._batch_keys = None if batch_keys is None else _names(batch_keys)
        self._found_rows: dict[str, bool] = {}  # for entries that were checked
        self._model = model
        self._is_flat = any(map(is_flat, model.modules()))
        if any(name.endswith("_flat_param") for name, _ in model.named_parameters()):
            raise ValueError(
                "FullyShardedDataParallel must be made with use_orig_params=True, which leaves the model its parameters' names, got a model "
                "without them"
            )
        if self._is_flat and gradients == "backprop":
            raise ValueError(
                "model must be sharded by fully_shard (FSDP2) with gradients='backprop', got FullyShardedDataParallel (FSDP1), which puts its "
                "parameters together for one backward pass of a forward pass, and no more; gradients='zeroth_order' takes it"
            )
        self.method = method
        self.steps = 0
        self._wanted = _parameters(model, parameter, matrices)
        self.parameter_names = tuple(name for name, _ in self._wanted)
        stands_for = {id(model.get_parameter(name)): name for name in self.parameter_names}
        for name in self.parameter_names:
            if (other := stands_for[id(model.get_parameter(name))]) != name:
                raise ValueError(
                    f"parameter must name each tensor once, got {name} and {other}, which are tied"
                )
        self._shapes = [whole_shape(model, name) for name in self.parameter_names]
        self.layer_name, self._before = min(
            (_layer_of(model, name) for name in self.parameter_names), key=lambda found: len(found[1])
        )
        self._is_checked = False  # whether it was checked that shortened passes are enough
        self._exact: LastLayerGradients | None = None
        if gradients == "backprop":
            self._exact = LastLayerGradients(
                model, [matrix_of(model, name, view) for name, view in self._wanted]
            )

    def _refuse_mixed(self) -> None:
        """Raises errors for options that the kind of gradients does not have."""
        of_other = {"eps": self._eps != 1e-3, "n_perturbations": self._count != 1, "resample": self._resample}
        if self._kind == "zeroth_order":
            of_other = {"sketch_dim": self._sketch_dim is not None}
        for name, is_given in of_other.items():
            if is_given:
                other = _GRADIENTS[self._kind == "zeroth_order"]
                raise ValueError(
                    f"{name} is for gradients={other!r}; leave it out with gradients={self._kind!r}"
                )

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors whose gradients are taken, looked up each time because models are moved and cast."""
        found = []
        for (name, view), shape in zip(self._wanted, self._shapes, strict=True):
            tensor = self._model.get_parameter(name)
            is_whole = tensor.shape == shape and not is_distributed(tensor)
            found.append(view(tensor.detach()) if view is not None and is_whole else tensor)
        return found

    @property
    def parameter_name(self) -> str:
        """The first of the names."""
        return self.parameter_names[0]

    @property
    def parameter(self) -> Tensor:
        """The first of the tensors."""
        return self.parameters[0]

    @property
    def numel(self) -> int:
        """The number of entries of these tensors."""
        return sum(
            part.numel() for part in self._parts([torch.empty(s, device="meta") for s in self._shapes])
        )

    def _parts(self, whole: Iterable[Tensor]) -> list[Tensor]:
        """The wanted parts of whole parameters."""
        return [
            tensor if view is None else view(tensor.detach())
            for (_, view), tensor in zip(self._wanted, whole, strict=True)
        ]

    def gradients(
        self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    ) -> LowRankGradients | OuterProductGradients | Tensor:
        """The gradient of each row's loss with respect to `parameters`.

        Args:
            batch: what the model is called with, and "labels" [B, T] or [B], with -100 where a label does not count: the labels that
                the model's own loss takes. Everything is on the model's device. A list of such mappings is a batch in parts, each of which
                runs by itself, whatever `batch_size`.

        Returns:
            For "zeroth_order" `LowRankGradients` with coefficients [B, n_perturbations]; for "backprop" `OuterProductGradients`, the
            matrices in the order of `parameter_names`, or with `sketch_dim` their sketches [B, sketch_dim]. NaN for rows whose loss is
            not finite, and 0 for rows without a label.

        Raises:
            TypeError, ValueError: for a batch without labels, or logits that do not fit them; if it stays open which
                entries have rows, or whether labels are shifted; for a model whose own loss is a different one.
        """
        self._processes = Processes(self._model)  # models may be sharded after the selector was made
        if any(map(is_flat, self._model.modules())) != self._is_flat:
            raise ValueError(
                "model must be wrapped by FullyShardedDataParallel before the selector is made, which has to call it as it is wrapped, got "
                "a model that was wrapped afterwards"
            )
        parts = list(batch if isinstance(batch, (list, tuple)) else self._cut(batch))
        seed = seed_of_call(self._seed, self.steps) if self._resample else self._seed
        options = {
            "seed": seed,
            "eps": self._eps,
            "n_perturbations": self._count,
            "parameter": self.parameter_names,
        }
        if not self._processes.agree((len(parts), options)):
            raise ValueError(
                "processes that share a model must take gradients together, of as many parts of a batch and with the same options and number "
                f"of steps before, got on this one {len(parts)} parts and {options}"
            )
        found: list[Any] = []
        with self._evaluation():
            for part in parts:
                _labels(part)
                if self.shift_labels is None:
                    with torch.no_grad():
                        found_out = shifts_labels(
                            self._model, self._inputs(part, labelled=True), self._processes.any
                        )
                    # Where one process does not know yet, none does, so that all of them make the same passes.
                    self.shift_labels = found_out if self._processes.all(found_out is not None) else None
                found.append(self._of_part(dict(part), seed))
        if not found:
            raise ValueError("batch must have at least one part, got an empty list")
        self.steps += 1
        if self._exact is None:
            return LowRankGradients(torch.cat(found), seed, self.numel)
        return joined(found) if self._sketch_dim is None else torch.cat(found)

    def _cut(self, batch: Any) -> Iterator[dict[str, Any]]:
        """The parts of a batch that run at a time."""
        rows = len(_labels(batch))
        step = rows if self._batch_size is None else self._batch_size
        if step >= rows:
            yield dict(batch)
            return
        has_rows = self._has_rows(batch, step)
        for first in range(0, rows, step):
            yield cut(batch, has_rows, slice(first, first + step))

    def _of_part(self, part: dict[str, Any], seed: int) -> Tensor | OuterProductGradients:
        if self._exact is None:
            return self._coefficients(part, seed) if self._is_checked else self._checked(part, seed)
        exact = self._exact(
            self._inputs(part), part["labels"], self.shift_labels is not False, self._processes
        )
        return exact if self._sketch_dim is None else exact.sketch(self._sketch_dim, seed=seed)

    def select(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]], groups: Any = None) -> Coreset:
        """The rows of `batch` to train on, by `method`.

        Args:
            batch: as for `gradients`.
            groups: [B] labels, such as the data sources, integers or strings, or None.

        Returns:
            What the method's `select` returns: for fc.CoLM a `Coreset` with the rows as `indices` and the sizes of their clusters
            as `weights`.

        Raises:
            TypeError, ValueError: as `gradients` and the method do.
        """
        if self.method is None:
            raise ValueError(
                "method must be given for select, as in BatchSelector(model, fc.CoLM(16)), got None"
            )
        if getattr(self.method, "method", None) == "random":
            rows = sum(
                len(_labels(part)) for part in (batch if isinstance(batch, (list, tuple)) else [batch])
            )
            drawn: Coreset = self.method.draw(rows, groups, device=self.parameter.device)
            return drawn
        chosen: Coreset = self.method.select(self.gradients(batch), groups)
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here: the number of steps and the method's state."""
        state: dict[str, Any] = {"steps": self.steps}
        if hasattr(self.method, "state_dict"):
            state["method"] = self.method.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict` of a selector with the same arguments.

        Raises:
            ValueError: for anything but such a dict.
        """
        keys = self.state_dict().keys()
        if not isinstance(state, Mapping) or state.keys() != keys:
            got = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state must have the entries {', '.join(keys)}, got {got}")
        steps = as_int64(state["steps"], "steps")
        if steps < 0:
            raise ValueError(f"steps must be >= 0, got {steps}")
        if "method" in state:
            self.method.load_state_dict(state["method"])
        self.steps = steps

    def _checked(self, batch: dict[str, Any], seed: int) -> Tensor:
        """Coefficients by shortened passes if these agree with whole passes, else by whole passes from now on."""
        short = self._coefficients(batch, seed)
        if not self._before:
            return short
        whole = self._coefficients(batch, seed, ())
        exact = whole.nan_to_num(0)
        largest = float(exact.abs().max())
        if self._processes.all(float((short.nan_to_num(0) - exact).abs().max()) <= _NEAR * largest):
            self._is_checked = self._processes.all(largest > 0)
            return short
        self._is_checked, self._before = True, []
        warn_caller(
            f"all of {type(self._model).__name__} runs in each pass of the selection: its layers before {self.layer_name} do "
            "more than compute the input of that layer",
            SlowPathWarning,
        )
        return whole

    def _has_rows(self, batch: Mapping[str, Any], step: int) -> dict[str, bool]:
        known = {**self._found_rows, **known_rows(self._model, batch, self._batch_keys)}
        if self._processes.are_several and (unknown := sorted(batch.keys() - known.keys())):
            raise ValueError(
                f"whether the batch's {', '.join(map(repr, unknown))} have a row for each sample is found by passes that processes sharing a "
                "model would have to make together; name all entries that have with batch_keys=, or run all rows at once with batch_size=None"
            )
        with torch.no_grad():
            found = find_rows(self._model, batch, known, step, lambda part: self._model(**self._inputs(part)))
        self._found_rows |= {name: found[name] for name in found.keys() - known.keys()}
        return found

    def _inputs(self, batch: Mapping[str, Any], labelled: bool = False) -> dict[str, Any]:
        """The inputs that the model is called with: labels only if it makes its decoder's input from them, or if `labelled`."""
        config = getattr(self._model, "config", None)
        inputs = dict(batch)
        if not labelled and not getattr(config, "is_encoder_decoder", False):
            del inputs["labels"]
        if "use_cache" not in inputs and hasattr(config, "use_cache"):
            inputs["use_cache"] = False
        return inputs

    def _coefficients(
        self, batch: dict[str, Any], seed: int, before: Sequence[nn.Module] | None = None
    ) -> Tensor:
        """Coefficients by passes that leave out the layers `before`, by default all layers before the parameter's."""
        labels, inputs = batch["labels"], self._inputs(batch)
        shifted = self.shift_labels is not False
        bad = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)

        with contextlib.ExitStack() as stack:
            run = stack.enter_context(_repeated(self._model, self._before if before is None else before))
            whole, write = stack.enter_context(whole_parameters(self._model, self.parameter_names))

            def losses() -> Tensor:
                nonlocal bad
                write()
                values = sample_losses(run(inputs), labels, shifted)
                unusable = ~torch.isfinite(values)
                bad = bad | unusable
                return values.masked_fill(unusable, 0)

            g = zeroth_order_gradients(
                losses, self._parts(whole), eps=self._eps, seed=seed, n_perturbations=self._count
            )
        return g.coefficients.masked_fill(bad[:, None], torch.nan)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Puts the model into eval mode; at the end restores every module's own mode and the random state."""
        modes = [(module, module.training) for module in self._model.modules()]
        device = self.parameter.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self._model.eval()
                yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _repeated(model: nn.Module, before: Sequence[nn.Module]) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A function that calls the model on one batch: in full the first time, and then without the layers `before`.

    Later calls go through the model's own forward, whatever it does around its layers; the layers that are skipped
    return what the last of them returned the first time. A decoder that runs that last layer more than once is called in full
    every time.
    """
    outputs: list[Any] = []
    replaced: list[nn.Module] = []
    own = [module.__dict__.get("forward") for module in before]

    def copied(output: Any) -> Any:
        """A copy, because the next layer may write into its input; None for what is neither a tensor nor a tuple that begins with one."""
        if isinstance(output, Tensor):
            return output.clone()
        return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else None

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(copied(output))

    def skip(*_: Any, **__: Any) -> Any:
        return copied(outputs[0])

    def call(batch: dict[str, Any]) -> Any:
        if not before or replaced:
            return model(**batch)
        outputs.clear()
        handle = before[-1].register_forward_hook(keep)
        try:
            result = model(**batch)
        finally:
            handle.remove()
        if len(outputs) == 1 and outputs[0] is not None:
            for module in before:
                replaced.append(module)
                module.forward = skip
        return result

    try:
        yield call
    finally:
        for module, forward in zip(before, own, strict=True):
            if module in replaced:
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


View = Callable[[Tensor], Tensor]


def _parameters(model: nn.Module, parameter: Any, matrices: Any) -> list[tuple[str, View | None]]:
    """The names of the parameters and, for those of which a part is wanted, the functions that take it."""
    if isinstance(matrices, str):
        matrices = [matrices]
    chosen = list(matrices) if isinstance(matrices, Iterable) else []
    if not chosen or any(which not in _MATRICES for which in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"matrices must be one or several of {', '.join(_MATRICES)}, each once, got {matrices!r}"
        )
    if parameter is None:
        return [_projection(model, which) for which in chosen]
    names = [parameter] if isinstance(parameter, str) else parameter
    if isinstance(names, Tensor) or not isinstance(names, Iterable):
        raise TypeError(f"parameter must be a str, several, or None, got {type(parameter).__name__}")
    found: list[tuple[str, View | None]] = []
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"parameter must be a str, several, or None, got {type(name).__name__} among them"
            )
        found.append((_named(model, name), None))
    if not found or len({name for name, _ in found}) < len(found):
        raise ValueError(f"parameter must name one parameter or several, each once, got {parameter!r}")
    return found


def _projection(model: nn.Module, which: str) -> tuple[str, View | None]:
    """The name of a projection of the last layer's attention and, for a fused one, the function that takes the wanted part of it."""
    values, _ = _value_projection(model)
    if which == "v":
        name, module = values, model.get_submodule(values)
    elif which == "o":
        name, module = _beside(model, values, _OUTPUTS, which)
    elif _last(values) in _FUSED and _last(values) != "kv_b_proj":
        name, module = values, model.get_submodule(values)
    elif _last(values) == "kv_b_proj":
        wanted = (values,) if which == "k" else _beside(model, values, ("q_b_proj", "q_proj"), which)[:1]
        name, module = wanted[0], model.get_submodule(wanted[0])
    else:
        style = _SEPARATE["v"].index(_last(values))
        name, module = _beside(model, values, _SEPARATE[which][style : style + 1], which)
    return _weight_of(model, name, module, which)


def _beside(model: nn.Module, values: str, names: Sequence[str], which: str) -> tuple[str, nn.Module]:
    """The projection of one of these names that is nearest to the V-projection, in its attention."""
    path = values.split(".")
    for depth in (1, 2):
        around = ".".join(path[:-depth])
        if path[-depth - 1 :][0].isdigit() and depth > 1:
            break  # the layer itself, beyond its attention
        for part, module in model.get_submodule(around).named_modules():
            if _last(part) in names and _weight(module) is not None:
                return f"{around}.{part}", module
    raise ValueError(
        f"matrices: no projection named {', '.join(names)} was found beside {values} for {which!r}; name it with parameter="
    )


def _value_projection(model: nn.Module) -> tuple[str, nn.Module]:
    """The name of the last layer's projection to values, fused or not, and the module."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    names = (*_SEPARATE["v"], *_FUSED)
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, layers in lists:
        if name.startswith(inside):
            continue  # a list within the layers of a list that was searched already
        for i in reversed(range(len(layers))):
            own = [
                (part, m)
                for part, m in layers[i].named_modules()
                if _last(part) in names and _weight(m) is not None
            ]
            if own:
                found.append((f"{name}.{i}.{own[0][0]}", own[0][1]))
                inside = (*inside, f"{name}.")
                break
    if not found:
        lengths = ", ".join(
            f"{name} ({len(layers)} of {type(layers[0]).__name__})" for name, layers in lists if len(layers)
        )
        raise ValueError(
            f"model must have decoder layers in an nn.ModuleList, with a V-projection named {', '.join(_SEPARATE['v'])} or a fused "
            f"one named {', '.join(_FUSED)}; {type(model).__name__} has "
            + (f"the lists {lengths}" if lengths else "no nn.ModuleList")
            + "; name the parameter with parameter="
        )
    language = [pair for pair in found if not any(word in pair[0] for word in _SENSES)]
    return (language or found)[-1]


def _weight_of(model: nn.Module, name: str, module: nn.Module, which: str) -> tuple[str, View | None]:
    weight = _weight(module)
    assert weight is not None
    owner, tensor = weight
    full = f"{name}.{owner}weight"
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"the projection {full} must be floating, got {tensor.dtype} (quantised?); give it a LoRA adapter, or "
            "name the parameter with parameter="
        )
    kind = _last(name)
    if kind not in _FUSED or which == "o":
        return full, None
    config = _config(model, name)
    layouts = _FUSED[kind]
    layout = layouts.get(getattr(config, "model_type", None) or "")
    if layout is None:
        raise ValueError(
            f"the layout of the fused projection {full} is known for the model_type {', '.join(layouts)}, got "
            f"{getattr(config, 'model_type', None)!r}; name the parameter with parameter="
        )
    known = layout
    # transformers' Conv1D is [in, out]; the matrix B of an adapter is always [out, r].
    if not owner.startswith("lora") and type(_base(module)).__name__ == "Conv1D":
        return full, lambda tensor: known(tensor.T, config, which)
    return full, lambda tensor: known(tensor, config, which)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _base(module: nn.Module) -> nn.Module:
    """The module that an adapter is wrapped around."""
    inner = getattr(module, "base_layer", module)
    return inner if inner is module else _base(inner)


def _weight(module: nn.Module) -> tuple[str, Tensor] | None:
    """The place in a projection and the matrix itself: that of an active LoRA adapter, or the projection's own."""
    adapters = getattr(module, "lora_B", None)
    if isinstance(adapters, nn.ModuleDict) and not getattr(module, "disable_adapters", False):
        for adapter in getattr(module, "active_adapters", ()):
            if adapter in adapters:
                matrix = adapters[adapter].get_parameter("weight")
                return f"lora_B.{adapter}.", matrix
    base = _base(module)
    weight = getattr(base, "weight", None)
    # FSDP1 shows its part of a matrix as a vector.
    if not isinstance(weight, Tensor) or (weight.dim() != 2 and not is_linear(base)):
        return None
    return "" if _base(module) is module else "base_layer.", weight


def _config(model: nn.Module, name: str) -> Any:
    """The configuration of the innermost module around `name` that has one."""
    while True:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None or not name:
            return config


def _named(model: nn.Module, name: str) -> str:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name not in parameters:
        near = [other for other in parameters if _last(other) == _last(name)] or list(parameters)
        raise ValueError(
            f"parameter must be the name of a parameter of {type(model).__name__}, such as {near[-1] if near else 'none'}, "
            f"got {name!r}"
        )
    if parameters[name].dtype not in FLOATING:
        raise TypeError(f"parameter must be floating, got {parameters[name].dtype} of {name}")
    return name


def _layer_of(model: nn.Module, parameter: str) -> tuple[str, list[nn.Module]]:
    """The layer that has the parameter, and those before it in its list; without such a list the model, and no layers."""
    path = parameter.split(".")
    for depth in range(1, len(path)):
        layers = model.get_submodule(".".join(path[:depth]))
        if isinstance(layers, nn.ModuleList):
            place = int(path[depth])
            return ".".join(path[: depth + 1]), [layers[i] for i in range(place)]
    return "", []


def _labels(batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of names to tensors, got {type(batch).__name__}")
    if "labels" not in batch:
        raise ValueError(f"batch must have the entry labels, got {', '.join(map(str, batch)) or 'none'}")
    labels = batch["labels"]
    if (
        not isinstance(labels, Tensor)
        or labels.dtype is torch.bool
        or labels.is_floating_point()
        or labels.is_complex()
    ):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"batch['labels'] must be an integer tensor, got {got}")
    if labels.dim() not in (1, 2) or not len(labels) or (labels.dim() == 2 and labels.shape[1] < 2):
        raise ValueError(
            f"batch['labels'] must have shape [B, T] with T >= 2, or [B], got {tuple(labels.shape)}"
        )
    return labels


def _names(keys: Any) -> frozenset[str]:
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise TypeError(f"batch_keys must be several names or None, got {keys!r}")
    names = list(keys)
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"batch_keys[{i}] must be a str, got {type(name).__name__}")
    return frozenset(names)


def _at_least_one(value: Any, name: str) -> int:
    number = as_integer(value, name)
    if number < 1:
        raise ValueError(f"{name} must be >= 1, got {number}")
    return number
