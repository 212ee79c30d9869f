"""CoLM inside transformers' Trainer: each step draws a large batch and trains on its coreset."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_int64, as_integer, one_of
from flashcoreset.gradients.zeroth_order import LowRankGradients
from flashcoreset.integrations.torch import BatchSelector, sample_losses
from flashcoreset.methods.colm import CoLM

try:
    from accelerate.utils import gather_object
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        f"CoLMTrainer needs transformers and accelerate ({error}); install them with pip install 'flashcoreset[transformers]'"
    ) from error

STATE_NAME = "coreset_selection.pt"
_WEIGHTS = "coreset_weights"
_WEIGHTINGS = ("mean", "cluster")
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
        rule, top, betas, adam_eps, metric: `rule`, `top`, `betas`, `eps` and `metric` of `fc.CoLM`. `top` is at most the number of
            perturbed parameters; None takes all.
        weighting: "mean": the loss of the coreset as the model computes it, like CoLM's published code. "cluster": the
            mean over the rows of each row's own loss times the size of its cluster.
        parameter, eps, n_perturbations, resample, seed, shift_labels, batch_keys: those of `fc.integrations.torch.BatchSelector`.
        forward_batch_size: the number of rows that run at a time in the selection; None: per_device_train_batch_size, which takes less
            memory than the training step.

    Raises:
        TypeError, ValueError: for a value of a wrong type or out of range; the errors of CoLM and BatchSelector come when the trainer
            is made.

    Example:
        >>> from flashcoreset.integrations.transformers import CoLMConfig
        >>> CoLMConfig(large_batch_size=128, keep_sources=("rare",)).weighting
        'mean'
    """

    large_batch_size: int
    source: str | None = "source"
    keep_sources: tuple[str | int, ...] = ()
    rule: str = "proportional"
    top: int | None = 2560
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    metric: str = "l1"
    weighting: str = "mean"
    parameter: str | None = None
    eps: float = 1e-3
    n_perturbations: int = 1
    resample: bool = False
    seed: int = 0
    forward_batch_size: int | None = None
    shift_labels: bool | None = None
    batch_keys: tuple[str, ...] | None = None

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
        one_of(self.weighting, "weighting", _WEIGHTINGS)


