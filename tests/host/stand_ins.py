"""Stand-ins for torchvision and torchaudio, for the test host only, where the real ones are absent.

ComfyUI imports both at start-up, and a CPU torch has no matching wheel of them on every registry.
Nothing that Braid touches uses them; a stand-in answers any attribute and fails when it is called.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

STOOD_IN = ("torchvision", "torchaudio", "kornia", "spandrel", "spandrel_extra_arches")


class _Anything:
    """Answers any attribute, may be subclassed or used as a decorator, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __mro_entries__(self, bases):
        return (object,)


class _StandInModule(types.ModuleType):
    __version__ = "0.0.0+stand-in"
    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandInModule(spec.name)

    def exec_module(self, module):
        pass

    def __init__(self, names):
        self.names = names


def install() -> list[str]:
    """Stand in for whichever of the packages is not installed; returns their names."""
    missing = [name for name in STOOD_IN if importlib.util.find_spec(name) is None]
    if missing:
        sys.meta_path.append(_Finder(set(missing)))
    return missing
