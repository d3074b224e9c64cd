"""The documents: what they show is run, what they name exists, what they point at is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from gateway.cli.main import _parser
from gateway.settings.loading import PREFIX
from gateway.settings.model import Settings
from tests.documents import tables
from tests.documents.markdown import ROOT, Block, Command, Document, documents
from tests.documents.session import Session, session
from tests.harness import KEY, SECRET, Mount, Simulator, free_port
from tests.promql import series

pytestmark = pytest.mark.timeout(600)  # it builds, starts or plays more than other tests


DOCUMENTS = documents()
ADDRESS = "127.0.0.1:8080"
ABSENT = {"utils.py"}  # deliberately, says ARCHITECTURE.md
SNIPPETS = {"python", "javascript", "html", "java"}  # run by test_snippets.py

# What no test can run, and why. What can be said of it all the same is tried below.
ELSEWHERE = {
    "docker": "needs a daemon: .ci/image builds the Dockerfile as it stands, and runs what it built",
    "kubectl create": "needs a cluster: run as far as it does not",
    "kubectl": "needs a cluster",
    "helm install": "needs a cluster: rendered instead",
    "helm upgrade": "needs a cluster: rendered instead",
    "helm test": "needs a cluster: test_chart.py runs the script that it runs",
    "helm rollback": "needs a cluster",
    "make": "builds or tests everything: run dry",
}

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)


def commands(document: Document) -> list[Command]:
    """Return every command of a document's console blocks."""
    return [command for block in document.blocks("console") for command in block.commands()]


def elsewhere(command: Command) -> str:
    """Return why a command is not run here; nothing when it is."""
    if command.text == "make demo":
        return ""
    return next((why for start, why in ELSEWHERE.items() if re.match(rf"{start}\b", command.text)), "")


NOT_RUN = [command for document in DOCUMENTS for command in commands(document) if elsewhere(command)]


def words(command: Command) -> list[str]:
    """Return a command's words, as a shell takes it apart."""
    return shlex.split(command.text.replace("\\\n", " "), comments=True)


# --- where they point, and what they name -----------------------------------------------------------------


@each_document
def test_documents_lead_somewhere(document: Document) -> None:
    """Every link and picture within the project is there, and so is the heading that a link names."""
    for target in document.targets():
        path, _, fragment = target.partition("#")
        if re.match(r"(https|http):", path):
            continue
        there = (document.path.parent / unquote(path)).resolve() if path else document.path
        assert there.is_relative_to(ROOT)
        assert there.exists(), f"{target} leads nowhere"
        if fragment:
            assert fragment in Document(there.relative_to(ROOT).as_posix()).anchors(), target


@each_document
def test_documents_made_parts_are_current(document: Document) -> None:
    """What the code tells in a document is what the code says now; if not: make docs."""
    assert tables.current(document) == document.text


def test_documents_tell_every_table() -> None:
    """Each table that can be made stands in one document."""
    assert sorted(name for document in DOCUMENTS for name in tables.made(document)) == sorted(tables.TABLES)


def test_documents_tell_the_meaning_of_every_setting() -> None:
    """No setting is left without a word in config/gateway.toml, whence the table has it."""
    told = tables.meanings()
    for section, field in Settings.model_fields.items():
        assert field.annotation is not None
        for name in field.annotation.model_fields:
            assert told[section, name], f"{section}.{name} stands there without a meaning"


def known_names() -> dict[str, set[str]]:
    """Return what documents may name, by kind."""
    rules = [rule for group in yaml.safe_load(tables.RULES.read_text())["groups"] for rule in group["rules"]]
    values = yaml.safe_load((ROOT / "helm" / "sd-progress-gateway" / "values.yaml").read_text())
    return {
        "setting": {
            f"{section}.{name}"
            for section, field in Settings.model_fields.items()
            for name in getattr(field.annotation, "model_fields", {})
        }
        | {
            f"{section}.{name}"
            for section, names in values.items()
            if isinstance(names, dict)
            for name in names
        },
        # A histogram is named by its series, and as a whole.
        "metric": {re.sub("_bucket$", part, name) for name in series() for part in ("", "_bucket")},
        "alert": {rule["alert"] for rule in rules if "alert" in rule},
        "target": set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)),
    }


SECTIONS = "|".join(Settings.model_fields)
NAMES = {
    "setting": rf"(?<![\w./-])(?:{SECTIONS})\.[a-z_]+(?![\w(/])",
    "metric": r"(?<!:)\bsd_gateway_(?!process)\w+",
    "alert": r"\bSdGateway\w+",
    "target": r"(?<=^make )[\w-]+",
}


