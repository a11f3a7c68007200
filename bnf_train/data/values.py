"""(stub, replaced)"""

import ast
import json
from typing import Any


def messages_or_text(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(value)
            except Exception:
                continue
            if (
                isinstance(found, list)
                and found
                and all(
                    isinstance(m, dict) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys()) for m in found
                )
            ):
                return found
    return value


def list_or_text(value: Any) -> Any:
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except Exception:
            return value
        return found if isinstance(found, list) else value
    return value
