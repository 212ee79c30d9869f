"""CoLM inside transformers' Trainer and its subclasses: each step draws a large batch and trains on its coreset."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_integer, one_of
from flashcoreset.gradients.outer_products import OuterProductGradients, joined
from flashcoreset.gradients.zeroth_order import LowRankGradients
from flashcoreset.integrations.torch import BatchSelector, sample_losses
from flashcoreset.matching import matching_error
from flashcoreset.methods.colm import CoLM, as_label, in_order, usable_rows

try:
    from accelerate.utils import gather_object
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        f"CoLMMixin and CoLMTrainer need transformers and accelerate ({error}); install them with pip install 'flashcoreset[transformers]'"
    ) from error

STATE_NAME = "coreset_selection.pt"
_WEIGHTS = "coreset_weights"
_WEIGHTINGS = ("mean", "cluster")
_SELECTIONS = ("colm", "random")
_SHOWN = 20  # the most sources in a message


@dataclass(frozen=True)
class CoLMConfig:
    """How `CoLMTrainer` selects. The coreset's size is per_device_train_batch_size, times the processes.

    Args:
        large_batch_size: the number of rows that are drawn, on each device, for a coreset of per_device_train_batch_size rows.
        source: the data set's column that holds a row's source, a string or an integer. None: there is one source.
        keep_sources: the sources of which every row is kept. Names of the classes of a `ClassLabel` column are taken too. A source
            that the data does not have is an error if the data's sources are known beforehand (a list of rows, a column of a
            `datasets.Dataset`), else a warning reports it at the end of the first epoch, or of the run, or after 100 batches.
        selection: "colm", or "random": random rows under the same quotas, the control, for which the model does not run.
        method, normalize, rule, top, betas, adam_eps, metric: `method` ("medoid" or "omp"), `normalize`, `rule`, `top`, `betas`, `eps` and
            `metric` of `fc.CoLM`.
        weighting: "mean": the loss of the coreset as the model computes it, like CoLM's published code. "cluster": each row's own
            loss times its weight (the size of its cluster, or for "omp" the weight of its gradient), summed and divided by the number of
            rows for which the weights stand. None: "cluster" for method "omp", else "mean".
        gradients, matrices, sketch_dim, parameter, eps, n_perturbations, resample, seed, shift_labels: those of
            `fc.integrations.torch.BatchSelector`; `seed` is that of `fc.CoLM` too.
        forward_batch_size: the number of rows that run at a time in the selection; None: per_device_train_batch_size, which takes less
            memory than the training step. Each part is collated by itself, so that a collator may return anything.
        log_matching_error: whether the logs have "matching_error": the mean since the last log of `fc.matching_error` of the
            coresets, by the gradients of the selection. With selection "random" these are then computed too.

    Raises:
        TypeError, ValueError: for a value of a wrong type or out of range; the errors of CoLM and BatchSelector come when the trainer
            is made.

    Example:
        >>> from flashcoreset.integrations.transformers import CoLMConfig
        >>> CoLMConfig(large_batch_size=128, keep_sources=("rare",), gradients="backprop", method="omp").has_weights
        True
    """

    large_batch_size: int
    source: str | None = "source"
    keep_sources: tuple[str | int, ...] = ()
    selection: str = "colm"
    method: str = "medoid"
    normalize: bool = True
    rule: str = "proportional"
    top: int | None = 2560
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    metric: str = "l1"
    weighting: str | None = None
    gradients: str = "zeroth_order"
    matrices: tuple[str, ...] = ("v",)
    sketch_dim: int | None = None
    parameter: str | tuple[str, ...] | None = None
    eps: float = 1e-3
    n_perturbations: int = 1
    resample: bool = False
    seed: int = 0
    forward_batch_size: int | None = None
    shift_labels: bool | None = None
    log_matching_error: bool = False

    def __post_init__(self) -> None:
        if as_integer(self.large_batch_size, "large_batch_size") < 1:
            raise ValueError(f"large_batch_size must be >= 1, got {self.large_batch_size}")
        if self.source is not None and not isinstance(self.source, str):
            raise TypeError(f"source must be a str or None, got {type(self.source).__name__}")
        if isinstance(self.keep_sources, (str, bytes)) or not isinstance(self.keep_sources, Iterable):
            raise TypeError(f"keep_sources must be several sources, got {self.keep_sources!r}")
        object.__setattr__(self, "keep_sources", tuple(self.keep_sources))
        if self.keep_sources and self.source is None:
            raise ValueError(f"source must be given with keep_sources={self.keep_sources}, got None")
        one_of(self.selection, "selection", _SELECTIONS)
        one_of(self.method, "method", ("medoid", "omp"))
        if self.weighting is not None:
            one_of(self.weighting, "weighting", _WEIGHTINGS)
        if not isinstance(self.log_matching_error, bool):
            raise TypeError(f"log_matching_error must be a bool, got {self.log_matching_error!r}")

    @property
    def has_weights(self) -> bool:
        """Whether the losses of a coreset's rows are weighted."""
        if self.weighting is None:
            return self.method == "omp" and self.selection == "colm"
        return self.weighting == "cluster"