@each_document
def test_documents_name_what_exists(document: Document) -> None:
    """Settings, their variables, metrics, alerts, make's targets and the commands are the code's own."""
    known = known_names()
    for code in document.code():
        for kind, pattern in NAMES.items():
            for name in re.findall(pattern, code):
                # A file's name looks like a setting's, a recorded metric is one with a suffix.
                if not name.endswith((".py", ".toml", ".md", ".yaml", ".json")):
                    assert name in known[kind], f"there is no {kind} {name}"
        for variable in re.findall(rf"{PREFIX}(\w+__\w+)", code):
            assert variable.lower().replace("__", ".") in known["setting"]
        if code.startswith("sd-gateway "):
            assert_parses(code)
        for scenario in re.findall(r"make bench ARGS=\"?(\w+)", code):
            assert (ROOT / "tests" / "bench" / f"{scenario}.py").exists()


@each_document
def test_documents_name_files_that_exist(document: Document) -> None:
    """A path in backticks begins at the root, in the package, the tests, .ci, or the document's folder."""
    shown = {block.name for block in document.blocks()}
    for code in document.code():
        if code not in ABSENT | shown and re.fullmatch(
            r"\.?[\w-]+(/[\w.-]+)*(\.(py|toml|md|yaml|json|js|lock)|/)", code
        ):
            places = (ROOT, ROOT / "gateway", ROOT / "tests", ROOT / ".ci", document.path.parent)
            assert any((place / code).exists() for place in places), f"there is no {code}"


def assert_parses(code: str) -> None:
    """Check that the command line knows this command and its options."""
    command, *arguments = shlex.split(code)[1:]
    if command == "--version":
        return
    options = _parser()._subparsers._group_actions[0].choices[command]._option_string_actions  # type: ignore[union-attr]
    for argument in arguments:
        assert not argument.startswith("--") or argument in options, f"sd-gateway does not know {code}"


def test_documents_show_nothing_untried() -> None:
    """Every fenced block is a console's, a program's or settings, and tried as such; or it is a drawing."""
    for document in DOCUMENTS:
        for block in document.blocks():
            match block.language:
                case "console" | "toml" | "yaml":
                    assert block.text
                case language if language in SNIPPETS:
                    assert block.name, f"{block} is a program without a name, and no test can find it"
                case _:
                    assert not block.language, f"{block} is in a language that nobody tries"
                    assert "$ " not in block.text, f"{block} looks like a console"


# --- settings ---------------------------------------------------------------------------------------------


SETTINGS = [block for document in DOCUMENTS for block in document.blocks("toml")]
VALUES = [block for document in DOCUMENTS for block in document.blocks("yaml")]


@pytest.mark.parametrize("block", SETTINGS, ids=str)
def test_documents_settings_are_taken(block: Block) -> None:
    """Settings that are shown are settings."""
    assert Settings.model_validate(tomllib.loads(block.text)) != Settings()


@pytest.mark.parametrize("block", VALUES, ids=str)
def test_documents_values_are_taken(block: Block, tmp_path: Path) -> None:
    """Values, which have a file's name, please the chart's schema; other YAML names metrics that exist."""
    if not block.name:
        named = set(re.findall(NAMES["metric"], block.text))
        assert named
        assert named <= known_names()["metric"]
        return
    values = tmp_path / block.name
    values.write_text(block.text, encoding="utf-8")
    given = ["--set", "credentials.existingSecret=progress-pair", "--values", str(values)]
    assert render("progress", "helm/sd-progress-gateway", *given)


# --- commands ---------------------------------------------------------------------------------------------


@contextmanager
def scene(document: Document, simulator: Simulator, tmp_path: Path) -> Iterator[Session]:
    """Give a session in the place where a document supposes its reader."""
    port = str(free_port())
    env = {
        "SD_GATEWAY_SERVER__PORT": port,
        "SPEEDPIX_ENDPOINT": simulator.url,
        "ARGS": "--simulator-port 0",  # of `make demo`
    }
    instead = {ADDRESS: f"127.0.0.1:{port}"}
    scratch, cwd = tmp_path / "scratch", tmp_path / "work"
    scratch.mkdir()
    match document.name:
        case "README.md":
            cwd = ROOT
            env |= empty_environment(tmp_path / "environment")
            instead |= {
                "SPEEDPIX_APP_KEY=…": f"SPEEDPIX_APP_KEY={KEY}",
                "APP_SECRET=…": f"APP_SECRET={SECRET}",
            }
        case "helm/OPERATING.md":
            cwd.mkdir()
            env |= mounted_pairs(tmp_path, simulator)
            for half in ("access_key", "secret_key"):
                (cwd / f"next_{half}").write_text("of the next pair")
        case _:
            cwd.mkdir()
    with session(cwd, scratch=scratch, env=env, instead=instead) as ready:
        if document.name == "helm/OPERATING.md":
            ready.run(Command("sd-gateway serve", ""))
        elif document.name != "README.md":
            ready.run(Command("sd-gateway demo --simulator-port 0", ""))
        yield ready


