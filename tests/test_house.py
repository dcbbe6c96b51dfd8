"""The house rules that a machine can hold: floors, cycles, hidden imports, banned words, names, the README's map."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {
        "printable",
        "errors",
        "events",
        "shapes",
        "modalities",
        "model_spec",
        "moments",
        "randomness",
        "durable",
        "digests",
        "lock",
        "signals",
        "tensor_files",
        "host_memory",
    },
    {"cards", "recipe", "specs", "specs_ltx2", "specs_ltx_video"},
    {"plan", "suites", "media", "hardware", "distributed"},
    {"models", "lora", "quant", "flow_matching", "dataset"},
    {
        "checkpoint",
        "optim",
        "memory",
        "run_directory",
        "estimates",
        "plan_notes",
        "kernel_choices",
        "exactness",
        "precision",
        "fit",
    },
    {"trainer", "validation", "planner", "ui", "trackers"},
    {
        "run",
        "session",
        "facts",
        "assumed",
        "doctor",
        "device_full",
        "ways_out",
        "dry_run",
        "kernel_calls",
        "kernel_listing",
        "benchmark",
        "benchmarks",
    },
    {"cli", "__main__"},
]
# Neighbours on one floor that may use each other, in this direction only.
BESIDE = {
    ("errors", "printable"),
    ("durable", "errors"),
    ("digests", "durable"),
    ("lock", "durable"),
    ("lock", "errors"),
    ("recipe", "specs"),
    ("specs", "specs_ltx_video"),
    ("specs", "specs_ltx2"),
    ("specs_ltx2", "specs_ltx_video"),
    ("dataset", "models"),
    ("models", "lora"),
    ("models", "quant"),
    ("lora", "quant"),
    ("run_directory", "checkpoint"),
    ("exactness", "kernel_choices"),
    ("fit", "memory"),
    ("plan_notes", "memory"),
    ("planner", "validation"),
    ("ui", "trackers"),
    ("run", "facts"),
    ("run", "assumed"),
    ("assumed", "facts"),
    ("doctor", "assumed"),
    ("doctor", "facts"),
    ("dry_run", "device_full"),
    ("session", "dry_run"),
    ("run", "device_full"),
    ("run", "ways_out"),
    ("run", "kernel_calls"),
    ("kernel_calls", "session"),
    ("run", "session"),
    ("benchmark", "benchmarks"),
    ("benchmarks", "session"),
    ("__main__", "cli"),
}
# Where an import may hide in a function: `module: imported`. importlib.import_module counts.
HIDDEN = {"benchmark: importlib", "benchmarks.step_peers: importlib", "cli: importlib", "optim: importlib"}
FILES = sorted(path for path in (ROOT / "ltxforge").rglob("*.py"))
# Below every floor: it imports torch, triton and itself.
KERNEL_FILES = sorted((ROOT / "kernels").rglob("*.py"))


def module_name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def part(module: str) -> str:
    """`ltxforge.media.probe` → `media`."""
    return ([*module.split("."), ""])[1]


def imports(path: Path, *, typing_too: bool = False) -> Iterator[tuple[str, ast.AST, bool]]:
    """(module, node, inside a function) of every import of ours; TYPE_CHECKING blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_too:
            skipped |= {id(inner) for child in node.body for inner in ast.walk(child)}
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node, id(node) in inside
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            known = {module_name(file) for file in FILES}
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in known else node.module), node, id(node) in inside


def test_every_module_has_a_floor():
    known = set().union(*FLOORS)
    assert {part(module_name(path)) for path in FILES} - {""} <= known


def test_imports_point_down():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path in FILES:
        here = part(module_name(path))
        for module, node, _ in imports(path):
            there = part(module)
            if not module.startswith("ltxforge.") or there not in floor or here in ("", there):
                continue
            level = floor[there] - floor[here]
            if level > 0 or (level == 0 and (here, there) not in BESIDE):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_cycles():
    graph = {module_name(p): {m for m, _, _ in imports(p) if m.startswith("ltxforge.")} for p in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for following in graph.get(module, ()):
                if following != module:
                    visit(following, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_import_hides_in_a_function():
    found = set()
    for path in FILES:
        name = module_name(path).removeprefix("ltxforge.")
        found |= {f"{name}: {module}" for module, _, inside in imports(path) if inside}
        if "importlib.import_module" in path.read_text(encoding="utf-8"):
            found.add(f"{name}: importlib")
    assert found <= HIDDEN, found - HIDDEN


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "ltxforge_kernels", *sys.stdlib_module_names}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {module}{' inside a function' if inside else ''}"
        for path in KERNEL_FILES
        for module, node, inside in imports(path)
        if module.split(".")[0] not in allowed or inside
    ]
    assert not wrong, "\n".join(wrong)


def test_the_choice_of_kernels_is_pure():
    """Plans are made without torch, and the choice is part of a plan."""
    code = "import sys; sys.path.insert(0, 'kernels'); import ltxforge_kernels.choice; print('torch' in sys.modules)"
    assert python(code).stdout.strip() == "False"