class CoLMMixin(Trainer):
    """Makes any subclass of transformers' Trainer train on coresets of large batches: `class CoLMSFTTrainer(CoLMMixin, SFTTrainer)`, the
    bases in either order.

    For each batch that Trainer would train on, `large_batch_size` rows are drawn. Their gradients are taken by
    `fc.integrations.torch.BatchSelector`, `fc.CoLM` chooses among the rows of all processes, each process takes an equal share of
    the coreset (rows travel between processes before they are collated), and from there on the trainer works as usual.
    Evaluation is the trainer's own. If the last large batch of an epoch is no larger than the coreset, all of it is taken.

    The logs have `selection_time`, seconds per optimizer step, `selection_share`, the share of the time from
    drawing a step's data to its end, `chosen/SOURCE`, rows of each source per coreset, and, if asked, `matching_error`. The
    selection's state is saved beside the optimizer's in checkpoints, and a resumed run goes on as if there had been no interruption;
    from a checkpoint of a trainer without CoLM it begins with an empty history, and a warning says so.

    Args:
        colm: a `CoLMConfig`.
        selection: takes the place of the config's `selection`.
        args, kwargs: those of the trainer. The data collator is called with parts of the large batch's rows, and again with those of
            the coreset, so it should not be random.

    Attributes:
        last_coreset: the last `fc.Coreset`, its indices being positions in the large batches of all processes, one after the
            other; None before the first.

    Raises:
        TypeError, ValueError: as CoLM and BatchSelector do; for a large batch that is smaller than the coreset, a
            data set without the source's column, and for options that do not go together: FSDP1, packing and
            padding_free, auto_find_batch_size, train_sampling_strategy="batch_rebalance", and weighted losses with a loss of
            one's own, label smoothing or output_router_logits.

    Source: Nguyen et al., "Mini-batch coresets for memory-efficient language model training on data mixtures" (CoLM),
    ICLR 2025.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> from flashcoreset.integrations.transformers import CoLMMixin
        >>> class CoLMSeq2SeqTrainer(CoLMMixin, Seq2SeqTrainer):
        ...     pass
    """

    # Trainer's own attribute, which _loading_rows exchanges.
    data_collator: Any
    _train_batch_size: int
    _signature_columns: Any

    def __init_subclass__(cls, **options: Any) -> None:
        """If another trainer stands before this one among the bases, what it does not know goes past it."""
        super().__init_subclass__(**options)
        before = cls.__mro__[1 : cls.__mro__.index(CoLMMixin)]
        if any("__init__" in vars(base) for base in before) and "__init__" not in vars(cls):

            def init(self: Any, *args: Any, colm: Any = None, selection: Any = None, **kwargs: Any) -> None:
                if colm is not None:
                    self._given = colm, selection
                super(cls, self).__init__(*args, **kwargs)

            cls.__init__ = init  # type: ignore[method-assign]
        if any("compute_loss" in vars(base) for base in before) and "compute_loss" not in vars(cls):

            def loss_of(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                weighted = isinstance(inputs, Mapping) and _WEIGHTS in inputs
                compute = CoLMMixin.compute_loss if weighted else super(cls, type(self)).compute_loss
                return compute(self, model, inputs, *args, **kwargs)

            cls.compute_loss = loss_of  # type: ignore[method-assign]

    def __init__(self, *args: Any, colm: Any = None, selection: str | None = None, **kwargs: Any) -> None:
        if colm is None:
            colm, selection = getattr(self, "_given", (None, None))
        if not isinstance(colm, CoLMConfig):
            raise TypeError(f"colm must be a CoLMConfig, got {type(colm).__name__}")
        if selection is not None:
            colm = replace(colm, selection=selection)
        super().__init__(*args, **kwargs)
        self.colm = colm
        self._is_loading = False
        self._refuse()
        self.last_coreset: Coreset | None = None
        self._start_clock()
        self._selector = self._new_selector()
        if colm.has_weights:
            self.model_accepts_loss_kwargs = (
                False  # the loss is a mean over rows, which does not count tokens
            )

    def _refuse(self) -> None:
        """Raises errors for options that do not go together."""
        arguments = self.args
        if arguments.train_batch_size >= self._large_batch_size:
            raise ValueError(
                "large_batch_size must be above per_device_train_batch_size, the coreset's size, got "
                f"{self.colm.large_batch_size} and {arguments.per_device_train_batch_size}"
            )
        for name in ("packing", "padding_free"):
            if getattr(arguments, name, False) or getattr(self, name, False):
                raise ValueError(
                    f"{name} must be False: it puts samples one after the other in a row, and a coreset is one of whole rows, got True"
                )
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise ValueError(
                "fsdp_config must have version 2: CoLM takes its rows from models that fully_shard has sharded, got FSDP1"
            )
        if arguments.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size must be False: it would change the coreset's size, got True"
            )
        if getattr(arguments, "train_sampling_strategy", "") == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy must not be 'batch_rebalance', which makes batches of its own"
            )
        if self.colm.has_weights and (self.compute_loss_func or self.label_smoother):
            given = "compute_loss_func" if self.compute_loss_func else "label_smoothing_factor"
            raise ValueError(f"weighting must be 'mean' with {given}, got 'cluster'")
        config = getattr(self.model, "config", None)
        if self.colm.has_weights and getattr(config, "output_router_logits", False):
            raise ValueError(
                "weighting must be 'mean' with output_router_logits, a loss of the model's own, got 'cluster'"
            )
        columns = getattr(self.train_dataset, "column_names", None)
        if self.colm.source is not None and columns is not None and self.colm.source not in columns:
            row = _first_row(self.train_dataset)  # a transform may add the column
            if row is not None and self.colm.source not in row:
                raise ValueError(_no_source(self.colm.source, columns))

    @property
    def _large_batch_size(self) -> int:
        return int(self.colm.large_batch_size * max(1, self.args.n_gpu))

    def _new_selector(self) -> BatchSelector:
        colm, arguments = self.colm, self.args
        self._classes = _class_labels(self.train_dataset, colm.source)
        method = _CoLMOfSources(
            arguments.train_batch_size * arguments.world_size,
            top=colm.top,
            betas=colm.betas,
            eps=colm.adam_eps,
            keep_groups=self._kept_sources(),
            rule=colm.rule,
            metric=colm.metric,
            method="random" if colm.selection == "random" else colm.method,
            normalize=colm.normalize,
            seed=colm.seed,
        )
        return BatchSelector(
            self.model,
            method,
            gradients=colm.gradients,
            parameter=colm.parameter,
            matrices=colm.matrices,
            sketch_dim=colm.sketch_dim,
            eps=colm.eps,
            seed=colm.seed,
            n_perturbations=colm.n_perturbations,
            resample=colm.resample,
            shift_labels=colm.shift_labels,
        )

    def _kept_sources(self) -> list[Any]:
        """The names of keep_sources, which the data must have if its sources are known."""
        kept = [
            self._source_name(source, f"keep_sources[{i}]") for i, source in enumerate(self.colm.keep_sources)
        ]
        known = _known_sources(self.train_dataset, self.colm.source) if kept else None
        if known is None:
            return kept
        present = {self._source_name(source, self.colm.source or "") for source in known}
        for i, (source, name) in enumerate(zip(self.colm.keep_sources, kept, strict=True)):
            if name not in present:
                raise ValueError(
                    f"keep_sources[{i}] must be a source of the training data, which has {_listed(known)} in the column "
                    f"{self.colm.source!r}, got {source!r}"
                )
        return kept

    def _source_name(self, source: Any, name: str) -> Any:
        """A source as it is called in results: by the name of its class if the column has classes."""
        source = as_label(source, name)
        classes = self._classes
        if classes is None:
            return source
        is_class = source in classes.names if isinstance(source, str) else 0 <= source < len(classes.names)
        if not is_class:
            raise ValueError(
                f"{name} must be a class of the column {self.colm.source!r}, {_listed(classes.names)}, got {source!r}"
            )
        return source if isinstance(source, str) else classes.int2str(source)

    def _start_clock(self) -> None:
        """Starts the clocks of selection and of whole optimizer steps, in seconds since the last log."""
        self._seconds = [0.0, 0.0]
        self._steps_timed = 0
        self._step_start: float | None = None
        self._chosen: Counter[Any] = Counter()  # rows of each source since the last log
        self._coresets = 0
        self._errors: list[float] = []

    # ---- What Trainer calls

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # A run starts without a history; resuming loads it later. The model may be a different one than before.
        self._selector = self._new_selector()
        self._start_clock()
        output = super()._inner_training_loop(*args, **kwargs)
        self._selector.method.warn_of_unseen("the run")
        return output

    def get_train_dataloader(self) -> Any:
        """Large batches of rows that are not collated yet."""
        if self.train_dataset is None:
            return super().get_train_dataloader()  # which raises the error
        with self._loading_rows():
            return super().get_train_dataloader()

    @contextmanager
    def _loading_rows(self) -> Iterator[None]:
        """Makes Trainer's own method of building a data loader build one of large batches of rows, with their sources."""
        self._set_signature_columns_if_needed()
        before = self._train_batch_size, self.data_collator, self._signature_columns
        dispatch = self.accelerator.dataloader_config.dispatch_batches
        try:
            self._train_batch_size, self.data_collator = self._large_batch_size, Rows
            self._is_loading = True
            self._signature_columns = [*self._signature_columns, *filter(None, [self.colm.source])]
            # Dispatching would cut batches of tensors; each process reads an iterable data set for itself.
            self.accelerator.dataloader_config.dispatch_batches = False
            yield
        finally:
            self._train_batch_size, self.data_collator, self._signature_columns = before
            self._is_loading = False
            self.accelerator.dataloader_config.dispatch_batches = dispatch

    def _remove_unused_columns(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # A transform needs the columns that the model does not take; what it makes is sorted out row by row.
        if self._is_loading and _is_transformed(dataset):
            return dataset
        return super()._remove_unused_columns(dataset, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's batches, made of coresets; all coresets of an optimizer step are chosen before it, by the same parameters."""
        self._step_start = time.perf_counter()
        return super().get_batch_samples(map(self._coreset_of, epoch_iterator), *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The trainer's loss, or the weighted mean of a coreset's losses."""
        if not isinstance(inputs, Mapping) or _WEIGHTS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        config = getattr(self.model, "config", None)
        # An encoder-decoder makes its decoder's input from the labels.
        left_out = (_WEIGHTS,) if getattr(config, "is_encoder_decoder", False) else (_WEIGHTS, "labels")
        outputs = model(**{name: value for name, value in inputs.items() if name not in left_out})
        losses = sample_losses(outputs, inputs["labels"], self._selector.shift_labels is not False)
        loss = (losses * inputs[_WEIGHTS].to(losses)).mean()
        return (loss, outputs) if return_outputs else loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        # The end of an optimizer step; evaluations and checkpoints come after it.
        if self._step_start is not None:
            self._seconds[1] += time.perf_counter() - self._step_start
            self._steps_timed += 1
            self._step_start = None
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log, with the time that selection took."""
        selection, whole = self._seconds
        if "loss" in logs and self._steps_timed:
            logs["selection_time"] = selection / self._steps_timed
            logs["selection_share"] = selection / whole
            for source in in_order(self._chosen):
                logs[f"chosen/{source}"] = self._chosen[source] / self._coresets
            if self._errors:
                logs["matching_error"] = sum(self._errors) / len(self._errors)
            self._start_clock()
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self._selector.state_dict(), os.path.join(output_dir, STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = os.path.join(checkpoint, STATE_NAME)
            if not os.path.isfile(path):
                warnings.warn(
                    f"{checkpoint} has no {STATE_NAME}, as checkpoints of trainers without CoLM: selection begins with an empty history",
                    stacklevel=2,
                )
                return
            # What one process selects by stays on its device.
            device = self._selector.parameter.device if self.args.world_size == 1 else torch.device("cpu")
            state = torch.load(
                path, map_location="cpu" if device.type == "cpu" else device, weights_only=True
            )
            self._selector.load_state_dict(state)

    # ---- A large batch becomes a coreset

    def _coreset_of(self, rows: Rows) -> dict[str, Any]:
        """The training step's inputs for a large batch: this process's share of the coreset, collated."""
        start = time.perf_counter()
        sources, features = self._split(rows.rows)
        method = self._selector.method
        g = None
        if method.method != "random" or self.colm.log_matching_error:
            g = self._gradients(features)
        # Gathered from every process, so that all processes choose the same coreset.
        parts = _gathered((_on_cpu(g) if self.args.world_size > 1 else g, sources, len(features)))
        counts = [part[2] for part in parts]
        groups = None if sources is None else [source for part in parts for source in part[1]]
        every = None if g is None else _together([part[0] for part in parts])
        if self.state.epoch is not None and self.state.epoch >= 1:
            method.warn_of_unseen("the first epoch")
        if sum(counts) <= method.k:
            coreset = method.take_all(sum(counts), groups)
        elif method.method == "random":
            coreset = method.draw(sum(counts), groups)
        else:
            coreset = method.select(every, groups)
            coreset = replace(coreset, indices=coreset.indices.cpu(), weights=coreset.weights.cpu())
        self.last_coreset = coreset
        self._note(coreset, every)
        share, weights = self._share(features, coreset, counts)
        inputs: dict[str, Any] = self._prepare_inputs(self.data_collator(share))
        if self.colm.has_weights:
            inputs = {**inputs, _WEIGHTS: weights}
        self._seconds[0] += time.perf_counter() - start
        return inputs

    def _note(self, coreset: Coreset, g: Any) -> None:
        """Keeps what the next log tells of a coreset."""
        self._coresets += 1
        if self.colm.source is not None:
            self._chosen.update(coreset.info["counts"])
        if not self.colm.log_matching_error:
            return
        # Rows without a usable gradient have no part in the batch's gradient.
        usable = usable_rows(g).cpu()
        place = usable.long().cumsum(0) - 1
        own = usable[coreset.indices]
        if bool(own.any()):
            weights, total = None, None
            if self.colm.has_weights:
                weights, total = coreset.weights[own], float(coreset.info["represented"])
            chosen = place[coreset.indices[own]]
            self._errors.append(matching_error(_rows_of(g, usable), chosen, weights, total=total))

    def _split(self, rows: list[Any]) -> tuple[list[Any] | None, list[Any]]:
        """The rows' sources, and the rows without them."""
        column = self.colm.source
        wanted = None
        if self.args.remove_unused_columns and _is_transformed(self.train_dataset):
            self._set_signature_columns_if_needed()
            wanted = {*self._signature_columns, column}
        sources, features = [], []
        for i, row in enumerate(rows):
            if wanted is not None and isinstance(row, Mapping):
                row = {name: value for name, value in row.items() if name in wanted}
            if column is None:
                features.append(row)
                continue
            if not isinstance(row, Mapping) or column not in row:
                raise ValueError(
                    _no_source(column, row if isinstance(row, Mapping) else [type(row).__name__])
                )
            sources.append(self._source_name(row[column], f"the {column} of row {i}"))
            features.append({name: value for name, value in row.items() if name != column})
        if column is None:
            return None, features
        self._selector.method.see(sources)
        self._check_kinds(sources)
        return sources, features

    def _check_kinds(self, sources: Iterable[Any]) -> None:
        """Refuses keep_sources of another type than the sources: strings never equal integers, whatever rows are still to come."""
        kept = {isinstance(source, str) for source in self.colm.keep_sources}
        if self._classes is not None or len(kept) != 1:
            return
        present = set(sources)
        if not any(isinstance(source, str) in kept for source in present):
            raise ValueError(
                f"keep_sources must be of the type of the sources, which are {_listed(present)}, got {_listed(self.colm.keep_sources)}"
            )

    def _gradients(self, features: list[Any]) -> LowRankGradients | OuterProductGradients | Tensor:
        step = self.colm.forward_batch_size or self.args.train_batch_size
        parts = []
        for first in range(0, len(features), step):
            own = [_copied(row) for row in features[first : first + step]]  # collators may write into rows
            count = len(own)
            inputs = self._prepare_inputs(self.data_collator(own))
            labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
            if isinstance(labels, Tensor) and labels.dim() and len(labels) != count:
                raise ValueError(
                    f"data_collator must make one row of labels per sample, got {len(labels)} of {count} (does "
                    "it put samples one after the other?)"
                )
            parts.append(inputs)
        with self.compute_loss_context_manager():
            return self._selector.gradients(parts)

    def _share(self, features: list[Any], coreset: Coreset, counts: list[int]) -> tuple[list[Any], Tensor]:
        """This process's rows of the coreset, dealt out in turn, and their weights, whose mean over the coreset is 1."""
        indices, rank, world = coreset.indices.tolist(), self.args.process_index, len(counts)
        if len(indices) < world:
            raise ValueError(
                f"a coreset must have a row for each of the {world} processes, got {len(indices)}: the gradients of all other "
                "rows are zero or not finite"
            )
        first = sum(counts[:rank])
        own = {
            place: features[index - first]
            for place, index in enumerate(indices)
            if first <= index < first + counts[rank]
        }
        chosen: dict[int, Any] = {}
        for part in _gathered(own):
            chosen.update(part)
        # The mean of the losses times these weights, over the processes' means, is the weighted sum over the rows represented.
        weights = coreset.weights[rank::world]
        weights = weights * (len(weights) * world / coreset.info["represented"])
        return [_copied(chosen[place]) for place in range(rank, len(indices), world)], weights


class CoLMTrainer(CoLMMixin):
    """A `transformers.Trainer` whose steps train on coresets of large batches: `CoLMMixin` says how, and with which arguments.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments
        >>> from flashcoreset.integrations.transformers import CoLMConfig, CoLMTrainer
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=2))
        >>> rows = torch.randint(0, 50, (64, 12)).tolist()
        >>> data = [{"input_ids": row, "labels": row, "source": "a" if i % 8 else "b"} for i, row in enumerate(rows)]
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), per_device_train_batch_size=4, max_steps=2, report_to="none",
        ...                               disable_tqdm=True, use_cpu=True)
        >>> colm = CoLMConfig(large_batch_size=16, keep_sources=("b",))
        >>> trainer = CoLMTrainer(model, arguments, train_dataset=data, colm=colm)
        >>> trainer.remove_callback(PrinterCallback)
        >>> trainer.train().global_step, len(trainer.last_coreset.indices)
        (2, 4)
    """


class _CoLMOfSources(CoLM):
    """A CoLM that speaks of sources in its warnings, and of all that have come."""

    def __init__(self, k: int, **options: Any) -> None:
        super().__init__(k, **options)
        self._present: set[Any] = set()
        self._has_warned = False

    def see(self, sources: Iterable[Any]) -> None:
        if len(self._present) <= _SHOWN:
            self._present.update(sources)

    def _warn(self, present: list[Any]) -> None:
        self.warn_of_unseen(f"{self._batches} batches")

    def warn_of_unseen(self, where: str) -> None:
        """Warns of unseen sources, once, and only if any rows have come."""
        if not self._unseen or self._has_warned or not self._batches:
            return
        self._has_warned = True
        warnings.warn(
            f"keep_sources keeps nothing by {_listed(self._unseen)}: no row of {where} has that source, but "
            f"{_listed(self._present)}",
            stacklevel=2,
        )


class Rows:
    """The rows of a batch, not collated: an object that data loaders pass on as it is."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows


def _gathered(value: Any) -> list[Any]:
    """The values of all processes."""
    found: list[Any] = gather_object([value])
    return found


def _copied(row: Any) -> Any:
    return dict(row) if isinstance(row, Mapping) else row


def _on_cpu(g: Any) -> Any:
    if isinstance(g, LowRankGradients):
        return replace(g, coefficients=g.coefficients.cpu())
    if isinstance(g, OuterProductGradients):
        return OuterProductGradients(tuple((a.cpu(), b.cpu()) for a, b in g.factors))
    return None if g is None else g.cpu()


def _together(parts: list[Any]) -> Any:
    """The gradients of all processes' rows."""
    first = parts[0]
    if isinstance(first, LowRankGradients):
        return replace(first, coefficients=torch.cat([part.coefficients for part in parts]))
    return joined(parts) if isinstance(first, OuterProductGradients) else torch.cat(parts)


def _rows_of(g: Any, mask: Tensor) -> Any:
    """The gradients of some rows."""
    if isinstance(g, LowRankGradients):
        return replace(g, coefficients=g.coefficients[mask.to(g.coefficients.device)])
    mask = mask.to(g.device)
    return g.take(mask) if isinstance(g, OuterProductGradients) else g[mask]


def _is_transformed(data: Any) -> bool:
    """Whether a `datasets.Dataset` makes its rows by a transform of the user's (`with_transform`, `set_transform`)."""
    form = getattr(data, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"


def _class_labels(data: Any, column: str | None) -> Any:
    """The `ClassLabel` with the names of a column's integers, if the data set has one."""
    features = getattr(data, "features", None)
    feature = features.get(column) if isinstance(features, Mapping) else None
    return feature if callable(getattr(feature, "str2int", None)) else None


def _known_sources(data: Any, column: str | None) -> list[Any] | None:
    """The sources of all rows, if they are known without making the rows."""
    if isinstance(data, (list, tuple)):
        found = [row[column] for row in data if isinstance(row, Mapping) and column in row]
        # Other sources are read row by row later, and values that cannot be a source are errors there.
        is_plain = all(
            isinstance(source, str) or (type(source) is int and -(2**63) <= source < 2**63)
            for source in found
        )
        return list(dict.fromkeys(found)) if found and is_plain else None
    unique = getattr(data, "unique", None)
    if (
        callable(unique)
        and not _is_transformed(data)
        and column in (getattr(data, "column_names", None) or ())
    ):
        classes = _class_labels(data, column)
        found = list(unique(column))
        return found if classes is None else [classes.int2str(label) for label in found]
    return None


def _first_row(data: Any) -> Mapping[str, Any] | None:
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
        return None
    row = data[0]
    return row if isinstance(row, Mapping) else None


def _listed(sources: Iterable[Any]) -> str:
    every = sorted(sources, key=lambda source: (isinstance(source, str), source))
    return ", ".join(map(repr, every[:_SHOWN])) + (", ..." if len(every) > _SHOWN else "")


def _no_source(column: str, columns: Any) -> str:
    return (
        f"the training data must have the column {column!r}, the source of each row (source= names another one, source=None "
        f"takes all rows as one source), got {', '.join(map(str, columns))}"
    )
