"""What a run leaves behind: a table on the screen, metrics.json, metrics.png, report.html, and the model card README.md."""

from bnf_train.report.examples import TokenExample, examples
from bnf_train.report.right import right_table
from bnf_train.report.write import table, write

__all__ = ["TokenExample", "examples", "right_table", "table", "write"]
