"""The arguments of all commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

# This module imports nothing of flashcoreset, so that help and version are there at once; a test compares these names with the library's.
BACKENDS = ("torch", "cpu", "cuda", "triton")
POINT_METRICS = ("cosine", "dot", "euclidean", "sqeuclidean", "l1")
MATRICES = ("precomputed", "precomputed_distance")
STRATA = ("width", "quantile", "log")
NORM_SCALES = ("max", "spread")
SCALINGS = ("class", "global")
SOLVERS = ("exact", "sinkhorn")
ALGORITHMS = (
    *("facility-location", "simcore", "ccs", "goracs", "colm", "autocoreset"),
    *("random-subset", "k-center", "nearest"),
)
OUTPUTS = (".npz", ".parquet", ".csv", ".jsonl")
_FILES = "F.npy, .npz, .pt, .safetensors, .parquet, .arrow, .csv or .jsonl; F:NAME names an array or column in it, F:A,B several columns"


class WrongArguments(Exception):
    """Arguments that the parser does not take."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong option like any other bad input: one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise WrongArguments(f"{message} (see: {self.prog} --help)")

    def typed(self, argv: Sequence[str]) -> dict[str, tuple[str, str]]:
        """By an option's name in the program: its long name, and what the person typed (the long name if nothing)."""
        parser: argparse.ArgumentParser = self
        found: dict[str, str] = {}
        for token in argv:
            name = token.partition("=")[0]
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parser = action.choices.get(token, parser)
                # argparse also takes the beginning of a long name.
                elif name in action.option_strings or (
                    len(name) > 2 and any(option.startswith(name) for option in action.option_strings)
                ):
                    found.setdefault(action.dest, name)
        options = {action.dest: action.option_strings for action in parser._actions if action.option_strings}
        longs = {
            name: next((o for o in strings if o.startswith("--")), strings[0])
            for name, strings in options.items()
        }
        return {
            name: (long, found[name] if found.get(name) in options[name] else long)
            for name, long in longs.items()
        }


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"flashcoreset {version('flashcoreset')}")
        parser.exit()


def make_parser() -> Parser:
    parser = Parser(
        prog="flashcoreset",
        description="Choose training data: facility location, SimCore, CCS, GORACS, CoLM and AutoCoreset, and the controls beside them.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | select | bench")

    info = commands.add_parser(
        "info", help="backends, instruction sets, devices, and why each missing one is missing"
    )
    _add_format(info)
    info.set_defaults(run="info")

    demo = commands.add_parser("demo", help="the five methods on real data: tables and pictures")
    demo.add_argument(
        "--out",
        default="demo.png",
        help="the picture; others go beside it, as NAME-ccs.png, NAME-colm.png and NAME-autocoreset.png (default: %(default)s)",
    )
    _add_force(demo)
    demo.set_defaults(run="demo")

    bench = commands.add_parser("bench", help="run the benchmarks of a checkout")
    bench.add_argument(
        "family", nargs="*", metavar="FAMILY", help="one or more kernel families (default: the quick ones)"
    )
    bench.set_defaults(run="bench")

    select = commands.add_parser("select", help="choose rows of a file of features, scores or gradients")
    select.set_defaults(run="select")
    algorithms = select.add_subparsers(
        dest="algorithm", required=True, metavar=" | ".join(reversed(ALGORITHMS))
    )
    _add_simcore(
        algorithms.add_parser(
            "simcore", argument_default=argparse.SUPPRESS, help="open-set rows close to a target"
        )
    )
    _add_ccs(
        algorithms.add_parser(
            "ccs", argument_default=argparse.SUPPRESS, help="samples spread over the range of their scores"
        )
    )
    _add_goracs(
        algorithms.add_parser(
            "goracs", argument_default=argparse.SUPPRESS, help="training rows that stand for validation rows"
        )
    )
    _add_colm(
        algorithms.add_parser(
            "colm", argument_default=argparse.SUPPRESS, help="rows of a batch that train as all of it would"
        )
    )
    _add_autocoreset(
        algorithms.add_parser(
            "autocoreset", argument_default=argparse.SUPPRESS, help="rows on which a model fits as on all"
        )
    )
    _add_random_subset(
        algorithms.add_parser(
            "random-subset",
            argument_default=argparse.SUPPRESS,
            help="a uniform choice, the control of all others",
        )
    )
    _add_k_center(
        algorithms.add_parser(
            "k-center", argument_default=argparse.SUPPRESS, help="rows that leave no row far from all of them"
        )
    )
    _add_nearest(
        algorithms.add_parser(
            "nearest", argument_default=argparse.SUPPRESS, help="open-set rows most similar to any target row"
        )
    )
    _add_facility_location(
        algorithms.add_parser(
            "facility-location", argument_default=argparse.SUPPRESS, help="rows that represent all rows"
        )
    )
    return parser


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace outputs that exist")


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="of what is printed (default: %(default)s)"
    )


