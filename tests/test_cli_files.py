"""Files of the command line: what it reads and writes beside NumPy's, and how it names options, answers as JSON and answers at once."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flashcoreset as fc
from flashcoreset import cli
from flashcoreset._core.dispatch import BACKENDS
from flashcoreset.cli import parser, select
from flashcoreset.methods.ccs.strata import KINDS
from flashcoreset.methods.goracs import NORM_SCALES, SCALINGS, SOLVERS

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
safetensors = pytest.importorskip("safetensors.torch")

X = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
NAMES = [["sea", "air", "land", "air"][i % 4] for i in range(40)]
CITY = [f"städt, {i}" for i in range(40)]


def table(**kinds: Any) -> Any:
    lists = pa.array(X.tolist(), kinds.get("lists", pa.list_(pa.float32())))
    return pa.table({"city": CITY, "x": lists, "kind": NAMES, "size": np.arange(40)})


def write_parquet(path: Path) -> str:
    pq.write_table(table(), path, row_group_size=7)
    return f"{path}:x"


def write_fixed(path: Path) -> str:
    pq.write_table(table(lists=pa.list_(pa.float32(), 3)), path, row_group_size=11)
    return f"{path}:x"


def write_columns(path: Path) -> str:
    pq.write_table(pa.table({"name": NAMES, **{n: X[:, i] for i, n in enumerate("abc")}}), path)
    return f"{path}:a,b,c"


def write_arrow(path: Path) -> str:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=9)
    return f"{path}:x"


def write_stream(path: Path) -> str:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=9)
    return f"{path}:x"


def write_csv(path: Path) -> str:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["city", "a", "b", "c", "kind", "list"])
        for i, row in enumerate(X.tolist()):
            writer.writerow([CITY[i], *row, NAMES[i], json.dumps(row)])
    return f"{path}:a,b,c"


def write_json(path: Path) -> str:
    with path.open("w", encoding="utf-8") as stream:
        for i, row in enumerate(X.tolist()):
            stream.write(json.dumps({"city": CITY[i], "x": row, "kind": NAMES[i], "code": f"00{i}"}) + "\n\n")
    return f"{path}:x"


def write_tensors(path: Path) -> str:
    torch.save({"x": torch.from_numpy(X), "y": torch.zeros(3)}, path)
    return f"{path}:x"


def write_tensor(path: Path) -> str:
    torch.save(torch.from_numpy(X), path)
    return str(path)


def write_safetensors(path: Path) -> str:
    safetensors.save_file({"x": torch.from_numpy(X), "other": torch.zeros(2)}, path)
    return f"{path}:x"


def write_shards(path: Path) -> str:
    np.save(path.with_name("part-0.npy"), X[:15])
    np.save(path.with_name("part-1.npy"), X[15:])
    return str(path.with_name("part-*.npy"))


FILES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "parquet": ("f.parquet", write_parquet),
    "parquet of fixed lists": ("f.parquet", write_fixed),
    "parquet columns": ("f.parquet", write_columns),
    "arrow": ("f.arrow", write_arrow),
    "arrow stream": ("f.arrow", write_stream),
    "csv": ("f.csv", write_csv),
    "tsv": ("f.tsv", write_csv),
    "csv of lists": ("f.csv", lambda path: write_csv(path).replace(":a,b,c", ":list")),
    "jsonl": ("f.jsonl", write_json),
    "pt of several": ("f.pt", write_tensors),
    "pt": ("f.pt", write_tensor),
    "safetensors": ("f.safetensors", write_safetensors),
    "npy shards": ("f.npy", write_shards),
}


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def expect_error(capsys: pytest.CaptureFixture[str], words: str, *arguments: object) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flashcoreset: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err, captured.err


def expected(**options: Any) -> fc.Selection:
    return fc.facility_location(X, options.pop("k", 5), **options)


# --- what is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_features_of_every_format(name: str, tmp_path: Path) -> None:
    file, write = FILES[name]
    text, out = write(tmp_path / file), tmp_path / "out.npz"
    assert run("select", "facility-location", "--features", text, "-k", 5, "-o", out) == 0
    found = fc.load(out)
    assert torch.equal(found.indices, expected().indices)
    rows = fc.open_rows(text)
    assert rows.shape == (40, 3)
    # CSV and JSON have numbers in double precision, which are float32's here.
    np.testing.assert_array_equal(np.concatenate(list(rows.batches(7))), X)
    np.testing.assert_array_equal(rows[5:31:2], X[5:31:2])
    np.testing.assert_array_equal(rows[np.array([30, 4, 4])], X[[30, 4, 4]])
    np.testing.assert_array_equal(rows[-1], X[-1])
    np.testing.assert_array_equal(rows[33:38], X[33:38])
    np.testing.assert_array_equal(rows[2:9], X[2:9])  # back again
    assert rows[9:9].shape == (0, 3)


@pytest.mark.parametrize("name", ["parquet", "arrow", "csv", "jsonl"])
def test_labels_are_strings(name: str, tmp_path: Path) -> None:
    file, write = FILES[name]
    text, out = write(tmp_path / file), tmp_path / "out.npz"
    groups = f"{tmp_path / file}:kind"
    command = ("select", "facility-location", "--features", text, "--groups", groups, "-o", out)
    assert run(*command, "--budgets", "sea=1,air=3,land=2") == 0
    budgets = {"sea": 1, "air": 3, "land": 2}
    assert torch.equal(fc.load(out).indices, expected(k=None, groups=NAMES, budgets=budgets).indices)
    np.save(tmp_path / "s.npy", X[:, 0])
    options = ("--scores", tmp_path / "s.npy", "--groups", groups, "-k", 9, "--mislabel-ratio", 0)
    assert run("select", "ccs", *options, "-o", out, "--force") == 0
    assert set(fc.load(out).info["groups"]) == {"air", "land", "sea"}
    np.save(tmp_path / "g.npy", X)
    options = (
        "--gradients",
        tmp_path / "g.npy",
        "--groups",
        groups,
        "-k",
        12,
        "--keep-groups",
        "sea",
        "--top",
        2,
    )
    assert run("select", "colm", *options, "-o", out, "--force") == 0
    assert fc.load(out).info["kept"] == 10
    assert set(fc.load(out).info["budgets"]) == {"air", "land"}


def test_whole_numbers_are_features(tmp_path: Path) -> None:
    numbers = np.random.default_rng(1).integers(-50, 50, (20, 2))
    frame = pa.table({"a": numbers[:, 0], "b": numbers[:, 1].astype(np.int8)})
    pq.write_table(frame, tmp_path / "f.parquet")
    out = tmp_path / "out.npz"
    assert run("select", "k-center", "--features", tmp_path / "f.parquet", "-k", 3, "-o", out) == 0
    assert torch.equal(fc.load(out).indices, fc.k_center(numbers.astype(float), 3).indices)


def broken(tmp_path: Path) -> dict[str, str]:
    """Files that are no features, and words that the error has to contain."""
    good = table()
    pq.write_table(good, tmp_path / "t.parquet")
    pq.write_table(
        good.set_column(1, "x", pa.array([[1.0]] * 39 + [[1.0, 2.0]])), tmp_path / "unequal.parquet"
    )
    pq.write_table(good.set_column(1, "x", pa.array([[1.0]] * 39 + [None])), tmp_path / "missing.parquet")
    pq.write_table(good.set_column(1, "x", pa.array([[1.0, None]] * 40)), tmp_path / "inner.parquet")
    pq.write_table(good.slice(0, 0), tmp_path / "none.parquet")
    (tmp_path / "damaged.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-9])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "names.csv").write_text("a,b\n")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "word.csv").write_text("a,b\n1,2\n1,x\n")
    (tmp_path / "short.csv").write_text("name,b\nx,2\ny\n")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "gap.jsonl").write_text('{"a": [1.0]}\n{"b": 1}\n')
    (tmp_path / "ragged.jsonl").write_text('{"a": [1.0]}\n{"a": [1.0, 2.0]}\n')
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04K\x01.")
    torch.save({"x": [1, 2]}, tmp_path / "lists.pt")
    torch.save(torch.eye(2).to_sparse(), tmp_path / "sparse.pt")
    (tmp_path / "no.safetensors").write_bytes(b"nothing of the kind")
    np.save(tmp_path / "p-0.npy", X)
    np.save(tmp_path / "p-1.npy", X.astype(float))
    return {
        "t.parquet": "has the columns city, x, kind, size; choose one as",
        "t.parquet:y": "no column 'y' in",
        "t.parquet:size,kind": "column 'kind' beside others must hold one number per row",
        "t.parquet:size,size": "names a column twice",
        "t.parquet:city": "expected a float16, float32 or float64 array [rows, features], got object [40]",
        "unequal.parquet:x": "must have lists of equal length",
        "missing.parquet:x": "column 'x' has 1 missing values; fill or drop them",
        "inner.parquet:x": "must have lists without missing values",
        "none.parquet:x": "has no rows",
        "damaged.parquet:x": "cannot read",
        "empty.csv": "is empty",
        "names.csv": "has no rows below its line of names",
        "twice.csv": "has a column name twice",
        "word.csv": "the columns a, b must hold numbers alone",
        "short.csv:name": "line 3: expected 2 columns, got 1",
        "bad.jsonl": "line 2: ",
        "list.jsonl": "line 1: expected an object {...}, got list",
        "gap.jsonl": "row 1 has no value of 'a'",
        "ragged.jsonl": "column 'a' must hold lists of equal length",
        "pickle.pt": "it holds more than tensors, or is damaged",
        "lists.pt": "holds nothing; choose one",
        "sparse.pt": "holds a sparse tensor",
        "no.safetensors": "cannot read",
        "absent.parquet:x": "no such file",
        "p-*.npy": "files must go together, got float32 [40, 3] in",
        "q-*.npy": "no file matches",
        "x.txt": "no such file",
    }


def test_files_that_are_no_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in broken(tmp_path).items():
        command = (
            "select",
            "facility-location",
            "--features",
            tmp_path / name,
            "-k",
            1,
            "-o",
            tmp_path / "o.npz",
        )
        expect_error(capsys, words, *command)
        assert not (tmp_path / "o.npz").exists()


def test_a_missing_library_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_parquet(tmp_path / "f.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr("flashcoreset._core.imports._imported", {})
    command = ("select", "facility-location", "--features", text, "-k", 1, "-o", tmp_path / "o.npz")
    expect_error(
        capsys,
        "pyarrow is missing, which such a file is read by: pip install 'flashcoreset[files]'",
        *command,
    )


# --- what is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_picks_as_a_table(suffix: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    out = tmp_path / f"out{suffix}"
    assert run("select", "facility-location", "--features", tmp_path / "x.npy", "-k", 5, "-o", out) == 0
    want = expected()
    found = read_table(out)
    assert list(found) == ["index", "weight", "gain"]
    assert [int(v) for v in found["index"]] == want.indices.tolist()
    assert [float(v) for v in found["weight"]] == want.weights.tolist()
    assert [float(v) for v in found["gain"]] == want.gains.tolist()
    if suffix == ".parquet":
        info = json.loads(pq.read_schema(out).metadata[b"flashcoreset"])
        assert info["objective"] == want.objective
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, "x.npy"]


def read_table(path: Path) -> dict[str, list[Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pydict()
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as stream:
            records: list[dict[str, Any]] = list(csv.DictReader(stream))
    else:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: [record[name] for record in records] for name in records[0]}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("name", ["parquet", "arrow", "csv", "jsonl", "npy shards"])
def test_the_rows_themselves(name: str, suffix: str, tmp_path: Path) -> None:
    file, write = FILES[name]
    text, out = write(tmp_path / file), tmp_path / f"out{suffix}"
    command = ("select", "facility-location", "--features", text, "-k", 5, "--rows", "-o", out)
    assert run(*command) == 0
    want, found = expected(), read_table(out)
    rows = want.indices.tolist()
    assert [int(v) for v in found["coreset_index"]] == rows
    assert [float(v) for v in found["coreset_weight"]] == want.weights.tolist()
    if name == "npy shards":
        columns = ["x0", "x1", "x2"] if suffix == ".csv" else ["features"]
        values = (
            np.array([[float(v) for v in found[c]] for c in columns]).T
            if suffix == ".csv"
            else found["features"]
        )
        np.testing.assert_array_equal(np.asarray(values), X[rows])
        return
    assert found["city"] == [CITY[i] for i in rows]
    assert found["kind"] == [NAMES[i] for i in rows]
    if name == "jsonl":
        assert found["code"] == [f"00{i}" for i in rows]  # as it stands there
    # The output is an input again: its own columns are replaced.
    again = tmp_path / f"again{suffix}"
    column = "a,b,c" if name == "csv" else "x"
    command = ("select", "facility-location", "--features", f"{out}:{column}", "-k", 2, "--rows", "-o", again)
    assert run(*command) == 0
    assert list(read_table(again)) == list(found)
    assert len(read_table(again)["city"]) == 2


def test_rows_of_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "text.jsonl")
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "s.npy", X[:, 0])
    out = tmp_path / "out.jsonl"
    command = ("select", "ccs", "--scores", tmp_path / "s.npy", "-k", 4, "--mislabel-ratio", 0, "-o", out)
    assert run(*command, "--rows", tmp_path / "text.jsonl") == 0
    picks = fc.ccs(X[:, 0], 4, mislabel_ratio=0)
    assert read_table(out)["city"] == picks.take(CITY)
    capsys.readouterr()
    command = ("select", "random-subset", "-n", 40, "-k", 4, "-o", out)
    expect_error(
        capsys, "--rows: random-subset reads no rows; name their file", *command, "--force", "--rows"
    )
    expect_error(capsys, f"-o/--out: {out} exists", *command, "--rows", tmp_path / "text.jsonl")
    expect_error(capsys, "is also an input", *command, "--force", "--rows", out)
    command = ("select", "random-subset", "-n", 39, "-k", 4, "-o", out, "--force")
    expect_error(
        capsys,
        "text.jsonl has 40 rows, but the choice was made from 39",
        *command,
        "--rows",
        tmp_path / "text.jsonl",
    )
    command = ("select", "random-subset", "-n", 40, "-k", 4, "-o", tmp_path / "o.npz")
    expect_error(
        capsys, "--rows: rows of a table go into .parquet", *command, "--rows", tmp_path / "text.jsonl"
    )
    expect_error(capsys, "--rows: no such file", *command, "--rows", tmp_path / "none.npy")
    assert run(*command, "--rows", tmp_path / "x.npy") == 0
    with np.load(tmp_path / "o.npz") as archive:
        np.testing.assert_array_equal(archive["rows"], X[archive["indices"]])


# --- what is said -------------------------------------------------------------------------------------


def test_errors_name_the_option_that_was_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "wide.npy", np.ones((4, 7), np.float32))
    np.save(tmp_path / "w.npy", np.ones(39))
    command = ("select", "facility-location", "--features", tmp_path / "x.npy", "-o", tmp_path / "o.npz")
    for words, options in (
        ("-k: k must be at most 40", ("-k", 41)),
        ("--weights: weights must have shape [40]", ("-k", 2, "--weights", tmp_path / "w.npy")),
        ("--clients: no such file", ("-k", 2, "--clients", tmp_path / "none.npy")),
        ("--target: no such file", ("-k", 2, "--target", tmp_path / "none.npy")),
        ("--clients: clients must have 3 columns", ("-k", 2, f"--clients={tmp_path / 'wide.npy'}")),
        ("--epsilon: epsilon must be in (0, 1)", ("-k", 2, "--epsi", 3)),
        ("--offset: offset is for distances", ("-k", 2, "--offset", 3)),
    ):
        expect_error(capsys, words, *command, *options)
    np.save(tmp_path / "nan.npy", X * np.nan)
    command = (
        "select",
        "facility-location",
        "--features",
        tmp_path / "nan.npy",
        "-k",
        1,
        "-o",
        tmp_path / "o.npz",
    )
    expect_error(capsys, "--features: x must be finite", *command)
    expect_error(capsys, "-o/--out: expected a name that ends in .npz or .parquet", *command[:-1], "out.txt")
    expect_error(capsys, "flashcoreset: --out: expected a name", *command[:-2], "--out", "out.txt")


def test_answers_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", X)
    command = (
        "select",
        "facility-location",
        "--features",
        tmp_path / "x.npy",
        "-k",
        5,
        "-o",
        tmp_path / "o.npz",
    )
    assert run(*command, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["out"], found["chosen"]) == (str(tmp_path / "o.npz"), 5)
    assert found["info"]["objective"] == expected().objective
    assert run("info", "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["flashcoreset"] == fc.__version__
    assert found["backends"]["torch"] == "available"
    expect_error(capsys, "invalid choice: 'xml'", "info", "--format", "xml")


def test_names_of_the_parser_are_the_library_s() -> None:
    assert set(parser.BACKENDS) == set(BACKENDS)
    assert tuple(KINDS) == parser.STRATA
    assert (parser.NORM_SCALES, parser.SCALINGS, parser.SOLVERS) == (NORM_SCALES, SCALINGS, SOLVERS)
    assert tuple(select.ALGORITHMS) == parser.ALGORITHMS


QUICK = """
import sys
import flashcoreset_cli
sys.argv = ["flashcoreset", *{arguments}]
try:
    flashcoreset_cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
    assert "torch" not in sys.modules
    assert "numpy" not in sys.modules
else:
    raise AssertionError("no exit")
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--version"], f"flashcoreset {fc.__version__}\n"), (["--help"], "Choose training data"), (["select", "ccs", "-h"], "--n-strata")],
    ids=["version", "help", "help of a method"],
)  # fmt: skip
def test_version_and_help_load_nothing_large(arguments: list[str], words: str) -> None:
    code = QUICK.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_the_quick_command_runs_everything_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flashcoreset_cli", "select", "nothing", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 2
    assert "invalid choice: 'nothing'" in done.stderr
    assert done.stderr.count("\n") == 1
