"""Warnings point at the line that called the library."""

import contextlib
import inspect
import re
import warnings
from importlib.machinery import BuiltinImporter

import numpy as np
import pytest
import sklearn.base
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline

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


def test_a_warning_of_fits_stands_at_the_call_once_and_is_ours():
    x = np.random.default_rng(0).standard_normal((200, 5))
    y = (x @ np.arange(5.0) > 0).astype(int)
    model = LogisticRegression(max_iter=1)
    with _at_this_line(fc.ConvergenceWarning) as caught:
        coreset = fc.autocoreset(x, y, model, "logistic_regression", 40)
    fits = coreset.info["fits"]
    assert len(caught) == 1
    expected = f"{fits} of {fits} fits of LogisticRegression stopped before they converged.*max_iter, now 1"
    assert re.match(expected, str(caught[0].message))
    assert coreset.info["unconverged"] == fits
    with pytest.raises(fc.ConvergenceWarning):  # warnings are errors in the tests
        fc.autocoreset(x, y, model, "logistic_regression", 40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", fc.ConvergenceWarning)
        fc.autocoreset(x, y, model, "logistic_regression", 40)
    assert not caught
    assert fc.autocoreset(x, y, "logistic_regression", None, 40).info["unconverged"] == 0


def test_other_warnings_of_fits_stand_at_the_call_once_and_those_of_own_models_where_they_are():
    x = np.random.default_rng(0).standard_normal((200, 3))

    class Warns(sklearn.base.BaseEstimator, sklearn.base.TransformerMixin):
        def fit(self, x, y=None):
            warnings.warn("odd", RuntimeWarning, stacklevel=1)
            return self

        def transform(self, x):
            return x

    def loss(model, x, y):
        return np.square(model.predict(x) - y)

    class Own:
        def fit(self, x, y, sample_weight):
            Warns().fit(x)
            self.inner = LinearRegression().fit(x, y, sample_weight)

        def predict(self, x):
            return self.inner.predict(x)

    with _at_this_line(RuntimeWarning) as caught:
        fc.autocoreset(x, x[:, 0], make_pipeline(Warns(), LinearRegression()), loss, 40)
    assert len(caught) == 1
    with pytest.warns(RuntimeWarning, match="odd") as caught:
        fc.autocoreset(x, x[:, 0], Own(), loss, 40)
    assert {w.lineno for w in caught} == {inspect.getsourcelines(Warns.fit)[1] + 1}
