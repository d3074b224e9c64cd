"""The documents: their commands run, the names in them exist, and their links have a target."""

import os
import re
import shlex
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

from gateway.cli.command_line import create_parser
from gateway.settings.model import Settings
from gateway.settings.variables import PREFIX
from tests.docs import tables
from tests.docs.markdown import ROOT, Block, Command, Document, documents
from tests.docs.session import Session, session
from tests.support import yaml_files
from tests.support.harness import KEY, SECRET, Mount, Simulator, free_port
from tests.support.programs import required
from tests.support.promql import series

pytestmark = pytest.mark.timeout(600)  # builds and starts more than other tests


DOCUMENTS = documents()
ADDRESS = "127.0.0.1:8080"
ABSENT = {"utils.py"}  # ARCHITECTURE.md says that it deliberately does not exist
SNIPPETS = {"python", "javascript", "html", "java", "sh"}  # run by test_snippets.py

# Commands that no test can run, and the reason. Tests below check as much of them as they can.
NOT_RUNNABLE = {
    "docker": "needs a daemon: .ci/image builds the unchanged Dockerfile, and tests run the image",
    "git clone": "needs a network and the URL of the repository",
    "kubectl create": "needs a cluster: run as a dry run",
    "kubectl": "needs a cluster",
    "helm install": "needs a cluster: rendered instead",
    "helm upgrade": "needs a cluster: rendered instead",
    "helm test": "needs a cluster: test_chart.py runs its script",
    "helm rollback": "needs a cluster",
    "cd /etc/sd-gateway": "needs an installed service: its names are compared with the unit",
    "systemctl": "needs systemd as the first process: test_systemd.py checks the unit",
    "make": "builds or tests everything: run as a dry run",
}

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)


def commands(document: Document) -> list[Command]:
    """Return every command of a document's console blocks."""
    return [command for block in document.blocks("console") for command in block.commands()]


def reason_not_run(command: Command) -> str:
    """Return the reason why a command is not run here; empty if it is run."""
    if command.text == "make demo":
        return ""
    return next((why for start, why in NOT_RUNNABLE.items() if re.match(rf"{start}\b", command.text)), "")


NOT_RUN = [command for document in DOCUMENTS for command in commands(document) if reason_not_run(command)]


def words(command: Command) -> list[str]:
    """Return a command's words, split as a shell splits them."""
    return shlex.split(command.text.replace("\\\n", " "), comments=True)


# --- links and names --------------------------------------------------------------------------------------


@each_document
def test_documents_links_have_targets(document: Document) -> None:
    """Every link and picture within the project exists, and so does the heading that a link names."""
    for target in document.targets():
        path, _, fragment = target.partition("#")
        if re.match(r"(https|http):", path):
            continue
        linked = (document.path.parent / unquote(path)).resolve() if path else document.path
        assert linked.is_relative_to(ROOT)
        assert linked.exists(), f"{target} does not exist"
        if fragment:
            assert fragment in Document(linked.relative_to(ROOT).as_posix()).anchors(), target


@each_document
def test_documents_generated_parts_are_current(document: Document) -> None:
    """The generated parts match the code; `make docs` updates them."""
    assert tables.current(document) == document.text


def test_documents_contain_every_table() -> None:
    """Each generated table is in exactly one document."""
    assert sorted(name for document in DOCUMENTS for name in tables.generated(document)) == sorted(
        tables.TABLES
    )


def test_documents_describe_every_setting() -> None:
    """Every setting has a meaning in config/gateway.toml, which the table takes it from."""
    meanings = tables.meanings()
    for section, field in Settings.model_fields.items():
        assert field.annotation is not None
        for name in field.annotation.model_fields:
            assert meanings[section, name], f"{section}.{name} has no meaning there"


