"""All rounds in the order in which they happen; what is there already is not done again."""

from rich.console import Console

from bnf_train.errors import UsageError
from bnf_train.rounds import report
from bnf_train.rounds.files import Folder, write_rows
from bnf_train.rounds.process import alone, run_stage
from bnf_train.rounds.settings import QUESTIONS, Begun, Settings, begin, check_folder, of_round
from bnf_train.rounds.stages import ask_model, sample_round, settle, tidy, train_round


def rounds(settings: Settings) -> None:
    """Runs the stages that are not complete, and writes the report after each round.

    Raises:
      UsageError: the folder was begun with other flags, or what a stage says.
    """
    console = Console(soft_wrap=True, highlight=False)
    output = settings.output
    check_folder(output)
    with alone(output):
        questions = output / QUESTIONS
        begun = begin(settings, questions)
        if Folder(output, settings.rounds + 1).path.exists():
            raise UsageError(f"--rounds {settings.rounds}: {output} has more; pass at least as many as it was begun with.")
        for sentence in begun.left_out:
            console.print(f"  {sentence}", markup=False)
        if begun.again:
            console.print(f"{begun.again:,} prompts of --dataset are in --check_dataset, too: they are trained on and asked.")
        start = Folder(output, 0)
        if not start.right.exists():
            console.rule("right answers before the first round")
            model = settings.config().model
            run_stage("before the first round", output, ask_model, settings, model, start, questions, begun.template_date)
        for number in range(1, settings.rounds + 1):
            _round(settings, Folder(output, number), begun, console)
            if number < settings.rounds:
                report.write(output, settings.rounds, begun.again)
        found = report.write(output, settings.rounds, begun.again)
        console.print(report.table(found))
        console.print(
            f"report.html, rounds.json, rounds.md and rounds.png in {output}; the last model in {_model(settings, number)}"
        )


def _model(settings: Settings, number: int) -> str:
    """What round `number` left; of 0 the model that all begins with."""
    return str(Folder(settings.output, number).model) if number else str(settings.config().model)


def _round(settings: Settings, folder: Folder, begun: Begun, console: Console) -> None:
    number, output = folder.number, settings.output
    name, before = f"round {number} of {settings.rounds}", _model(settings, number - 1)
    if not folder.rows.exists():
        console.rule(f"{name}: sampling")
        if not folder.prompts.exists():
            asked = of_round(begun.prompts, number, settings.prompts_per_round)
            write_rows(folder.prompts, (dict(prompt.columns) for prompt in asked))
        run_stage(f"round {number}, sampling", output, sample_round, settings, before, folder, begun.template_date)
    settle(folder)
    if not folder.trained.exists():
        if one_sided := report.one_sided(folder):
            console.print(one_sided)
        console.rule(f"{name}: training")
        run_stage(f"round {number}, training", output, train_round, settings, before, folder, begun.template_date)
    tidy(folder)
    if not folder.right.exists():
        console.rule(f"{name}: right answers")
        questions = output / QUESTIONS
        run_stage(
            f"round {number}, right answers", output, ask_model, settings, str(folder.model), folder, questions,
            begun.template_date,
        )  # fmt: skip
    if settings.keep == "last" and number > 1:
        for path in Folder(output, number - 1).model.glob("*.safetensors"):
            path.unlink()
