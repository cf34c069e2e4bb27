"""Layers, public names and rules of the code base, held by machine."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dist_train
import launch
from tests.commands import REPOSITORY, environment
from tests.patience import PATIENCE_SECONDS

FILES = sorted((REPOSITORY / "dist_train").rglob("*.py")) + sorted((REPOSITORY / "launch").rglob("*.py"))
MODULES = [
    name
    for package in (dist_train, launch)
    for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
# What outside programs and later packages import. A name may move only together with everybody who uses it.
PUBLIC = {
    "dist_train.errors": ["UserError", "TrainingFault"],
    "dist_train.config.schema": ["JobConfig"],
    "dist_train.config.load": ["load_config", "read_config"],
    "dist_train.distributed.world": ["World", "world_from_environment", "process_group"],
    "dist_train.distributed.collectives": ["Collectives"],
    "dist_train.determinism.keyed_random": ["RowRandom", "derive", "permutation"],
    "dist_train.data.dataset": ["load_dataset"],
    "dist_train.data.encoding.encoder": ["Encoder"],
    "dist_train.data.encoding.spec": ["FeatureSpec"],
    "dist_train.data.sources": ["Feed"],
    "dist_train.data.sampler": ["PositionSampler"],
    "dist_train.determinism.batch_norm": ["sync_batch_norm"],
    "dist_train.models.financial_classifier": ["FinancialClassifier"],
    "dist_train.models.registry": ["build_model", "register_model"],
    "dist_train.run.checkpoint.checkpoints": ["Checkpoints"],
    "dist_train.run.checkpoint.state": ["weights_sha256"],
    "dist_train.run.tracking.jsonl_tracker": ["JsonlTracker"],
    "dist_train.training.evaluation": ["evaluate", "probabilities"],
    "dist_train.training.loop": ["Loop"],
    "dist_train.training.step": ["EagerStep", "Step"],
    "dist_train.run.session": ["Session"],
    "dist_train.run.job": ["train"],
    "dist_train.run.scoring.predictor": ["Predictor"],
}


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    found = importlib.import_module(module)
    for name in PUBLIC[module]:
        assert (getattr(found, name).__doc__ or "").strip() or name.isupper(), f"{module}.{name}: no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    assert (importlib.import_module(module).__doc__ or "").strip()


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_no_file_is_too_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


def reads_the_environment(source: str) -> bool:
    """Whether code touches os.environ or os.getenv, under whichever name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name != "PathLike" for a in node.names):
            return True
    return False


def test_only_commands_and_the_lowest_layers_read_the_environment() -> None:
    assert reads_the_environment("import os\nx = os.environ['A']")
    assert reads_the_environment("from os import environ as e")
    package = REPOSITORY / "dist_train"
    allowed = (
        package / "api",
        package / "commands",
        package / "distributed",
        package / "system",
        package / "watchdog",
        package / "accel",
    )
    guilty = [f for f in FILES if reads_the_environment(f.read_text())]
    assert [f for f in guilty if not any(f.is_relative_to(folder) for folder in allowed)] == []


