"""The public interface is one table, in `docs/api.md`: nothing more, nothing less, nothing else."""

from __future__ import annotations

import builtins
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import presort
from presort import errors, runtime
from presort.errors import ConfigurationError

TABLE = Path(__file__).parent.parent / "docs" / "api.md"
ISSUE = """
configure wrap OptimizedLLMWrapper batch urgent run submit stream flush drain close jobs transport errors
finish_run payload
""".split()


def rows() -> dict[str, tuple[str, str, list[str]]]:
    """Read the table: name -> (as written, what it does, what it raises)."""
    found = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            written = cells[0].strip("`")
            found[written.partition("(")[0]] = written, cells[1], re.findall(r"`(\w+)`", cells[2])
    return found


def signature(name: str) -> str:
    """Write a public name as the table does: parameters and defaults, without types."""
    thing: Any = getattr(presort, name)
    if inspect.ismodule(thing):
        return name
    plain = inspect.signature(thing)
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in plain.parameters.values()]
    return name + str(plain.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_names():
    """`presort.__all__`, the table and the names that were asked for are the same."""
    assert sorted(ISSUE) == sorted(presort.__all__)
    assert sorted(ISSUE) == sorted(rows())


@pytest.mark.parametrize("name", ISSUE)
def test_signature(name):
    """Each name has the parameters and defaults that the table shows."""
    pytest.importorskip("langchain_core") if name == "OptimizedLLMWrapper" else None

    assert signature(name) == rows()[name][0]


@pytest.mark.parametrize("name", ISSUE)
def test_errors_in_the_table_exist(name):
    """Whatever the table says is raised exists, in `presort.errors` or in Python."""
    for error in rows()[name][2]:
        kind = getattr(errors, error, None) or getattr(builtins, error)
        assert issubclass(kind, Exception)


@pytest.mark.parametrize("name", ISSUE)
def test_docstring(name):
    """Each name has a docstring whose first line is a sentence."""
    pytest.importorskip("langchain_core") if name == "OptimizedLLMWrapper" else None
    text = inspect.getdoc(getattr(presort, name))

    assert text is not None
    assert text.splitlines()[0].endswith((".", "what the caller does next."))


def test_dir():
    """`dir(presort)` shows every public name, so that completion does."""
    assert set(presort.__all__) <= set(dir(presort))


def test_version():
    """The package says its version."""
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", presort.__version__)


def test_errors_are_of_one_family():
    """Every error is a `PresortError`, and those that replace a standard one are that as well."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]

    assert all(issubclass(kind, errors.PresortError) for kind in kinds)
    assert {
        "ConfigurationError": ValueError,
        "InputError": ValueError,
        "MissingExtraError": ImportError,
        "EngineError": RuntimeError,
        "ClosedError": RuntimeError,
        "DeadlockError": RuntimeError,
    } == {
        kind.__name__: base
        for kind in kinds
        for base in (ValueError, ImportError, RuntimeError)
        if issubclass(kind, base)
    }


@pytest.mark.parametrize("deadline", [0, -1, float("nan")])
def test_wrong_deadline(deadline):
    """A deadline that is no positive number is refused where it is given."""
    with pytest.raises(ConfigurationError, match="deadline"), presort.batch(deadline=deadline):
        pass
    with pytest.raises(ConfigurationError, match="deadline"):
        presort.stream([], deadline=deadline)
    with pytest.raises(ConfigurationError, match="deadline"):
        presort.submit([], run="x", deadline=deadline)


@pytest.mark.parametrize("name", ["", "x" * 201])
def test_wrong_run(name, monkeypatch):
    """A run's name is refused where it is given if it is empty or too long, in the environment too."""
    with pytest.raises(ConfigurationError, match="run"), presort.run(name):
        pass
    with pytest.raises(ConfigurationError, match="run"):
        presort.submit([], run=name)
    monkeypatch.setenv("PRESORT_RUN", name)
    from presort.context import current_run

    if name:
        with pytest.raises(ConfigurationError, match="run"):
            current_run()
    else:
        assert current_run() is None


def test_contexts_nest():
    """The innermost of `batch` and `urgent` counts, and leaving it restores the one outside."""
    from presort.context import current_wish
    from presort.request import Route

    def route() -> Route | None:
        wish = current_wish()
        return None if wish is None else wish.route

    seen = [route()]
    with presort.batch():
        seen.append(route())
        with presort.urgent():
            seen.append(route())
            with presort.batch(deadline=5):
                seen.append(route())
            seen.append(route())
        seen.append(route())
    seen.append(route())

    assert [None, Route.BATCH, Route.STANDARD, Route.BATCH, Route.STANDARD, Route.BATCH, None] == seen


def test_without_an_engine(monkeypatch):
    """`flush`, `drain` and `close` before any call do nothing, and start nothing."""
    monkeypatch.setattr(runtime, "_engine", None)
    presort.flush()
    presort.close()

    assert True is presort.drain(0)
    assert not runtime.started()
