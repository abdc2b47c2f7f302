"""What the pages say is so: programs run, defaults are the settings', links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from command_runner import Home
from emulator_server import EmulatorServer
from presort.config import Settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def programs(page: Path) -> list[str]:
    """Return a page's Python programs; what shows a fragment imports nothing."""
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [program for program in found if "import " in program]


PROGRAMS = [pytest.param(text, id=f"{page.stem}-{n}") for page in PAGES[:1] for n, text in enumerate(programs(page), 1)]
PROGRAMS += [pytest.param(path.read_text(encoding="utf-8"), id=path.name) for path in EXAMPLES]


@pytest.fixture(scope="module")
def emulator():
    """Stand in for both vendors."""
    with EmulatorServer(batch_seconds=0.2) as server:
        yield server


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program, emulator, tmp_path):
    """Every program of the README, and every example, runs as it stands, prints answers, and sends a batch."""
    home = Home(tmp_path)
    environment = home.environment(
        ANTHROPIC_API_KEY="test-key",
        ANTHROPIC_BASE_URL=emulator.url,
        OPENAI_API_KEY="test-key",
        OPENAI_BASE_URL=f"{emulator.url}/v1",
        PRESORT_BATCHING__FLUSH_SECONDS="1.5",
        PRESORT_BATCHING__POLL_INTERVAL_SECONDS="0.2",
    )
    before = len(emulator.record()["batches"])

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=home.work, env=environment, capture_output=True, text=True, timeout=60
    )

    assert 0 == done.returncode, done.stderr
    assert "EMULATED" in done.stdout
    assert before + 1 == len(emulator.record()["batches"])


def defaults(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Return every setting's default by its dotted name."""
    found: dict[str, object] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            found |= defaults(type(field.default), f"{prefix}{name}.")
        else:
            found[prefix + name] = field.default
    return found


def test_settings():
    """The README's table holds every setting that does something, with its default."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([a-z_.]+)` \| (.*?) \|", readme, re.MULTILINE))
    expected = {name: value for name, value in defaults(Settings).items() if not name.startswith("caching.")}

    assert sorted(expected) == sorted(table)
    for name, value in expected.items():
        if value is not None:
            assert f"`{str(value).lower()}`" == table[name], name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    """Links between the pages lead to files and headings that exist."""
    for target in re.findall(r"\]\(([^)#]*(?:#[^)]*)?)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        goal = (page.parent / file).resolve() if file else page
        assert goal.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles], target