def _add_output(parser: argparse.ArgumentParser, *, needs_k: bool, has_seed: bool = True) -> None:
    parser.add_argument("-k", type=int, required=needs_k, metavar="K", help="how many rows to select")
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="OUT",
        help="what was chosen: OUT.npz (every array, and info as JSON text), OUT.parquet, OUT.csv or OUT.jsonl (a row for each pick)",
    )
    parser.add_argument(
        "--rows",
        nargs="?",
        const="",
        metavar="DATA",
        help="write the chosen rows themselves, with coreset_index and coreset_weight: those of DATA, or else of the file of features",
    )
    _add_force(parser)
    _add_format(parser)
    if has_seed:
        parser.add_argument("--seed", type=int)


def _add_common(parser: argparse.ArgumentParser, *, needs_k: bool = False, has_seed: bool = True) -> None:
    _add_output(parser, needs_k=needs_k, has_seed=has_seed)
    parser.add_argument("--backend", choices=BACKENDS, help="default: the fastest that can")
    parser.add_argument("--memory-budget", type=int, metavar="BYTES", help="for similarities and orders")
    parser.add_argument("--progress", action="store_true", help="show a bar on stderr")


def _add_simcore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", required=True, metavar="F", help=f"open set [n, d]: {_FILES}")
    parser.add_argument("--target", metavar="T", help="features of the target data [m, d]")
    parser.add_argument("--centroids", metavar="C", help="in place of --target: centroids of it [c, d]")
    _add_common(parser)
    parser.add_argument(
        "--ratio", type=float, metavar="R", help="in place of -k: the share of rows to select"
    )
    parser.add_argument("--n-clusters", type=int, metavar="N", help="centroids of the target")
    parser.add_argument("--fit-on", type=int, metavar="N", help="rows of the target that k-means sees")
    parser.add_argument(
        "--stop-threshold", type=float, metavar="R", help="stop below this share of the first value"
    )
    parser.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="the round whose value is the first value (default: 1 to 20, by the sizes)",
    )
    parser.add_argument("--no-stop", dest="stop", action="store_false", help="take K rows however dissimilar")


def _add_ccs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scores", required=True, metavar="S", help=f"how hard each sample is [n]: {_FILES}")
    _add_output(parser, needs_k=True)
    parser.add_argument("--mislabel-scores", metavar="M", help="low for labels that are probably wrong [n]")
    parser.add_argument(
        "--mislabel-ratio",
        type=float,
        metavar="R",
        help="the share to drop of the lowest (default: as published, by the share of rows that K leaves out)",
    )
    parser.add_argument("--n-strata", type=int, metavar="N", help="the number of strata; 1 draws at random")
    parser.add_argument("--strata", choices=STRATA, help="what strata have in common (default: width)")
    parser.add_argument(
        "--groups", metavar="G", help="labels [n], integers or strings: each group gets its share"
    )