def known_names() -> dict[str, set[str]]:
    """Return the names that documents may use, by kind."""
    rules = [rule for group in yaml_files.load(tables.RULES.read_text())["groups"] for rule in group["rules"]]
    values = yaml_files.load((ROOT / "helm" / "sd-progress-gateway" / "values.yaml").read_text())
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
        # A histogram may be named by its series or by its base name.
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
    """Settings, their variables, metrics, alerts, make's targets and commands exist in the code."""
    known = known_names()
    for code in document.code():
        for kind, pattern in NAMES.items():
            for name in re.findall(pattern, code):
                # File names look like names of settings.
                if not name.endswith((".py", ".toml", ".md", ".yaml", ".json")):
                    assert name in known[kind], f"{kind} {name} does not exist"
        for variable in re.findall(rf"{PREFIX}(\w+__\w+)", code):
            assert variable.lower().replace("__", ".") in known["setting"]
        if code.startswith("sd-gateway "):
            assert_parses(code)
        for scenario in re.findall(r"make bench ARGS=\"?(\w+)", code):
            assert (ROOT / "tests" / "bench" / f"{scenario}.py").exists()


@each_document
def test_documents_name_files_that_exist(document: Document) -> None:
    """A path in backticks exists below the root, the package, a test folder, .ci or the document's folder."""
    block_names = {block.name for block in document.blocks()}
    for code in document.code():
        if code not in ABSENT | block_names and re.fullmatch(
            r"\.?[\w-]+(/[\w.-]+)*(\.(py|toml|md|yaml|json|js|lock)|/)", code
        ):
            tests = [folder for folder in (ROOT / "tests").iterdir() if folder.is_dir()]
            places = (ROOT, ROOT / "gateway", ROOT / "tests", *tests, ROOT / ".ci", document.path.parent)
            assert any((place / code).exists() for place in places), f"{code} does not exist"


def assert_parses(code: str) -> None:
    """Check that the command line accepts this command and its options."""
    command, *arguments = shlex.split(code)[1:]
    if command == "--version":
        return
    # argparse has no public way to list the options of a command.
    options = create_parser().load(command)._option_string_actions
    for argument in arguments:
        assert not argument.startswith("--") or argument in options, f"sd-gateway does not know {code}"


def test_documents_have_no_untested_block() -> None:
    """Every fenced block is tested as a console, a program or settings, or it is a drawing."""
    for document in DOCUMENTS:
        for block in document.blocks():
            match block.language:
                case "console" | "toml" | "yaml":
                    assert block.text
                case language if language in SNIPPETS:
                    assert block.name, f"{block} is a program without a file name, so no test can find it"
                case "mermaid":
                    assert block.text.startswith("flowchart TD")  # top-down: fits on a phone
                case _:
                    assert not block.language, f"{block} is in a language that no test runs"
                    assert "$ " not in block.text, f"{block} looks like a console"


# --- settings ---------------------------------------------------------------------------------------------


SETTINGS = [block for document in DOCUMENTS for block in document.blocks("toml")]
VALUES = [block for document in DOCUMENTS for block in document.blocks("yaml")]


@pytest.mark.parametrize("block", SETTINGS, ids=str)
def test_documents_settings_are_valid(block: Block) -> None:
    """TOML blocks are valid settings."""
    assert Settings.model_validate(tomllib.loads(block.text)) != Settings()


@pytest.mark.parametrize("block", VALUES, ids=str)
def test_documents_values_are_valid(block: Block, tmp_path: Path) -> None:
    """YAML with a file name matches the chart's schema; other YAML names existing metrics."""
    if not block.name:
        names = set(re.findall(NAMES["metric"], block.text))
        assert names
        assert names <= known_names()["metric"]
        return
    values = tmp_path / block.name
    values.write_text(block.text, encoding="utf-8")
    options = ["--set", "credentials.existingSecret=progress-pair", "--values", str(values)]
    assert render("progress", "helm/sd-progress-gateway", *options)


# --- commands ---------------------------------------------------------------------------------------------


