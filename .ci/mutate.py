"""Mutation testing: put small mistakes (mutants) into the code, one at a time, and see whether the tests notice.

    make mutate                                        # 200 mutants of the whole code
    make mutate FILES=model/inference/postprocess.py   # of one file, or of several in quotes; also SAMPLE=50, SEED=1

Cosmic Ray makes the mutants: other numbers, operators, comparisons and constants, loops that never run, decorators left
out. Annotations and guards (`zip(strict=True)`, `dataclass(frozen=True)`) stay as they are. Locations are sampled, not
mutants: there are a dozen mutants of a `+`, and it is as likely to be drawn as a `<`.

A mutant is tested with the quick tests nearest to its file: test files of the same name, then those that import it,
then those that import its importers, and so on; the first four. They run once without a mutant, under coverage, to find
the tests that execute the mutant's line; these are used, the quickest first, or all if none does, or an import does. A
survivor is tried with the files that follow, none of which is begun after five minutes, so tests that were not reached
may still notice it. A mutant that exceeds its time counts as noticed, and a test run without a verdict as neither.

Everything happens in a copy of the tree; each test run is forked from a process that has imported torch.
"""

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# Threads do not survive a fork.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cuda_ops", "model", "components")
GUARDS = {"zip": "strict", "dataclass": "frozen"}  # keywords that matter to code with a mistake alone
PRELOADED = (
    "torch torchvision scipy.stats pycocotools.cocoeval pydantic ruamel.yaml rich.progress matplotlib.pyplot mlflow "
    "kubernetes.client hypothesis"
)
NEAREST = 4  # test files that every mutant is tested with
FURTHER_S = 300.0  # time for more of them, if it survives
BASELINE_S = 1200  # time limit of a test file without a mutant
LEAST_S, SLOWER = 30.0, 5.0  # time limit of a mutant's tests: LEAST_S + SLOWER × their time without it


@dataclass(frozen=True)
class Mutant:
    """One mistake at one location."""

    file: str
    line: int
    lines: range  # lines of the statement
    operator: str
    original: str  # the file's text
    mutated: str


@dataclass
class Baseline:
    """Results of tests without a mutant: which pass, how long they take, which lines they execute."""

    files: set[str] = field(default_factory=set)  # test files that ran
    seconds: dict[str, float] = field(default_factory=dict)  # passing test → time
    tests: dict[tuple[str, int], set[str]] = field(default_factory=dict)  # (file, line) → the tests that execute it

    def of(self, mutant: Mutant, files: Sequence[str]) -> list[str]:
        """The tests of some files for a mutant, the quickest first."""
        found = {test for line in mutant.lines for test in self.tests.get((mutant.file, line), ())}
        found &= self.seconds.keys()
        tests = {test for test in self.seconds if test.split("::")[0] in files}
        return sorted(found & tests if found else tests, key=lambda test: self.seconds[test])


class Recorder:
    """Plugin of pytest that records the lines each test executes, including those of its fixtures of any scope."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.fixtures: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self._contexts = [""]

    def _within(self, context: str) -> Iterator[None]:
        self._contexts.append(context)
        self.coverage.switch_context(context)
        try:
            yield
        finally:
            self._contexts.pop()
            self.coverage.switch_context(self._contexts[-1])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.fixtures[item.nodeid] = getattr(item, "fixturenames", [])
        yield from self._within(f"test {item.nodeid}")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        yield from self._within(f"fixture {fixturedef.argname}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if not report.passed:  # skipped ones notice nothing either
            self.failed.add(report.nodeid)


def forked(work: Callable[[], int], timeout_s: float, output: Path) -> int | None:
    """Run a function in a forked process and return its status; None if it took too long. Its children are killed."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.setsid()
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 3
        try:
            status = work()
        finally:
            os._exit(status)
    until, pid = time.monotonic() + timeout_s, 0
    while not pid and time.monotonic() < until:
        time.sleep(0.02)
        pid, status = os.waitpid(child, os.WNOHANG)
    with suppress(ProcessLookupError):  # with servers that the tests have left running
        os.killpg(child, signal.SIGKILL)
    if pid:
        return os.waitstatus_to_exitcode(status)
    os.waitpid(child, 0)
    return None


def run_tests(tree: Path, tests: Sequence[str], scratch: Path, plugins: Sequence[object] = ()) -> int:
    """Run pytest on the copy of the tree, in this process; up to the first failure if there are no plugins."""
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={scratch / 'pytest'}", *([] if plugins else ["-x"])]
    return int(pytest.main([*options, *tests], plugins=list(plugins)))