def _add_goracs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", required=True, metavar="F", help=f"training features [n, d]: {_FILES}")
    parser.add_argument("--valid", required=True, metavar="V", help="validation features [m, d]")
    parser.add_argument("--grad-norms", metavar="G", help="gradient norms [n], for --lam")
    _add_common(parser, needs_k=True)
    parser.add_argument("--lam", type=float, help="weight of the gradient norms (default: 0)")
    parser.add_argument(
        "--norm-clip", type=float, metavar="Q", help="the quantile that larger norms count as"
    )
    parser.add_argument(
        "--norm-scale",
        choices=NORM_SCALES,
        help="divide norms by the largest, or scale them to the distances' spread",
    )
    parser.add_argument("--max-exchanges", type=int, metavar="N", help="exchanges to make at most")
    parser.add_argument("--n-candidates", type=int, metavar="N", help="removals and additions to pair")
    parser.add_argument("--max-solves", type=int, metavar="N", help="transport problems to solve at most")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds for the exchanges")
    parser.add_argument(
        "--tol", type=float, metavar="R", help="share of the score that an exchange has to gain"
    )
    parser.add_argument("--train-labels", metavar="L", help="class labels [n], integers or strings")
    parser.add_argument("--valid-labels", metavar="L", help="class labels [m], integers or strings")
    parser.add_argument("--scaling", choices=SCALINGS, help="by the maxima of each class, or of all items")
    parser.add_argument("--solver", choices=SOLVERS)
    parser.add_argument("--reg", type=float, help="regularisation of --solver sinkhorn")


def _add_colm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gradients",
        required=True,
        metavar="G",
        help=f"per-sample gradients [B, D]: {_FILES}",
    )
    parser.add_argument(
        "--numel",
        type=int,
        metavar="D",
        help="the rows of G are coefficients [B, q] of directions of this length, made from --seed",
    )
    _add_output(parser, needs_k=True)
    parser.add_argument("--groups", metavar="L", help="labels of the rows' sources [B], integers or strings")
    parser.add_argument(
        "--keep-groups", type=_labels, metavar="LABEL,...", help="sources of which every row is kept"
    )
    parser.add_argument(
        "--top", type=_top, metavar="N", help="dimensions that count in each source, or all (default: 2560)"
    )
    parser.add_argument(
        "--rule", choices=("proportional", "balanced", "none"), help="for the sources' shares"
    )
    parser.add_argument("--metric", choices=POINT_METRICS, help="default: l1")
    parser.add_argument("--betas", type=float, nargs=2, metavar=("BETA1", "BETA2"), help="Adam's")
    parser.add_argument("--eps", type=float, help="Adam's")
    parser.add_argument("--state", metavar="STATE.npz", help="Adam's history, as --save-state wrote it")
    parser.add_argument(
        "--save-state",
        metavar="STATE.npz",
        help="the history after this batch is written here (without --force also where it is STATE)",
    )
    parser.add_argument("--backend", choices=BACKENDS, help="default: the fastest that can")


def _labels(text: str) -> list[Any]:
    """Labels that are all integers as integers, others as strings."""
    parts = text.split(",")
    if not all(parts):
        raise argparse.ArgumentTypeError(f"expected LABEL,LABEL,..., got {text!r}")
    try:
        return [int(label) for label in parts]
    except ValueError:
        return list(parts)


def _top(text: str) -> int | None:
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or all, got {text!r}") from None