def empty_environment(folder: Path) -> dict[str, str]:
    """Make an environment for `pip install .`, without a network: what it needs is seen there already."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(packages.strip(), "needed.pth").write_text(sysconfig.get_path("purelib"))
    return {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PIP_PYTHON": str(python),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # so says pip: 0 is none
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def mounted_pairs(tmp_path: Path, simulator: Simulator) -> dict[str, str]:
    """Mount two pairs that upstream knows; return the settings that name the files."""
    folder = tmp_path / "secret"
    folder.mkdir()
    mount = Mount(folder)
    pairs = {"": (KEY, SECRET), "next_": ("following-key", "following-secret")}
    simulator.control("PUT", "/pairs", pairs=dict(pairs.values()))
    files = {
        f"{slot}{half}": text
        for slot, pair in pairs.items()
        for half, text in zip(("access_key", "secret_key"), pair, strict=True)
    }
    mount.publish(**files)
    return {f"SD_GATEWAY_CREDENTIALS__{name.upper()}_FILE": str(mount.file(name)) for name in files}


WITH_COMMANDS = [
    document for document in DOCUMENTS if any(not elsewhere(each) for each in commands(document))
]


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=lambda document: document.name)
def test_documents_commands_do_what_is_shown(
    document: Document, simulator: Simulator, tmp_path: Path
) -> None:
    """Typed in from top to bottom, every command works, and prints what is shown."""
    for program in ("bash", "curl", "make"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here: .ci/run installs it")
    with scene(document, simulator, tmp_path) as typing:
        for command in commands(document):
            if not elsewhere(command):
                typing.run(command)


def render(*arguments: str, cwd: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Return what `helm template` makes of arguments, by kind."""
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("helm is not here: .ci/run fetches it")
    ran = subprocess.run([helm, "template", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(ran.stdout) if manifest}


def folder_with_values(tmp_path: Path) -> Path:
    """Return a folder like the project's, in which the values files that documents show were saved."""
    for document in DOCUMENTS:
        for block in document.blocks("yaml"):
            if block.name:
                (tmp_path / block.name).write_text(block.text, encoding="utf-8")
    (tmp_path / "helm").symlink_to(ROOT / "helm")
    return tmp_path


@pytest.mark.parametrize("command", NOT_RUN, ids=lambda command: " ".join(words(command))[:70])
def test_documents_commands_of_elsewhere_fit(command: Command, tmp_path: Path) -> None:
    """What cannot be run here is at least about this project's targets, files, manifests and commands."""
    match words(command):
        case ["make", *rest]:
            subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, capture_output=True, check=True)
        case ["helm", "install" | "upgrade", "progress", *rest]:
            assert "Deployment" in render("progress", *rest, cwd=folder_with_values(tmp_path))
        case ["helm", "test" | "rollback", release, *_]:
            assert release == "progress"
        case ["docker", "build", *rest]:
            assert (ROOT / rest[-1] / "Dockerfile").exists()
        case ["docker", "run", *rest]:
            assert rest[-1] == "sd-progress-gateway"
        case ["kubectl", "create", "secret", *_]:
            assert_makes_the_secret(command, tmp_path)
        case ["kubectl", *rest]:
            assert_fits_the_chart(rest)
        case _:
            pytest.fail("nothing is tried of this")


def assert_makes_the_secret(command: Command, tmp_path: Path) -> None:
    """Run the first half of a command, without a cluster: the settings name every key of its secret."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here: .ci/run fetches it")
    first, _, second = command.text.partition("|")
    assert second.strip() in {"", "kubectl apply --filename=-"}
    program, *arguments = words(Command(first, ""))
    for argument in arguments:
        if argument.startswith("--from-file="):
            (tmp_path / argument.removeprefix("--from-file=")).write_text("half a pair")
    arguments += [flag for flag in ("--dry-run=client", "--output=yaml") if flag not in arguments]
    made = subprocess.run(
        [program, *arguments],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    secret = yaml.safe_load(made.stdout)
    given = ["--set", f"credentials.existingSecret={secret['metadata']['name']}"]
    if "next_access_key" in secret["data"]:
        given += ["--set", "credentials.next=true"]
    manifests = render("progress", "helm/sd-progress-gateway", *given)
    settings = manifests["ConfigMap"]["data"]["gateway.toml"]
    assert set(secret["data"]) == set(re.findall(r'_file = ".*/(\w+)"', settings))


def assert_fits_the_chart(arguments: list[str]) -> None:
    """Check what a kubectl command names beside what the chart makes, and the container has."""
    secret = "progress-pair"
    given = ["--set", f"credentials.existingSecret={secret}", "--set", "credentials.next=true"]
    deployment = render("progress", "helm/sd-progress-gateway", *given)["Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    if "deploy/" in "".join(arguments):
        assert f"deploy/{deployment['metadata']['name']}" in arguments
    if "--" in arguments:
        program, *rest = arguments[arguments.index("--") + 1 :]
        assert f'ENTRYPOINT ["{program}"]' in (ROOT / "Dockerfile").read_text()
        assert_parses(shlex.join(["sd-gateway", *rest]))
        assert rest[1:] == pod["containers"][0]["args"][1:]