BANNED_CALLS = {"eval", "exec", "torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dump", "os.system"}
BANNED_MODULES = {"pickle", "cPickle", "yaml", "dill", "joblib", "kernels"}


def test_banned_constructs():
    wrong = []
    for path in FILES + KERNEL_FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in BANNED_CALLS:
                wrong.append(f"{where} {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code"):
                wrong.append(f"{where} {node.arg}=")
        wrong += [f"{path.name} imports {m}" for m, _, _ in imports(path) if m.split(".")[0] in BANNED_MODULES]
    assert not wrong, "\n".join(wrong)


def test_only_durable_renames_and_deletes():
    wrong = []
    for path in FILES + KERNEL_FILES:
        if path.name == "durable.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                one = len(node.args) == 1 and not node.keywords  # Path.replace takes one argument, str.replace two
                renames = node.func.attr in ("rename", "renames") or call in ("os.replace", "shutil.move")
                renames = renames or (node.func.attr == "replace" and one)
                deletes = node.func.attr in ("rmdir", "rmtree", "removedirs", "unlink") or call == "os.remove"
                if renames or deletes:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {call}")
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is():
    modules = [path for path in FILES if path.name != "__init__.py"] + KERNEL_FILES
    assert not [path.name for path in modules if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("name", ["utils", "util", "common", "helpers", "misc", "manager", "handler", "base"])
def test_no_file_hides_an_idea_behind_a_vague_name(name):
    assert not [path for path in FILES + KERNEL_FILES if path.stem == name or path.parent.name == name]


def test_the_loop_is_one_screen():
    tree = ast.parse((ROOT / "ltxforge" / "trainer.py").read_text(encoding="utf-8"))
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno - loop.lineno + 1 <= 50


def test_the_readme_s_file_map_is_true():
    spec = spec_from_file_location("file_map", ROOT / "tests" / "file_map.py")
    generator = module_from_spec(spec)
    spec.loader.exec_module(generator)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.endswith(generator.file_map()), "run: python tests/file_map.py"


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, encoding="utf-8"
    )


CHECK = """
import sys
from ltxforge.cli import app
app(["check", "recipes/ltx-video-lora.toml"], standalone_mode=False)
heavy = {"torch", "diffusers", "transformers", "peft", "av", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""


def test_check_never_imports_torch():
    result = python(CHECK)
    assert result.returncode == 0, result.stderr
    assert "correct" in result.stdout


SUITE_MISTAKE = """
import sys
from ltxforge.cli import app
from ltxforge.errors import RecipeError
try:
    app(["bench", SUITE], standalone_mode=False)
except RecipeError as error:
    print(error)
heavy = {"torch", "diffusers", "transformers", "peft", "av", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_suite_s_mistakes_are_told_without_torch(tmp_path):
    suite = tmp_path / "wrong.toml"
    suite.write_text('suite = "step"\n[[case]]\nname = "a"\nmodel = "tiny/ltx2"\n', encoding="utf-8")
    result = python(SUITE_MISTAKE.replace("SUITE", repr(suite.as_posix())))
    assert result.returncode == 0, result.stderr
    assert "`size` is missing in [[case]]" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [["check", "recipes/quickstart.toml"], ["--help"], ["schema"], ["bench", "--help"], ["kernels", "--help"]],
)
def test_light_verbs_answer_at_once(arguments):
    """Well under half a second on an idle machine; the best of three here, where other tests share the cores."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        command = [sys.executable, "-m", "ltxforge", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
        times.append(time.perf_counter() - began)
        assert result.returncode == 0, result.stderr
    assert min(times) < 1.0, times


def test_the_kernels_folder_never_shadows_hugging_face_s_package():
    """That import name belongs to Hugging Face's `kernels`, which diffusers and transformers probe."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "kernels").glob("*.py"))
    assert not (ROOT / "tests" / "kernels" / "__init__.py").exists()
    code = f"""
import importlib.metadata
import importlib.util
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None or not spec.origin.startswith({str(ROOT)!r}), spec
installed = "kernels" in importlib.metadata.packages_distributions()
import diffusers.utils
import transformers.utils
for library in (diffusers, transformers):
    assert installed or not library.utils.is_kernels_available(), library
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline, LTXPipeline
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_the_wheel_holds_both_packages_and_no_third():
    """What setuptools finds by pyproject.toml's own words, editable and in the wheel."""
    setuptools = pytest.importorskip("setuptools")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    find = project["tool"]["setuptools"]["packages"]["find"]
    assert find["namespaces"] is False
    found = {
        name for where in find["where"] for name in setuptools.find_packages(ROOT / where, include=find["include"])
    }
    ours = {module_name(path) for path in FILES if path.name == "__init__.py"}
    kernels = {module_name(path).removeprefix("kernels.") for path in KERNEL_FILES if path.name == "__init__.py"}
    assert found == ours | kernels
    assert {"ltxforge", "ltxforge_kernels"} <= found
