"""`flashcoreset.compat.patch` on a small peer that is written for these tests; the real peers are in test_compat_programs.py."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashcoreset import compat
from flashcoreset.compat.__main__ import main
from flashcoreset.compat._calls import CALLS
from flashcoreset.compat._peers import PEERS, Entry, Peer

PEER = {
    "fakepeer/__init__.py": """
        from .numbers import double, halve
        from .picks import Base, Mixture, Picker
        from . import numbers
        """,
    "fakepeer/numbers.py": """
        def double(x, how="plain"):
            '''Twice x.'''
            if how == "broken":
                raise ValueError("broken")
            return ("peer", 2 * x)

        def halve(x):
            return ("peer", x / 2)

        def quadruple(x, how="plain"):
            return double(double(x)[1], how)
        """,
    "fakepeer/later.py": """
        from fakepeer.numbers import double as twice
        from fakepeer import Picker
        """,
    # As old classes are written: the base is found by the class's name.
    "fakepeer/picks.py": """
        class Base(object):
            def __init__(self, k):
                self.k = k
                self.log = ["init"]

            def _start(self, x):
                self.log.append("start")
                self.best = 0

            def fit(self, x, way="plain"):
                self._start(x)
                self.picks = ("peer", x[: self.k])
                return self

            def shared(self):
                return self

        class Picker(Base):
            def __init__(self, k, mode="plain"):
                super(Picker, self).__init__(k)
                self.mode = mode

            def fit(self, x, way="plain"):
                return super(Picker, self).fit(x, way)

            def add(self, x):
                self.picks = ("peer", getattr(self, "picks", (None, []))[1] + [x])

            def value(self):
                return self.picks

            def only_theirs(self):
                return ("peer", self.k)

            def __len__(self):
                return self.k

        class Mixture(Base):
            def __init__(self, k, parts):
                super(Mixture, self).__init__(k)
                self.parts = parts
                for part in parts:
                    assert isinstance(part, Base)
                    part.mode = "mixed"

            def fit(self, x):
                for part in self.parts:
                    part._start(x)
                return [part.log for part in self.parts], [part.mode for part in self.parts]
        """,
    "ours_of_it.py": """
        import fakepeer

        def double(x, how="plain"):
            if how not in ("plain", "calls back"):
                raise NotImplementedError(f"how={how!r} is left to fakepeer.double")
            return ("ours", fakepeer.double(x)[1] if how == "calls back" else 2 * x)

        class Picker:
            def __init__(self, k, mode="plain"):
                if mode == "odd":
                    raise NotImplementedError("mode='odd'")
                self.k, self.mode = k, mode

            def fit(self, x, way="plain"):
                if way != "plain":
                    raise NotImplementedError(f"way={way!r}")
                self.picks = ("ours", x[: self.k])
                return self

            def add(self, x):
                self.picks = ("ours", getattr(self, "picks", (None, []))[1] + [x])

            def value(self):
                return self.picks

            def _start(self, x):
                raise AssertionError("a private method of ours is not the peer's")

            def __len__(self):
                return self.k
        """,
}

FAKE = Peer(
    name="fake",
    package="fakepeer",
    distributions=("fakepeer",),
    tested=("1", "1"),
    entries=(
        Entry("fakepeer:double", "ours_of_it:double"),
        Entry(
            "fakepeer.picks:Picker",
            "ours_of_it:Picker",
            state=frozenset({"fit", "add"}),
            fresh=frozenset({"fit", "_start"}),
        ),
        Entry("fakepeer.gone:nothing", "ours_of_it:double"),
        Entry("fakepeer.numbers:gone", "ours_of_it:double"),
    ),
)


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in sys.path with the peer and our part of it; its version is the tested one."""
    for name, text in PEER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    (tmp_path / "fakepeer-1.0.dist-info").mkdir()
    (tmp_path / "fakepeer-1.0.dist-info" / "METADATA").write_text("Name: fakepeer\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(PEERS, "fake", FAKE)
    importlib.invalidate_caches()
    yield tmp_path
    compat.unpatch()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("fakepeer", "ours_of_it")]:
        del sys.modules[name]


def taken_and_left(name: str) -> tuple[int, int]:
    count = CALLS.snapshot()[name]
    return count.taken, count.left