def draws_from_a_global_generator(source: str) -> list[str]:
    """Calls such as torch.rand(...) or np.random.rand(...) that draw from hidden state."""
    hidden = {"rand", "randn", "randint", "normal", "bernoulli", "multinomial", "manual_seed", "shuffle", "seed"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in hidden:
            owner = ast.unparse(node.func.value)
            if owner in ("torch", "random", "np.random", "numpy.random"):
                found.append(ast.unparse(node.func))
    return found


def test_nothing_draws_from_a_global_generator() -> None:
    assert draws_from_a_global_generator("torch.rand(3); torch.manual_seed(0)") == ["torch.rand", "torch.manual_seed"]
    assert {str(f): calls for f in FILES if (calls := draws_from_a_global_generator(f.read_text()))} == {}


WITHOUT_WANDB = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"wandb", "torchmetrics"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib
for name in %r:
    importlib.import_module(name)
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from tests.dist.sessions import BUILTIN, train
trained = train(Collectives(World()), [*BUILTIN, "train.max_steps=2", "model.hidden_dim=8"])
assert len(trained.losses) == 2
print("trained")
"""


def test_imports_and_trains_without_wandb() -> None:
    done = python(WITHOUT_WANDB % (MODULES,))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trained\n"


def test_slow_libraries_wait_until_they_are_needed() -> None:
    """Each of them takes seconds to load: not before the first step, and those of texts never for a table."""
    program = (
        "import sys, dist_train.run.job, dist_train.run.scoring.predictor, dist_train.models.financial_classifier\n"
        "late = 'wandb sklearn matplotlib torchmetrics transformers peft tokenizers huggingface_hub'.split()\n"
        "print([n for n in late if n in sys.modules])"
    )
    done = python(program)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def imported_modules(source: str) -> set[str]:
    """Every module that code imports, whole names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_the_watchdog_is_a_package_of_its_own() -> None:
    """It could be taken into another trainer as it is."""
    for file in (REPOSITORY / "dist_train" / "watchdog").glob("*.py"):
        for module in imported_modules(file.read_text()):
            top = module.split(".")[0]
            own = module.startswith("dist_train.watchdog")
            assert own or top == "torch" or top in sys.stdlib_module_names, f"{file.name} imports {module}"


SOURCES = [f for folder in ("dist_train", "launch", "tests", "benchmarks") for f in (REPOSITORY / folder).rglob("*.py")]


def private_modules_of_torch(source: str) -> set[str]:
    """Modules that code imports from, of those that torch keeps to itself."""
    private = re.compile(r"torch(\.\w+)*\.(_\w+|distributed_c10d)(\.|$)")
    return {module for module in imported_modules(source) if private.match(module)}


def test_nothing_that_torch_exports_is_imported_from_its_private_modules() -> None:
    """torch.distributed exports HashStore, PrefixStore, Store and GradBucket. What torch exports nowhere is listed."""
    assert private_modules_of_torch("from torch._C._distributed_c10d import HashStore")
    assert private_modules_of_torch("from torch.distributed.distributed_c10d import Store")
    assert not private_modules_of_torch("from torch.distributed import Store")
    table = (REPOSITORY / "docs" / "torch-internals.md").read_text()
    used = {module: str(f) for f in SOURCES for module in private_modules_of_torch(f.read_text())}
    assert {module: file for module, file in used.items() if module not in table or "distributed" in module} == {}


# Names that are not torch's alone, or are public and yet lean on what torch does not promise.
INTERNALS = {"_parameters", "_buffers", "_BatchNorm", "register_comm_hook", "gradient_as_bucket_view", "__class__"}


def internals_of_torch(source: str) -> set[str]:
    """Private attributes of torch, and INTERNALS, that code uses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            private = re.match(r"_[^_]", node.attr) and owner.split(".")[0] == "torch"
            if private or (node.attr in INTERNALS and owner != "self"):
                found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg in INTERNALS:
            found.add(node.arg)
    return found


def test_the_internals_of_torch_are_listed_with_the_tests_that_notice() -> None:
    assert internals_of_torch("torch._foreach_zero_(x); a.__class__ = B; f(gradient_as_bucket_view=True)") == {
        "_foreach_zero_", "__class__", "gradient_as_bucket_view",
    }  # fmt: skip
    table = (REPOSITORY / "docs" / "torch-internals.md").read_text()
    product = [f for f in FILES if f.is_relative_to(REPOSITORY / "dist_train")]
    used = {name: str(f) for f in product for name in internals_of_torch(f.read_text())}
    assert {name: file for name, file in used.items() if name not in table} == {}
    tests = "\n".join(f.read_text() for f in (REPOSITORY / "tests").rglob("test_*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", table) if f"def {name}(" not in tests] == []
