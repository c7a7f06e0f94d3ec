"""Run-time checks of the annotated shapes and dtypes, for users who ask for them."""

import importlib
import importlib.machinery
import os
import sys
from types import ModuleType
from typing import Any

PACKAGE = "celo2_harness"
VARIABLE = "CELO2_TYPE_CHECKS"
_CHECKER = "beartype.beartype"


def enable_type_checks() -> None:
    """Checks every call of this package against its annotations from now on: types, trees, shapes, dtypes.

    The modules are run again, each in its place, with jaxtyping's import hook and beartype. So call it once, right
    after the import and before anything is built: classes are made anew, and presets registered before are forgotten.
    The environment variable CELO2_TYPE_CHECKS=1 does the same without running anything twice. Calls then take longer
    outside of `jax.jit`; compiled code is the same.

    Raises:
      ImportError: jaxtyping or beartype cannot be imported.

    A wrong argument raises `jaxtyping.TypeCheckError`, which names the function, the argument and what it got.
    """
    if any(getattr(finder, "modules", None) == [PACKAGE] for finder in sys.meta_path):
        return
    hook = _install_hook()
    ours = f"{PACKAGE}."
    # This module stays: it is running.
    old = {name: sys.modules[name] for name in list(sys.modules) if name == PACKAGE or name.startswith(ours)}
    del old[__name__]
    again = _InPlace(hook, old)
    for name in old:
        del sys.modules[name]
    sys.meta_path.insert(0, again)
    try:
        for name in old:
            importlib.import_module(name)
    except BaseException:
        sys.modules.update(old)
        raise
    finally:
        sys.meta_path.remove(again)


def _install_hook() -> Any:
    from jaxtyping import install_import_hook

    return install_import_hook(PACKAGE, _CHECKER).hook


class _InPlace:
    """A finder that loads through another one, into the modules that exist already: references to them stay good."""

    def __init__(self, finder: Any, modules: dict[str, ModuleType]) -> None:
        self.finder = finder
        self.modules_by_name = modules

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.modules_by_name:
            return None
        spec = self.finder.find_spec(name, path, target)
        if spec is not None:
            spec.loader.create_module = lambda spec: self.modules_by_name[spec.name]
        return spec


# The package imports this module before all its others, so that the hook sees them.
if os.environ.get(VARIABLE, "") not in ("", "0"):
    _install_hook()
