"""Warnings point at the line that called the library."""

import contextlib
import inspect
import warnings
from importlib.machinery import BuiltinImporter

import numpy as np
import pytest
import sklearn.exceptions
import torch
from sklearn.linear_model import LogisticRegression

import flashcoreset as fc
from flashcoreset._core import errors


def _line() -> int:
    frame = inspect.currentframe()
    return frame.f_back.f_lineno


@contextlib.contextmanager
def _at_this_line(category: type[Warning]):
    """All warnings of the block stand at the block's one line, the one below the `with`."""
    line = inspect.currentframe().f_back.f_back.f_lineno + 1
    with pytest.warns(category) as caught:
        yield caught
    assert {(w.filename, w.lineno) for w in caught} == {(__file__, line)}


def test_the_slow_path_stands_at_the_call(monkeypatch):
    monkeypatch.setattr(errors, "_reported", set())
    monkeypatch.setattr("flashcoreset._core.dispatch.DEFAULTS", {})
    x = torch.eye(3)
    with _at_this_line(fc.SlowPathWarning):
        fc.facility_location(x, 1)


def test_a_call_from_a_users_module_inside_torch_stands_in_the_module(monkeypatch):
    monkeypatch.setattr("flashcoreset._core.dispatch.DEFAULTS", {})
    monkeypatch.setattr(errors, "_reported", set())

    class Module(torch.nn.Module):
        def forward(self, x):
            self.line = _line() + 1
            return fc.sketch(x, 2)

    module = Module()
    with pytest.warns(fc.SlowPathWarning) as caught:
        module(torch.ones(1, 3))
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, module.line)]


def test_with_nothing_outside_it_stands_at_the_first_frame(monkeypatch):
    monkeypatch.setattr(errors, "_package", lambda frame: "torch")
    with pytest.warns(UserWarning, match="text") as caught:
        errors.warn_caller("text", UserWarning)
    assert len(caught) == 1
    assert caught[0].filename != __file__


def test_a_session_without_a_source_is_warned():
    # As in `python` and `python -c`, whose __main__ is said to be built in and has no source to look up.
    code = "from flashcoreset._core.errors import warn_caller\nwarn_caller('text', UserWarning)\n"
    session = {"__name__": "__main__", "__loader__": BuiltinImporter}
    with pytest.warns(UserWarning, match="text") as caught:
        exec(compile(code, "<stdin>", "exec"), session)
    assert [(w.filename, w.lineno) for w in caught] == [("<stdin>", 2)]


def test_warnings_of_models_stand_at_the_call_once():
    x = np.random.default_rng(0).standard_normal((200, 5))
    y = (x @ np.arange(5.0) > 0).astype(int)
    model = LogisticRegression(max_iter=1)
    with _at_this_line(sklearn.exceptions.ConvergenceWarning) as caught:
        fc.autocoreset(x, y, model, "logistic_regression", 40)
    assert len(caught) == len({str(w.message) for w in caught})
    with pytest.raises(sklearn.exceptions.ConvergenceWarning):  # warnings are errors in the tests
        fc.autocoreset(x, y, model, "logistic_regression", 40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        fc.autocoreset(x, y, model, "logistic_regression", 40)
    assert not caught
