"""What holds for the repository as a whole: who imports whom, and what no file may name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("videor1", "videor1_kernels")
FOLDERS = (*PACKAGES, "tests", "csrc", "benchmarks", "examples", ".ci", "docs")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".sh", ".h", ".cpp", ".cu", ".cfg", ""}

# The folders and single modules of videor1, and the other folders with Python, bottom to top: a file may import from
# its own folder and from what stands on the lines above, and from nothing else.
LAYERS = (
    ("videor1_kernels",),
    ("types", "errors", "seeding", "answer", "placeholders", "atomic", "side_by_side"),
    ("config", "logs"),
    ("remote",),
    ("video", "rewards"),
    ("data", "model", "doctor", "report"),
    ("rollout",),
    ("evaluation",),
    ("training",),
    ("demo", "sft"),
    ("plan",),
    ("evaluate", "train", "cli"),
    ("benchmarks", "docs", "examples"),
    ("tests",),
)


@dataclass(frozen=True)
class Import:
    """A name or a module that a file imports, at its top or inside a function."""

    file: str
    line: int
    target: str  # the file it comes from
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name} of {self.target}"


def modules(root: Path) -> dict[str, str]:
    """The files with Python of the folders in LAYERS, by the name that they are imported by."""
    found = {}
    for folder in ("videor1", *{room for layer in LAYERS for room in layer}):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[parts[-1] if folder in ("docs", "examples", "tests") else dotted] = str(path.relative_to(root))
    return found


def own_imports(known: Mapping[str, str], root: Path) -> Iterator[Import]:
    """Every import of one file of the repository by another."""
    for file in known.values():
        for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in known:
                        yield Import(file, node.lineno, known[alias.name], alias.name.rpartition(".")[2])
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    target = known.get(f"{node.module}.{alias.name}", known.get(node.module or ""))
                    if target is not None:
                        yield Import(file, node.lineno, target, alias.name)


def room(file: str) -> str:
    """The folder or single module of LAYERS that a file is of."""
    top, *rest = Path(file).with_suffix("").parts
    return rest[0] if top == "videor1" and rest else top


def wrong_imports(root: Path) -> list[str]:
    """What breaks the order of LAYERS: imports of a higher folder or of one beside, of a private name of another
    folder, and circles of files."""
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    found = list(own_imports(modules(root), root))
    wrong = []
    for one in found:
        above, below = room(one.file), room(one.target)
        if above != below and not level.get(below, len(LAYERS)) < level.get(above, -1):
            wrong.append(f"{one}: in LAYERS, {below} does not stand below {above}")
        private = one.name.startswith("_") and not one.name.startswith("__")
        if private and above != "tests" and Path(one.file).parent != Path(one.target).parent:
            wrong.append(f"{one}: a private name of another folder")
    return wrong + list(circles(found))


def circles(imports: list[Import]) -> Iterator[str]:
    """Each circle of files that import each other, once."""
    following: dict[str, list[Import]] = {}
    for one in imports:
        following.setdefault(one.file, []).append(one)
    done: set[str] = set()

    def visit(file: str, way: list[Import]) -> Iterator[str]:
        start = next((i for i, step in enumerate(way) if step.file == file), None)
        if start is not None:
            yield "a circle: " + ", ".join(map(str, way[start:]))
        elif file not in done:
            for step in following.get(file, []):
                yield from visit(step.target, [*way, step])
            done.add(file)

    for file in following:
        yield from visit(file, [])


def imports(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def texts() -> list[Path]:
    """Every text file of the repository, made by a run or a build left out."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    made = {"__pycache__", "build", "runs"}
    return sorted(p for p in found if p.suffix in TEXT and not made & set(p.parts) and p.name != ".git")


def test_imports_run_down() -> None:
    assert modules(ROOT)["videor1.train"] == "videor1/train.py"
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("importer", "text", "target", "why"),
    [
        ("videor1/video/a.py", "from videor1.training.b import x\n", "videor1/training/b.py", "does not stand below"),
        ("videor1/data/a.py", "\ndef f():\n    import videor1.model.b\n", "videor1/model/b.py", "does not stand below"),
        ("videor1/types.py", "if x:\n    from videor1 import errors\n", "videor1/errors.py", "does not stand below"),
        ("videor1/unheard_of/a.py", "from videor1.types import x\n", "videor1/types.py", "does not stand below"),
        ("videor1_kernels/a.py", "from videor1.seeding import x\n", "videor1/seeding.py", "does not stand below"),
        ("videor1/train.py", "def f():\n    import tiny\n", "tests/tiny.py", "does not stand below"),
        ("videor1/plan/a.py", "from videor1.training.b import _x\n", "videor1/training/b.py", "private"),
        ("videor1/plan/a.py", "from videor1.training import _b\n", "videor1/training/_b.py", "private"),
    ],
    ids=["higher", "beside, in a function", "beside", "no layer", "by the kernels", "of the tests", "name", "module"],
)
def test_a_wrong_import_is_found(tmp_path: Path, importer: str, text: str, target: str, why: str) -> None:
    write(tmp_path, {target: "x = _x = 1\n", importer: text})
    (found,) = wrong_imports(tmp_path)
    assert found.startswith(f"{importer}:{text.rstrip().count(chr(10)) + 1} imports ")
    assert f" of {target}: " in found
    assert why in found


