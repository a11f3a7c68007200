"""A function of the user's own that a flag names: module:function or path/to/file.py:function."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnf_train.errors import UsageError, one_line


def parts(name: str) -> tuple[str, str] | None:
    """Module, or path of a file, and function; None where the name has not this form.

    >>> parts("my_file.py:my_function"), parts("bnf")
    (('my_file.py', 'my_function'), None)
    """
    module, colon, function = name.rpartition(":")
    return (module, function) if colon and module and function else None


def load(flag: str, name: str) -> Callable[..., Any]:
    """The function that `--flag name` means; `name` has the form of `parts`. A file is run anew at each call.

    Raises:
      UsageError: no such file or function, or what the file itself raises.
    """
    found = parts(name)
    assert found is not None
    module_name, function_name = found
    module = _module(flag, name, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        functions = [k for k in own if not k.startswith("_")]
        raise UsageError(
            f"--{flag} {name}: {module_name} has no function {function_name}; it has {', '.join(functions) or 'none'}."
        )
    called: Callable[..., Any] = function
    return called


def _module(flag: str, name: str, module: str) -> Any:
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        path = Path(module)
        if not path.is_file():
            raise UsageError(f"--{flag} {name}: no such file {path}.")
        spec = importlib.util.spec_from_file_location(f"bnf_train_{flag}_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own file raises
        what = f"{type(error).__name__}: {one_line(error, 300)}"
        raise UsageError(f"--{flag} {name}: {module} could not be imported ({what}).") from error
    return loaded