@contextmanager
def scene(document: Document, simulator: Simulator, tmp_path: Path) -> Iterator[Session]:
    """Return a session in the folder and environment that a document assumes."""
    port = str(free_port())
    env = {
        "SD_GATEWAY_SERVER__PORT": port,
        "SPEEDPIX_ENDPOINT": simulator.url,
        "ARGS": "--simulator-port 0",  # of `make demo`
    }
    replacements = {ADDRESS: f"127.0.0.1:{port}"}
    scratch, cwd = tmp_path / "scratch", tmp_path / "work"
    scratch.mkdir()
    match document.name:
        case "README.md":
            cwd = ROOT
            env |= empty_environment(tmp_path / "environment")
            replacements |= {
                "SPEEDPIX_APP_KEY=…": f"SPEEDPIX_APP_KEY={KEY}",
                "APP_SECRET=…": f"APP_SECRET={SECRET}",
                "> access_key": f"> {scratch / 'access_key'}",  # not into the project's folder
                "> secret_key": f"> {scratch / 'secret_key'}",
                "rm access_key secret_key": f"rm {scratch / 'access_key'} {scratch / 'secret_key'}",
            }
        case "helm/OPERATING.md":
            cwd.mkdir()
            env |= mounted_pairs(tmp_path, simulator)
            for half in ("access_key", "secret_key"):
                (cwd / f"next_{half}").write_text("part of the next pair")
        case _:
            cwd.mkdir()
            for block in document.blocks("sh"):
                (cwd / block.name).write_text(block.text, encoding="utf-8")
    with session(cwd, scratch=scratch, env=env, replacements=replacements) as ready:
        if document.name == "helm/OPERATING.md":
            ready.run(Command("sd-gateway serve", ""))
        elif document.name != "README.md":
            ready.run(Command("sd-gateway demo --simulator-port 0", ""))
        yield ready


def empty_environment(folder: Path) -> dict[str, str]:
    """Create an environment for `pip install .` without a network; it sees the installed dependencies."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(packages.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PIP_PYTHON": str(python),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # in pip, 0 disables the isolation
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def mounted_pairs(tmp_path: Path, simulator: Simulator) -> dict[str, str]:
    """Mount two key pairs that the upstream accepts; return the settings that name the files."""
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
    files["next_secret_key"] += "\n"
    mount.publish(**files)
    return {f"SD_GATEWAY_CREDENTIALS__{name.upper()}_FILE": str(mount.file(name)) for name in files}


WITH_COMMANDS = [
    document for document in DOCUMENTS if any(not reason_not_run(each) for each in commands(document))
]


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=lambda document: document.name)
def test_documents_commands_print_what_is_shown(
    document: Document, simulator: Simulator, tmp_path: Path
) -> None:
    """Every command works, run from top to bottom, and prints what the document shows."""
    for name in ("bash", "curl", "make"):
        required(name)
    with scene(document, simulator, tmp_path) as shell:
        for command in commands(document):
            if not reason_not_run(command):
                shell.run(command)


def render(*arguments: str, cwd: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Return the manifests that `helm template` renders, by kind."""
    command = [required("helm"), "template", *arguments]
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return {manifest["kind"]: manifest for manifest in yaml_files.load_all(ran.stdout) if manifest}


def folder_with_values(tmp_path: Path) -> Path:
    """Return a folder with the chart and the values files that the documents show."""
    for document in DOCUMENTS:
        for block in document.blocks("yaml"):
            if block.name:
                (tmp_path / block.name).write_text(block.text, encoding="utf-8")
    (tmp_path / "helm").symlink_to(ROOT / "helm")
    return tmp_path


@pytest.mark.parametrize("command", NOT_RUN, ids=lambda command: " ".join(words(command))[:70])
def test_documents_commands_that_are_not_run_are_plausible(command: Command, tmp_path: Path) -> None:
    """Commands that are not run name existing targets, files, manifests and commands."""
    match words(command):
        case ["git", "clone", _, folder, "&&", "cd", entered]:
            assert folder == entered == "sd-progress-gateway"
        case ["make", *rest]:
            subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, capture_output=True, check=True)
        case ["helm", "install" | "upgrade", "progress", *rest]:
            assert "Deployment" in render("progress", *rest, cwd=folder_with_values(tmp_path))
        case ["helm", "test" | "rollback", release, *_]:
            assert release == "progress"
        case ["docker", *rest]:
            assert_uses_the_image(rest)
        case ["systemctl", *_, unit]:
            assert (ROOT / "config" / f"{unit}.service").exists()
        case ["cd", folder, "&&", "sudo", *rest]:
            assert_matches_the_unit(folder, rest)
        case ["kubectl", *rest]:
            assert_matches_the_chart(command, rest, tmp_path)
        case _:
            pytest.fail("no check covers this command")


