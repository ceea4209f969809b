"""What README.md and the pages in docs/ show is true: code runs, commands exist, links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from autocompress_fast.cli.commands import commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def code(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("in_an_empty_folder")
def test_the_example_of_the_readme_runs(capsys):
    (example,) = code(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "all weights" in printed
    assert float(re.search(r"accuracy without torch: ([\d.]+)", printed)[1]) > 0.5


@pytest.mark.usefixtures("in_an_empty_folder")
def test_the_code_of_the_guide_runs():
    names = {}
    for number, block in enumerate(code(ROOT / "docs" / "guide.md", "python"), 1):
        exec(compile(block, f"docs/guide.md, block {number}", "exec"), names)
    assert number >= 5
    assert names["result"].rates["params"] >= 6
    assert Path("runs/digits/plots/weights.png").is_file()


def test_the_two_commands_of_the_readme_are_where_ci_finds_them():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = dict(re.findall(r"<!-- ci: (\w+) -->\s*```bash\n(.*?)\n```", text))
    assert marked == {
        "install": 'pip install -c constraints.txt ".[demo]" && autocompress demo',
        "test": 'pip install -c constraints.txt ".[test]" && pytest -n auto',
    }


def test_commands_and_options_that_pages_mention_exist():
    runner = CliRunner()
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    mentioned = {name for text in texts.values() for name in re.findall(r"\bautocompress (?!--)([a-z]+)\b", text)}
    known = {command.name or command.callback.__name__ for command in commands.registered_commands}
    assert known <= mentioned <= known
    for page in (ROOT / "README.md", ROOT / "docs" / "guide.md"):
        lines = [*re.findall(r"`(autocompress [^`]*)`", texts[page]), *"".join(code(page, "")).splitlines()]
        for line in lines:
            words = re.split(r"\s{2,}", line)[0].split()
            if words[:1] == ["autocompress"] and words[1] in known:
                options = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
                shown = runner.invoke(commands, [words[1], "--help"], env={"COLUMNS": "200"}, color=False).stdout
                assert options <= set(re.findall(r"--[a-z-]+", shown)), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_the_files_that_the_guide_lists_are_those_of_a_run():
    listed = set(re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for row in listed for name in re.findall(r"`([^`]+)`", row)}
    written = (ROOT / "autocompress_fast" / "pipeline.py").read_text() + (
        ROOT / "autocompress_fast" / "cli" / "job.py"
    ).read_text()
    for name in named - {"base.ckpt", "round1.admm.ckpt", "purify1.json", "purify1.steps.json", "plots/"}:
        assert f'"{name}"' in written, name
