"""Rows that are not as they should be: every kind has a name, which is a flag's, and a rule."""

from typing import NamedTuple


class Rule(NamedTuple):
    """What may become of rows of one kind: the flag of the same name takes one of `choices`, the first by default."""

    choices: tuple[str, ...]
    kind: str  # the rows that it is about; the flag's help begins with it
    drops: str  # of a count: what was left out, and why


RULES = {
    "too_long": Rule(
        ("cut", "drop", "error"),
        "Rows longer than --max_length (cut shortens responses at their end, and drops rows whose prompt leaves no room)",
        "rows dropped as too long",
    ),
    "empty": Rule(("error", "drop"), "Rows with an empty response", "rows dropped because a response is empty"),
    "malformed": Rule(
        ("error", "drop"),
        "Rows that lack a column, or whose label, messages or text are not what they should be",
        "rows dropped as malformed",
    ),
    "no_boundary": Rule(
        ("drop", "error"),
        "Rows in which it is not certain where the response, or what counts of it, begins",
        "rows dropped because it is not certain where their response begins",
    ),
    "several_turns": Rule(
        ("error", "drop"),
        "Rows whose responses go on over several turns (--train_on all_assistant takes them)",
        "rows dropped because their responses go on over several turns",
    ),
    "template_refuses": Rule(
        ("error", "drop"), "Rows that the chat template refuses", "rows dropped because the chat template refuses them"
    ),
    "not_rendered": Rule(
        ("error", "drop"),
        "Rows with a message that the chat template leaves out",
        "rows dropped because the chat template leaves out a message",
    ),
    "already_rendered": Rule(
        ("error", "as_is", "text", "drop"),
        "Rows whose prompt is text that has been through a chat template (as_is uses it as it stands, text puts the template "
        "around it once more)",
        "rows dropped because their prompt has been through a chat template",
    ),
    "duplicates": Rule(("keep", "drop", "error"), "Exact duplicates of a row before", "exact duplicates of a row before"),
}