def assert_uses_the_image(arguments: list[str]) -> None:
    """Check that a docker command names the Dockerfile's folder, the image or a compose file."""
    match arguments:
        case ["build", *_, folder]:
            assert (ROOT / folder / "Dockerfile").exists()
        case ["run", *_, image]:
            assert image == "sd-progress-gateway"
        case ["compose", "--file", file, "up", *_]:
            assert (ROOT / file).exists()  # test_compose.py checks it
        case ["compose", "--file", file, "exec", service, program, *rest]:
            assert service in yaml_files.load((ROOT / file).read_text())["services"]
            assert f'ENTRYPOINT ["{program}"]' in (ROOT / "Dockerfile").read_text()
            assert_parses(shlex.join(["sd-gateway", *rest]))
        case _:
            pytest.fail("no check covers this command")


def assert_creates_the_secret(command: Command, tmp_path: Path) -> None:
    """Run the first half of a command as a dry run: the settings name every key of its secret."""
    required("kubectl")
    first, _, second = command.text.partition("|")
    assert second.strip() in {"", "kubectl apply --filename=-"}
    program, *arguments = words(Command(first, ""))
    for argument in arguments:
        if argument.startswith("--from-file="):
            (tmp_path / argument.removeprefix("--from-file=")).write_text("half a pair")
    arguments += [flag for flag in ("--dry-run=client", "--output=yaml") if flag not in arguments]
    ran = subprocess.run(
        [program, *arguments],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    secret = yaml_files.load(ran.stdout)
    options = ["--set", f"credentials.existingSecret={secret['metadata']['name']}"]
    if "next_access_key" in secret["data"]:
        options += ["--set", "credentials.next=true"]
    manifests = render("progress", "helm/sd-progress-gateway", *options)
    settings = manifests["ConfigMap"]["data"]["gateway.toml"]
    assert set(secret["data"]) == set(re.findall(r'_file = ".*/(\w+)"', settings))


def assert_matches_the_unit(folder: str, arguments: list[str]) -> None:
    """Compare the folder, variables, files and program of a command with systemd's unit."""
    *assignments, program, command = arguments
    unit = (ROOT / "config" / "sd-gateway.service").read_text().splitlines()
    assert {f"WorkingDirectory={folder}", f"ExecStart={program} serve"} <= set(unit)
    assert assignments
    for assignment in assignments:
        variable, _, path = assignment.partition("=")
        name = Path(path).name
        assert {f"Environment={variable}=%d/{name}", f"LoadCredential={name}:{path}"} <= set(unit)
    assert_parses(f"sd-gateway {command}")


def assert_matches_the_chart(command: Command, arguments: list[str], tmp_path: Path) -> None:
    """Compare the names in a kubectl command with the chart's manifests and the image."""
    if arguments[:2] == ["create", "secret"]:
        assert_creates_the_secret(command, tmp_path)
        return
    secret = "progress-pair"
    options = ["--set", f"credentials.existingSecret={secret}", "--set", "credentials.next=true"]
    deployment = render("progress", "helm/sd-progress-gateway", *options)["Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    if "deploy/" in "".join(arguments):
        assert f"deploy/{deployment['metadata']['name']}" in arguments
    if "--" in arguments:
        program, *rest = arguments[arguments.index("--") + 1 :]
        assert f'ENTRYPOINT ["{program}"]' in (ROOT / "Dockerfile").read_text()
        assert_parses(shlex.join(["sd-gateway", *rest]))
        assert rest[1:] == pod["containers"][0]["args"][1:]
