"""The container image, by reading the Dockerfile and by running what it installs. Building it needs Docker, which no
test has.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML

from components.config import ClusterConfig
from components.runs.environment import git_commit

REPOSITORY = Path(__file__).resolve().parents[1]
FLOORS = ("components", "cuda_ops", "model", "pipelines")
PATTERNS = [
    line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
]
# Imported where they are there, or for what asks for an extra of its own.
OPTIONAL = {
    "apex",
    "amp_C",
    "boto3",
    "botocore",
    "cv2",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "setuptools",
    "supervision",
}


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`declared` sets CUDA_OPS, which later tests of the same process must not see."""
    monkeypatch.setenv("CUDA_OPS", "0")


@pytest.fixture(scope="module")
def requirements() -> ModuleType:
    """.ci/image_requirements.py."""
    spec = importlib.util.spec_from_file_location("image_requirements", REPOSITORY / ".ci" / "image_requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dockerfile() -> Any:
    package = pytest.importorskip(
        "dockerfile_parse", reason="needs dockerfile-parse, of the extra `dev`, which reads the Dockerfile"
    )
    return package.DockerfileParser(path=str(REPOSITORY / "Dockerfile"), cache_content=True)


def instructions(dockerfile: Any, name: str, *, stage: str = "") -> list[str]:
    """What follows an instruction's name, in one stage or in all."""
    found, at = [], ""
    for step in dockerfile.structure:
        if step["instruction"] == "FROM":
            at = step["value"].rpartition(" AS ")[2]
        if step["instruction"] == name and stage in ("", at):
            found.append(step["value"])
    return found


def let_through(root: Path) -> set[str]:
    """The files of a tree that .dockerignore sends to the builder."""
    build = pytest.importorskip(
        "docker.utils.build", reason="needs docker, of Python, which mlflow brings and which reads .dockerignore"
    )
    return {path for path in build.exclude_paths(str(root), list(PATTERNS)) if (root / path).is_file()}


def sources(dockerfile: Any) -> list[str]:
    words = [copy.split() for copy in instructions(dockerfile, "COPY") if "--from=" not in copy]
    return [word for line in words for word in line[:-1] if not word.startswith("--")]


def default_of(dockerfile: Any, argument: str) -> str:
    """The value that an ARG has by default."""
    (value,) = {
        arg.partition("=")[2].strip('"') for arg in instructions(dockerfile, "ARG") if arg.startswith(f"{argument}=")
    }
    return value


def test_what_is_copied_exists_and_what_is_sent_is_copied(dockerfile: Any):
    sent = let_through(REPOSITORY) - {"Dockerfile", ".dockerignore"}
    copied = set(sources(dockerfile))
    for source in copied:
        assert any(path == source or path.startswith(f"{source}/") for path in sent), source
    assert not [path for path in sent if not any(path == s or path.startswith(f"{s}/") for s in copied)]


def test_the_code_the_recipes_and_the_templates_of_jobs_are_sent():
    sent = let_through(REPOSITORY)
    for folder, pattern in [*((floor, "*.py") for floor in FLOORS), ("recipes", "*.yaml"), ("k8s/job", "*.yaml")]:
        files = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / folder).rglob(pattern)}
        assert files
        assert files <= sent
    assert {"params.yaml", "requirements.image.lock"} <= sent


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", "data/raw/a.jpg", "runs/a/config.yaml", "mlruns/0/meta.yaml", "mlflow.db",
     "mlartifacts/a", ".env", ".dvc/config.local", "kubeconfig", "model/__pycache__/a.pyc", "cuda_ops/_C.abi3.so",
     "tests/a.py", "docs/a.md"],
)  # fmt: skip
def test_data_runs_secrets_and_build_outputs_are_never_sent(tmp_path: Path, path: str):
    for name in (path, "model/boxes.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert let_through(tmp_path) == {"model/boxes.py"}


def test_bases_have_versions(dockerfile: Any):
    stages = {line.rpartition(" AS ")[2] for line in instructions(dockerfile, "FROM")}
    for line in instructions(dockerfile, "FROM"):
        base = line.partition(" AS ")[0]
        argument = re.fullmatch(r"\$\{(\w+_IMAGE)\}", base)
        if argument:
            assert re.search(r":\d+\.\d+[\w.-]*$", default_of(dockerfile, argument[1])), "a version, not latest"
        else:
            assert {base.replace("${VARIANT}", variant) for variant in ("gpu", "cpu")} <= stages


def test_the_image_ends_as_the_user_of_the_pods(dockerfile: Any):
    pod = YAML(typ="safe").load((REPOSITORY / "k8s" / "job" / "pod.yaml").read_text())["spec"]
    assert instructions(dockerfile, "FROM")[-1].endswith(" AS runtime")
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert instructions(dockerfile, "USER", stage="runtime") == [user]
    assert all(f"--chown={user}" in c for c in instructions(dockerfile, "COPY", stage="runtime") if "--from" not in c)
    assert f"chown {user}" in " ".join(instructions(dockerfile, "RUN", stage="runtime"))


def test_pid_1_of_the_image_and_of_pods_passes_signals_on(dockerfile: Any):
    """Kubernetes' command takes the place of the entry point."""
    (entry,) = instructions(dockerfile, "ENTRYPOINT", stage="runtime")
    assert json.loads(entry) == ["tini", "--"]
    assert " install --yes --no-install-recommends tini" in instructions(dockerfile, "RUN", stage="runtime")[0]
    job = YAML(typ="safe").load((REPOSITORY / "k8s" / "prepare.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["tini", "-g", "--"]


def test_the_working_folder_and_its_volumes_are_those_of_jobs(dockerfile: Any):
    cluster = ClusterConfig()
    assert instructions(dockerfile, "WORKDIR", stage="runtime") == [cluster.working_dir]
    folders = re.search(r"mkdir -p ([\w ]+?) &&", " ".join(instructions(dockerfile, "RUN", stage="runtime")))
    assert folders is not None
    folders_of_jobs = {f"{cluster.working_dir}/{folder}" for folder in folders[1].split()}
    assert folders_of_jobs == {volume.split(":")[1] for volume in cluster.volumes}


def test_with_a_read_only_root_all_that_is_written_goes_to_tmp(dockerfile: Any):
    (line,) = instructions(dockerfile, "ENV", stage="runtime")
    env = dict(word.split("=", 1) for word in line.split() if "=" in word)
    assert env["PATH"].startswith("/opt/maskrcnn/bin:")
    folders = {name: value for name, value in env.items() if value.startswith("/") and name != "PATH"}
    assert folders.keys() >= {"HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "TORCH_HOME", "TRITON_CACHE_DIR"}
    pod = YAML(typ="safe").load((REPOSITORY / "k8s" / "job" / "pod.yaml").read_text())["spec"]["containers"][0]
    mounts = {mount["mountPath"] for mount in pod["volumeMounts"]}
    assert all(f"/{value.split('/')[1]}" in mounts for value in folders.values())


def test_versions_are_those_that_setup_allows(dockerfile: Any, requirements: ModuleType):
    said = re.search(r"# [\d.]+ has torch (\S+), torchvision (\S+), CUDA \S+, Python ([\d.]+)\.", dockerfile.content)
    assert said is not None
    declared = {r.name: r.specifier for r in map(Requirement, requirements.declared(REPOSITORY))}
    assert declared["torch"].contains(said[1], prereleases=True)
    assert declared["torchvision"].contains(said[2], prereleases=True)
    setup = (REPOSITORY / "setup.py").read_text()
    pythons = re.search(r'python_requires="(.+?)"', setup)
    assert pythons is not None
    for version in (said[3], default_of(dockerfile, "PYTHON_IMAGE").partition(":")[2].partition("-")[0]):
        assert SpecifierSet(pythons[1]).contains(version)
    architectures = default_of(dockerfile, "CUDA_ARCHITECTURES")
    assert architectures.endswith("+PTX"), "for GPUs to come"
    known = re.search(r"ARCHITECTURES = \((.+?)\)", setup)
    assert known is not None
    # CUDA 13 knows no 7.0.
    assert architectures.removesuffix("+PTX").split() == re.findall(r"\d+\.\d", known[1])[1:]


def test_the_lock_says_what_is_installed_but_for_what_the_base_image_has(requirements: ModuleType):
    def entry(requirement: str) -> str:
        return f"{requirement} \\\n    --hash=sha256:{'0' * 64}"

    names = ("torch==2.15.0", "numpy==2.4.6", "triton==3.9.0 ; sys_platform == 'linux'", "nvidia-nccl-cu13==2.30.7")
    ours = [entry("nvidia-ml-py==13.0 ; sys_platform == 'linux'"), entry("kfp==2.17.0")]
    lock = "# made by uv\n" + "\n".join([*map(entry, names), *ours]) + "\n"
    declared = ["torch>=2.11,<2.16", "numpy>=1.26", "kfp>=2"]
    of_nvidia = {"torch": "2.13.0a0+nv26.06", "numpy": "2.1.0", "kfp": "1.0", "triton": "3.7.0+git"}
    assert requirements.requirements(lock, declared, of_nvidia) == (
        [*ours, "torch>=2.11,<2.16", "numpy>=1.26"],
        ["numpy==2.1.0", "torch==2.13.0a0+nv26.06", "triton==3.7.0+git"],
    )
    of_cpus = {"torch": "2.15.0+cpu", "setuptools": "84.2"}
    assert requirements.requirements(lock, declared, of_cpus) == (
        [entry("numpy==2.4.6"), *ours, "torch>=2.11,<2.16"],
        ["torch==2.15.0+cpu"],
    )


def test_what_is_locked_for_the_image_is_what_setup_declares_and_all_that_is_installed_is_hashed(
    dockerfile: Any, requirements: ModuleType
):
    lock = requirements.entries((REPOSITORY / "requirements.image.lock").read_text())
    locked = {requirements.name_of(entry) for entry in lock}
    assert {requirements.name_of(line) for line in requirements.declared(REPOSITORY)} <= locked
    assert {"setuptools", "ninja"} <= locked
    assert not {"pytest", "mypy", "uv"} & locked
    commands = [part for run in instructions(dockerfile, "RUN") for part in run.split("&&") if "pip install" in part]
    unhashed = [command for command in commands if "--require-hashes" not in command]
    assert len(commands) == 5
    # PyTorch's index for CPUs has other files than those with hashes in the lock; the others install this project.
    assert [
        ("TORCH_INDEX" in command, command.strip().endswith("--no-index /wheels/*.whl")) for command in unhashed
    ] == [
        (True, False),
        (False, True),
        (False, True),
    ]


def test_a_change_of_the_code_leaves_the_layer_of_the_dependencies_alone(dockerfile: Any):
    """All that the stage of the dependencies copies is what they are installed from; the code comes in a layer of its
    own.
    """
    copied = [copy.split()[:-1] for copy in instructions(dockerfile, "COPY", stage="dependencies")]
    assert copied == [["setup.py", "pyproject.toml", "requirements.image.lock", "README.md", "LICENSE",
                       ".ci/image_requirements.py"]]  # fmt: skip
    steps = [f"{step['instruction']} {step['value']}" for step in dockerfile.structure]
    large = steps.index("COPY --from=dependencies /opt/maskrcnn /opt/maskrcnn")
    assert steps[large + 1].startswith("RUN --mount=type=bind,from=build,source=/wheels,target=/wheels ")
    assert not [step for step in steps if step.startswith("COPY --from=build")]


def with_dependencies(names: set[str]) -> set[str]:
    """Packages and all that they bring, by what is installed here."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:  # new in setup.py, and not yet in this environment: the image has it all the same
            needed = []
        for requirement in map(Requirement, needed):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.add(requirement.name)
    return found


def test_all_that_the_code_imports_is_installed(requirements: ModuleType):
    pytest.importorskip("kfp", reason="needs kfp, of the extra `pipelines`")
    installed = with_dependencies({Requirement(line).name for line in requirements.declared(REPOSITORY)})
    assert {"kfp", "kfp-kubernetes", "kubernetes", "mlflow", "dvc", "torch"} <= installed
    of_module = packages_distributions()
    imported = set()
    for path in (path for floor in FLOORS for path in (REPOSITORY / floor).rglob("*.py")):
        imported |= set(re.findall(r"^ *(?:import|from) ([A-Za-z]\w*)", path.read_text(), flags=re.MULTILINE))
    foreign = {name for name in imported if name in of_module} - {*FLOORS, *OPTIONAL}
    assert {"torch", "mlflow", "pydantic", "ruamel"} <= foreign
    for module in foreign:
        names = {re.sub(r"[-_.]+", "-", name).lower() for name in of_module[module]}
        assert names & installed, f"{module}: {names} is not in setup.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image's environment has of ours: the wheel of what .dockerignore lets through, unpacked; without the
    compiled library.
    """
    tree, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("site")
    for path in let_through(REPOSITORY):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes((REPOSITORY / path).read_bytes())
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(out)]
    subprocess.run(command, cwd=tree, env={**os.environ, "CUDA_OPS": "0"}, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out)
    return out


def in_image(site: Path, workspace: Path, *words: str) -> str:
    """What a command of the installed package prints, run in another folder with no other code of ours on the path."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "HOME": str(workspace)}
    command = [sys.executable, "-P", *words]
    return subprocess.run(command, cwd=workspace, env=env, check=True, capture_output=True, text=True).stdout


def test_what_is_installed_runs_without_the_tree(site: Path, tmp_path: Path):
    code = "import components.pytorchjob, pipelines.cli; print(components.pytorchjob.__file__)"
    assert in_image(site, tmp_path, "-c", code).startswith(str(site))
    assert "maskrcnn = pipelines.cli:main" in next(site.glob("*.dist-info/entry_points.txt")).read_text()
    assert "pytorchjob" in in_image(site, tmp_path, "-m", "pipelines.cli", "--help")
    assert "coco2017_r50_fpn_1x" in in_image(site, tmp_path, "-m", "pipelines.cli", "recipe", "--list")


@pytest.mark.parametrize("api", ["pytorchjob", "trainjob"])
def test_the_installed_launcher_makes_manifests(site: Path, tmp_path: Path, api: str):
    (tmp_path / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    words = ["-m", "pipelines.cli", "pytorchjob", "--dry-run", "cluster.image=a/b:1", f"cluster.api={api}"]
    manifest = YAML(typ="safe").load(in_image(site, tmp_path, *words))
    assert manifest["kind"].lower() == api
    assert "a/b:1" in str(manifest)


def test_runs_of_the_image_have_the_commit_that_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("MASKRCNN_COMMIT", raising=False)
    assert git_commit() is None
    monkeypatch.setenv("MASKRCNN_COMMIT", "")
    assert git_commit() is None
    monkeypatch.setenv("MASKRCNN_COMMIT", "abc-dirty")
    assert git_commit() == "abc-dirty"


@pytest.mark.parametrize(("target", "variant"), [("image", "gpu"), ("image-cpu", "cpu")])
def test_make_builds_each_variant(dockerfile: Any, target: str, variant: str):
    printed = subprocess.run(
        ["make", "--dry-run", target, "IMAGE=a/b:1"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert f"--build-arg VARIANT={variant} " in printed
    assert "--tag a/b:1 ." in printed
    assert "_IMAGE=" not in printed
    pinned = ["make", "--dry-run", target, "NGC_IMAGE=a@sha256:0", "PYTHON_IMAGE=b@sha256:1"]
    printed += subprocess.run(pinned, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "--build-arg NGC_IMAGE=a@sha256:0 --build-arg PYTHON_IMAGE=b@sha256:1 " in printed
    arguments = {arg.partition("=")[0] for arg in instructions(dockerfile, "ARG")}
    assert set(re.findall(r"--build-arg (\w+)=", printed)) <= arguments
    assert f"base-{variant}" in " ".join(instructions(dockerfile, "FROM"))


def test_make_says_what_is_wanting_where_there_is_no_docker():
    command = ["make", "image", "DOCKER=no-such-builder"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "error: no-such-builder is not on PATH; install Docker" in done.stdout


def test_hadolint_finds_nothing():
    beside = Path(sys.executable).with_name("hadolint")
    if not beside.is_file():
        pytest.skip("needs hadolint, of the extra `dev`")
    done = subprocess.run([beside, "Dockerfile"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
