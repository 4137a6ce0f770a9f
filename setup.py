"""What pyproject.toml cannot say: how the kernels and their sources get into the package.

Compiling ahead of time needs torch and ninja in the build environment:
``pip install --no-build-isolation .``. Otherwise, or with FUSED_RNN_SKIP_EXT=1, or in an editable
install, whose sources change, the package builds its library at its first use, and the last line
of this program's output says so (pip shows it with -v). With FUSED_RNN_REQUIRE_EXT=1 that is an
error.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # only without build isolation
    raise SystemExit("fused_rnn needs a newer setuptools: pip install 'setuptools>=77'")

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build import build  # noqa: E402

ROOT = Path(__file__).resolve().parent


def load_builder() -> ModuleType:
    """fused_rnn/build by its path: importing fused_rnn would need all that it depends on."""
    path = ROOT / "fused_rnn" / "build" / "__init__.py"
    spec = importlib.util.spec_from_file_location("fused_rnn_build", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()
target = builder.CPU
try:
    builder.settings.check()
except ValueError as error:
    raise SystemExit(f"fused_rnn: {error}") from error


def reason_to_skip() -> str:
    """Why nothing is compiled ahead of time, or nothing if it is."""
    if builder.settings.flag("FUSED_RNN_SKIP_EXT"):
        return "FUSED_RNN_SKIP_EXT is set"
    if os.name != "posix":
        return "there are no native kernels for this system"
    if importlib.util.find_spec("torch") is None:
        return "torch is not in the build environment (pip install --no-build-isolation)"
    return ""


class BuildNative(setuptools.Command):
    """Step of ``build``: puts csrc and, if it can, the compiled library into the package."""

    description = "compile the native library"
    user_options: list = []

    def initialize_options(self) -> None:
        self.build_lib = self.build_temp = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        for option in ("build_lib", "build_temp"):
            self.set_undefined_options("build", (option, option))

    def run(self) -> None:
        if self.editable_mode:
            return
        shutil.rmtree(self._package() / "csrc", ignore_errors=True)  # may hold what is deleted now
        for output, source in self.get_output_mapping().items():
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, output)
        if reason := reason_to_skip():
            if builder.settings.flag("FUSED_RNN_REQUIRE_EXT"):
                raise SystemExit(f"fused_rnn: FUSED_RNN_REQUIRE_EXT is set, but {reason}")
            return
        place = builder.Place(Path(self.build_temp), "native")
        try:
            library = builder.compile_library(target, place, target.ahead_of_time)
        except builder.BuildError as error:
            raise SystemExit(f"fused_rnn: {error}\n  or skip it: FUSED_RNN_SKIP_EXT=1") from error
        for path in (library, library.with_suffix(".json")):
            shutil.copyfile(path, self._package() / path.name)

    def _package(self) -> Path:
        return Path(self.build_lib) / "fused_rnn"

    def get_source_files(self) -> list[str]:
        """Relative paths, which the source distribution takes up."""
        return [path.relative_to(ROOT).as_posix() for path in builder.source_files()]

    def get_output_mapping(self) -> dict[str, str]:
        if self.editable_mode:
            return {}
        return {str(self._package() / source): source for source in self.get_source_files()}

    def get_outputs(self) -> list[str]:
        outputs = list(self.get_output_mapping())
        if outputs and not reason_to_skip():
            library = self._package() / f"{target.ahead_of_time}.so"
            outputs += [str(library), str(library.with_suffix(".json"))]
        return outputs


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """The library has torch's stable ABI, and of Python at most the limited API, which every
        Python has that this package runs on, or else leaves alone."""
        return ("py3", "none", super().get_tag()[2])


class WithLibrary(setuptools.Distribution):
    def has_ext_modules(self) -> bool:
        """Whether the wheel is bound to a platform."""
        return not reason_to_skip()


setuptools.setup(
    version=builder.VERSION,
    packages=[
        "fused_rnn",
        *(f"fused_rnn.{n}" for n in ("build", "compiler", "custom", "ops", "reference")),
    ],
    # Has editable installs put a folder on the path, which type checkers find, and not a program.
    package_dir={"": "."},
    package_data={"fused_rnn": ["py.typed"]},
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
    distclass=WithLibrary,
)

if "bdist_wheel" in sys.argv and (reason := reason_to_skip()):
    print(f"fused_rnn: NO NATIVE LIBRARY IN THIS WHEEL, the first use builds it: {reason}")