def _add_autocoreset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", required=True, metavar="F", help=f"rows [n, d]: {_FILES}")
    parser.add_argument("--targets", metavar="Y", help="labels or numbers [n]; --model kmeans needs none")
    parser.add_argument(
        "--model", required=True, choices=("kmeans", "logistic_regression", "linear_svm", "linear_regression")
    )
    _add_output(parser, needs_k=True)
    parser.add_argument("--method", choices=("caratheodory", "importance", "median_of_means", "uniform"))
    parser.add_argument("--n-initial", type=int, metavar="N", help="models fitted on uniform samples first")
    parser.add_argument("--patience", type=int, metavar="N", help="rounds without gain to end after")
    parser.add_argument(
        "--groups", metavar="G", help="labels [n], integers or strings: each group gets an equal share"
    )
    parser.add_argument(
        "--no-groups", action="store_true", help="no groups (default: the classes of a classifier)"
    )
    parser.add_argument("--loss", choices=("hinge", "squared_hinge"), help="of --model linear_svm")
    parser.add_argument("--n-clusters", type=int, metavar="N", help="of --model kmeans (default: 8)")
    parser.add_argument("--x-test", metavar="F", help="a test set [m, d], whose loss is written")
    parser.add_argument("--y-test", metavar="Y", help="its labels or numbers [m]")
    parser.add_argument("--progress", action="store_true", help="show a bar on stderr")


def _add_random_subset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", type=int, required=True, metavar="N", help="how many samples there are")
    _add_output(parser, needs_k=True)
    parser.add_argument("--mislabel-scores", metavar="M", help="low for labels that are probably wrong [n]")
    parser.add_argument("--mislabel-ratio", type=float, metavar="R", help="the share to drop of the lowest")
    parser.add_argument(
        "--groups", metavar="G", help="labels [n], integers or strings: each group gets its share"
    )


def _add_k_center(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", required=True, metavar="F", help=f"rows [n, d]: {_FILES}")
    _add_common(parser, needs_k=True, has_seed=False)
    parser.add_argument("--metric", choices=("euclidean", "sqeuclidean", "l1", "cosine"))
    parser.add_argument("--preselected", metavar="P", help="rows that are picks already")


def _add_nearest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--features", required=True, metavar="F", help=f"open set [n, d]: {_FILES}")
    parser.add_argument("--target", required=True, metavar="T", help="features of the target data [m, d]")
    _add_common(parser, needs_k=True, has_seed=False)
    parser.add_argument("--metric", choices=POINT_METRICS)


def _add_facility_location(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        required=True,
        metavar="F",
        help=f"candidates [n, d], or the similarities or distances: {_FILES}",
    )
    parser.add_argument(
        "--target",
        "--clients",
        dest="clients",
        metavar="T",
        help="clients [m, d] (default: the candidates themselves)",
    )
    _add_common(parser)
    parser.add_argument("--metric", choices=(*POINT_METRICS, *MATRICES))
    parser.add_argument("--weights", metavar="W", help="client weights [m]")
    parser.add_argument("--groups", metavar="G", help="labels [n], integers or strings")
    add_limits(parser)
    parser.add_argument("--method", choices=("lazy", "naive", "stochastic"))
    parser.add_argument("--epsilon", type=float, help="sampling of --method stochastic")
    parser.add_argument("--offset", type=float, help="similarity of a distance of 0")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """What bounds the picks of facility location, on one machine and on many."""
    parser.add_argument("--budgets", metavar="B", help="LABEL=COUNT,LABEL=COUNT,... or a file of counts")
    parser.add_argument(
        "--preselected", metavar="P", help="rows that are in the set already, as indices or a mask [n]"
    )
    parser.add_argument("--costs", metavar="C", help="what each row costs [n]: picks go by gain per cost")
    parser.add_argument("--cost-budget", type=float, metavar="B", help="what the picks may cost together")
    parser.add_argument(
        "--plain-gains",
        dest="cost_sensitive",
        action="store_false",
        help="with --cost-budget: picks go by gain, whatever they cost",
    )
    parser.add_argument("--stop-gain", type=float, metavar="G", help="end before the first gain below it")
    parser.add_argument("--exclude", metavar="E", help="rows that are not picked, as indices or a mask [n]")
    parser.add_argument("--caps", metavar="B", help="LABEL=COUNT,...: at most so many of a label of --groups")
    parser.add_argument(
        "--min-distance", type=float, metavar="D", help="between picks; what is nearer to one is not picked"
    )
    parser.add_argument("--rounds", type=int, metavar="R", help="up to how many picks serve each client")