def test_a_circle_is_found(tmp_path: Path) -> None:
    c = "import typing\n\nif typing.TYPE_CHECKING:\n    from videor1.video import a\n"
    texts = {"a": "from videor1.video.b import f\n", "b": "\n\ndef f():\n    from videor1.video.c import g\n", "c": c}
    texts |= {"d": "from videor1.video import a, b, c\n"}
    write(tmp_path, {f"videor1/video/{name}.py": text for name, text in texts.items()})
    assert wrong_imports(tmp_path) == [
        "a circle: videor1/video/a.py:1 imports f of videor1/video/b.py, videor1/video/b.py:4 imports g of "
        "videor1/video/c.py, videor1/video/c.py:4 imports a of videor1/video/a.py"
    ]
    write(tmp_path, {"videor1/video/c.py": ""})
    assert wrong_imports(tmp_path) == []


def write(root: Path, texts: Mapping[str, str]) -> None:
    for file, text in texts.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)


def test_tests_mirror_the_package() -> None:
    """Every folder of tests/ has the name of a folder of videor1/, but for those of other things."""
    others = ("kernels", "benchmarks", "fuzz", "faults")
    folders = {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("*.py")} - {Path()}
    strange = [path for path in folders if path.parts[0] not in others and not (ROOT / "videor1" / path).is_dir()]
    assert strange == []


def test_kernels_import_torch_and_triton_only() -> None:
    hosts = {"transformers"}  # of the integrations
    optional = {"fla"}  # of the backend of that name, inside its functions
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "videor1_kernels"}
    for path in (ROOT / "videor1_kernels").rglob("*.py"):
        extra = imports(path) - allowed - (hosts if path.parent.name == "integrations" else set())
        extra -= optional & {path.stem}
        assert not extra, (path, extra)


@pytest.mark.parametrize(
    ("names", "unwanted"),
    [
        # Imports videor1_kernels itself too.
        ("videor1_kernels.integrations.transformers", ("transformers", "triton", "av", "videor1")),
        ("videor1.config", ("transformers", "torch")),
        ("videor1.doctor.__main__", ("torch", "transformers", "av", "numpy", "triton", "psutil", "packaging")),
        ("videor1.data.prefetch, videor1.video.media", ("transformers", "peft")),  # what a decode worker loads
    ],
)
def test_an_import_stays_light(names: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {names}; print([n for n in {unwanted!r} if n in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_records_and_options_import_no_stage() -> None:
    for name in ("types", "config/options", "config/ranges", "errors", "seeding", "atomic"):
        tree = ast.parse((ROOT / "videor1" / f"{name}.py").read_text())
        stages = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "videor1" in (n.module or "")}
        known = {"videor1.errors", "videor1.config.ranges", "videor1_kernels.frames_to_patches"}  # planes
        assert stages <= known, (name, stages)


def untrusting(path: Path) -> Iterator[str]:
    """Calls that read a model, a tokenizer or the like, and do not say that code in its folder must not run."""
    calls = (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call))
    for node in calls:
        words = {word.arg: word.value for word in node.keywords}
        trust = words.get("trust_remote_code")
        if trust is None and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
            yield f"{path.name}:{node.lineno}: from_pretrained without trust_remote_code=False"
        if trust is not None and not (isinstance(trust, ast.Constant) and trust.value is False):
            yield f"{path.name}:{node.lineno}: trust_remote_code that is not False"


def test_code_of_a_model_folder_is_never_trusted(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    for line in ("X.from_pretrained(p)", "X.from_pretrained(p, trust_remote_code=y)", "f(trust_remote_code=True)"):
        file.write_text(line)
        assert list(untrusting(file)), line
    file.write_text("X.from_pretrained(p, trust_remote_code=False)")
    assert list(untrusting(file)) == []
    own = [path for folder in (*PACKAGES, "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert [found for path in own for found in untrusting(path)] == []


def test_no_file_reads_a_pickle_of_tensors() -> None:
    """torch.load, numpy's object arrays, joblib: what is read from a file is safetensors, JSON, YAML or media."""
    reads = re.compile(r"\btorch\.load\(|\ballow_pickle=True|\bjoblib\b|\bpickle\.load\(|\bdill\b|\bload_state_dict\(")
    assert reads.search("torch." + "load(x)")
    for folder in PACKAGES:
        for path in (ROOT / folder).rglob("*.py"):
            assert not reads.search(path.read_text(encoding="utf-8")), path


def test_no_file_installs_the_project_from_an_index() -> None:
    """Its name there is not ours: extras are added in the clone, ``errors.install``."""
    index = re.compile(r"pip install [^\n]*videor1\[")
    assert index.search("pip install 'videor1" + "[server]'") is not None
    assert [str(path.relative_to(ROOT)) for path in texts() if index.search(path.read_text(errors="replace"))] == []


def test_no_file_names_a_local_path_or_a_private_host() -> None:
    folders = "|".join(("work", "tmp", "home", "root", "Users", "mnt"))
    private = re.compile(
        rf"(?<![\w.<*)])/(?:{folders})/\w"
        r"|\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}\b"
        r"|https?://[\w.-]+\.(?:internal|local|corp|lan)\b"
    )
    assert private.search("see /" + "work/x") is not None
    assert private.search("http://" + "build.internal/x") is not None
    found = []
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if match := private.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found
