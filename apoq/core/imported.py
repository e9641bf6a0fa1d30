"""Functions that another process finds by importing their modules."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apoq.errors import InvalidProcessor, glimpse

MAIN = "__main__"


def importable_name(module: str) -> str:
    """Return the name by which other programs import a module: that of the main module isn't ``__main__``."""
    if module != MAIN:
        return module
    main = sys.modules[MAIN]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return spec.name if spec else Path(file).stem if file else module


@dataclass(frozen=True, slots=True)
class Importable:
    """A function, and the path by which another process imports it."""

    what: str
    """How a message names it."""
    function: Callable[..., Any]
    path: str
    """Such as ``myapp.tasks:send``."""

    def check(self) -> None:
        """Raise `InvalidProcessor` if the path doesn't lead to the function."""
        module, _, name = self.path.partition(":")
        if self.function.__module__ == MAIN:
            self._check_main(module)
            module = MAIN
        try:
            found = _find(module, name)
        except (ImportError, AttributeError) as error:
            raise InvalidProcessor(
                f"{self.what} must be importable in another process as {self.path}, which fails: {error}"
            ) from error
        # A decorator may have replaced the function by a typed task.
        if found is not self.function and getattr(found, "function", None) is not self.function:
            raise InvalidProcessor(
                f"{self.what} must be importable in another process as {self.path}, got {glimpse(found)} "
                "there: give each function a name of its own"
            )

    def _check_main(self, module: str) -> None:
        file = Path(sys.modules[MAIN].__file__ or "")
        spec = find_spec(module)
        if spec is None or spec.origin is None or not file.samefile(spec.origin):
            raise InvalidProcessor(
                f"{self.what} must be importable in another process as {self.path}, but {module!r} is not "
                f"{file}: move the function to a module with another name"
            )
        if "__name__" not in file.read_text(encoding="utf-8", errors="replace"):
            raise InvalidProcessor(
                f"{self.what} is in the main program, which other processes import to find it: put the code "
                f'that must not run there, such as `worker.run()`, under `if __name__ == "__main__":`: {file}'
            )


def importable(function: Any, what: str) -> Importable:
    """Return the path of a function; `InvalidProcessor` if another process can't import it."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    reason = ""
    if not (callable(function) and module and name):
        reason = "which has no name that can be imported"
    elif inspect.ismethod(function):
        reason = "which is a method of an object"
    elif "<lambda>" in name:
        reason = "which is a lambda"
    elif "<locals>" in name:
        reason = "which is defined in another function"
    elif importable_name(module) == MAIN:
        reason = "which is in a program without a file"
    if reason:
        raise InvalidProcessor(
            f"{what} must be a function at the top level of a module, because another process imports it, "
            f"got {glimpse(function)}, {reason}: define it with `def` in a module"
        )
    return Importable(what, function, f"{importable_name(module)}:{name}")


def imported(path: str) -> Any:
    """Import a module, and return the object in it, as `Importable.path` names them."""
    module, _, name = path.partition(":")
    return _find(module, name)


def _find(module: str, name: str) -> Any:
    return reduce(getattr, name.split("."), import_module(module))