@pytest.mark.parametrize("first", ["import", "patch"])
def test_functions_are_ours_under_every_name(peer: Path, first: str) -> None:
    before = importlib.import_module("fakepeer") if first == "import" else None
    compat.patch("fake")
    import fakepeer
    import fakepeer.later
    import fakepeer.numbers

    assert before in (None, fakepeer)
    for double in (fakepeer.double, fakepeer.numbers.double, fakepeer.later.twice):
        assert double(3) == ("ours", 6)
    assert fakepeer.numbers.quadruple(3) == ("ours", 12)  # through the module's own globals
    assert fakepeer.halve(3) == ("peer", 1.5)
    assert fakepeer.double.__doc__ == "Twice x."
    assert fakepeer.numbers.__spec__.loader is fakepeer.numbers.__loader__
    assert taken_and_left("fakepeer.double") == (5, 0)


def test_names_in_modules_of_the_program(peer: Path) -> None:
    program = ModuleType("program_of_the_test")
    sys.modules[program.__name__] = program
    try:
        exec("from fakepeer import double", program.__dict__)
        original = program.double
        compat.patch("fake")
        assert program.double(1) == ("ours", 2)
        compat.unpatch("fake")
        assert program.double is original
    finally:
        del sys.modules[program.__name__]


def test_what_ours_do_not_take_goes_to_the_peer(peer: Path) -> None:
    compat.patch("fake")
    import fakepeer

    assert fakepeer.double(3, how="odd") == ("peer", 6)
    with pytest.raises(ValueError, match="broken") as caught:
        fakepeer.double(3, how="broken")
    assert caught.value.__context__ is None  # nothing of ours in the traceback
    assert taken_and_left("fakepeer.double") == (0, 2)
    told = compat.report()
    assert "fake 1.0" in told
    assert "left: fakepeer.double, 1 x: how='odd' is left to fakepeer.double" in told
    assert "not in the installed version: fakepeer.gone.nothing, fakepeer.numbers.gone" in told


def test_a_left_call_may_call_what_is_taken_over(peer: Path) -> None:
    compat.patch("fake")
    import fakepeer

    assert fakepeer.numbers.quadruple(3, "odd") == ("peer", 12)
    assert taken_and_left("fakepeer.double") == (1, 1)


def test_ours_calling_the_peer_gets_the_peer(peer: Path) -> None:
    compat.patch("fake")
    import fakepeer

    assert fakepeer.double(3, "calls back") == ("ours", 6)
    assert taken_and_left("fakepeer.double") == (1, 0)


