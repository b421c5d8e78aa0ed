"""What stands in the repository for those who come to it: forms that are read, a release that would
find what it names.
"""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from safegene_trl.commands.main import COMMANDS


ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def release():
    return yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text())["jobs"]["build"]


def test_the_citation_is_of_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert found["version"] == VERSION and found["license"] == "Apache-2.0"
    assert "2606.06519" in str(found["references"])


@pytest.mark.parametrize("form", ["bug", "family"])
def test_a_form_can_be_filled_in(form):
    found = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
    assert found["name"] and found["description"]
    names = [part["id"] for part in found["body"]]
    assert len(names) == len(set(names))
    assert all(part["type"] in ("input", "textarea") for part in found["body"])
    assert all(part["attributes"]["label"] for part in found["body"])


def test_the_links_of_the_security_policy_lead_somewhere():
    text = (GITHUB / "SECURITY.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 2 and all((GITHUB / link).is_file() for link in links)


def test_a_release_runs_what_is_there():
    runs = "\n".join(step.get("run", "") for step in release()["steps"])
    assert "bash .ci/run" in runs and (ROOT / ".ci" / "run").is_file()
    assert set(re.findall(r"safegene (\w+) ", runs)) == {"sign"} <= set(COMMANDS)
    assert (ROOT / re.search(r"cp -r (\S+)", runs)[1] / "safegene_config.json").is_file()
    for secret in re.findall(r"secrets\.(\w+)", str(release())):
        assert f"${{{{ secrets.{secret}" not in runs  # only by the environment, never in a script


@pytest.mark.parametrize(
    ("tag", "passes"), [(f"v{VERSION}", True), ("v9.9.9", False), ("v0.0.1", False)]
)
def test_a_release_needs_its_version_and_its_part_of_the_changelog(tag, passes, tmp_path):
    (script,) = (s["run"] for s in release()["steps"] if s.get("name", "").startswith("The tag is"))
    for name in ("pyproject.toml", "CITATION.cff"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "CHANGELOG.md").write_text(
        f"# Changelog\n\n## Unreleased\n\n- more\n\n## {VERSION}\n\n- this\n\n## 0.0.1\n\n- that\n"
    )
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"},
        timeout=30,
    )
    assert (done.returncode == 0) == passes
    if passes:
        assert (tmp_path / "notes.md").read_text().split() == ["-", "this"]