def measure(tree: Path, file: str, scratch: Path, baseline: Baseline) -> None:
    """Run a test file without a mutant and add its results to the baseline, unless they are there."""
    import coverage

    if file in baseline.files:
        return
    baseline.files.add(file)
    recorded, data_file = scratch / "recorded.json", scratch / "coverage"
    recorded.unlink(missing_ok=True)
    data_file.unlink(missing_ok=True)

    def work() -> int:
        sources = [str(tree / package) for package in PACKAGES]
        recording = coverage.Coverage(data_file=str(data_file), source=sources, messages=False)
        recorder = Recorder(recording)
        recording.start()
        status = run_tests(tree, [file], scratch, [recorder])
        recording.stop()
        recording.save()
        recorded.write_text(json.dumps([recorder.fixtures, recorder.seconds, sorted(recorder.failed)]))
        return status

    forked(work, BASELINE_S, scratch / "baseline.log")
    if not recorded.exists():
        print(f"  {file}: did not end, and is left out; see {scratch / 'baseline.log'}")
        return
    fixtures, seconds, failed = json.loads(recorded.read_text())
    if failed:
        print(f"  {file}: {len(failed)} tests do not pass (or skip) without a mistake, and are left out")
    baseline.seconds |= {test: spent for test, spent in seconds.items() if test not in failed}
    users: dict[str, set[str]] = {}
    for test, names in fixtures.items():
        for name in names:
            users.setdefault(f"fixture {name}", set()).add(test)
    data = coverage.CoverageData(basename=str(data_file))
    data.read()
    for path in data.measured_files():
        for line, contexts in data.contexts_by_lineno(path).items():
            tests = {c.removeprefix("test ") for c in contexts if c.startswith("test ")}
            tests = tests.union(*(users.get(c, set()) for c in contexts))
            baseline.tests.setdefault((str(Path(path).relative_to(tree)), line), set()).update(tests)


@cache
def imports(path: Path) -> set[str]:
    """The files of PACKAGES that a file imports, at any level."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = [f"{name.replace('.', '/')}{end}" for name in names for end in (".py", "/__init__.py")]
    return {file for file in files if file.startswith(PACKAGES) and (ROOT / file).is_file()}


def nearest_tests(file: str) -> list[str]:
    """Test files, nearest first: those of its name, those that import it, then the same for its importers, and so on.

    Among equals, those with the fewest imports come first.
    """
    known = {
        str(p.relative_to(ROOT)): imports(p) for package in (*PACKAGES, "tests") for p in (ROOT / package).rglob("*.py")
    }
    tests = {path for path in known if path.startswith("tests/") and Path(path).name.startswith("test_")}
    found: list[str] = []
    seen, ring = {file}, {file}
    while ring:
        folders = {(f"tests/{Path(f).parts[0]}/", f"test_{Path(f).name}") for f in ring}
        ends = [(folder, f"/{name}") for folder, name in folders]
        namesakes = {path for path in tests for start, end in ends if path.startswith(start) and path.endswith(end)}
        users = {path for path, used in known.items() if used & ring}
        new = (namesakes | users) & tests - set(found)
        found += sorted(new, key=lambda path: (path not in namesakes, len(known[path]), path))
        ring = users - seen
        seen |= ring
    return found


def mutants(files: Iterable[str], sample: int, seed: int) -> list[Mutant]:
    """Draw a sample of locations and, for each, one of the possible mutants."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    operators = {name: get_operator(name) for name in operator_names()}
    operators = {name: kind() for name, kind in operators.items() if not kind.arguments()}
    candidates: dict[tuple[str, Any, Any], list[tuple[str, int]]] = {}
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in sorted(files)}
    for file, text in texts.items():
        nodes, left_alone = list(ast_nodes(get_ast(text))), annotations(text)
        for name, operator in operators.items():
            positions = [position for node in nodes for position in operator.mutation_positions(node)]
            for occurrence, (start, end) in enumerate(positions):
                if not any(first <= start < last for first, last in left_alone):
                    candidates.setdefault((file, start, end), []).append((name, occurrence))
    rng = random.Random(seed)
    chosen = rng.sample(sorted(candidates), min(sample, len(candidates)))
    print(f"{len(chosen)} of {len(candidates)} places in {len(texts)} files, seed {seed}")
    found = []
    for file, start, end in chosen:  # in the order drawn, so that an interrupted run is a sample too
        mistakes = candidates[file, start, end]
        for name, occurrence in rng.sample(mistakes, len(mistakes)):
            mutated = None
            with suppress(AttributeError):  # Cosmic Ray's ExceptionReplacer cannot replace a dotted name
                mutated = mutate_code(texts[file], operators[name], occurrence)
            if mutated is not None and is_python(mutated):
                lines = statement(texts[file], start[0])
                found.append(Mutant(file, start[0], lines, name.removeprefix("core/"), texts[file], mutated))
                break
    return found


def is_python(text: str) -> bool:
    """False if a text cannot be parsed, or a signature has `/`: Cosmic Ray takes its `*` for a product."""
    with suppress(SyntaxError):
        return not any(isinstance(node, ast.arguments) and node.posonlyargs for node in ast.walk(ast.parse(text)))
    return False