class CoLMTrainer(Trainer):
    """A `transformers.Trainer` whose steps train on coresets of large batches.

    For each batch that Trainer would train on, `large_batch_size` rows are drawn. Their gradients are estimated by
    `fc.integrations.torch.BatchSelector`, `fc.CoLM` chooses among the rows of all processes, each process takes an equal share of
    the coreset (rows travel between processes before they are collated), and from there on Trainer works as usual.
    Evaluation is Trainer's own. If the last large batch of an epoch is no larger than the coreset, all of it is taken.

    The logs have `selection_time`, seconds per optimizer step, and `selection_share`, the share of the time from
    drawing a step's data to its end. The selection's state is saved beside the optimizer's in checkpoints, and a resumed run goes
    on as if there had been no interruption.

    Args:
        colm: a `CoLMConfig`.
        args, kwargs: those of Trainer. The data collator is called with the rows of the large batch, and again with those of the
            coreset, so it should not be random.

    Attributes:
        last_coreset: the last `fc.Coreset`, its indices being positions in the large batches of all processes, one after the
            other; None before the first.

    Raises:
        TypeError, ValueError: as CoLM and BatchSelector do; for a large batch that is smaller than the coreset, a
            data set without the source's column, `top` above the number of perturbed parameters, and for options that do not go
            together: FSDP and DeepSpeed, auto_find_batch_size, train_sampling_strategy="batch_rebalance", and
            weighting="cluster" with a loss of one's own, label smoothing or output_router_logits.

    Source: Nguyen et al., "Mini-batch coresets for memory-efficient language model training on data mixtures" (CoLM),
    ICLR 2025.

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
        >>> colm = CoLMConfig(large_batch_size=16, keep_sources=("b",), top=256)
        >>> trainer = CoLMTrainer(model, arguments, train_dataset=data, colm=colm)
        >>> trainer.remove_callback(PrinterCallback)
        >>> trainer.train().global_step, len(trainer.last_coreset.indices)
        (2, 4)
    """

    # Trainer's own attribute, which _loading_rows exchanges.
    data_collator: Any
    _train_batch_size: int
    _signature_columns: Any

    def __init__(self, *args: Any, colm: CoLMConfig, **kwargs: Any) -> None:
        if not isinstance(colm, CoLMConfig):
            raise TypeError(f"colm must be a CoLMConfig, got {type(colm).__name__}")
        super().__init__(*args, **kwargs)
        self.colm = colm
        self._refuse()
        self.last_coreset: Coreset | None = None
        self._start_clock()
        self._selector = self._new_selector()
        if colm.weighting == "cluster":
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
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "CoLMTrainer moves whole parameters on each process, as DistributedDataParallel has them, got "
                + ("FSDP" if self.is_fsdp_enabled else "DeepSpeed")
            )
        if arguments.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size must be False: it would change the coreset's size, got True"
            )
        if getattr(arguments, "train_sampling_strategy", "") == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy must not be 'batch_rebalance', which makes batches of its own"
            )
        if self.colm.weighting == "cluster" and (self.compute_loss_func or self.label_smoother):
            given = "compute_loss_func" if self.compute_loss_func else "label_smoothing_factor"
            raise ValueError(f"weighting must be 'mean' with {given}, got 'cluster'")
        config = getattr(self.model, "config", None)
        if self.colm.weighting == "cluster" and getattr(config, "output_router_logits", False):
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
        kept = self._kept_labels()
        method = _CoLMOfSources(
            arguments.train_batch_size * arguments.world_size,
            top=colm.top,
            betas=colm.betas,
            eps=colm.adam_eps,
            names=dict(zip(kept, colm.keep_sources, strict=True)),
            keep_groups=kept,
            rule=colm.rule,
            metric=colm.metric,
        )
        selector = BatchSelector(
            self.model,
            method,
            parameter=colm.parameter,
            eps=colm.eps,
            seed=colm.seed,
            n_perturbations=colm.n_perturbations,
            resample=colm.resample,
            batch_size=colm.forward_batch_size or arguments.train_batch_size,
            shift_labels=colm.shift_labels,
            batch_keys=colm.batch_keys,
        )
        if colm.top is not None and colm.top > selector.numel:
            raise ValueError(
                f"top must be <= {selector.numel}, the size of {selector.parameter_name}, or None for all of it, got {colm.top}"
            )
        return selector

    def _kept_labels(self) -> list[int]:
        """The labels of keep_sources, which the data must have if its sources are known."""
        kept = self.colm.keep_sources
        labels = [self._label(source, f"keep_sources[{i}]") for i, source in enumerate(kept)]
        known = _known_sources(self.train_dataset, self.colm.source) if kept else None
        if known is None:
            return labels
        present = {self._label(source, self.colm.source or "") for source in known}
        for i, (source, label) in enumerate(zip(kept, labels, strict=True)):
            if label not in present:
                raise ValueError(
                    f"keep_sources[{i}] must be a source of the training data, which has {_listed(known)} in the column "
                    f"{self.colm.source!r}, got {source!r}"
                )
        return labels

    def _label(self, source: Any, name: str) -> int:
        if self._classes is None or not isinstance(source, str):
            return _label(source, name)
        if source not in self._classes.names:
            raise ValueError(
                f"{name} must be a class of the column {self.colm.source!r}, {_listed(self._classes.names)}, got {source!r}"
            )
        return int(self._classes.str2int(source))

    def _start_clock(self) -> None:
        """Starts the clocks of selection and of whole optimizer steps, in seconds since the last log."""
        self._seconds = [0.0, 0.0]
        self._steps_timed = 0
        self._step_start: float | None = None

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
            self._signature_columns = [*self._signature_columns, *filter(None, [self.colm.source])]
            # Dispatching would cut batches of tensors; each process reads an iterable data set for itself.
            self.accelerator.dataloader_config.dispatch_batches = False
            yield
        finally:
            self._train_batch_size, self.data_collator, self._signature_columns = before
            self.accelerator.dataloader_config.dispatch_batches = dispatch

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's batches, made of coresets; all coresets of an optimizer step are chosen before it, by the same parameters."""
        self._step_start = time.perf_counter()
        return super().get_batch_samples(map(self._coreset_of, epoch_iterator), *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Trainer's loss, or with weighting="cluster" the weighted mean of a coreset's losses."""
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
                raise ValueError(
                    f"resume_from_checkpoint must be a checkpoint of CoLMTrainer with its optimizer, got {checkpoint}, which has no "
                    f"{STATE_NAME}"
                )
            self._selector.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    # ---- A large batch becomes a coreset

    def _coreset_of(self, rows: Rows) -> dict[str, Any]:
        """The training step's inputs for a large batch: this process's share of the coreset, collated."""
        start = time.perf_counter()
        sources, features = self._split(rows.rows)
        g = self._gradients(features)
        # Gathered from every process, on the CPU, so that all processes choose the same coreset.
        parts = _gathered((g.coefficients.cpu(), sources))
        coefficients = torch.cat([part[0] for part in parts])
        groups = None if sources is None else torch.cat([part[1] for part in parts])
        method = self._selector.method
        if self.state.epoch is not None and self.state.epoch >= 1:
            method.warn_of_unseen("the first epoch")
        if len(coefficients) <= method.k:
            if groups is not None:
                method._note(groups.unique().tolist())
            coreset = Coreset(torch.arange(len(coefficients)), torch.ones(len(coefficients)), {})
        else:
            coreset = method.select(LowRankGradients(coefficients, g.seed, g.numel), groups)
        self.last_coreset = coreset
        share, weights = self._share(features, coreset, [len(part[0]) for part in parts])
        inputs: dict[str, Any] = self._prepare_inputs(self.data_collator(share))
        if self.colm.weighting == "cluster":
            inputs = {**inputs, _WEIGHTS: weights}
        self._seconds[0] += time.perf_counter() - start
        return inputs

    def _split(self, rows: list[Any]) -> tuple[Tensor | None, list[Any]]:
        """The labels of the rows' sources, and the rows without them."""
        column = self.colm.source
        if column is None:
            return None, rows
        labels, features = [], []
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping) or column not in row:
                raise ValueError(
                    _no_source(column, row if isinstance(row, Mapping) else [type(row).__name__])
                )
            labels.append(self._label(row[column], f"the {column} of row {i}"))
            self._selector.method.name(row[column], labels[-1])
            features.append({name: value for name, value in row.items() if name != column})
        self._check_kinds(row[column] for row in rows)
        return torch.tensor(labels), features

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

    def _gradients(self, features: list[Any]) -> LowRankGradients:
        # Copies, since collators may write into rows.
        inputs = self._prepare_inputs(self.data_collator([_copied(row) for row in features]))
        with self.compute_loss_context_manager():
            g = self._selector.gradients(inputs)
        if len(g.coefficients) != len(features):
            raise ValueError(
                f"data_collator must make one row of labels per sample, got {len(g.coefficients)} of {len(features)} (does "
                "it put samples one after the other?)"
            )
        return g

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
        weights = coreset.weights / coreset.weights.mean()
        return [_copied(chosen[place]) for place in range(rank, len(indices), world)], weights[rank::world]