def test_seconds_are_without_those_of_calls_inside(peer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 13.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    CALLS.forget("test.")
    CALLS.run("test.outer", None, lambda: CALLS.run("test.inner", lambda: None, print, (), {}), (), {})
    counts = CALLS.snapshot()
    assert (counts["test.outer"].seconds_left, counts["test.inner"].seconds_taken) == (17.0, 3.0)
    CALLS.forget("test.")


def test_a_class_stays_the_same_class(peer: Path) -> None:
    import fakepeer

    old = fakepeer.Picker(2)
    compat.patch("fake")
    new = fakepeer.Picker(2)
    assert isinstance(new, fakepeer.Base)
    assert type(old) is type(new) is fakepeer.Picker
    assert old.fit([1, 2, 3]).picks == ("peer", [1, 2])
    assert new.fit([1, 2, 3]) is new
    assert new.picks == ("ours", [1, 2])
    assert (len(new), new.k, new.mode) == (2, 2, "plain")
    assert taken_and_left("fakepeer.picks.Picker") == (1, 0)
    assert taken_and_left("fakepeer.picks.Picker.fit") == (1, 1)
    with pytest.raises(AttributeError, match="nothing"):
        _ = old.nothing


def test_constructors_and_methods_that_ours_do_not_take(peer: Path) -> None:
    compat.patch("fake")
    import fakepeer

    odd = fakepeer.Picker(1, mode="odd")
    assert odd.fit([1, 2]).value() == ("peer", [1])
    assert taken_and_left("fakepeer.picks.Picker") == (0, 1)
    picker = fakepeer.Picker(1)
    picker.mode = "set"
    assert picker.fit([1, 2], way="odd").value() == ("peer", [1])
    assert (picker.mode, picker.log) == ("set", ["init", "start"])
    assert taken_and_left("fakepeer.picks.Picker.fit") == (0, 2)
    assert taken_and_left("fakepeer.picks.Picker.value") == (0, 2)
    assert fakepeer.Picker(3).only_theirs() == ("peer", 3)
    assert fakepeer.Picker(3).log == ["init"]  # an attribute of the peer's alone


def test_results_of_ours_and_of_the_peer_do_not_mix(peer: Path) -> None:
    compat.patch("fake")
    import fakepeer

    picker = fakepeer.Picker(1)
    picker.add(7)
    with pytest.raises(NotImplementedError, match=r"only_theirs is left to the peer, but earlier calls"):
        picker.only_theirs()
    assert picker.value() == ("ours", [7])
    with pytest.raises(AttributeError):
        _ = picker.log
    assert picker.fit([1, 2], way="odd").value() == ("peer", [1])  # fit begins anew


def test_the_peers_own_code_uses_a_held_object(peer: Path) -> None:
    compat.patch("fake")
    import fakepeer

    parts = [fakepeer.Picker(1), fakepeer.Picker(2)]
    parts[0].fit([1, 2])
    assert fakepeer.Mixture(2, parts).fit([1]) == ([["init", "start"]] * 2, ["mixed"] * 2)


def test_subclasses(peer: Path) -> None:
    import fakepeer

    class Before(fakepeer.Picker):
        pass

    compat.patch("fake")

    class More(fakepeer.Picker):
        def __init__(self, k: int) -> None:
            self.early = 1
            super().__init__(k)
            self.late = 2

        def best(self, x: list[int]) -> Any:
            return self.fit(x).value()

    class Other(fakepeer.Picker):
        def _start(self, x: list[int]) -> None:
            self.started = True

    assert Before(1).fit([1, 2]).picks == ("ours", [1])
    more = More(1)
    assert more.best([1, 2]) == ("ours", [1])
    assert (more.early, more.late) == (1, 2)
    other = Other(1).fit([1, 2])
    assert (other.picks, other.started) == (("peer", [1]), True)
    assert "Other overrides _start" in compat.report()


def test_objects_are_copied_and_pickled(peer: Path) -> None:
    compat.patch("fake")
    import fakepeer

    picker = fakepeer.Picker(1).fit([1, 2])
    for other in (copy.copy(picker), copy.deepcopy(picker), pickle.loads(pickle.dumps(picker))):
        other.fit([3, 4])
        assert (picker.picks, other.picks) == (("ours", [1]), ("ours", [3]))
    assert pickle.loads(pickle.dumps(fakepeer.double)) is fakepeer.double
    own = fakepeer.Picker(1, "odd")
    assert copy.deepcopy(own).log == ["init"]
    written = pickle.dumps(picker)
    compat.unpatch()
    with pytest.raises(RuntimeError, match=r"compat.patch\('fakepeer'\)"):
        pickle.loads(written)


def test_unpatch_restores_every_attribute(peer: Path) -> None:
    import fakepeer
    import fakepeer.later
    import fakepeer.numbers
    import fakepeer.picks

    namespaces = [fakepeer, fakepeer.later, fakepeer.numbers, fakepeer.picks, fakepeer.Picker, fakepeer.Base]
    before = [dict(vars(namespace)) for namespace in namespaces]
    compat.patch("fake")
    assert [dict(vars(namespace)) for namespace in namespaces] != before
    kept, held = fakepeer.double, fakepeer.Picker(1)
    compat.unpatch()
    for namespace, names in zip(namespaces, before, strict=True):
        assert list(vars(namespace)) == list(names)
        assert all(vars(namespace)[name] is value for name, value in names.items() if name != "__dict__")
    assert kept(1) == ("peer", 2)
    assert held.fit([1, 2]).value() == ("ours", [1])  # what was made in between works on
    assert isinstance(held, fakepeer.Picker)
    assert fakepeer.Picker(1).fit([1]).value() == ("peer", [1])


def test_what_was_imported_in_between_is_restored_too(peer: Path) -> None:
    compat.patch("fake")
    import fakepeer.later

    compat.unpatch("fake")
    assert fakepeer.later.twice is fakepeer.numbers.double
    assert fakepeer.later.twice(1) == ("peer", 2)


def test_patching_twice_and_again(peer: Path) -> None:
    import fakepeer

    compat.patch("fake")
    double, add = fakepeer.double, vars(fakepeer.Picker)["add"]
    compat.patch("fake", "fake")
    assert fakepeer.double is double
    assert vars(fakepeer.Picker)["add"] is add
    fakepeer.double(1)
    assert taken_and_left("fakepeer.double") == (1, 0)
    compat.unpatch()
    compat.unpatch()
    assert fakepeer.double(1) == ("peer", 2)
    compat.patch("fake")
    assert fakepeer.double(1) == ("ours", 2)
    assert taken_and_left("fakepeer.double") == (1, 0)  # counted from the last patch on


def test_patch_that_waits_is_withdrawn(peer: Path) -> None:
    finders = list(sys.meta_path)
    compat.patch("fake")
    compat.unpatch("fake")
    assert sys.meta_path == finders
    import fakepeer

    assert fakepeer.double(1) == ("peer", 2)


def test_threads(peer: Path) -> None:
    compat.patch("fake")
    import fakepeer

    wrong: list[Any] = []

    def work() -> None:
        for i in range(200):
            picker = fakepeer.Picker(1).fit([i])
            if picker.value() != ("ours", [i]) or fakepeer.double(i)[1] != 2 * i:
                wrong.append(i)

    def change() -> None:
        for _ in range(20):
            compat.patch("fake")

    threads = [threading.Thread(target=target) for target in (work, work, work, change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert taken_and_left("fakepeer.double") == (600, 0)
    assert taken_and_left("fakepeer.picks.Picker.fit") == (600, 0)


def test_a_peer_that_is_not_installed(peer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Peer("gone", "not_a_package", ("not-a-package",), ("1", "1"), ())
    monkeypatch.setitem(PEERS, "gone", gone)
    with pytest.raises(ImportError, match=r"gone is not: pip install not-a-package"):
        compat.patch("fake", "gone")
    import fakepeer

    assert fakepeer.double(1) == ("peer", 2)  # all or nothing


def test_bad_names(peer: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown peer 'POT'; valid names: submodlib, "):
        compat.patch("POT")
    with pytest.raises(TypeError, match=r"names must be str, got 3 of type int"):
        compat.unpatch(3)  # type: ignore[arg-type]


def test_a_version_that_was_not_tested(peer: Path) -> None:
    (peer / "fakepeer-1.0.dist-info" / "METADATA").write_text("Name: fakepeer\nVersion: 2.5.1\n")
    import fakepeer

    with pytest.warns(UserWarning, match=r"tested with fake 1, and 2.5.1 is installed") as caught:
        compat.patch("fake")
    assert caught[0].filename == __file__
    assert fakepeer.double(1) == ("ours", 2)


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.9.7", True),
        ("0.9.7.post1", True),
        ("0.9.10", True),
        ("0.9.6", False),
        ("0.10", False),
        (None, False),
    ],
)
def test_versions_are_compared_as_numbers(version: str | None, tested: bool) -> None:
    assert Peer("x", "x", ("x",), ("0.9.7", "0.9.10"), ()).is_tested(version) is tested


RUNNER = """
import sys
from flashcoreset.compat import _peers
from test_compat_patch import FAKE
_peers.PEERS.clear()
_peers.PEERS["fake"] = FAKE
from flashcoreset.compat.__main__ import main
main()
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m flashcoreset.compat ARGUMENTS` with the peer of these tests."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), here, *sys.path])}
    command = [sys.executable, "-c", RUNNER, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)


PROGRAM = """
import atexit, sys
import helper
from fakepeer import double, Picker
print(double(3), double(3, how="odd"), Picker(1).fit([1, 2]).picks, sys.argv, __name__)
atexit.register(lambda: print(double(4), file=sys.stderr))
sys.exit(3)
"""


def test_running_a_program(peer: Path) -> None:
    folder = peer / "elsewhere"
    folder.mkdir()
    (folder / "helper.py").write_text("")
    (folder / "program.py").write_text(PROGRAM)
    for options in ([], ["--only", "fake", "--report"]):
        done = run(peer, *options, "elsewhere/program.py", "--report", "x")
        argv = ["elsewhere/program.py", "--report", "x"]
        assert done.stdout == f"{('ours', 6)} {('peer', 6)} {('ours', [1])} {argv} __main__\n", done.stderr
        assert done.returncode == 3
        first, *told = done.stderr.splitlines()  # after what the program itself does at exit
        assert first == "('ours', 8)"
        if options:
            assert told[0] == "flashcoreset.compat: calls of fake 1.0"
            row = next(line.split() for line in told if line.startswith("fakepeer.double"))
            assert (row[1], row[3]) == ("2", "1")
        else:
            assert len(told) == 1
            assert "4 calls taken over: fakepeer.double 2, fakepeer.picks.Picker 1" in told[0]
            assert "; 1 calls left to the peers: fakepeer.double 1 (" in told[0]


def test_running_a_module(peer: Path) -> None:
    (peer / "as_module.py").write_text(
        "from fakepeer import double\nimport sys\nprint(double(1), sys.argv[1:])\n"
    )
    done = run(peer, "-m", "as_module", "--only", "y")
    assert done.stdout == "('ours', 2) ['--only', 'y']\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing.py"], "there is no file nothing.py"),
        (["--only", "other", __file__], "unknown peer 'other'"),
        (["--only", ",", __file__], "--only: no name given"),
        ([], "the following arguments are required: program"),
    ],
)
def test_bad_command_lines(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