def annotations(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Positions of type annotations, guards and `if __name__ …` blocks, in which mutants change no behaviour."""
    nodes: list[ast.expr | ast.stmt | None] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            nodes.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes.append(node.returns)
        elif isinstance(node, ast.Call) and (guard := GUARDS.get(ast.unparse(node.func))):
            nodes += [word.value for word in node.keywords if word.arg == guard]
        elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            nodes.append(node)
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in nodes if n is not None]


def statement(text: str, line: int) -> range:
    """The lines of the innermost statement with a line, or its head; none of what runs at import, for all tests."""
    found, is_later = range(0), False
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.stmt):
            continue
        body, end = getattr(node, "body", None), node.end_lineno or node.lineno
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.body[0].lineno <= line <= end:
            is_later = True
        if node.lineno <= line <= (last := body[0].lineno - 1 if body else end):
            found = range(node.lineno, last + 1)  # inner ones come later
    return found if is_later else range(0)


def copy_tree() -> Path:
    """Copy the files that git tracks or would add, and the compiled operators, into a temporary folder (TMPDIR)."""
    tree = Path(tempfile.mkdtemp(prefix="mutate-"))
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in [*listed, *(str(p.relative_to(ROOT)) for p in ROOT.glob("cuda_ops/_C*.so"))]:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def verdict(mutant: Mutant, tree: Path, tests: Sequence[str], baseline: Baseline, scratch: Path) -> str:
    """Put the mutant into the copy, run the tests, undo it; return "noticed", "SURVIVES" or "UNDECIDED"."""
    if not tests:
        return "SURVIVES"
    place, log = tree / mutant.file, scratch / "mutant.log"
    timeout_s = LEAST_S + SLOWER * sum(baseline.seconds[test] for test in tests)

    def status_of(names: Sequence[str]) -> int | None:
        """The status; that of an interruption if a test file cannot be collected."""
        status = forked(lambda: run_tests(tree, names, scratch), timeout_s, log)
        is_unreadable = status == pytest.ExitCode.USAGE_ERROR and "ERROR collecting" in log.read_text()
        return pytest.ExitCode.INTERRUPTED if is_unreadable else status

    place.write_text(mutant.mutated, encoding="utf-8")
    try:
        status = status_of(tests)
        if status == pytest.ExitCode.USAGE_ERROR:  # parameters were renamed
            status = status_of(sorted({test.split("::")[0] for test in tests}))
    finally:
        place.write_text(mutant.original, encoding="utf-8")
    if status in (None, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        return "noticed"
    return "SURVIVES" if status == pytest.ExitCode.OK else "UNDECIDED"


def changed_lines(mutant: Mutant) -> list[str]:
    """The changed lines, before and after."""
    lines = difflib.unified_diff(mutant.original.splitlines(), mutant.mutated.splitlines(), lineterm="", n=0)
    return [line for line in list(lines)[2:] if not line.startswith("@@")]


def main() -> None:
    """Command line of `make mutate`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="Python files to mutate (all)")
    parser.add_argument("--sample", type=int, default=200, help="number of mutants (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sample (%(default)s)")
    args = parser.parse_args()
    if missing := [file for file in args.files if not (ROOT / file).is_file()]:
        sys.exit(f"error: files must be Python files of {', '.join(PACKAGES)}, relative to the root, got {missing[0]}")
    files = args.files or [str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    sample = mutants(files, args.sample, args.seed)
    for name in PRELOADED.split():
        __import__(name)
    tree, scratch = copy_tree(), Path(tempfile.mkdtemp(prefix="mutate-"))
    try:
        survivors, verdicts = try_all(sample, tree, scratch)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
    print("\nsurvivors:" if survivors else "\nno survivor")
    for mutant in survivors:
        print(f"{mutant.file}:{mutant.line}", *changed_lines(mutant), sep="\n    ")
    decided = len(sample) - verdicts["UNDECIDED"]
    near, left = verdicts["noticed further away"] + len(survivors), len(survivors)
    print(f"{near} of {decided} survive the nearest tests: {near / max(decided, 1):.1%}")
    print(f"{left} survive those further away too: {left / max(decided, 1):.1%}; {verdicts['UNDECIDED']} undecided")


def try_all(sample: Sequence[Mutant], tree: Path, scratch: Path) -> tuple[list[Mutant], Counter[str]]:
    """Test all mutants; return those that survive and the number of each verdict."""
    baseline, survivors, verdicts = Baseline(), [], Counter[str]()
    for number, mutant in enumerate(sample, start=1):
        began = time.monotonic()
        files = nearest_tests(mutant.file)
        for file in files[:NEAREST]:
            measure(tree, file, scratch, baseline)
        found = verdict(mutant, tree, baseline.of(mutant, files[:NEAREST]), baseline, scratch)
        until = time.monotonic() + FURTHER_S
        for file in sorted(files[NEAREST:], key=lambda file: file not in baseline.files):
            if found != "SURVIVES" or time.monotonic() > until:
                break
            measure(tree, file, scratch, baseline)
            if verdict(mutant, tree, baseline.of(mutant, [file]), baseline, scratch) == "noticed":
                found = "noticed further away"
        survivors += [mutant] if found == "SURVIVES" else []
        verdicts[found] += 1
        place = f"{mutant.file}:{mutant.line} {mutant.operator}"
        text = f"{number}/{len(sample)}, {len(survivors)} survive; {found} in {time.monotonic() - began:.1f} s: {place}"
        print(text, *(changed_lines(mutant) if found != "noticed" else ()), sep="\n    ", flush=True)
    return survivors, verdicts


if __name__ == "__main__":
    main()