class _CoLMOfSources(CoLM):
    """A CoLM that warns of kept sources by their names."""

    def __init__(self, k: int, *, names: Mapping[int, Any], **options: Any) -> None:
        super().__init__(k, **options)
        self._names = dict(names)
        self._present: dict[int, Any] = {}
        self._has_warned = False

    def name(self, source: Any, label: int) -> None:
        if len(self._present) <= _SHOWN:
            self._present[label] = source

    def _warn(self, present: list[Any]) -> None:
        self.warn_of_unseen(f"{self._batches} batches")

    def warn_of_unseen(self, where: str) -> None:
        """Warns of unseen sources, once, and only if any rows have come."""
        if not self._unseen or self._has_warned or not self._batches:
            return
        self._has_warned = True
        missing = [self._names[label] for label in sorted(self._unseen)]
        warnings.warn(
            f"keep_sources keeps nothing by {_listed(missing)}: no row of {where} has that source, but "
            f"{_listed(self._present.values())}",
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


def _label(source: Any, name: str) -> int:
    """The integer label of a source: itself, or 63 bits of a string's hash, the same on every process and in every run."""
    if isinstance(source, str):
        encoded = source.encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big") >> 1
    return as_int64(source, name)


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
    unique, form = getattr(data, "unique", None), getattr(data, "format", None)
    is_transformed = isinstance(form, Mapping) and form.get("type") == "custom"
    if callable(unique) and not is_transformed and column in (getattr(data, "column_names", None) or ()):
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
